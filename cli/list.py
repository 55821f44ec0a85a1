"""`bitassay list`: the goldens of a store."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from bitassay.cli.console import say
from bitassay.cli.options import StoreOption


def list_(
    store: StoreOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="read every byte as well")] = False,
) -> None:
    """List the goldens of a store, as its manifest states them.

    Example: bitassay list --store golden/store --verify
    """
    from bitassay.golden.report.goldens import listing
    from bitassay.golden.storage.store import find_store

    target = find_store(store)
    entries = target.entries()
    say(listing(entries))
    if verify:
        say(Text(f"{len([target.read(name) for name in entries])} goldens verified"))
