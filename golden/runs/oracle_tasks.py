"""The reference's work in tasks: what one task does, and how prompts are divided into tasks.

Rows are independent in the reference, so neither the division nor the process that takes a task
can change a bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitassay.golden.errors import GoldenError
from bitassay.golden.inputs.job import Job, Progress
from bitassay.golden.inputs.model_info import Reference
from bitassay.golden.streams.drafts import compared_fingerprints
from bitassay.golden.streams.traces import Arrays, trace_arrays
from bitassay.reference.spec.errors import SequenceError
from bitassay.reference.spec.rounds import draft_count

Tokens = tuple[int, ...]
Chosen = Callable[[dict[int, int]], None]  # called at each step: prompt -> the token it chose
Fed = Callable[[dict[int, int]], None]  # called now and then: prompt -> its rows done so far

_SECONDS = 0.5  # between two calls of Fed
REPLAYED_ROWS = 512  # of one task, as far as prompts can be divided
LITERAL_DRAFTS = 3  # draft tokens a round


@dataclass(frozen=True)
class Task:
    """Some prompts of a job, by number, and the tokens already known of each, equally many.

    Known tokens are replayed, and the rest is generated; one prompt alone is generated one token
    at a time, the sequential truth. binding: the known tokens must be what the model chooses.
    literal: rounds of drafts are drafted and verified one after the other (`literal`).
    """

    prompts: tuple[int, ...]
    recorded: tuple[Tokens, ...]
    binding: bool = True
    literal: bool = False

    @property
    def known(self) -> int:
        """How many tokens of each prompt are known."""
        return len(self.recorded[0])


def replaying(job: Job, tokens: dict[int, Tokens]) -> list[Task]:
    """Divide prompts whose tokens are all recorded, into tasks of a few hundred rows."""
    groups: list[list[int]] = []
    for prompt in _longest_first(job, tokens):
        rows = sum(map(job.rows, groups[-1])) if groups else 0
        if not groups or rows + job.rows(prompt) > REPLAYED_ROWS:
            groups.append([])
        groups[-1].append(prompt)
    return [Task(tuple(some), tuple(tokens[p] for p in some), binding=False) for some in groups]


def generating(job: Job, tokens: dict[int, Tokens], *, batch: int) -> list[Task]:
    """Divide prompts of which some tokens may be known, into tasks of at most `batch` prompts."""
    tasks = []
    for known in sorted(set(map(len, tokens.values()))):
        alike = {prompt: own for prompt, own in tokens.items() if len(own) == known}
        count = -(-len(alike) // batch)
        ordered = _longest_first(job, alike)
        for start in range(count):  # dealt out in turn, so that tasks are equally long
            some = ordered[start::count]
            tasks.append(Task(tuple(some), tuple(alike[p] for p in some)))
    return sorted(tasks, key=lambda task: sum(map(job.rows, task.prompts)), reverse=True)


def run_task(model: Reference, job: Job, task: Task, chosen: Chosen, fed: Fed) -> dict[int, Arrays]:
    """Return the traces of a task's prompts.

    Raises GoldenError where known tokens bind and are not what the model chooses, and SequenceError
    with the prompt's id and the step of its continuation.
    """
    traces = _run(model, job, task, chosen, fed)
    return dict(zip(task.prompts, traces, strict=True))


def _run(model: Reference, job: Job, task: Task, chosen: Chosen, fed: Fed) -> list[Arrays]:
    prompts = [job.prompts[prompt] for prompt in task.prompts]
    names = [job.prompt_names[prompt] for prompt in task.prompts]
    meter = _meter(job, task, fed)
    if task.literal:
        found = []
        for name, prompt in zip(names, prompts, strict=True):
            with _located([name]):
                found.append(literal(model, prompt, job.steps, meter))
        return found
    known = _replay(model, job, task, prompts, meter) if task.known else []
    if task.known == job.steps:
        return known
    begun = [prompt + own for prompt, own in zip(prompts, task.recorded, strict=True)]
    with _located(names, task.known):
        rest = _generate(model, begun, job.steps - task.known, task, chosen, meter)
    if not known:
        return rest
    if job.draft is None:
        return [_joined(*pair) for pair in zip(known, rest, strict=True)]
    # Drafts look across the seam, and are fewer near the end, so all of them are asked for anew.
    whole = [(*own, *new["tokens"].tolist()) for own, new in zip(task.recorded, rest, strict=True)]
    return _replay(model, job, replace(task, recorded=tuple(whole)), prompts, meter)


def _meter(job: Job, task: Task, fed: Fed) -> Progress:
    """Return what turns the model's progress into rows of each prompt, told now and then."""
    told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _SECONDS:
            told = time.monotonic()
            fed({p: job.rows(p) * done // total for p in task.prompts})

    return progress


def _replay(
    model: Reference, job: Job, task: Task, prompts: Sequence[Tokens], meter: Progress
) -> list[Arrays]:
    """Replay the known tokens; GoldenError when they bind and are not what the model chooses."""
    names = [job.prompt_names[prompt] for prompt in task.prompts]
    with _located(names):
        arrays = [trace_arrays(trace) for trace in model.replay_many(prompts, task.recorded, meter)]
    for name, own, recorded in zip(names, arrays, task.recorded, strict=True):
        if task.binding and tuple(own["tokens"].tolist()) != recorded:
            raise GoldenError(
                f"prompt {name}: the model does not choose the tokens noted when this recording "
                "was begun: delete its journal, below .work in the store, and begin again"
            )
    return arrays


def _generate(
    model: Reference,
    prompts: Sequence[Tokens],
    steps: int,
    task: Task,
    chosen: Chosen,
    meter: Progress,
) -> list[Arrays]:
    told: list[list[int]] = [[] for _ in prompts]

    def tell(tokens: list[int]) -> None:
        for own, token in zip(told, tokens, strict=True):
            own.append(token)
        chosen(dict(zip(task.prompts, tokens, strict=True)))

    # For a prompt alone this is the sequential truth.
    traces = model.generate_many(prompts, steps, meter, tell)
    arrays = [trace_arrays(trace) for trace in traces]
    if [own["tokens"].tolist() for own in arrays] != told:
        raise RuntimeError("the tokens told step by step are not those of the trace")
    return arrays


def _joined(known: Arrays, rest: Arrays) -> Arrays:
    """One trace of two parts; the prompt's rows are those of the first."""
    joined = {name: np.concatenate([known[name], rest[name]]) for name in known}
    return joined | {"prompt_fingerprints": known["prompt_fingerprints"]}


@contextmanager
def _located(names: Sequence[str], known: int = 0) -> Iterator[None]:
    """Name prompts as the job does, and count steps from the end of the prompt.

    Errors number both within the call that raised them. names: the prompts' of that call; known:
    tokens of each that it was given as part of the prompt.
    """
    try:
        yield
    except SequenceError as error:
        prompt = names[error.prompt] if isinstance(error.prompt, int) else error.prompt
        step = None if error.step is None else error.step + known
        raise error.located(prompt=prompt, step=step) from error


def _longest_first(job: Job, prompts: dict[int, Tokens]) -> list[int]:
    return sorted(prompts, key=lambda prompt: (-job.rows(prompt), prompt))


def literal(model: Any, prompt: Sequence[int], steps: int, progress: Progress) -> Arrays:
    """Return the arrays of one prompt as the loop itself gives them, round by round.

    A golden has drafts after every token, and the loop drafts only where a round begins. What the
    loop said stands; the rest is replayed from its tokens. So a comparison sees every bit of the
    loop, and where it contradicts the replay.
    """
    said = trace_arrays(model.generate(prompt, steps, LITERAL_DRAFTS))
    tokens = said["tokens"].tolist()
    (trace,) = model.replay_many([prompt], [tokens], progress)
    return overlaid(said, trace_arrays(trace))


def overlaid(said: Arrays, replayed: Arrays) -> Arrays:
    """Return a replay's arrays with what the loop said in their place, wherever it said it."""
    found = said | {name: array.copy() for name, array in replayed.items() if "draft" in name}
    found["accepted"] = replayed["accepted"].copy()
    steps, operations = len(said["tokens"]), said["draft_prompt_fingerprints"].size
    run = []
    for t in np.flatnonzero(said["accepted"] >= 0).tolist():
        drafted, right = draft_count(t, steps, LITERAL_DRAFTS), int(said["accepted"][t])
        run.append((t, drafted, right))
        some = min(drafted, right + 1)
        found["draft_tokens"][t, :some] = said["draft_tokens"][t, :some]
        if right < drafted or replayed["accepted"][t] < right:
            found["accepted"][t] = right
    (there,) = compared_fingerprints([run], steps, operations)
    found["draft_fingerprints"][there] = said["draft_fingerprints"][there]
    if any(drafted for _, drafted, _ in run):
        found["draft_prompt_fingerprints"] = said["draft_prompt_fingerprints"]
    return found
