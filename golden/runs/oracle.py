"""Streams of the reference: generated step by step, or replayed from what is recorded.

A row sees only tokens before it. So if the reference, fed a recorded stream, chooses the recorded
token at every step, the record is what it generates, by induction over the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bitassay.golden.inputs.job import Job, Progress
from bitassay.golden.inputs.model_info import ModelFacts
from bitassay.golden.runs.collect import collect
from bitassay.golden.runs.oracle_tasks import Tokens, generating, replaying
from bitassay.golden.runs.process_pool import Crew, run
from bitassay.golden.storage.journal import Journal
from bitassay.golden.streams.token_stream import TokenStream
from bitassay.golden.streams.traces import Arrays

ALONE = Crew(1)
BATCH = 32  # prompts of one task, where every CPU has one
JOURNALED = 8  # fewer, so that a kill loses less of what only a finished task leaves


@dataclass(frozen=True)
class Replayed:
    """A stream, and the names of prompts whose recorded tokens were not what was chosen.

    Those were generated step by step instead.
    """

    stream: TokenStream
    regenerated: tuple[str, ...]


class _Collector:
    """Gathers traces, counts rows for the progress, and notes both in a journal if there is one."""

    def __init__(self, job: Job, progress: Progress, journal: Journal | None = None) -> None:
        self.traces: dict[int, Arrays] = {}
        self.known: dict[int, Tokens] = {}
        self._job, self._progress, self._journal = job, progress, journal
        self._rows = [0] * len(job.prompts)
        self._fed = [0] * len(job.prompts)  # within a step; for the progress alone
        self._total = sum(map(job.rows, range(len(job.prompts))))
        if journal:
            self.known = {prompt: tuple(own) for prompt, own in journal.tokens.items()}
        self._take(journal.traces if journal else {})

    def chosen(self, tokens: dict[int, int]) -> None:
        if self._journal:
            self._journal.chosen(tokens)
        for prompt in tokens:
            first = len(self._job.prompts[prompt]) + len(self.known.get(prompt, ()))
            self._rows[prompt] = max(first, self._rows[prompt] + 1)
        self._tell()

    def fed(self, rows: dict[int, int]) -> None:
        for prompt, count in rows.items():
            self._fed[prompt] = max(self._fed[prompt], count)
        self._tell()

    def finished(self, arrays: dict[int, Arrays]) -> None:
        if self._journal:
            self._journal.finished(arrays)
        self._take(arrays)

    def forget(self, prompts: Sequence[int]) -> None:
        for prompt in prompts:
            self._rows[prompt] = self._fed[prompt] = 0
        self._tell()

    def stream(self, facts: ModelFacts) -> TokenStream:
        return collect([self.traces[p] for p in range(len(self._job.prompts))], self._job, facts)

    def _take(self, arrays: dict[int, Arrays]) -> None:
        self.traces |= arrays
        for prompt in arrays:
            self._rows[prompt] = self._job.rows(prompt)
        self._tell()

    def _tell(self) -> None:
        self._progress(sum(map(max, self._rows, self._fed)), self._total)


def generate(
    job: Job,
    facts: ModelFacts,
    progress: Progress,
    *,
    crew: Crew = ALONE,
    sequential: bool = False,
    journal: Journal | None = None,
) -> TokenStream:
    """Generate step by step, many prompts at a time; sequential: one prompt and token at a time.

    With a draft head, sequential is its literal loop, draft by draft and round by round; what no
    round of it comes to is replayed.

    journal: what it holds is not generated again, and what is generated goes into it. Raises
    GoldenError when that is not of this job, or not what the model chooses.
    """
    if journal:
        journal.require_fits(
            len(job.prompts),
            job.steps,
            facts.vocab_size,
            operations=len(facts.operations),
            drafting=len(facts.draft_operations),
        )
    collector = _Collector(job, progress, journal)
    tokens = {
        prompt: collector.known.get(prompt, ())
        for prompt in range(len(job.prompts))
        if prompt not in collector.traces
    }
    most = 1 if sequential else JOURNALED if journal else BATCH
    _generate(job, tokens, crew, collector, most, literal=sequential)
    return collector.stream(facts)


def replay(
    job: Job,
    facts: ModelFacts,
    tokens: Sequence[Sequence[int]],
    progress: Progress,
    *,
    crew: Crew = ALONE,
) -> TokenStream:
    """Ask for the choice after every recorded token; tokens [S][T]."""
    return _replay(job, tokens, progress, crew).stream(facts)


def replay_or_generate(
    job: Job,
    facts: ModelFacts,
    tokens: Sequence[Sequence[int]],
    progress: Progress,
    *,
    crew: Crew = ALONE,
) -> Replayed:
    """Replay recorded tokens, and generate those prompts whose choices are not the recorded."""
    collector = _replay(job, tokens, progress, crew)
    other = [
        prompt
        for prompt, own in sorted(collector.traces.items())
        if own["tokens"].tolist() != list(tokens[prompt])
    ]
    if other:
        collector.forget(other)
        _generate(job, dict.fromkeys(other, ()), crew, collector, BATCH)
    return Replayed(collector.stream(facts), tuple(job.prompt_names[p] for p in other))


def _replay(
    job: Job, tokens: Sequence[Sequence[int]], progress: Progress, crew: Crew
) -> _Collector:
    collector = _Collector(job, progress)
    recorded = {prompt: tuple(own) for prompt, own in enumerate(tokens)}
    run(job, replaying(job, recorded), crew, collector)
    return collector


def _generate(
    job: Job,
    tokens: dict[int, Tokens],
    crew: Crew,
    collector: _Collector,
    most: int,
    *,
    literal: bool = False,
) -> None:
    batch = max(1, min(most, -(-len(tokens) // crew.jobs)))
    tasks = generating(job, tokens, batch=batch)
    if literal and job.draft is not None:
        tasks = [replace(task, literal=True) for task in tasks]
    run(job, tasks, crew, collector)
