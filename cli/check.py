"""`bitassay check`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from bitassay.cli import engine_options as parameters
from bitassay.cli.comparison_output import say_comparison
from bitassay.cli.console import DIFFERENT, EQUAL, each, progress, say
from bitassay.cli.options import (
    DraftOption,
    Everything,
    JobsOption,
    ModelOption,
    Names,
    PromptsOption,
    SequentialOption,
    StoreOption,
    prompts_options,
)
from bitassay.golden.errors import GoldenError
from bitassay.golden.runs.check_options import Options, Way
from bitassay.golden.suites import select

if TYPE_CHECKING:
    from bitassay.golden.check import Checked


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
    k: parameters.K = None,
    dp: parameters.Dp = None,
    backend: parameters.BackendName = None,
    max_num_seqs: parameters.MaxNumSeqs = None,
    max_num_batched_tokens: parameters.MaxNumBatchedTokens = None,
    num_blocks: parameters.NumBlocks = None,
    no_prefix_caching: parameters.NoPrefixCaching = False,
    arrivals: parameters.Arrivals = False,
    cancel: parameters.Cancel = None,
    warm: parameters.Warm = False,
    eager: parameters.Eager = None,
    timeout: parameters.Timeout = None,
    sweep: parameters.Sweep = False,
    seed: parameters.Seed = None,
    model: ModelOption = None,
    draft: DraftOption = None,
    store: StoreOption = None,
) -> None:
    """Run something and compare every bit of what it says with the goldens.

    --all with --with gpu means the goldens of this GPU's architecture; the others are named.

    A golden with drafts is checked on kernels with the serving engine, 3 draft tokens a round.

    Example: bitassay check context-lm/sm_90 --with gpu --batch-size 7 --shuffle 1

    Example: bitassay check eagle-pico/sm_90 --with engine --dp 2 --sweep
    """
    _require_alone()
    count, file = prompts_options(prompts, model)
    engine, asked = parameters.engine_options(
        engine=way is Way.ENGINE,
        sweep=sweep,
        seed=seed,
        arrivals=arrivals,
        shuffle=shuffle,
        anywhere={"dp": dp, "backend": backend, "timeout": timeout},
        alone={
            "draft_tokens": k,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "num_blocks": num_blocks,
            "prefix_caching": False if no_prefix_caching else None,
            "cancel": cancel,
            "warm": warm or None,
            "eager": eager,
        },
    )
    options = Options(
        way, sequential, count, tokens, batch_size, shuffle, chunk_size, confirm, jobs, engine
    )
    from bitassay.golden.storage.store import find_store

    target = find_store(store)
    if model is None and draft is not None:
        raise GoldenError("--draft needs --model DIR")
    if model is None:
        chosen = select(names or [], everything)
    elif everything or not names or not all("/" in name for name in names):
        raise GoldenError("--model: name its goldens, as <name>/<arch>")
    else:
        chosen = names

    from bitassay.golden.check import OwnModel, Runs, check_sweep, of_this_gpu
    from bitassay.golden.check import check as run

    own = OwnModel(model, file, draft) if model is not None and file is not None else None

    def one(name: str) -> int:
        with progress(name, options.description) as meter:
            checked = run(target, name, options, own=own, progress=meter, tell=meter.tell)
        return _told(name, checked, model)

    def swept(name: str) -> int:
        assert asked is not None
        runs: Runs = check_sweep(target, name, options, asked, own=own)

        made: list[Checked] = []

        def single(number: str) -> int:
            what, make = runs[number]
            with progress(name, f"{number} of {len(runs)}, {what}"):
                made.append(make())
            return _told(f"{name} {number}/{len(runs)}", made[-1], model, decode_as=name)

        status = each(list(runs), single)
        different = sum(not checked.comparison.equal for checked in made)
        idle = sum(bool(checked.missing) for checked in made)
        say(
            Text(
                f"{name}: {len(runs)} configurations: {len(made) - different} equal, {different} "
                f"different, {len(runs) - len(made)} failed; {idle} not exercised"
            )
        )
        return status

    if everything and way is Way.GPU:
        chosen, others = of_this_gpu(chosen)
        for name in others:
            say(Text(f"{name}: not checked, this GPU is of another architecture"))
    raise typer.Exit(each(chosen, swept if asked else one))


def _require_alone() -> None:
    """Raise GoldenError where torchrun has started several of this process."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and size != "1":
        raise GoldenError(
            f"check is one process, and RANK and WORLD_SIZE say that this is one of {size}: leave "
            "torchrun away, which is for `bitassay run`; check starts ranks itself, with --dp"
        )


def _told(name: str, checked: Checked, model: Path | None, decode_as: str = "") -> int:
    """Print what came of a check; what it did not come to is an error, though nothing differs."""
    say_comparison(name, checked.how, checked.comparison, model, decode_as=decode_as or name)
    if checked.confirmed:
        from bitassay.golden.report.goldens import confirmed

        say(Text(f"{name}: the manifest now says {confirmed(checked.confirmed)}"))
    if checked.missing:
        error = (
            f"{name}: not exercised ({checked.how}): the run was made for "
            f"{', '.join(checked.missing)} and came to none: take more prompts or tokens"
        )
        if checked.comparison.equal:
            raise GoldenError(error)
        say(Text(error))
    return EQUAL if checked.comparison.equal else DIFFERENT
