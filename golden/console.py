"""Output of the command: results on stdout, progress and errors on stderr, one exit status."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .errors import GoldenError

EQUAL, DIFFERENT, COULD_NOT_CHECK = 0, 1, 2
LINE_SECONDS = 60.0  # between lines of progress where there is no bar
_NO_TERMINAL = 300  # columns: digests and names of GPUs are for grep and copying


def say(what: RenderableType) -> None:
    """Print a result; long lines and tables are left whole where the output is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _NO_TERMINAL
    console.print(what, soft_wrap=not console.is_terminal, markup=False)


def each(names: list[str], one: Callable[[str], int]) -> int:
    """Run `one` for every golden and return the status of all.

    A golden that cannot be checked does not keep the next from it. A difference anywhere is 1;
    failing that, anything that could not be checked is 2.
    """
    said: set[str] = set()  # what is wrong with the input is wrong for every architecture
    statuses = [guarded(lambda name=name: one(name), said) for name in names]  # type: ignore[misc]
    return DIFFERENT if DIFFERENT in statuses else max(statuses, default=COULD_NOT_CHECK)


def guarded(action: Callable[[], int], said: set[str] | None = None) -> int:
    """Return the action's status, or 2 after printing why it failed.

    Bad input, a ValueError, an OSError or a package that is not installed, is told in a sentence;
    anything else is a bug and keeps its traceback. Python's own status for an exception is 1,
    which here means "different". said: errors that were told already, and are not told again.
    """
    said = set() if said is None else said
    try:
        return action()
    except (GoldenError, ValueError, OSError, ImportError) as error:
        if str(error) not in said:
            print(f"error: {error}", file=sys.stderr)
        said.add(str(error))
    except Exception:
        traceback.print_exc()
    return COULD_NOT_CHECK


class Meter:
    """Shows how far the work is: called with what is done and what there is in all.

    Where stderr is no terminal there is no bar, but now and then a line, for work that takes long.
    """

    def __init__(self, bar: Progress, description: str) -> None:
        self._bar, self._description = bar, description
        self._task = bar.add_task(description, total=None)
        self._total: int | None = None
        self._begun = self._said = time.monotonic()
        self._before = 0  # done when it began: by an earlier run

    def __call__(self, done: int, total: int) -> None:
        """Move the bar; a new total is a new beginning, whose time is estimated afresh."""
        if total != self._total:
            self._bar.reset(self._task, total=total, completed=done)
            self._total, self._before, self._begun = total, done, time.monotonic()
        else:
            self._bar.update(self._task, completed=done)
        if not self._bar.console.is_terminal:
            self._line(done, total, time.monotonic())

    def _line(self, done: int, total: int, now: float) -> None:
        if now - self._said < LINE_SECONDS or done <= self._before:
            return
        self._said = now
        left = (now - self._begun) / (done - self._before) * (total - done)
        self.tell(
            f"{self._description}: {done:,} of {total:,} rows, about "
            f"{timedelta(seconds=round(left))} left"
        )

    def tell(self, text: str) -> None:
        """Print a line on stderr, above the bar."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(name: str, what: str) -> Iterator[Meter]:
    """Show a bar on stderr while something runs, in rows, with the time it still takes."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("left"),
    )
    console = Console(stderr=True)
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    ) as bar:
        yield Meter(bar, f"{name}: {what}")
