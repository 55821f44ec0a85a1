"""`bitassay show`: one golden, verified, and where it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bitassay.cli.console import say
from bitassay.cli.options import StoreOption
from bitassay.golden.errors import GoldenError

if TYPE_CHECKING:
    from bitassay.golden.storage.store import Store


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
    from bitassay.golden.report.decoding import decoder
    from bitassay.golden.report.goldens import facts, streams
    from bitassay.golden.storage.store import find_store

    target = find_store(store)
    _require_golden(target, name)
    golden = target.read(name)
    known = golden.stream.prompt_names
    if unknown := [p for p in prompt or [] if p not in known]:
        raise GoldenError(
            f"golden {name} has no prompt {unknown[0]!r}: it has {known[0]} … {known[-1]}"
        )
    say(facts(golden))
    chosen = [s for s, known_name in enumerate(known) if text or known_name in (prompt or [])]
    for stream in streams(golden, chosen, decoder(name)):
        say(stream)


def _require_golden(store: Store, name: str) -> None:
    """Raise GoldenError for a suite's name, which stands for several goldens."""
    if "/" in name:
        return
    goldens = [golden for golden in store.entries() if golden.partition("/")[0] == name]
    meant = " or ".join(goldens) or "<suite>/<arch>"
    raise GoldenError(f"{name!r} does not name one golden: expected {meant}")
