"""What a request leaves on the device while it runs, and the trace that is made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitassay.engine.models.kv_cache import slots_of
from bitassay.engine.scheduling.request import Output, Request
from bitassay.engine.scheduling.step_plan import Result
from bitassay.engine.step.fingerprints import RowFingerprints
from bitassay.engine.step.outputs import Collected, collect
from bitassay.engine.trace import EngineDrafts, EngineTrace

Fold = Callable[[Tensor], Tensor]  # [R] -> []


@dataclass(eq=False)
class Record:
    """A request with the results of its steps.

    inbox: where its outputs lie until whoever reads them does; others' may lie there too.
    row_fingerprints, draft_fingerprints: once it has ended, the fingerprints of its rows at
    positions 0 … P + T - 2, int64 [P + T - 1, O] and [P + T - 1, D]; None where none are kept.
    """

    request: Request
    inbox: list[Output] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    row_fingerprints: Tensor | None = None
    draft_fingerprints: Tensor | None = None

    def gather(
        self, row_fingerprints: RowFingerprints | None, draft_fingerprints: RowFingerprints | None
    ) -> None:
        """Copy the rows' fingerprints out of the slots that the request still holds."""
        slots = slots_of(self.request.table, range(self.request.computed))
        self.row_fingerprints = None if row_fingerprints is None else _at(row_fingerprints, slots)
        self.draft_fingerprints = (
            None if draft_fingerprints is None else _at(draft_fingerprints, slots)
        )

    def trace(self, fold: Fold, num_speculative_tokens: int) -> EngineTrace:
        """Return the trace, on the CPU; fold: how fingerprints of rows become one."""
        tokens = self.request.tokens
        collected = collect(self.results)
        rows, prompt = _split(self.row_fingerprints, self.request, fold)
        if collected is None:
            top_ids, top_bits, margins = _none(len(tokens)).int(), _none(len(tokens)), _none()
        else:
            # Behind an eos there may have been more.
            top_ids = collected.top_ids[: len(tokens)].cpu()
            top_bits = collected.top_bits[: len(tokens)].cpu()
            margins = collected.margins[: len(tokens)].cpu()
            rows[:, -1] = collected.lm_head[: len(tokens)].cpu()
        return EngineTrace(
            tokens=torch.tensor(tokens, dtype=torch.int32),
            top_ids=top_ids,
            top_bits=top_bits,
            margins=margins,
            fingerprints=rows,
            prompt_fingerprints=prompt,
            drafts=self._drafts(collected, fold, num_speculative_tokens)
            if num_speculative_tokens
            else None,
        )

    def _drafts(self, collected: Collected | None, fold: Fold, most: int) -> EngineDrafts:
        """Return the drafts of every round: each was drafted by the result before it."""
        rounds = self.request.rounds
        tokens = torch.full((len(rounds), most), -1, dtype=torch.int32)
        for row, (result, (_, drafted, _)) in enumerate(
            zip(self.results[:-1], rounds, strict=True)
        ):
            tokens[row, :drafted] = torch.tensor(result.drafts[:drafted], dtype=torch.int32)
        if collected is None or collected.drafts is None:
            row_fingerprints = torch.zeros(len(rounds), most, 0, dtype=torch.int64)
        else:
            row_fingerprints = collected.drafts[:-1].cpu() * (tokens >= 0)[:, :, None]
        first_pass, prompt = _split(self.draft_fingerprints, self.request, fold)
        return EngineDrafts(rounds, tokens, row_fingerprints, first_pass, prompt)


def _at(row_fingerprints: RowFingerprints, slots: list[int]) -> Tensor:  # -> [N, O]
    """Return the fingerprints of slots, in memory of their own, without waiting for the device."""
    where = torch.tensor(slots, dtype=torch.int64)
    if row_fingerprints.rows.is_cuda:
        where = where.pin_memory().to(row_fingerprints.rows.device, non_blocking=True)
    return row_fingerprints[where]


def _split(row_fingerprints: Tensor | None, request: Request, fold: Fold) -> tuple[Tensor, Tensor]:
    """Return, on the CPU, the rows of generated tokens [T, O] and the fold of those before [O].

    The last operation, the lm_head, runs on none of the rows before: its fold is 0.
    """
    if row_fingerprints is None:
        return _none(request.generated), _none()
    before = row_fingerprints[: request.num_prompt - 1].t().contiguous()
    folds = [fold(column) for column in before[:-1]]
    folded = torch.stack([*folds, row_fingerprints.new_zeros(())])
    return row_fingerprints[request.num_prompt - 1 :].cpu(), folded.cpu()


def _none(*sizes: int) -> Tensor:
    return torch.empty(*sizes, 0, dtype=torch.int64)
