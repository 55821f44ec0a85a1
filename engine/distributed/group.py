"""The group of ranks: one collective a step, which never blocks for longer than it may."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from bitassay.engine.distributed.collectives import Exchange, GlooExchange, NcclExchange, PendingSum
from bitassay.engine.distributed.configuration_check import agree
from bitassay.engine.distributed.heartbeat import BEAT, QUIET_BEATS, SILENCE, Heartbeat
from bitassay.engine.distributed.rendezvous import (
    TIMEOUT,
    Meeting,
    RankError,
    RankInfo,
    RankLost,
    RankTimeout,
    bind,
    check_timeout,
    meet,
    named,
)

# The first steps compile kernels, some ranks more of them than others.
WARM_UP, WARM_UP_FACTOR = 2, 10
_PATIENCE = 10.0  # seconds more for a rank to find out by itself
_LONGEST_PAUSE = 1e-3  # seconds between two looks at a collective
_LIBRARY_GRACE = 60.0  # seconds after which torch ends what this module gave up before
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"

Stuck = Callable[[RankError], None]


class Group:
    """Ranks that step together, over NCCL where each has a GPU, else over gloo.

    A group of one needs no torch.distributed. After a RankError the group is of no more use, and
    so is the process: with NCCL a collective may wait on the GPU for ever, and tearing it down, or
    an orderly end of Python, would wait for it. Tell the error and end with os._exit.
    """

    def __init__(
        self, rank_info: RankInfo, device: torch.device, timeout: float, stuck: Stuck | None = None
    ) -> None:
        check_timeout(timeout)
        self.rank_info, self.device = rank_info, device
        self.rank, self.world_size = rank_info.rank, rank_info.world_size
        self._timeout, self._entered, self._began = timeout, 0, time.monotonic()
        self._stuck, self._lost_since, self._agreements = stuck, self._began, 0
        self._heartbeat: Heartbeat | None = None
        self._meeting: Meeting | None = None
        if self.world_size == 1:
            return
        self._meeting = meeting = meet(rank_info, timeout)
        self._heartbeat = Heartbeat(meeting, self._look)
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world_size):
            # All on one host, whose name gloo would look up, and it need not have an address.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
        nccl = device.type == "cuda"
        if nccl:
            # The sum of a few numbers gains nothing by multicast, which not every machine allows.
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

        def init() -> None:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo",
                store=meeting.store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=timeout * WARM_UP_FACTOR + _LIBRARY_GRACE),
                device_id=device if nccl else None,
            )

        self._bounded(init, "joining the group")
        self._exchange: Exchange = (
            NcclExchange(device, self.world_size + 1) if nccl else GlooExchange()
        )

    @classmethod
    def join(
        cls,
        rank_info: RankInfo,
        *,
        device: str = "cuda",
        timeout: float = TIMEOUT,
        stuck: Stuck | None = None,
    ) -> Group:
        """Meet the other ranks and return the group; a rank's GPU is the one of its local rank.

        device: "cuda" or "cpu". timeout: seconds for joining, and for every collective. stuck:
        called with a RankError, in another thread, when the other ranks are gone for long and this
        one has not come to see it: whatever waits for the whole GPU, as a first launch or the
        capture of a graph may, waits for the collectives under way too. It should end the process;
        None for nothing. Raises ValueError for more ranks than GPUs, which NCCL cannot share,
        RankTimeout naming ranks that do not come, RankError where the store cannot be had.
        """
        return cls(rank_info, bind(rank_info, device), timeout, stuck)

    def note(self, where: str) -> None:
        """Note what this rank is doing, for the other ranks' errors; costs nothing."""
        if self._heartbeat is not None:
            self._heartbeat.note(where)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise RankError, naming ranks and facts, unless every rank calls this with the same.

        facts: text by name, of what decides results. Waits for the others as for a first step.
        """
        if self._meeting is None:
            return
        self._agreements += 1
        number, what = self._agreements, "comparing what is to be run"
        timeout = self._timeout * WARM_UP_FACTOR

        def done() -> bool:
            assert self._meeting is not None
            agree(self._meeting, number, facts, timeout, lambda: self._refuse_lost(what))
            return True

        self._done(done, what)

    def sum(self, step: int, count: int) -> PendingSum:
        """Begin the sum of all ranks' counts after a step; every rank must, in the same step.

        Returns at once, and the device's own work waits for nothing: read the sum a step later.
        """
        self._entered, self._began = self._entered + 1, time.monotonic()
        if self._heartbeat is None:
            return self._pending(step, lambda: True, lambda: [count, step])
        self._heartbeat.enter(self._entered)
        # Every rank adds its step in a place of its own, so that all see who is in another one.
        values = [count, *(step if r == self.rank else 0 for r in range(self.world_size))]
        done, read = self._exchange.start(values)
        return self._pending(step, done, read)

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's value, in the order of ranks, on rank 0; None on the others.

        value: plain data, or tensors on the CPU; it is pickled.
        """
        if self._heartbeat is None:
            return [value]
        self._entered, self._began = self._entered + 1, time.monotonic()
        self._heartbeat.enter(self._entered)
        found: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        self._bounded(lambda: dist.gather_object(value, found), "gathering results")
        return found

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the group when all is done; after an error only tell the others of it."""
        if self._heartbeat is None:
            return
        if error is not None:
            self._heartbeat.fail(error)
            return
        self.sum(-1, 0).result()  # so that none ends, and takes its store along, before the others
        self._heartbeat.leave()
        dist.destroy_process_group()

    def wait(self, number: int, what: str, done: Callable[[], bool]) -> None:
        """Look at something until it is done; raise RankLost or RankTimeout if it will not be."""
        if self._heartbeat is None:
            return
        timeout = self._allowed(number)
        deadline = time.monotonic() + timeout
        pause, look = 0.0, time.monotonic() + BEAT
        while not self._done(done, what):
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause + 1e-5)
            if (now := time.monotonic()) < look:
                continue
            look = now + BEAT / 2
            self._refuse_lost(what)
            # Two beats more: by then a rank that did take part has said so. Where all have, some
            # more tell whether one of them has gone silent since.
            beats = 2 if self._heartbeat.missing(number) else 2 + QUIET_BEATS
            if now > deadline + beats * BEAT:
                raise self._timed_out(number, what, timeout)

    def _pending(
        self, step: int, done: Callable[[], bool], read: Callable[[], list[int]]
    ) -> PendingSum:
        """Return the sum that was begun last."""
        number = self._entered

        def wait(what: str) -> None:
            self.wait(number, what, done)
            if self._heartbeat is not None:
                self._heartbeat.complete(number)

        return PendingSum(self.rank_info.name, number, step, read, wait)

    def _allowed(self, number: int) -> float:
        """Seconds for a collective."""
        return self._timeout * (WARM_UP_FACTOR if 0 < number <= WARM_UP else 1)

    def _look(self) -> None:
        """See whether this rank is stuck; in the heartbeat's thread, which never asks the GPU.

        A rank that is well, and waits in `wait`, has raised the same long before.
        """
        if self._stuck is None or self._heartbeat is None:
            return
        now, number = time.monotonic(), self._entered
        what = f"what follows collective {number}"
        if not (lost := self._heartbeat.lost()):
            self._lost_since = now
        elif now - self._lost_since > _PATIENCE:
            self._stuck(self._lost(what, lost))
        timeout = 2 * self._allowed(number) + _PATIENCE
        if number and now - self._began > timeout and self._heartbeat.missing(number):
            self._stuck(self._timed_out(number, f"collective {number}", timeout))

    def _done(self, done: Callable[[], bool], what: str) -> bool:
        """Whether it is; an error of the transport most likely means that a rank is gone."""
        try:
            return done()
        except RankError:
            raise
        except RuntimeError as error:
            end = time.monotonic() + SILENCE + 2 * BEAT
            while time.monotonic() < end:
                self._refuse_lost(what)
                time.sleep(BEAT / 2)
            raise RankError(f"{self.rank_info.name}, {what}: {error}") from error

    def _refuse_lost(self, what: str) -> None:
        assert self._heartbeat is not None
        if lost := self._heartbeat.lost():
            raise self._lost(what, lost)

    def _lost(self, what: str, lost: dict[int, str]) -> RankLost:
        said = "; ".join(
            f"{f'rank {rank}' if rank >= 0 else 'the store of the ranks'} {why}"
            for rank, why in sorted(lost.items())
        )
        return RankLost(f"{self.rank_info.name} cannot go on with {what}: {said}")

    def _timed_out(self, number: int, what: str, timeout: float) -> RankTimeout:
        assert self._heartbeat is not None
        missing = self._heartbeat.missing(number)
        if not missing and (quiet := self._heartbeat.quiet()):
            where = "; ".join(f"rank {rank} {said}" for rank, said in quiet.items())
            return RankTimeout(
                f"{self.rank_info.name}: {what} was not done after {timeout:g} s, because "
                f"{named(list(quiet))} went silent in it ({where}): see whether it was stopped"
            )
        if not missing:
            return RankTimeout(
                f"{self.rank_info.name}: {what} was not done after {timeout:g} s, although every "
                "rank takes part: the ranks cannot reach each other"
            )
        where = "; ".join(f"rank {rank} {said}" for rank, said in missing.items())
        return RankTimeout(
            f"{self.rank_info.name}: {what} was not done after {timeout:g} s, because "
            f"{named(list(missing))} did not enter it ({where}); a step that takes longer needs a "
            "larger timeout"
        )

    def _bounded(self, action: Callable[[], object], what: str) -> None:
        """Run what may block in a thread, so that this one can give up."""
        errors: list[Exception] = []

        def run() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # a thread begins with the first
                action()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=run, name=what, daemon=True)
        thread.start()

        def done() -> bool:
            if thread.is_alive():
                return False
            if errors:
                raise RuntimeError(str(errors[0])) from errors[0]
            return True

        number = self._entered
        self.wait(number, f"collective {number} ({what})" if number else what, done)
