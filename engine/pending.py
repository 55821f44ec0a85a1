"""A collective that was begun: what it comes to, and whether every rank was in the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .rendezvous import RankError

if TYPE_CHECKING:
    from .group import Group


class Pending:
    """A sum that was begun."""

    def __init__(
        self,
        group: Group,
        number: int,
        step: int,
        done: Callable[[], bool],
        read: Callable[[], list[int]],
    ) -> None:
        self._group, self._number, self._step = group, number, step
        self._done, self._read = done, read

    def result(self) -> int:
        """Wait for the sum and return it; RankTimeout, RankLost, or RankError for a rank astray."""
        what = f"collective {self._number} (after step {self._step})"
        self._group.wait(self._number, what, self._done)
        self._group.complete(self._number)
        count, *steps = self._read()
        astray = {rank: step for rank, step in enumerate(steps) if step != self._step}
        if astray:
            where = ", ".join(f"rank {rank} is at step {step}" for rank, step in astray.items())
            raise RankError(
                f"{self._group.place.name}, {what}: expected every rank at step {self._step}, but "
                f"{where}: a rank has skipped a collective or entered one too many"
            )
        return count
