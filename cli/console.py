"""Output of the command: results on stdout, progress and errors on stderr, one exit status."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

from bitassay.cli.advice import worded
from bitassay.golden.errors import GoldenError

EQUAL, DIFFERENT, COULD_NOT_CHECK = 0, 1, 2
# A pipe that broke: the result was not told, so no status may state one.
UNHEARD = "whoever read the output has ended before all was said"
LINE_SECONDS = 60.0  # between lines of progress where there is no bar
_NO_TERMINAL = 300  # columns: digests and names of GPUs are for grep and copying


def say(what: RenderableType) -> None:
    """Print a result; long lines and tables are left whole where the output is no terminal."""
    if sys.stdout is None:  # closed by whoever started this process
        raise BrokenPipeError
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
    statuses = []
    for name in names:
        statuses.append(guarded(lambda name=name: one(name), said))  # type: ignore[misc]
        if UNHEARD in said:
            return COULD_NOT_CHECK
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
    except BrokenPipeError:
        _unheard(said)
    except SystemExit as end:
        # What prints, rich and click, ends the process with 1 when nobody reads any more.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        _unheard(said)
    except (GoldenError, ValueError, OSError, ImportError) as error:
        text = worded(error)
        if text not in said:
            print(f"error: {text}", file=sys.stderr)
        said.add(text)
    except Exception:
        traceback.print_exc()
    return COULD_NOT_CHECK


def _unheard(said: set[str]) -> None:
    """Tell that nobody reads the output, and keep Python from trying again at its end."""
    said.add(UNHEARD)
    with suppress(OSError, ValueError, AttributeError):  # a stream may have no descriptor
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    with suppress(OSError):  # it may be the same pipe
        print(f"error: {UNHEARD}", file=sys.stderr)


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
        self.log(
            f"{self._description}: {done:,} of {total:,} rows, about "
            f"{timedelta(seconds=round(left))} left"
        )

    def log(self, text: str) -> None:
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
