"""The `bitassay` command.

Exit status: 0 equal, 1 different, 2 could not check, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.text import Text

from .. import __version__
from . import render
from .check_command import check
from .console import EQUAL, guarded, say
from .errors import GoldenError
from .parameters import StoreOption
from .record_command import record
from .run_command import run
from .store import Store, find_store
from .verdicts import decoder

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


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit; whatever goes wrong is status 2, never 1."""
    # OpenMP reads it when torch loads. On a machine with other work, threads that spin while they
    # wait for each other took many times as long as threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(guarded(lambda: app(arguments, standalone_mode=True) or EQUAL))


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


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="GOLDEN", help="<suite>/<arch>")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="ID", help="print this prompt and its stream; repeatable"),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="print all prompts and streams")] = False,
    store: StoreOption = None,
) -> None:
    """Verify one golden and print where it comes from, and its streams as text.

    Streams of a model that is not bitassay's own are printed as token ids.

    Example: bitassay show context-lm/sm_89 --prompt context-lm-00
    """
    target = find_store(store)
    _require_golden(target, name)
    golden = target.read(name)
    known = golden.stream.prompt_names
    if unknown := [p for p in prompt or [] if p not in known]:
        raise GoldenError(f"golden {name} has no prompt {unknown[0]!r}: it has {', '.join(known)}")
    say(render.facts(golden))
    chosen = [s for s, known_name in enumerate(known) if text or known_name in (prompt or [])]
    for stream in render.streams(golden, chosen, decoder(name)):
        say(stream)


@app.command("list")
def list_(
    store: StoreOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="read every byte as well")] = False,
) -> None:
    """List the goldens of a store, as its manifest states them.

    Example: bitassay list --store golden/store --verify
    """
    target = find_store(store)
    entries = target.entries()
    say(render.listing(entries))
    if verify:
        say(Text(f"{len([target.read(name) for name in entries])} goldens verified"))


def _require_golden(store: Store, name: str) -> None:
    """Raise GoldenError for a suite's name, which stands for several goldens."""
    if "/" in name:
        return
    goldens = [golden for golden in store.entries() if golden.partition("/")[0] == name]
    meant = " or ".join(goldens) or "<suite>/<arch>"
    raise GoldenError(f"{name!r} does not name one golden: expected {meant}")
