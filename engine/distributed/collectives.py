"""Sums of a few numbers over ranks, begun without waiting and asked for later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from bitassay.engine.distributed.rendezvous import RankError

# Whether the sum is there, which raises what went wrong, and what reads it then.
Sum = tuple[Callable[[], bool], Callable[[], list[int]]]


class Exchange(Protocol):
    """A way to sum the numbers of all ranks."""

    def start(self, values: list[int]) -> Sum:
        """Begin a sum of as many numbers on every rank, without waiting for it."""


class GlooExchange:
    """Sums on the CPUs, by threads of gloo's own."""

    def start(self, values: list[int]) -> Sum:
        """Begin a sum."""
        numbers = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(numbers, async_op=True)

        def done() -> bool:
            if not work.is_completed():
                return False
            work.wait()  # it raises what went wrong
            return True

        return done, numbers.tolist


class NcclExchange:
    """Sums on the GPU, on a stream of its own that no other one waits for.

    So a step is never queued behind a sum that waits for another rank, and the host asks an event
    whether the numbers have been copied back. Two are in flight at most.
    """

    def __init__(self, device: torch.device, numbers: int) -> None:
        """Make room for sums of so many numbers."""
        self._stream = torch.cuda.Stream(device)
        shape = (2, numbers)
        self._device = torch.zeros(shape, dtype=torch.int64, device=device)
        self._given = torch.zeros(shape, dtype=torch.int64, pin_memory=True)
        self._taken = torch.zeros(shape, dtype=torch.int64, pin_memory=True)
        self._events = [torch.cuda.Event() for _ in range(2)]
        self._started = 0
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def start(self, values: list[int]) -> Sum:
        """Begin a sum; the one before the last must have been read."""
        slot = self._started % 2
        self._started += 1
        numbers, taken, event = self._device[slot], self._taken[slot], self._events[slot]
        self._given[slot] = torch.tensor(values, dtype=torch.int64)
        with torch.cuda.stream(self._stream):
            numbers.copy_(self._given[slot], non_blocking=True)
            work = dist.all_reduce(numbers, async_op=True)
            work.wait()  # this stream waits, the host does not
            taken.copy_(numbers, non_blocking=True)
            event.record()
        return event.query, taken.tolist


class PendingSum:
    """A sum that was begun: what it comes to, and whether every rank was in the same step."""

    def __init__(
        self,
        rank_name: str,
        number: int,
        step: int,
        read: Callable[[], list[int]],
        wait: Callable[[str], None],
    ) -> None:
        """Note a sum; number: of the collective. wait: until it is there, given what it is."""
        self._rank_name, self._number, self._step = rank_name, number, step
        self._read, self._wait = read, wait

    def result(self) -> int:
        """Wait for the sum and return it; RankTimeout, RankLost, or RankError for a rank astray."""
        what = f"collective {self._number} (after step {self._step})"
        self._wait(what)
        count, *steps = self._read()
        astray = {rank: step for rank, step in enumerate(steps) if step != self._step}
        if astray:
            where = ", ".join(f"rank {rank} is at step {step}" for rank, step in astray.items())
            raise RankError(
                f"{self._rank_name}, {what}: expected every rank at step {self._step}, but "
                f"{where}: a rank has skipped a collective or entered one too many"
            )
        return count
