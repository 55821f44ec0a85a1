"""The table of faults: rows are noted while tests run and printed when all have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from rich.console import Console
from rich.table import Table

from bitassay.golden.compare.diff import Comparison
from support.planted_faults import Fault

Note = Callable[..., None]
_ROWS = pytest.StashKey[list[tuple[str, ...]]]()
_HEAD = ("fault", "what it does", "where", "first check that caught it", "tokens that differ")


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Operations here are so short that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """Return what notes a row: a fault, where it was planted, what caught it, and a comparison.

    How many tokens differ says what a test of equal tokens would have seen.
    """
    rows = request.config.stash.setdefault(_ROWS, [])

    def note(fault: Fault, where: str, check: str, comparison: Comparison | None = None) -> None:
        tokens = (
            ""
            if comparison is None
            else (f"{comparison.different.tokens:,} of {comparison.compared.tokens:,}")
        )
        rows.append((fault.name, fault.does, where, check, tokens))

    return note


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the rows, as a table and in Markdown, in the process that ran the tests."""
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    table = Table(*_HEAD, title="faults")
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)
    for line in (_HEAD, ("---",) * len(_HEAD), *rows):
        terminalreporter.write_line(f"| {' | '.join(line)} |")
