"""Heartbeats: each rank tells twice a second how far it is, so that a missing one can be named.

A thread does so, and steps cost nothing. A rank that is killed or stopped goes silent; one that
fails says why.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from bitassay.engine.distributed.rendezvous import Meeting, RankError

BEAT = 0.5  # seconds between two beats
QUIET_BEATS = 3  # without which a rank is no witness that it still takes part
SILENCE = 5.0  # seconds without a beat after which a rank counts as lost
_LAST_BEAT = 2.0  # seconds that the last beat may take before a process ends


@dataclass(frozen=True)
class RankStatus:
    """What a rank last said.

    entered: the number of the last collective that it began, from 1. where: what it is doing.
    failed: the error it ended with, gave_up: the same where other ranks were the cause; "" while
    all is well. left: it has done its part.
    """

    beat: int = 0
    entered: int = 0
    where: str = "joining"
    failed: str = ""
    gave_up: str = ""
    left: bool = False


class Heartbeat:
    """This rank's heartbeat, and what the others' say. `news` is written by the rank itself."""

    def __init__(self, meeting: Meeting, look: Callable[[], None]) -> None:
        """Begin to beat. look: called after every beat, in the heartbeat's thread."""
        self._look = look
        self._place, self._store = meeting.rank_info, meeting.beats
        self._entered, self._complete, self._beats = 0, 0, 0
        self._where, self._failed, self._gave_up, self._left = "joining", "", "", False
        self._seen = [RankStatus() for _ in range(self._place.world_size)]
        self._listened = time.monotonic()
        self._heard = [self._listened] * self._place.world_size
        self._store_error = ""
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, number: int) -> None:
        """Note that this rank begins a collective."""
        self._entered = number

    def complete(self, number: int) -> None:
        """Note that a collective was complete: all have entered it, whatever they said since."""
        self._complete = number

    def note(self, where: str) -> None:
        """Note what this rank is doing: for errors of the others."""
        self._where = where

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error, and beat no more."""
        if isinstance(error, RankError):
            self._gave_up = str(error)
        else:
            self._failed = f"{type(error).__name__}: {error}"
        self._stop()

    def leave(self) -> None:
        """Tell the others that this rank is done, and beat no more."""
        self._left = True
        self._stop()

    def lost(self) -> dict[int, str]:
        """Return the ranks that cannot take part any more, and why; rank -1 is the store.

        Those that gave up because of others are named only where the others are not known here.
        """
        found, gave_up = {}, {}
        for rank in self._others():
            # Up to when this rank listened: while it is busy itself, it hears nobody.
            news, silent = self._seen[rank], self._listened - self._heard[rank]
            if news.failed:
                found[rank] = f"failed: {news.failed}"
            elif news.gave_up:
                gave_up[rank] = f"gave up: {news.gave_up}"
            elif silent > SILENCE and not news.left and not self._store_error:
                found[rank] = f"has not been heard of for {silent:.1f} s ({self._doing(news)})"
        if self._store_error and not found and not gave_up:
            host = f"{self._place.address}:{self._place.port}"
            found[-1] = f"is gone: whoever kept it at {host} has ended ({self._store_error})"
        return found or gave_up

    def missing(self, number: int) -> dict[int, str]:
        """Return the ranks that have not begun a collective, and where they were last seen."""
        now = time.monotonic()
        return {
            rank: f"last heard of {now - self._heard[rank]:.1f} s ago: "
            + self._doing(self._seen[rank])
            for rank in self._others()
            if self._seen[rank].entered < number
        }

    def quiet(self) -> dict[int, str]:
        """Return the ranks that have missed some beats, and where they were last seen."""
        return {
            rank: f"last heard of {silent:.1f} s ago: {self._doing(self._seen[rank])}"
            for rank in self._others()
            if (silent := self._listened - self._heard[rank]) > QUIET_BEATS * BEAT
        }

    def _others(self) -> list[int]:
        return [rank for rank in range(self._place.world_size) if rank != self._place.rank]

    def _stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(_LAST_BEAT)

    def _run(self) -> None:
        try:
            while True:
                stopping = self._stopping  # read first: what is told after it is the last word
                self._tell()
                if stopping:
                    return
                self._listen()
                self._look()
                self._wake.wait(BEAT)
        except RuntimeError as error:
            self._store_error = str(error).splitlines()[0]

    def _tell(self) -> None:
        self._beats += 1
        news = RankStatus(
            self._beats, self._entered, self._where, self._failed, self._gave_up, self._left
        )
        self._store.set(f"beat/{self._place.rank}", json.dumps(asdict(news)))

    def _listen(self) -> None:
        # A key that nobody has set yet would be waited for.
        told = [rank for rank in self._others() if self._store.check([f"beat/{rank}"])]
        for rank in told:
            news = RankStatus(**json.loads(self._store.get(f"beat/{rank}")))
            if news != self._seen[rank]:
                self._seen[rank], self._heard[rank] = news, time.monotonic()
        self._listened = time.monotonic()

    def _doing(self, news: RankStatus) -> str:
        entered = max(news.entered, self._complete)
        part = f"in collective {entered}" if entered else "in no collective"
        return f"{news.where}, having taken part {part}"
