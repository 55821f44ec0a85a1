"""Checking with the serving engine: one run beside a golden, or a sweep of configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bitassay.golden.errors import GoldenError
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import ModelFacts
from bitassay.golden.inputs.suite_inputs import Inputs
from bitassay.golden.runs.engine_job import EngineJob, EngineRun
from bitassay.golden.runs.engine_options import EngineOptions, SweepOptions
from bitassay.golden.runs.engine_requests import (
    EngineCheck,
    Requests,
    blocks,
    engine_job,
    filled,
    judge,
    lay_out,
)
from bitassay.golden.runs.gpu import require_gpu
from bitassay.golden.runs.interpreter import estimate
from bitassay.golden.runs.rank_launcher import require, run_jobs
from bitassay.golden.runs.sweep import Configuration, sweep
from bitassay.golden.streams.token_stream import TokenStream, take
from bitassay.reference.spec.arch import get_arch


def run_engine_way(
    inputs: Inputs,
    expected: TokenStream,
    options: EngineOptions,
    tell: Callable[[str], None] = lambda text: None,
) -> EngineCheck:
    """Run the engine on the prompts of `expected` and compare; CannotRunError if it cannot."""
    job = inputs.first(len(expected.prompt_names), expected.steps)
    plan = _plan(job, expected, options)
    _require(plan, inputs.facts)
    if options.backend == "interpreter" and (warning := estimate(job, inputs.facts)):
        tell(f"{inputs.identity.name}: {warning}")
    (run,) = run_jobs([plan.ready], options.dp)
    return _judge(run, plan, inputs.facts)


class Sweep:
    """The runs of a sweep, one after another on the same ranks, which load the model once."""

    def __init__(self, inputs: Inputs, expected: TokenStream, options: SweepOptions) -> None:
        """Plan the runs for the prompts and tokens of `expected`; GoldenError if none can be."""
        job = inputs.first(len(expected.prompt_names), expected.steps)
        self._facts, self._dp = inputs.facts, options.dp
        runs = _runs(job, expected, options)
        self._planned = [_plan(job, expected, run, some) for run, some in runs]
        for plan in self._planned[:1]:
            _require(plan, inputs.facts)
        self._running: Iterator[EngineRun] | None = None

    @property
    def options(self) -> list[EngineOptions]:
        """The runs."""
        return [plan.options for plan in self._planned]

    def check(self, number: int) -> EngineCheck:
        """Make the run of a number and compare; ask for them in order.

        After an error the ranks are started again for those that are left.
        """
        if self._running is None:
            self._running = run_jobs([plan.ready for plan in self._planned[number:]], self._dp)
        try:
            run = next(self._running)
        except BaseException:
            self._running = None
            raise
        return _judge(run, self._planned[number], self._facts)


@dataclass(frozen=True)
class _Plan:
    job: Job
    expected: TokenStream
    options: EngineOptions
    requests: Requests
    ready: EngineJob


def _plan(
    job: Job, expected: TokenStream, options: EngineOptions, some: Sequence[int] | None = None
) -> _Plan:
    if some is not None:
        names = tuple(job.prompt_names[p] for p in some)
        job = replace(job, prompt_names=names, prompts=tuple(job.prompts[p] for p in some))
        expected = take(expected, list(some))
    requests = lay_out(len(job.prompts), options)
    return _Plan(job, expected, options, requests, engine_job(job, options, requests))


def _require(plan: _Plan, facts: ModelFacts) -> None:
    """Raise GoldenError for a model that the engine does not run, or ranks that are not here."""
    if not facts.has_cache:
        raise GoldenError(
            f"--with engine: the model of {plan.job.model} is none that the serving engine runs: "
            "use --with gpu or --with interpreter"
        )
    require(plan.ready, plan.options.dp)
    if plan.options.backend == "gpu":
        require_gpu(plan.job.arch)


def _judge(run: EngineRun, plan: _Plan, facts: ModelFacts) -> EngineCheck:
    return judge(run, plan.job, facts, plan.expected, plan.options, plan.requests)


def _runs(
    job: Job, expected: TokenStream, options: SweepOptions
) -> Iterator[tuple[EngineOptions, list[int]]]:
    """The runs of a sweep, and the prompts of each."""
    gpu = options.backend == "gpu"
    graphs = gpu and get_arch(job.arch).trusts_cuda_graphs
    whole = [(*ids, *own) for ids, own in zip(job.prompts, expected.tokens.tolist(), strict=True)]
    for configuration in sweep(graphs=graphs):
        if configuration.draft_tokens and job.draft is None:
            continue
        run = configuration.options(
            count=len(job.prompts),
            longest=max(blocks(job)),
            filled=filled(whole),
            dp=options.dp,
            backend=options.backend,
            seed=options.seed,
            timeout=options.timeout,
        )
        yield run, _prompts(job, configuration)


def _prompts(job: Job, configuration: Configuration) -> list[int]:
    """The prompts of a configuration: all, or the longest, of which the cache keeps the most."""
    count = {"all": len(job.prompts), "three": 3, "one": 1}[configuration.prompts]
    longest = sorted(range(len(job.prompts)), key=lambda p: -len(job.prompts[p]))
    return sorted(longest[:count])
