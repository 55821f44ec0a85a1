"""Drafting: the head's first pass over a step's rows, then its chain, all on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.engine.models.batch import Batch, Placement
from bitassay.engine.models.eagle import EagleHead
from bitassay.engine.models.kv_cache import PagedCache
from bitassay.engine.models.ops import Ops
from bitassay.engine.scheduling.blocks import BLOCK_SIZE
from bitassay.engine.step.fingerprints import Recorder, RowFingerprints
from bitassay.engine.step.inputs import Inputs
from bitassay.engine.step.verify import Verified
from bitassay.kernels.flags import Flag

_LINE = 16  # elements


class Drafting:
    """A head with its cache; and, where they are kept, the fingerprints of its first pass.

    The rows of rejected drafts are stored like all others, in slots of positions after the
    accepted ones. Whatever reads these later has written them before: each round's chain, then
    the next round's first pass.
    """

    def __init__(
        self,
        head: EagleHead,
        run: Ops,
        cache: PagedCache,
        row_fingerprints: RowFingerprints | None,
        num_drafts: int,
    ) -> None:
        self._head, self._run, self._cache = head, run, cache
        self._row_fingerprints, self._num_drafts = row_fingerprints, num_drafts
        self._recorder = None
        if row_fingerprints is not None:
            self._recorder = Recorder(run, head.operations, head.device)
        self.nans = Flag()  # its rows: place in the chain * S + sequence

    def draft(
        self, x: Inputs, chosen: Tensor, hidden: Tensor, verified: Verified
    ) -> tuple[Tensor, Tensor | None]:  # [C], [T, F] -> [S, K], [S, K, D]
        """Return K drafts of S sequences, and the fingerprints of the rows that chose them.

        chosen: the choices of the choosing rows. hidden: the target's rows for the head.
        """
        tails, base = len(verified.base), verified.base
        row_fingerprints = self._new_fingerprints(tails)
        rows, state = (part.index_select(0, base) for part in self._first_pass(x, chosen, hidden))
        logits = [self._head.logits(rows)]
        drafts = [self._choose(logits[0], 0)]
        for j, placement in enumerate(self._chain(x, verified), start=1):
            batch = Batch.of(placement, drafts[-1], self._cache)
            places = torch.arange(tails, device=base.device) * self._num_drafts + j
            out = None if row_fingerprints is None else row_fingerprints.flatten(0, 1)
            rows, state = self._pass(batch, state, out, places, chain=True)
            logits.append(self._head.logits(rows))
            drafts.append(self._choose(logits[j], j * tails))
        if (
            self._row_fingerprints is not None
            and self._recorder is not None
            and row_fingerprints is not None
        ):
            self._recorder.join()
            row_fingerprints[:, 0] = self._row_fingerprints[
                x["slots"].index_select(0, base).clamp_min(0)
            ]
            of_logits = [self._run.fingerprint_rows(some) for some in logits]
            row_fingerprints[:, :, -1] = torch.stack(of_logits, dim=1)
        return torch.stack(drafts, dim=1), row_fingerprints

    def follow(self, x: Inputs, hidden: Tensor) -> None:
        """Run the first pass of a step in which no sequence chooses."""
        self._first_pass(x, None, hidden)
        if self._recorder is not None:
            self._recorder.join()

    def _first_pass(
        self, x: Inputs, chosen: Tensor | None, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The id after a row that chooses is its choice. Where a draft was rejected, its row and
        # those after it are used by nothing.
        ids = x["next_ids"]
        if chosen is not None:
            ids = ids.index_copy(0, x["choosing"], chosen)
        out = None if self._row_fingerprints is None else self._row_fingerprints.rows
        return self._pass(x.batch(ids, self._cache), hidden, out, x["slots"], chain=False)

    def _pass(
        self, batch: Batch, hidden: Tensor, out: Tensor | None, slots: Tensor, *, chain: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the head; its rows' fingerprints go to slots of out, if there is one."""
        if self._recorder is None or out is None:
            return self._head.forward(batch, hidden, _nothing, chain=chain)
        rows = self._head.forward(batch, hidden, self._recorder.to(out, slots), chain=chain)
        self._recorder.flush()
        return rows

    def _chain(self, x: Inputs, verified: Verified) -> list[Placement]:
        """Return where the K - 1 rows after the base rows stand, one of each sequence at a time.

        A position after the last that may be fed is that last one, and nothing is stored for it:
        its draft is never used.
        """
        tails, device = len(verified.base), verified.base.device
        ahead = torch.arange(1, self._num_drafts, device=device)[:, None]
        wanted = verified.position + ahead  # [K - 1, S]
        positions, slots = self._lines(tails, torch.int64), self._lines(tails, torch.int64)
        torch.minimum(wanted, x["limit"], out=positions)
        tables = x["tables"].index_select(0, x["sequence"])
        blocks = tables.long().gather(1, (positions // BLOCK_SIZE).t()).t()
        there = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        slots.copy_(torch.where(wanted <= x["limit"], there, -1))
        seq_lens = self._lines(tails, torch.int32).copy_(positions + 1)
        starts = torch.arange(tails + 1, device=device)
        query_start = torch.minimum(starts, x["count"]).int()  # padding has no rows
        return [
            Placement(
                positions=positions[j],
                slots=slots[j],
                query_start=query_start,
                seq_lens=seq_lens[j],
                block_tables=tables,
                max_query_len=1,
                max_seq_len=x.sizes.max_seq_len,
                padded=x.sizes.padded,
            )
            for j in range(self._num_drafts - 1)
        ]

    def _lines(self, tails: int, dtype: torch.dtype) -> Tensor:
        """Return memory for [K - 1, S], each line as aligned as the first, as kernels like it."""
        width = -(-tails // _LINE) * _LINE
        shape = (self._num_drafts - 1, width)
        return torch.empty(shape, dtype=dtype, device=self._head.device)[:, :tails]

    def _choose(self, logits: Tensor, first_row: int) -> Tensor:  # [S, V] -> [S]
        _, ids, _ = self._run.decide(logits, 2, nans=self.nans, first_row=first_row)
        return self._head.token_ids(ids[:, 0])

    def _new_fingerprints(self, tails: int) -> Tensor | None:
        if self._row_fingerprints is None:
            return None
        shape = (tails, self._num_drafts, len(self._row_fingerprints.operations))
        return torch.zeros(shape, dtype=torch.int64, device=self._head.device)


def _nothing(name: str, rows: Tensor) -> None:
    """Observe nothing."""
