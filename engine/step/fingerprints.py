"""Fingerprints of what a forward pass computes, made on the device beside it.

They lie where the keys and values of the same rows lie, slot by slot: a block that another request
takes over brings along those of the rows whose work it saves, and one that is stale, or was given
back too early, shows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitassay.engine.models.ops import Ops
from bitassay.engine.scheduling.blocks import BLOCK_SIZE

# The norm that closes a layer has the next layer's name; that of the last needs no mark.
_LAYER_ENDS = re.compile(r"layers\.\d+\.input_layernorm")


@dataclass(frozen=True)
class RowFingerprints:
    """int64 [slots, O]: the fingerprints of the row whose keys and values lie in a slot.

    The column of the lm_head, the last, stays zero: only rows that choose have logits, and theirs
    are among a step's outputs.
    """

    rows: Tensor
    operations: tuple[str, ...]

    @classmethod
    def empty(cls, operations: Sequence[str], blocks: int, device: torch.device) -> RowFingerprints:
        """Return the prints of a cache of so many blocks."""
        shape = (blocks * BLOCK_SIZE, len(operations))
        return cls(torch.zeros(shape, dtype=torch.int64, device=device), tuple(operations))

    def __getitem__(self, slots: Tensor) -> Tensor:  # [N] -> [N, O]
        """Return the prints of slots, from the device's memory into other memory of it."""
        return self.rows.index_select(0, slots)


_BESIDE = 256  # rows up to which they are made beside the layers (measured on an H100)


class Recorder:
    """An `Observe` that writes fingerprints of rows into a table: a launch for each layer.

    A launch takes what came since the last, cut so that all layers look alike to the compiler; what
    is left goes with `flush`.

    On a GPU those of few rows are made on a stream of their own, beside the next layer's products;
    `join` waits for them, on the device. Forked and joined like that, it may be captured in a
    graph. Products of many rows leave no room beside them, so these wait for their turn.
    """

    def __init__(self, run: Ops, operations: Sequence[str], device: torch.device) -> None:
        self._run = run
        self._ends = {name for name in operations if _LAYER_ENDS.fullmatch(name)}
        self._columns = {name: column for column, name in enumerate(operations)}
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._rows: list[Tensor] = []
        self._into: list[int] = []
        # What the side stream may still be reading, and the event after which it does not.
        self._busy: tuple[torch.cuda.Event, list[Tensor], Tensor] | None = None
        self._out = self._slots = torch.empty(0)

    def to(self, out: Tensor, slots: Tensor) -> Recorder:
        """Begin a pass whose row r goes to row slots[r] of out [slots, O]; -1 is dropped."""
        self.flush()
        self._out, self._slots = out, slots
        return self

    def __call__(self, name: str, rows: Tensor) -> None:
        """Note an operation's rows [R, *]; nothing may overwrite them before `join`."""
        self._rows.append(rows)
        self._into.append(self._columns[name])
        if name in self._ends:
            self.flush()

    def join(self) -> None:
        """Let the current stream wait for all that was noted."""
        self.flush()
        self._release()

    def flush(self) -> None:
        """Launch what was noted, so that it runs beside whatever comes next."""
        if not self._rows:
            return
        rows, into, self._rows, self._into = self._rows, self._into, [], []
        if self._side is None or len(rows[0]) > _BESIDE:
            self._run.fingerprint_into(rows, self._out, into, self._slots)
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            self._run.fingerprint_into(rows, self._out, into, self._slots)
            done = self._side.record_event()
        self._release()
        self._busy = (done, rows, self._slots)

    def _release(self) -> None:
        """Let the current stream wait for the launch before the last; then its rows may go."""
        if self._busy is not None and self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_event(self._busy[0])
            self._busy = None
