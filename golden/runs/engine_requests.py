"""A job as the serving engine's requests, and its traces as a stream to compare with the golden."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitassay.engine.scheduling.blocks import BLOCK_SIZE
from bitassay.golden.errors import GoldenError
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import ModelFacts
from bitassay.golden.runs.engine_job import EngineJob, EngineRun
from bitassay.golden.runs.engine_options import EVICTIONS, HITS, PREEMPTIONS, EngineOptions
from bitassay.golden.runs.runner import Run
from bitassay.golden.streams.drafts import DraftStream, run_of
from bitassay.golden.streams.token_stream import (
    ARRAYS,
    TokenStream,
    from_parts,
    ragged,
    take,
)
from bitassay.golden.streams.traces import Arrays, as_stored
from bitassay.reference.spec.contract import DRAFT_DEPTH


@dataclass(frozen=True)
class Requests:
    """Which prompt of a job each request of the engine continues, and which are cancelled."""

    prompts: tuple[int, ...]
    cancelled: frozenset[int]

    @property
    def kept(self) -> list[int]:
        """The numbers of the requests that run to their end."""
        return [r for r in range(len(self.prompts)) if r not in self.cancelled]


def lay_out(prompts: int, options: EngineOptions) -> Requests:
    """Return the requests of a run; a copy that is cancelled comes right after its original."""
    order = [*range(prompts), *(reversed(range(prompts)) if options.mirrored else ())]
    found: list[int] = []
    cancelled: set[int] = set()
    for place, prompt in enumerate(order, 1):
        found.append(prompt)
        if options.cancel is not None and (place % options.cancel == 0 or place == prompts == 1):
            cancelled.add(len(found))
            found.append(prompt)
    if options.cancel is not None and not cancelled:
        raise GoldenError(
            f"--cancel {options.cancel}: expected at most {len(order)}, as many as there are "
            "prompts: no neighbour would be cancelled"
        )
    return Requests(tuple(found), frozenset(cancelled))


def engine_job(job: Job, options: EngineOptions, requests: Requests) -> EngineJob:
    """Return what ranks are to run."""
    count = len(requests.prompts)
    order = arrivals = None
    if options.shuffle is not None:
        order = tuple(random.Random(options.shuffle).sample(range(count), count))
    if options.late is not None:
        chance = random.Random(options.late)
        arrivals = tuple(chance.randrange(count) for _ in range(count))
    config = replace(
        options.config(head=job.draft is not None),
        num_blocks=options.num_blocks or _ample(job, options),
    )
    return EngineJob(
        # The head is loaded with K = 0 as well, so that other runs find it there.
        replace(
            job,
            prompt_names=tuple(job.prompt_names[prompt] for prompt in requests.prompts),
            prompts=tuple(job.prompts[prompt] for prompt in requests.prompts),
        ),
        config,
        options.backend,
        order=order,
        arrivals=arrivals,
        cancelled=dict.fromkeys(sorted(requests.cancelled), max(1, job.steps // 2)),
        warm=options.warm,
        timeout=options.timeout,
    )


def as_run(
    run: EngineRun,
    job: Job,
    facts: ModelFacts,
    golden: TokenStream,
    options: EngineOptions,
    requests: Requests,
) -> Run:
    """Return what an engine gave beside the golden's streams of the same prompts.

    What was drafted is compared as far as the rounds of such a run come to it, and with K = 0 not
    at all.
    """
    drafting = options.drafts(head=job.draft is not None)
    prompts = [requests.prompts[r] for r in requests.kept]
    expected = take(golden, prompts)
    drafts = run_of(expected.drafts, drafting) if expected.drafts and drafting else None
    expected = replace(expected, drafts=drafts)
    traces: list[Arrays] = []
    for r in requests.kept:
        if (trace := run.traces[r]) is None:
            name = job.prompt_names[requests.prompts[r]]
            raise GoldenError(f"expected the engine's trace of {name}, found none")
        traces.append(trace)
    ran = [list(job.prompts[prompt]) for prompt in prompts]
    found = _stream(traces, ran, expected, facts)
    return Run(expected, found, missing(run, job, options, requests), run.total)


def blocks(job: Job) -> list[int]:
    """Return how many blocks of the cache each prompt and its continuation fill or begin."""
    return [-(-(len(prompt) + job.steps - 1) // BLOCK_SIZE) for prompt in job.prompts]


def filled(sequences: Iterable[Sequence[int]]) -> int:
    """Return how many different blocks sequences fill, at least: the last ids may not be fed."""
    return len(
        {
            tuple(ids[:end])
            for ids in sequences
            for end in range(BLOCK_SIZE, len(ids) - 1, BLOCK_SIZE)
        }
    )


def _ample(job: Job, options: EngineOptions) -> int:
    """Room for all that run at once, and for all that the prefix cache may keep."""
    own = blocks(job)
    together = max(own) * min(options.max_num_seqs, 2 * len(own))
    return together + (sum(own) if options.enable_prefix_caching else 0)


def _stream(
    traces: Sequence[Arrays], prompts: list[list[int]], expected: TokenStream, facts: ModelFacts
) -> TokenStream:
    """The traces as a stream of the prompts that were run, named as expected."""
    named = [name for name in ARRAYS if name not in ("prompt_ids", "prompt_offsets")]
    for name, trace in zip(expected.prompt_names, traces, strict=True):
        if len(trace["tokens"]) != expected.steps:
            raise GoldenError(
                f"{name}: expected {expected.steps} tokens of the engine, found "
                f"{len(trace['tokens'])}"
            )
    arrays = {name: np.stack([as_stored(trace[name], name) for trace in traces]) for name in named}
    arrays |= ragged(prompts)
    labels = {
        "operations": facts.operations,
        "prompt_names": expected.prompt_names,
        "logits_dtype": facts.logits_dtype,
        "vocab_size": facts.vocab_size,
    }
    stream = from_parts(arrays, labels)
    if expected.drafts is None:
        return stream
    return replace(stream, drafts=_drafts(traces, expected.steps, facts.draft_operations))


def _drafts(traces: Sequence[Arrays], steps: int, operations: tuple[str, ...]) -> DraftStream:
    """What the rounds of each trace drafted, beyond their first mismatch too."""
    shape = (len(traces), steps, DRAFT_DEPTH)
    tokens, accepted = np.full(shape, -1, "<i4"), np.full(shape[:2], -1, "<i4")
    row_fingerprints = np.zeros((*shape, len(operations)), "<u8")
    runs = []
    for s, trace in enumerate(traces):
        if "rounds" not in trace:
            raise GoldenError("expected the engine's drafts, found none: it ran without a head")
        row_fingerprints[s, :, 0] = as_stored(trace["draft_first_pass"], "draft_fingerprints")
        runs.append(tuple((int(t), int(d), int(a)) for t, d, a in trace["rounds"]))
        for n, (t, drafted, right) in enumerate(runs[-1]):
            if not 0 <= t < steps:
                continue  # such a round is a difference by itself
            some = min(drafted, DRAFT_DEPTH)
            accepted[s, t] = min(right, DRAFT_DEPTH)
            tokens[s, t, :some] = trace["draft_tokens"][n, :some]
            own = as_stored(trace["draft_fingerprints"][n, :some], "draft_fingerprints")
            row_fingerprints[s, t, :some] = own
    folds = np.stack(
        [as_stored(x["draft_prompt_fingerprints"], "draft_prompt_fingerprints") for x in traces]
    )
    return DraftStream(tokens, accepted, row_fingerprints, folds, operations, tuple(runs))


def missing(
    run: EngineRun, job: Job, options: EngineOptions, requests: Requests
) -> tuple[str, ...]:
    """Return what a run was made for and did not come to."""
    stats = run.total
    seen = {PREEMPTIONS: stats.preemptions, HITS: stats.prefix_hit_tokens}
    must = [*options.must, *([HITS] if options.warm and HITS not in options.must else [])]
    absent = [what for what in must if what in seen and not seen[what]]
    if EVICTIONS in must and not _evicted(run, job, options, requests):
        absent.append(EVICTIONS)
    if any(run.traces[r] is not None for r in requests.cancelled):
        absent.append("cancelled neighbours")
    return tuple(absent)


def _evicted(run: EngineRun, job: Job, options: EngineOptions, requests: Requests) -> bool:
    """Whether blocks were taken from the prefix cache: more were filled than there are."""
    if options.num_blocks is None:
        return False
    whole = [
        (*job.prompts[requests.prompts[r]], *trace["tokens"].tolist())
        for r in requests.kept
        if (trace := run.traces[r]) is not None
    ]
    return filled(whole) > options.dp * options.num_blocks
