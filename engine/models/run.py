"""One run over some sequences: all steps prepared, then run, then read.

The schedule depends on lengths alone, so every step's placement is on the device before the first
runs. Tokens, logits and fingerprints stay there as well: a step reads the ids that earlier steps
wrote, nothing waits, and what the device found is read once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitassay.engine.models.batch import Batch, Placement, Segment, place, upload, upload_all
from bitassay.engine.models.kv_cache import BlockAllocator
from bitassay.engine.models.top_logits import CHOOSING as _CHOOSING
from bitassay.engine.models.top_logits import choices
from bitassay.engine.scheduling.blocks import blocks_for
from bitassay.engine.trace import Trace
from bitassay.kernels.flags import Flag

if TYPE_CHECKING:
    from bitassay.engine.models.causal_lm import CausalLM


@dataclass(frozen=True)
class _Step:
    """A step's rows: their places among the ids of all sequences, and which choose a token.

    places: [T]. choosing: [C], rows of the batch. written: [C], places of the chosen tokens.
    """

    placement: Placement
    places: Tensor
    choosing: Tensor
    written: Tensor


class Run:
    """All steps over some sequences, laid end to end: each its prompt's and its tokens' places."""

    def __init__(
        self,
        model: CausalLM,
        sequences: list[list[int]],
        prompts: list[int],
        steps: list[list[Segment]],
    ) -> None:
        self._model, self._prompts = model, prompts
        self._counts = [len(s) - p for s, p in zip(sequences, prompts, strict=True)]
        self._offsets = [0]
        for sequence in sequences:
            self._offsets.append(self._offsets[-1] + len(sequence))
        ids = torch.tensor([i for sequence in sequences for i in sequence], dtype=torch.int64)
        self._ids = ids.to(model.device)
        # (sequence, token) of every row that chooses, in running order.
        self._chosen = [
            (s.sequence, p - prompts[s.sequence] + 1)
            for step in steps
            for s in step
            for p in self._choosing(s)
        ]
        # Enough for the longest that can be in flight together.
        needs = sorted((blocks_for(len(s)) for s in sequences), reverse=True)
        blocks = sum(needs[: max(map(len, steps), default=0)])
        self._cache = model.new_cache(blocks)
        self._steps = self._prepare(steps, BlockAllocator(blocks))
        rows = (len(model.operations), len(ids))
        self._prints = torch.zeros(rows, dtype=torch.int64, device=model.device)

    def traces(self, *, keep_choices: bool) -> list[Trace]:
        """Run all steps; keep_choices: what a step chooses is what the next ones read."""
        columns: list[tuple[Tensor, ...]] = []
        nans, chosen = Flag(), 0
        for step in self._steps:
            columns += self._run(step, nans, chosen, keep_choices)
            chosen += len(step.choosing)
        return self._collect(columns, nans)

    def _run(
        self, step: _Step, nans: Flag, first_row: int, keep_choices: bool
    ) -> list[tuple[Tensor, ...]]:
        """Run one step without waiting for it; return what its rows choose, as traces have it."""
        rows = {name: row for row, name in enumerate(self._model.operations)}
        prints = self._model.backend.fingerprint_rows

        def observe(name: str, values: Tensor, places: Tensor = step.places) -> None:
            self._prints[rows[name]].index_copy_(0, places, prints(values))

        ids = self._ids.index_select(0, step.places)
        hidden = self._model.forward(Batch.of(step.placement, ids, self._cache), observe)
        columns: list[tuple[Tensor, ...]] = []
        for some in range(0, len(step.choosing), _CHOOSING):
            written = step.written[some : some + _CHOOSING]
            chosen = hidden.index_select(0, step.choosing[some : some + _CHOOSING])
            logits = self._model.logits(chosen)
            observe("lm_head", logits, written - 1)
            columns.append(choices(self._model.backend, logits, nans, first_row + some))
            if keep_choices:
                self._ids.index_copy_(0, written, columns[-1][0].long())
        return columns

    def _choosing(self, segment: Segment) -> range:
        """Return the positions of a segment's rows that choose a token."""
        return range(max(segment.first, self._prompts[segment.sequence] - 1), segment.end)

    def _prepare(self, steps: list[list[Segment]], allocator: BlockAllocator) -> list[_Step]:
        """Return every step on the device; blocks are given back as soon as a sequence ends."""
        placements: list[Placement] = []
        columns: tuple[list[Tensor], ...] = ([], [], [])
        for step in steps:
            placements.append(place(step, [allocator.grow(s.sequence, s.end) for s in step]))
            places: list[int] = []
            choosing: list[int] = []
            written: list[int] = []
            for s in step:
                offset, row = self._offsets[s.sequence], len(places)
                places += range(offset + s.first, offset + s.end)
                choosing += [row + p - s.first for p in self._choosing(s)]
                written += [offset + p + 1 for p in self._choosing(s)]
                if offset + s.end + 1 == self._offsets[s.sequence + 1]:
                    allocator.release(s.sequence)
            for column, values in zip(columns, (places, choosing, written), strict=True):
                column.append(torch.tensor(values, dtype=torch.int64))
        device = self._model.device
        uploaded = [upload_all(column, device) for column in columns]
        return [
            _Step(*fields) for fields in zip(upload(placements, device), *uploaded, strict=True)
        ]

    def _collect(self, columns: list[tuple[Tensor, ...]], nans: Flag) -> list[Trace]:
        """Fold the prompts, wait for the device, and put every sequence's rows together."""
        if not self._prompts:
            return []
        folds = torch.stack([self._fold(s) for s in range(len(self._prompts))]).cpu()
        self._model.check()
        self._refuse_nan(nans)
        prints = self._prints.cpu()
        values = [torch.cat(column).cpu() for column in zip(*columns, strict=True)]
        rows: list[list[int]] = [[] for _ in self._prompts]
        for row, (sequence, _) in enumerate(self._chosen):
            rows[sequence].append(row)
        traces = []
        for s, prompt in enumerate(self._prompts):
            first = self._offsets[s] + prompt - 1
            generated = prints[:, first : first + self._counts[s]].t().contiguous()
            tokens, top_ids, top_bits, margins = (value[rows[s]] for value in values)
            traces.append(Trace(tokens, top_ids, top_bits, margins, generated, folds[s]))
        return traces

    def _fold(self, sequence: int) -> Tensor:  # -> [O]
        """Return each operation's fold over the prompt's rows but the last.

        The lm_head runs only on rows that choose, so over the prompt it folds no rows.
        """
        first = self._offsets[sequence]
        end = first + self._prompts[sequence] - 1
        fold = self._model.backend.fold
        folds = [fold(prints[first:end]) for prints in self._prints[:-1]]
        return torch.stack([*folds, self._prints.new_zeros(())])

    def _refuse_nan(self, nans: Flag) -> None:
        first = nans.take()
        if first is not None:
            prompt, step = self._chosen[first[0]]
            raise ValueError(
                f"prompt {prompt}, step {step}: expected numbers among the logits, found NaN, "
                f"first at id {first[1]}: the weights are too large to be decoded"
            )
