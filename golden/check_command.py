"""`bitassay check`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from . import render
from .console import DIFFERENT, EQUAL, each, progress, say
from .errors import GoldenError
from .parameters import (
    Everything,
    JobsOption,
    ModelOption,
    Names,
    PromptsOption,
    SequentialOption,
    StoreOption,
    prompts_options,
)
from .store import find_store
from .suites import select
from .verdicts import report
from .ways import Options, Way


def check(
    names: Names = None,
    everything: Everything = False,
    way: Annotated[Way, typer.Option("--with", help="what to run")] = Way.REFERENCE,
    sequential: SequentialOption = False,
    prompts: PromptsOption = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, metavar="T", help="the first T tokens of each prompt alone")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="kernels: sequences at once; all if unset"),
    ] = None,
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", help="kernels: take the prompts in another order")
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="kernels: prompt tokens a step; all if unset"),
    ] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="gpu: note in the manifest that this GPU agrees")
    ] = False,
    jobs: JobsOption = None,
    model: ModelOption = None,
    store: StoreOption = None,
) -> None:
    """Run something and compare every bit of what it says with the goldens.

    --all with --with gpu means the goldens of this GPU's architecture; the others are named.

    Example: bitassay check context-lm/sm_90 --with gpu --batch-size 7 --shuffle 1
    """
    count, file = prompts_options(prompts, model)
    options = Options(
        way, sequential, count, tokens, batch_size, shuffle, chunk_size, confirm, jobs
    )
    target = find_store(store)
    if model is None:
        chosen = select(names or [], everything)
    elif everything or not names or not all("/" in name for name in names):
        raise GoldenError("--model: name its goldens, as <name>/<arch>")
    else:
        chosen = names

    from .check import OwnModel, of_this_gpu
    from .check import check as run

    own = OwnModel(model, file) if model is not None and file is not None else None

    def one(name: str) -> int:
        with progress(name, options.description) as meter:
            checked = run(target, name, options, own=own, progress=meter, tell=meter.tell)
        report(name, options.description, checked.comparison, model)
        if checked.confirmed:
            say(Text(f"{name}: the manifest now says {render.confirmed(checked.confirmed)}"))
        return EQUAL if checked.comparison.equal else DIFFERENT

    if everything and way is Way.GPU:
        chosen, others = of_this_gpu(chosen)
        for name in others:
            say(Text(f"{name}: not checked, this GPU is of another architecture"))
    raise typer.Exit(each(chosen, one))
