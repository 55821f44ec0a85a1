"""The `bitassay` command.

Exit status: 0 equal, 1 different, 2 could not check, 130 interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

from bitassay import __version__
from bitassay.cli.check import check
from bitassay.cli.console import COULD_NOT_CHECK, EQUAL, guarded
from bitassay.cli.list import list_
from bitassay.cli.record import record
from bitassay.cli.run import run
from bitassay.cli.show import show

app = typer.Typer(
    name="bitassay",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Predict the exact bits of batch-invariant LLM inference on any CPU, keep them as golden "
    "token streams, and check kernels and engines against them.\n\n"
    "Exit status: 0 equal, 1 different, 2 could not check, 130 interrupted (Ctrl-C).",
)
app.command()(record)
app.command()(check)
app.command()(run)
app.command()(show)
app.command("list")(list_)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; see `bitassay.cli.main`."""
    # OpenMP reads it when torch loads. On a machine with other work, threads that spin while they
    # wait for each other took many times as long as threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def act() -> int:
        return app(_arguments(argv), standalone_mode=True) or EQUAL

    try:
        return guarded(act)
    except SystemExit as end:  # how typer ends a command, whatever its status
        return end.code if isinstance(end.code, int) else COULD_NOT_CHECK if end.code else EQUAL


def _arguments(argv: Sequence[str] | None) -> list[str] | None:
    if argv is None:
        return None
    if isinstance(argv, str) or not isinstance(argv, Iterable):
        raise ValueError(f"argv: expected a list of strings, found {argv!r}")
    arguments: list[object] = list(argv)
    if strange := [x for x in arguments if not isinstance(x, str)]:
        raise ValueError(f"argv: expected a list of strings, found {strange[0]!r} in it")
    return [str(x) for x in arguments]


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda v: _version(v))
    ] = False,
) -> None:
    pass


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"bitassay {__version__}")
        raise typer.Exit(EQUAL)
