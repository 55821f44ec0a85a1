"""Running an engine beside a golden: once, or in every configuration of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bitassay.engine.config import OptionError
from bitassay.golden.inputs.job import Job, Progress
from bitassay.golden.inputs.model_info import ModelFacts
from bitassay.golden.inputs.suite_inputs import Inputs
from bitassay.golden.runs.backend import Backend, require_backend
from bitassay.golden.runs.engine_job import EngineJob, EngineRun
from bitassay.golden.runs.engine_options import EngineOptions, SweepOptions
from bitassay.golden.runs.engine_requests import (
    Requests,
    as_run,
    blocks,
    engine_job,
    filled,
    lay_out,
)
from bitassay.golden.runs.rank_launcher import run_jobs
from bitassay.golden.runs.runner import Log, Run
from bitassay.golden.runs.sweep import Configuration, sweep
from bitassay.golden.streams.token_stream import TokenStream, take
from bitassay.reference.spec.arch import get_arch

# Roughly what the interpreter takes: products of weights and rows in a second, and seconds for an
# operation of one step, however few its rows.
MULTIPLY_ADDS, OPERATION = 20_000_000, 0.09
_LONG = 300  # seconds


@dataclass(frozen=True)
class EngineRunner:
    """An engine on ranks of its own: what serves is what is checked.

    A model without a key/value cache, which no engine serves, runs in whole batches instead.
    """

    options: EngineOptions

    @property
    def on_gpu(self) -> bool:
        """Whether its operations run on a GPU."""
        return self.options.backend is Backend.GPU

    def describe(self, inputs: Inputs) -> str:
        """Return what is run, in words."""
        if inputs.facts.has_cache:
            return self.options.description(head=inputs.job.draft is not None)
        where = "GPU" if self.on_gpu else f"{self.options.backend}"
        extra = [f"batches of {self.options.max_num_seqs}"]
        if self.options.shuffle is not None:
            extra.append(f"shuffled with {self.options.shuffle}")
        return ", ".join([f"kernels on the {where}", *extra])

    def run(self, inputs: Inputs, expected: TokenStream, progress: Progress, log: Log) -> Run:
        """Run the prompts and tokens of `expected`; CannotRunError where it cannot."""
        job = inputs.first(len(expected.prompt_names), expected.steps)
        plan = _plan(job, expected, self.options)
        _require(plan, inputs.facts)
        if self.options.backend is Backend.INTERPRETER and (
            warning := long_interpreted(plan.ready, inputs.facts)
        ):
            log(f"{inputs.identity.name}: {warning}")
        (run,) = run_jobs([plan.ready], self.options.dp)
        return plan.judge(run, inputs.facts)


class Sweep:
    """The runs of a sweep, one after another on the same ranks, which load the model once."""

    def __init__(self, inputs: Inputs, expected: TokenStream, options: SweepOptions) -> None:
        """Plan the runs for the prompts and tokens of `expected`; GoldenError if none can be."""
        job = inputs.first(len(expected.prompt_names), expected.steps)
        self._facts, self._dp = inputs.facts, options.dp
        self._plans = [_plan(job, expected, *run) for run in _runs(job, expected, options)]
        for plan in self._plans[:1]:
            _require(plan, inputs.facts)
        self._running: Iterator[EngineRun] | None = None

    @property
    def options(self) -> list[EngineOptions]:
        """The runs."""
        return [plan.options for plan in self._plans]

    def run(self, number: int) -> Run:
        """Make the run of a number; ask for them in order.

        After an error the ranks are started again for those that are left.
        """
        if self._running is None:
            self._running = run_jobs([plan.ready for plan in self._plans[number:]], self._dp)
        try:
            run = next(self._running)
        except BaseException:
            self._running = None
            raise
        return self._plans[number].judge(run, self._facts)


def long_interpreted(ready: EngineJob, facts: ModelFacts) -> str:
    """Return how long the interpreter will take, where that is more than a few minutes; else ""."""
    job, config = ready.job, ready.config
    rows = sum(map(job.rows, range(len(job.prompts))))
    prompt_rows = sum(map(len, job.prompts))
    together = min(config.max_num_seqs, len(job.prompts))
    steps = -(-len(job.prompts) // together) * job.steps
    steps += -(-prompt_rows // config.max_num_batched_tokens)
    seconds = rows * facts.weights / MULTIPLY_ADDS + steps * len(facts.operations) * OPERATION
    if seconds < _LONG:
        return ""
    long = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
    return f"about {long} in the interpreter; fewer prompts and tokens take less"


@dataclass(frozen=True)
class _Plan:
    """One run: the prompts, what they are to give, and what ranks are told."""

    job: Job
    expected: TokenStream
    options: EngineOptions
    requests: Requests
    ready: EngineJob

    def judge(self, run: EngineRun, facts: ModelFacts) -> Run:
        """Return what ranks gave beside what is expected."""
        return as_run(run, self.job, facts, self.expected, self.options, self.requests)


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
    """Raise GoldenError for options that the model cannot run with, or ranks that are not here."""
    if not facts.has_cache and (serving := plan.options.serving):
        raise OptionError(
            serving,
            f"expected none for the model of {plan.job.model}, which is no transformer and runs in "
            "whole batches: omit it",
        )
    require_backend(plan.options.backend, plan.job.arch, plan.options.dp)


def _runs(
    job: Job, expected: TokenStream, options: SweepOptions
) -> Iterator[tuple[EngineOptions, list[int]]]:
    """Yield the runs of a sweep, and the prompts of each."""
    graphs = options.backend is Backend.GPU and get_arch(job.arch).trusts_cuda_graphs
    whole = [(*ids, *own) for ids, own in zip(job.prompts, expected.tokens.tolist(), strict=True)]
    for configuration in sweep(graphs=graphs):
        if configuration.num_speculative_tokens and job.draft is None:
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
    """Return the prompts of a configuration: all, or the longest, of which caches keep the most."""
    count = {"all": len(job.prompts), "three": 3, "one": 1}[configuration.prompts]
    longest = sorted(range(len(job.prompts)), key=lambda p: -len(job.prompts[p]))
    return sorted(longest[:count])
