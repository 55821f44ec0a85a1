"""What one step does on the device: host data in, one copy of the answer out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitassay.engine.config import EngineConfig
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.eagle import EagleHead
from bitassay.engine.scheduling.blocks import blocks_for
from bitassay.engine.scheduling.step_plan import Result, Rows
from bitassay.engine.step.cuda_graphs import CudaGraphs, enforce_eager, padded
from bitassay.engine.step.device_step import DeviceStep, Outputs
from bitassay.engine.step.drafting import Drafting
from bitassay.engine.step.fingerprints import RowFingerprints
from bitassay.engine.step.inputs import Inputs, Sizes, pack, sizes_of
from bitassay.engine.step.outputs import Collected, StepHandle, collect
from bitassay.engine.step.staging import Staging
from bitassay.reference.spec.arch import get_arch
from bitassay.reference.spec.errors import SequenceError

__all__ = ["Collected", "Result", "Rows", "Runner", "collect"]


class Runner:
    """A model, maybe a draft head, their caches of num_blocks blocks, and what runs a step.

    num_blocks None: the configuration's.
    """

    def __init__(
        self,
        model: CausalLM,
        head: EagleHead | None = None,
        config: EngineConfig | None = None,
        *,
        num_blocks: int | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.num_drafts = config.drafts(head=head is not None)
        longest = blocks_for(model.config.max_position_embeddings)
        num_blocks = config.num_blocks if num_blocks is None else num_blocks
        if num_blocks is None:
            raise ValueError("num_blocks: expected how many blocks the caches have, found None")
        self.model, self.head, self.config, self.num_blocks = model, head, config, num_blocks
        self.device = model.device
        capture = config.capture
        self.row_fingerprints = (
            RowFingerprints.empty(model.operations, num_blocks, self.device) if capture else None
        )
        self.draft_fingerprints: RowFingerprints | None = None
        self.caches = [model.new_cache(num_blocks)]
        drafting = None
        if head is not None and self.num_drafts:
            if capture:
                self.draft_fingerprints = RowFingerprints.empty(
                    head.operations, num_blocks, self.device
                )
            self.caches.append(head.new_cache(num_blocks))
            drafting = Drafting(
                head, model.ops, self.caches[1], self.draft_fingerprints, self.num_drafts
            )
        wanted = head.config.hidden_operations if head is not None and drafting else ()
        self._step = DeviceStep(model, self.caches[0], self.row_fingerprints, drafting, wanted)
        arch = get_arch(model.contract.arch) if self.device.type == "cuda" else None
        self.eager = enforce_eager(arch, config.enforce_eager, config.force_graphs)
        self._graphs = CudaGraphs(self._step, self.device)
        self._most_blocks = min(num_blocks, longest)
        self._staging = Staging(self.device)

    @torch.no_grad()
    def run(self, step: Sequence[Rows]) -> list[Result]:
        """Run a step; return what the sequences that choose got, in their order.

        Waits for the device once, and not at all where none chooses. Raises ValueError naming the
        request and the token for NaN among the logits.
        """
        sizes = sizes_of(step, self.num_drafts)
        graphed = not self.eager and all(
            rows.chooses and len(rows.ids) == 1 + rows.drafts for rows in step
        )
        if graphed:
            sizes = padded(sizes, self.config.max_num_seqs, self._most_blocks)
        packed, array = self._staging.take(sizes.nbytes)
        pack(step, sizes, array)
        if graphed:
            outputs = self._graphs.run(sizes, packed)
            self._staging.sent()
        else:
            buffer = packed.to(self.device, non_blocking=True)
            self._staging.sent()
            outputs = self._step(Inputs.of(buffer, sizes))
        return [] if outputs is None else self._results(step, sizes, outputs)

    def check(self) -> None:
        """Wait for the device; ValueError for an id, position or slot out of range since last."""
        self.model.check()

    def _results(self, step: Sequence[Rows], sizes: Sizes, outputs: Outputs) -> list[Result]:
        answer = self._staging.fetch(outputs.answer)
        choosing = [rows for rows in step if rows.chooses]
        self._refuse_nan(choosing, sizes, answer)
        handle = None
        if outputs.choices is not None:
            handle = StepHandle(outputs.choices, outputs.draft_fingerprints)
        wide, depth = sizes.num_drafts + 1, sizes.num_drafts
        accepted = answer[sizes.tails * wide :]
        drafts = accepted[sizes.tails :]
        return [
            Result(
                request=rows.request,
                tokens=answer[row * wide : row * wide + accepted[row] + 1],
                accepted=accepted[row],
                drafts=drafts[row * depth : (row + 1) * depth],
                handle=handle,
                row=row,
            )
            for row, rows in enumerate(choosing)
        ]

    def _refuse_nan(self, choosing: Sequence[Rows], sizes: Sizes, answer: list[int]) -> None:
        """Raise for the first NaN of a sequence; padding comes after all of them."""
        flags = answer[sizes.tails * (2 * sizes.num_drafts + 2) :]
        row, token = flags[0] >> 32, flags[0] & 0xFFFFFFFF
        for rows in choosing:
            if row < 1 + rows.drafts:
                position = rows.first + len(rows.ids) - rows.drafts + row
                raise SequenceError(
                    f"expected numbers among the logits, found NaN, first at id {token}: the "
                    "weights are too large to be decoded",
                    request=rows.request,
                    position=position,
                )
            row -= 1 + rows.drafts
        accepted = answer[sizes.tails * (sizes.num_drafts + 1) :]
        for flag in flags[1:]:
            ahead, row = divmod(flag >> 32, sizes.tails)
            if row < len(choosing) and ahead < self._usable(choosing[row], accepted[row]):
                raise SequenceError(
                    "expected numbers among the draft head's logits, found NaN, first at id "
                    f"{flag & 0xFFFFFFFF}: its weights are too large to be decoded",
                    request=choosing[row].request,
                    draft=ahead,
                )

    def _usable(self, rows: Rows, accepted: int) -> int:
        """Return how many drafts may follow the last token that the rows chose.

        What a chain says beyond them is never verified, so there it may be NaN.
        """
        last = rows.first + len(rows.ids) - rows.drafts + accepted
        return min(self.num_drafts, rows.limit - last)
