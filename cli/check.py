"""`bitassay check`."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from bitassay.cli.comparison_output import say_comparison
from bitassay.cli.console import DIFFERENT, EQUAL, each, progress, say
from bitassay.cli.engine_options import Given, takes_engine_options
from bitassay.cli.flags import FLAGS, spelled
from bitassay.cli.options import (
    OUTPUT,
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
from bitassay.golden.runs.backend import Backend
from bitassay.golden.runs.engine_options import EngineOptions, SweepOptions
from bitassay.golden.suites import select

if TYPE_CHECKING:
    from bitassay.golden.check import Checked
    from bitassay.golden.runs.runner import Runner

_OF_A_SWEEP = ("backend", "dp", "timeout")  # what it leaves to whoever asks for it


class With(StrEnum):
    """What is checked: the oracle, or the engine on a backend."""

    REFERENCE = "reference"
    INTERPRETER = "interpreter"
    GPU = "gpu"
    ENGINE = "engine"


@takes_engine_options(*FLAGS)
def check(
    names: Names = None,
    everything: Everything = False,
    way: Annotated[
        With,
        typer.Option(
            "--with",
            help="what runs: the oracle, the engine on this GPU or in Triton's interpreter, or the "
            "engine on the --backend",
        ),
    ] = With.REFERENCE,
    prompts: PromptsOption = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, metavar="T", help="the first T tokens of each prompt alone")
    ] = None,
    sequential: SequentialOption = False,
    jobs: JobsOption = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="run the engine in up to forty configurations in which all pairs of settings meet",
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="SEED", help="of a sweep's orders and arrivals (default: 0)"
        ),
    ] = None,
    confirm: Annotated[
        bool,
        typer.Option(
            "--confirm",
            help="note in the manifest that this GPU gave every bit",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    model: ModelOption = None,
    draft: DraftOption = None,
    store: StoreOption = None,
    *,
    engine: Given,
) -> None:
    """Run something and compare every bit of what it gives with the goldens.

    The engine's options need --with gpu, interpreter or engine. With --all,
    --with gpu means the goldens of this GPU's architecture; others are named.

    Example: bitassay check llama-pico/sm_90 --with gpu --shuffle 1

    Example: bitassay check eagle-pico/sm_90 --with engine --dp 2 --sweep
    """
    _require_alone()
    count, file = prompts_options(prompts, model)
    asked = _engine(way, engine)
    swept = _sweep(engine, asked, seed) if sweep else None
    if sweep and confirm:
        raise GoldenError("--confirm: expected one run of all prompts, found --sweep: omit one")
    if seed is not None and not sweep:
        raise GoldenError("--seed is of --sweep; --shuffle and --arrivals take seeds of their own")
    if asked is not None and (sequential or jobs is not None):
        raise GoldenError("--sequential and --jobs are for --with reference")
    if model is None and draft is not None:
        raise GoldenError("--draft needs --model DIR")
    if model is None:
        chosen = select(names or [], everything)
    elif everything or not names or not all("/" in name for name in names):
        raise GoldenError("--model: name its goldens, as <name>/<arch>")
    else:
        chosen = names

    from bitassay.golden.check import OwnModel, Part, Runs, check_sweep, of_this_gpu
    from bitassay.golden.check import check as run
    from bitassay.golden.storage.store import find_store

    target, part = find_store(store), Part(count, tokens)
    own = OwnModel(model, file, draft) if model is not None and file is not None else None
    runner = _runner(asked, sequential, jobs)

    def one(name: str) -> int:
        with progress(name, way) as meter:
            checked = run(
                target,
                name,
                runner,
                part,
                own=own,
                confirm=confirm,
                progress=meter,
                log=meter.log,
            )
        return _report(name, checked, model)

    def all_of(name: str) -> int:
        assert swept is not None
        runs: Runs = check_sweep(target, name, part, swept, own=own)
        made: list[Checked] = []

        def single(number: str) -> int:
            what, make = runs[number]
            with progress(name, f"{number} of {len(runs)}, {what}"):
                made.append(make())
            return _report(f"{name} {number}/{len(runs)}", made[-1], model, decode_as=name)

        status = each(list(runs), single)
        say(Text(f"{name}: {_summary(made, len(runs))}"))
        return status

    if everything and asked is not None and asked.backend is Backend.GPU:
        chosen, others = of_this_gpu(chosen)
        for name in others:
            say(Text(f"{name}: not checked, this GPU is of another architecture"))
    raise typer.Exit(each(chosen, all_of if sweep else one))


def _require_alone() -> None:
    """Raise GoldenError where torchrun has started several of this process."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and size != "1":
        raise GoldenError(
            f"check is one process, and RANK and WORLD_SIZE say that this is one of {size}: leave "
            "torchrun away, which is for `bitassay run`; check starts ranks itself, with --dp"
        )


def _engine(way: With, given: Given) -> EngineOptions | None:
    """Return how the engine runs, None where the oracle does."""
    if way is With.REFERENCE:
        if given:
            raise GoldenError(
                f"{spelled(list(given))}: an option of the engine, which --with reference does not "
                "run: add --with gpu, --with interpreter or --with engine"
            )
        return None
    if way is With.ENGINE:
        return EngineOptions(**given)
    backend = Backend(way)
    if given.get("backend", backend) is not backend:
        raise GoldenError(
            f"--with {way} is --with engine --backend {backend}: omit --backend, or use "
            "--with engine"
        )
    return EngineOptions(**given | {"backend": backend})


def _sweep(given: Given, engine: EngineOptions | None, seed: int | None) -> SweepOptions:
    """Return the sweep that was asked for; GoldenError for options that it sets by itself."""
    if engine is None:
        raise GoldenError("--sweep: expected the engine: add --with gpu or --with engine")
    if own := [name for name in given if name not in _OF_A_SWEEP]:
        raise GoldenError(
            f"{spelled(own)}: a sweep chooses its configurations itself: beside --sweep there may "
            f"be {spelled(list(_OF_A_SWEEP))}, --seed, --prompts and --tokens"
        )
    return SweepOptions(
        dp=engine.dp, backend=engine.backend, timeout=engine.timeout, seed=seed or 0
    )


def _runner(engine: EngineOptions | None, sequential: bool, jobs: int | None) -> Runner:
    if engine is not None:
        from bitassay.golden.runs.engine_runner import EngineRunner

        return EngineRunner(engine)
    from bitassay.golden.runs.oracle_runner import OracleRunner

    return OracleRunner(sequential, jobs)


def _report(name: str, checked: Checked, model: Path | None, decode_as: str = "") -> int:
    """Print what came of a check; what it did not come to is an error, though nothing differs."""
    say_comparison(name, checked.how, checked.comparison, model, decode_as=decode_as or name)
    if checked.confirmed:
        from bitassay.golden.report.goldens import confirmed

        say(Text(f"{name}: the manifest now says {confirmed(checked.confirmed)}"))
    if checked.comparison.equal and not checked.comparison.whole:
        absent = ", ".join(checked.comparison.not_compared)
        raise GoldenError(f"{name}: not compared ({checked.how}): the run gave no {absent}")
    if checked.missing:
        error = (
            f"{name}: not exercised ({checked.how}): the run was made for "
            f"{', '.join(checked.missing)} and exercised none: take more prompts or tokens"
        )
        if checked.comparison.equal:
            raise GoldenError(error)
        say(Text(error))
    return EQUAL if checked.comparison.equal else DIFFERENT


def _summary(made: list[Checked], count: int) -> str:
    different = sum(not checked.comparison.equal for checked in made)
    idle = sum(bool(checked.missing) for checked in made)
    return (
        f"{count} configurations: {len(made) - different} equal, {different} different, "
        f"{count - len(made)} failed; {idle} not exercised"
    )
