"""`bitassay run`: prompts through the engine, on one or more ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from bitassay.cli.console import EQUAL, guarded, say
from bitassay.cli.options import DraftOption, ModelOption, PromptsOption, prompts_options
from bitassay.golden.errors import CannotRunError, GoldenError, WorkerError
from bitassay.golden.runs.check_options import NO_GPU, Backend
from bitassay.golden.suites import SUITES, Suite, own_suite

if TYPE_CHECKING:  # torch takes seconds to import, --help should not
    from bitassay.golden.runs.engine_job import EngineJob, EngineRun

_ARCH = "sm_90"  # whose arithmetic is used where there is no GPU, unless told otherwise
_DRAFTS = 3  # a round, where there is a head


def run(
    suite: Annotated[
        str | None, typer.Argument(metavar="[SUITE]", help=f"one of {', '.join(SUITES)}")
    ] = None,
    dp: Annotated[
        int, typer.Option("--dp", min=1, metavar="N", help="ranks that share the prompts")
    ] = 1,
    backend: Annotated[
        Backend, typer.Option(help="what operations run on; nothing is run in its place")
    ] = Backend.GPU,
    arch: Annotated[
        str | None,
        typer.Option(metavar="ARCH", help=f"the GPU's own; {_ARCH} for the other backends"),
    ] = None,
    prompts: PromptsOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, metavar="T", help="a prompt; the suite's if unset"),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("--k", min=0, metavar="K", help=f"drafts a round; {_DRAFTS} with a head"),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="requests that run at once, on each rank")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="rows a step")
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="blocks of 16 positions; enough if unset"),
    ] = None,
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="keep blocks of prefixes")
    ] = True,
    eager: Annotated[
        bool | None,
        typer.Option("--eager/--graphs", help="gpu: CUDA graphs from 9.0 on if unset"),
    ] = None,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="end a stream with the model's eos token")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="S", help="seconds that ranks wait for each other; 60 on GPUs"),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="print every step's text, not whole streams")
    ] = False,
    model: ModelOption = None,
    draft: DraftOption = None,
) -> None:
    """Generate with the engine; print the streams as they end, and what was counted.

    Under torchrun this is one of its ranks, and rank 0 prints: other ranks' streams at the end.

    Example: bitassay run eagle-pico --dp 2 --prompts 8
    """
    config = {
        "num_draft_tokens": k,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "num_blocks": num_blocks,
        "enforce_eager": eager,
    }
    count, file = prompts_options(prompts, model)

    def act() -> int:
        chosen = _suite(suite, model, draft, file, max_tokens)
        job, names = _job(chosen, _arch(backend, arch), count, max_tokens)
        job = replace(
            job,
            backend=backend,
            config=_config(job, config) | {"enable_prefix_caching": prefix_caching},
            eos_token_id=_eos(chosen.model) if stop_at_eos else None,
            timeout=timeout,
        )
        return _run(job, names, dp, stream)

    if "RANK" in os.environ:  # torchrun started this process, and others like it
        from bitassay.golden.runs.rank_worker import leave

        leave(guarded(act))
    raise typer.Exit(guarded(act))


def _run(job: EngineJob, names: tuple[str, ...], dp: int, pieces: bool) -> int:
    from bitassay.cli.run_output import Streams, counted
    from bitassay.golden.report.decoding import decoder

    streams = Streams(job, names, decoder("", job.model), pieces=pieces)
    if "RANK" not in os.environ:
        from bitassay.golden.runs.rank_launcher import run_ranks

        found: EngineRun | None = run_ranks(job, dp, streams.told)
    else:
        found = _as_rank(job, dp, streams)
    if found is not None:
        streams.rest(found)
        say(counted(found))
    return EQUAL


def _as_rank(job: EngineJob, dp: int, streams: Any) -> EngineRun | None:
    """Take the place among ranks that torchrun states; only rank 0 says anything but errors."""
    from bitassay.engine.distributed.rendezvous import Place, RankError
    from bitassay.engine.scheduling.request import Output
    from bitassay.golden.runs.rank_worker import leave, take_part

    place = Place.from_environment()
    if dp not in (1, place.world_size):
        raise GoldenError(
            f"--dp {dp}: torchrun has started {place.world_size} ranks: leave it away, or start "
            f"torchrun with --nproc-per-node {dp}"
        )

    def told(outputs: list[tuple[int, Output]]) -> None:
        if place.rank == 0:
            for prompt, output in outputs:
                streams.told(prompt, output.tokens, output.finish_reason)

    def stuck(error: RankError) -> NoReturn:
        leave(guarded(lambda: _refuse(error)))

    try:
        (found,) = take_part([job], place, told, stuck)
        return found
    except RankError as error:  # it names the ranks
        _refuse(error)
    except (GoldenError, ValueError, OSError) as error:
        name = f"{place.name}: " if place.world_size > 1 else ""
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
    suite: Suite, arch: str, count: int | None, tokens: int | None
) -> tuple[EngineJob, tuple[str, ...]]:
    """Return what the suite asks for, or its first `count` prompts, and the prompts' names."""
    from bitassay.golden.inputs.suite_inputs import load_inputs
    from bitassay.golden.runs.engine_job import EngineJob

    inputs = load_inputs(suite, arch)
    if not inputs.facts.has_cache:
        raise GoldenError(f"{suite.model}: the engine runs transformers, which this is not")
    job = inputs.first(count or len(inputs.job.prompts), tokens or suite.tokens)
    found = EngineJob(
        model=job.model,
        arch=arch,
        prompts=job.prompts,
        max_tokens=job.steps,
        draft=job.draft,
        model_digest=job.model_digest,
        draft_digest=job.draft_digest,
    )
    return found, job.prompt_names


def _config(job: EngineJob, given: dict[str, Any]) -> dict[str, Any]:
    """Return what was given as fields of EngineConfig; ValueError for what is unfit."""
    from bitassay.engine.config import EngineConfig

    config = {name: value for name, value in given.items() if value is not None}
    if job.draft is None and config.get("num_draft_tokens"):
        raise GoldenError(
            "--k: expected a draft head, found none: add --draft DIR, or leave it away"
        )
    config.setdefault("num_draft_tokens", _DRAFTS if job.draft else 0)
    config["capture"] = False
    EngineConfig(**config)
    return config


def _arch(backend: Backend, asked: str | None) -> str:
    if backend is not Backend.GPU:
        return asked or _ARCH
    import torch

    from bitassay.golden.runs.gpu import gpu_arch
    from bitassay.reference.spec.arch import get_arch

    if not torch.cuda.is_available():
        raise CannotRunError(NO_GPU)
    found = gpu_arch()
    if asked is not None and get_arch(asked).name != found:
        raise GoldenError(f"--arch {asked}: the GPU is {found}: leave it away, or use another GPU")
    return found


def _eos(model: Path) -> tuple[int, ...]:
    """Return a model's eos tokens: config.json has one, from 0, or a list of several."""
    from bitassay.reference.checkpoints.checkpoint import load_checkpoint

    config = load_checkpoint(model).config
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(type(one) is int and one >= 0 for one in ids):  # a bool is no id
        said = repr(found) if "eos_token_id" in config else "nothing"
        raise GoldenError(
            f"--stop-at-eos: expected 'eos_token_id' of {model / 'config.json'} to be an id or a "
            f"list of ids, found {said}: correct config.json, or leave --stop-at-eos away"
        )
    return tuple(ids)
