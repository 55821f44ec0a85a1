"""The `bitassay` command.

Exit status: 0 equal, 1 different, 2 could not check.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from .. import __version__
from . import render
from .console import DIFFERENT, EQUAL, each, guarded, progress, say
from .errors import GoldenError
from .store import find_store
from .suites import SUITES, select
from .ways import Options, Way

if TYPE_CHECKING:
    from .compare import Comparison
    from .record import Recording

app = typer.Typer(
    name="bitassay",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Predict the exact bits of batch-invariant LLM inference on any CPU, keep them as golden "
    "token streams, and check kernels and engines against them.\n\n"
    "Exit status: 0 equal, 1 different, 2 could not check.",
)
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[GOLDEN]...", help="<suite> or <suite>/<arch>: context-lm/sm_89"),
]
Everything = Annotated[bool, typer.Option("--all", help="every golden of every suite")]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR|URL",
        help="default: BITASSAY_STORE, else the checkout's golden/store, else the packaged one",
    ),
]


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
def record(
    names: Names = None,
    everything: Everything = False,
    accept: Annotated[
        bool, typer.Option("--accept", help="write what is new or different (never under CI)")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Generate goldens again with the reference and compare them with the store.

    Without --accept nothing is written: equal is 0, different is 1, missing is 2.

    Example: bitassay record context-lm/sm_89 --accept
    """
    from .record import record as run  # torch takes seconds to import, --help should not

    target = find_store(store)

    def one(name: str) -> int:
        with progress(name, "generating with the reference") as advance:
            recording = run(target, name, accept=accept, progress=advance)
        return _report_recording(name, recording)

    raise typer.Exit(each(select(names or [], everything), one))


@app.command()
def check(
    names: Names = None,
    everything: Everything = False,
    way: Annotated[Way, typer.Option("--with", help="what to run")] = Way.REFERENCE,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="reference: generate token by token, not replay")
    ] = False,
    prompts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="the first N prompts alone")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="kernels: sequences at once; all if unset"),
    ] = None,
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", help="kernels: take the prompts in another order")
    ] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="gpu: note in the manifest that this GPU agrees")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Run something and compare every bit of what it says with the goldens.

    --all with --with gpu means the goldens of this GPU's architecture; the others are named.

    Example: bitassay check context-lm/sm_90 --with gpu --batch-size 7 --shuffle 1
    """
    from .check import check as run
    from .check import of_this_gpu

    target = find_store(store)
    options = Options(way, sequential, prompts, batch_size, shuffle, confirm)

    def one(name: str) -> int:
        with progress(name, options.description) as advance:
            checked = run(target, name, options, progress=advance)
        _report(name, options.description, checked.comparison)
        if checked.confirmed:
            say(Text(f"{name}: the manifest now says {render.confirmed(checked.confirmed)}"))
        return EQUAL if checked.comparison.equal else DIFFERENT

    chosen = select(names or [], everything)
    if everything and way is Way.GPU:
        chosen, others = of_this_gpu(chosen)
        for name in others:
            say(Text(f"{name}: not checked, this GPU is of another architecture"))
    raise typer.Exit(each(chosen, one))


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

    Example: bitassay show context-lm/sm_89 --prompt context-lm-00
    """
    golden = find_store(store).read(name)
    known = golden.stream.prompt_names
    if unknown := [p for p in prompt or [] if p not in known]:
        raise GoldenError(f"golden {name} has no prompt {unknown[0]!r}: it has {', '.join(known)}")
    say(render.facts(golden))
    chosen = [s for s, known_name in enumerate(known) if text or known_name in (prompt or [])]
    for stream in render.streams(golden, chosen, _decoder(name) if chosen else str):
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


def _report(name: str, what: str, comparison: Comparison) -> None:
    say(render.verdict(name, what, comparison))
    if not comparison.equal:
        say(render.difference(comparison, _decoder(name)))


def _report_recording(name: str, recording: Recording) -> int:
    if recording.comparison:
        _report(name, "generated with the reference", recording.comparison)
    if recording.incomparable:
        say(Text(f"{name}: different: {recording.incomparable}", style="bold red"))
    for key in recording.changed:
        say(Text(f"{name}: recorded under another {key.replace('_', ' ')}"))
    if recording.published:
        say(Text(f"{name}: written, digest {recording.published.digest}"))
    elif not recording.equal:
        say(Text(f"{name}: nothing was written; to replace it: bitassay record {name} --accept"))
    return EQUAL if recording.equal or recording.published else DIFFERENT


def _decoder(name: str) -> Callable[[list[int]], str]:
    """Return what turns token ids into text, with the tokenizer of the golden's suite."""
    from bitassay.reference.checkpoint import load_tokenizer

    suite = name.partition("/")[0]
    if suite not in SUITES:
        raise GoldenError(f"unknown suite {suite!r}, so its tokenizer is unknown: no text")
    tokenizer = load_tokenizer(SUITES[suite].model)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
