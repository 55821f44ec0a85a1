"""Decoding steps in CUDA graphs: one for each padded shape, captured when it is first met.

A graph's inputs lie in one buffer that every replay overwrites; all graphs share one pool of
memory, so what a replay leaves is copied before the next. On a CPU there is nothing to capture:
the padded step is called as it is, which shows that padding changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitassay.engine.scheduling.blocks import BLOCK_SIZE
from bitassay.engine.step.device_step import DeviceStep, Outputs
from bitassay.engine.step.inputs import Inputs, Sizes, pack
from bitassay.reference.spec.arch import ARCHES, Arch

_WIDTH = 1024 // BLOCK_SIZE  # blocks of the narrowest table, unless the cache is smaller
_WARM_UPS = 2  # the first compiles; the second runs as the captured one will


def padded(sizes: Sizes, most_tails: int, most_width: int) -> Sizes:
    """Return the shapes of the graph that a decoding step runs in.

    Sequences: the next power of two, at most most_tails. Rows: each sequence's token and K
    drafts. The table's width: 1024 keys times a power of two, at most most_width blocks.
    """
    tails = max(sizes.tails, min(_power_of_two(sizes.tails), most_tails))
    width = min(_WIDTH * _power_of_two(-(-sizes.width // _WIDTH)), most_width)
    rows = tails * (sizes.num_drafts + 1)
    return Sizes(
        rows=rows,
        sequences=tails,
        choosing=rows,
        tails=tails,
        num_drafts=sizes.num_drafts,
        width=width,
        max_query_len=sizes.num_drafts + 1,
        padded=True,
    )


@dataclass(frozen=True)
class _Captured:
    """A graph, the buffer it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    buffer: Tensor
    outputs: Outputs


class CudaGraphs:
    """The padded decoding steps of one runner."""

    def __init__(self, step: DeviceStep, device: torch.device) -> None:
        self._step, self._device = step, device
        self._captured: dict[Sizes, _Captured] = {}
        self._pool: Any = None

    @property
    def shapes(self) -> list[Sizes]:
        """The shapes that were captured so far."""
        return list(self._captured)

    def run(self, sizes: Sizes, packed: Tensor) -> Outputs | None:
        """Run the step whose arrays are packed in bytes on the host; see `DeviceStep`."""
        if self._device.type != "cuda":
            return self._step(Inputs.of(packed, sizes))
        with torch.cuda.device(self._device):
            if sizes not in self._captured:
                self._captured[sizes] = self._capture(sizes)
            captured = self._captured[sizes]
            captured.buffer.copy_(packed, non_blocking=True)
            captured.graph.replay()
            left = captured.outputs
            # The answer goes to the host before the next replay, traces stay.
            return replace(
                left,
                choices=None if left.choices is None else left.choices.clone(),
                draft_fingerprints=None
                if left.draft_fingerprints is None
                else left.draft_fingerprints.clone(),
            )

    def _capture(self, sizes: Sizes) -> _Captured:
        """Run the step on padding alone, which stores nothing, then capture it."""
        nothing = np.empty(sizes.nbytes, dtype=np.uint8)
        pack([], sizes, nothing)
        buffer = torch.from_numpy(nothing).to(self._device)
        inputs = Inputs.of(buffer, sizes)
        aside, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                self._step(inputs)
        current.wait_stream(aside)
        torch.cuda.synchronize(self._device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # NCCL asks about its own events while this captures, from another thread.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._step(inputs)
        if outputs is None:
            raise RuntimeError("expected a step in which a sequence chooses, found none: a defect")
        return _Captured(graph, buffer, outputs)


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def enforce_eager(arch: Arch | None, asked: bool | None, force: bool) -> bool:
    """Return whether every step runs eagerly.

    arch: of the device, None for a CPU. asked: what the user wants, None for the default: eager
    where graphs are not trusted, and on a CPU. force: graphs even there. Raises ValueError, with
    the reason, for graphs that are asked for where they are not trusted, and not forced. On a CPU
    nothing is captured: forced graphs run their padded steps as they are.
    """
    trusted = arch is not None and arch.trusts_cuda_graphs
    if asked is None:
        return not (trusted or force)
    if asked or trusted or force:
        return asked
    known = ", ".join(name for name, record in ARCHES.items() if record.trusts_cuda_graphs)
    expected = (
        f"enforce_eager=False: expected an architecture whose CUDA graphs are trusted ({known})"
    )
    if arch is None:
        raise ValueError(
            f"{expected}, found a CPU, which has no CUDA graphs: leave enforce_eager out"
        )
    raise ValueError(
        f"{expected}, found {arch.name}: there, an engine with compiled graphs has been seen to "
        "give other tokens than eager decoding; leave enforce_eager out, or set force_graphs to "
        "try it"
    )
