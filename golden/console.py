"""Output of the command: results on stdout, progress and errors on stderr, one exit status."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .errors import GoldenError

EQUAL, DIFFERENT, COULD_NOT_CHECK = 0, 1, 2
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
    statuses = [guarded(lambda name=name: one(name)) for name in names]  # type: ignore[misc]
    return DIFFERENT if DIFFERENT in statuses else max(statuses, default=COULD_NOT_CHECK)


def guarded(action: Callable[[], int]) -> int:
    """Return the action's status, or 2 after printing why it failed.

    Bad input, a ValueError, an OSError or a package that is not installed, is told in a sentence;
    anything else is a bug and keeps its traceback. Python's own status for an exception is 1,
    which here means "different".
    """
    try:
        return action()
    except (GoldenError, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    return COULD_NOT_CHECK


@contextmanager
def progress(name: str, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while something runs; yields what to call with done and total."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"{name}: {what}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
