"""`bitassay run`: prompts through the engine, on one or more ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from bitassay.cli.console import EQUAL, guarded, say
from bitassay.cli.engine_options import Given, takes_engine_options
from bitassay.cli.options import (
    OUTPUT,
    DraftOption,
    ModelOption,
    PromptsOption,
    prompts_options,
)
from bitassay.golden.errors import GoldenError, WorkerError
from bitassay.golden.runs.backend import Backend, gpu_arch
from bitassay.golden.runs.engine_options import EngineOptions
from bitassay.golden.suites import SUITES, Suite, own_suite

if TYPE_CHECKING:  # torch takes seconds to import, --help should not
    from bitassay.golden.runs.engine_job import EngineJob, EngineRun

_ARCH = "sm_90"  # whose arithmetic is used where there is no GPU, unless told otherwise


@takes_engine_options(
    *("backend", "dp", "num_speculative_tokens", "max_num_seqs", "max_num_batched_tokens"),
    *("num_blocks", "enable_prefix_caching", "enforce_eager", "timeout"),
)
def run(
    suite: Annotated[
        str | None, typer.Argument(metavar="[SUITE]", help=f"one of {', '.join(SUITES)}")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH", help=f"whose bits (default: the GPU's; {_ARCH} on other backends)"
        ),
    ] = None,
    prompts: PromptsOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, metavar="T", help="of a prompt (default: the suite's)"),
    ] = None,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="end a stream with the model's eos token")
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="print every step's text, in place of whole streams",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    model: ModelOption = None,
    draft: DraftOption = None,
    *,
    engine: Given,
) -> None:
    """Generate with the engine; print the streams as they end, and what was counted.

    Under torchrun this is one of its ranks, and rank 0 prints: other ranks' streams at the end.

    Example: bitassay run eagle-pico --dp 2 --prompts 8
    """
    count, file = prompts_options(prompts, model)

    def act() -> int:
        chosen = _suite(suite, model, draft, file, max_tokens)
        # Nothing is compared, so nothing but tokens is kept.
        options = EngineOptions(**engine, capture=False)
        job = _job(chosen, _arch(options.backend, arch), count, max_tokens, options, stop_at_eos)
        return _run(job, options.dp, stream)

    raise typer.Exit(guarded(act))


def _run(job: EngineJob, dp: int, pieces: bool) -> int:
    from bitassay.cli.run_output import Streams, counted
    from bitassay.golden.report.decoding import decoder

    streams = Streams(job.job, decoder("", job.job.model), pieces=pieces)
    if "RANK" not in os.environ:
        from bitassay.golden.runs.rank_launcher import run_ranks

        found: EngineRun | None = run_ranks(job, dp, streams.take)
    else:
        found = _as_rank(job, dp, streams)
    if found is not None:
        streams.rest(found)
        say(counted(found))
    return EQUAL


def _as_rank(job: EngineJob, dp: int, streams: Any) -> EngineRun | None:
    """Take the place among ranks that torchrun states; only rank 0 prints anything but errors."""
    from bitassay.engine.distributed.rendezvous import RankError, RankInfo
    from bitassay.engine.scheduling.request import Output
    from bitassay.golden.runs.child_main import leave
    from bitassay.golden.runs.rank_worker import take_part

    rank_info = RankInfo.from_environment()
    if dp not in (1, rank_info.world_size):
        raise GoldenError(
            f"--dp {dp}: torchrun has started {rank_info.world_size} ranks: omit it, or start "
            f"torchrun with --nproc-per-node {dp}"
        )

    def on_outputs(outputs: list[tuple[int, Output]]) -> None:
        if rank_info.rank == 0:
            for prompt, output in outputs:
                streams.take(prompt, output.tokens, output.finish_reason)

    def stuck(error: RankError) -> NoReturn:
        leave(guarded(lambda: _refuse(error)))

    try:
        (found,) = take_part([job], rank_info, on_outputs, stuck)
        return found
    except RankError as error:  # it names the ranks
        _refuse(error)
    except (GoldenError, ValueError, OSError) as error:
        name = f"{rank_info.name}: " if rank_info.world_size > 1 else ""
        raise WorkerError(f"{name}{error}") from error


def _refuse(error: Exception) -> NoReturn:
    raise WorkerError(str(error)) from error


def _suite(
    name: str | None,
    model: Path | None,
    draft: Path | None,
    file: Path | None,
    tokens: int | None,
) -> Suite:
    if (name is None) == (model is None):
        raise GoldenError(
            f"name a suite ({', '.join(SUITES)}), or give --model DIR, --prompts FILE and "
            "--max-tokens T: one of the two"
        )
    if model is not None and file is not None:
        if tokens is None:
            raise GoldenError("--model needs --max-tokens T")
        return own_suite(model, file, tokens, name="own", arches=(), draft=draft)
    if draft is not None:
        raise GoldenError("--draft needs --model DIR: a suite has its own head, or none")
    if name not in SUITES:
        raise GoldenError(f"unknown suite {name!r}: known are {', '.join(SUITES)}")
    return SUITES[name]


def _job(
    suite: Suite,
    arch: str,
    count: int | None,
    tokens: int | None,
    options: EngineOptions,
    stop_at_eos: bool,
) -> EngineJob:
    """Return what the suite asks for, or its first `count` prompts."""
    from bitassay.golden.inputs.suite_inputs import load_inputs
    from bitassay.golden.runs.engine_job import EngineJob

    inputs = load_inputs(suite, arch)
    if not inputs.facts.has_cache:
        raise GoldenError(
            f"{suite.name}: expected a model with a KV cache, which the engine serves; run this "
            f"with `bitassay check {suite.name} --with interpreter`, or --with gpu"
        )
    job = inputs.first(count or len(inputs.job.prompts), tokens or suite.tokens)
    return EngineJob(
        job,
        options.config(head=job.draft is not None),
        options.backend,
        eos_token_id=_eos(suite.model) if stop_at_eos else None,
        timeout=options.timeout,
    )


def _arch(backend: Backend, asked: str | None) -> str:
    if backend is not Backend.GPU:
        return asked or _ARCH
    from bitassay.reference.spec.arch import get_arch

    found = gpu_arch()
    if asked is not None and get_arch(asked).name != found:
        raise GoldenError(f"--arch {asked}: the GPU is {found}: omit it, or use another GPU")
    return found


def _eos(model: Path) -> tuple[int, ...]:
    """Return a model's eos tokens: config.json has one, from 0, or a list of several."""
    from bitassay.golden.inputs.checkpoint_cache import describe_checkpoint

    config = describe_checkpoint(model).config
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(type(one) is int and one >= 0 for one in ids):  # a bool is no id
        said = repr(found) if "eos_token_id" in config else "nothing"
        raise GoldenError(
            f"--stop-at-eos: expected 'eos_token_id' of {model / 'config.json'} to be an id or a "
            f"list of ids, found {said}: correct config.json, or omit --stop-at-eos"
        )
    return tuple(ids)
