"""Data parallelism: every rank runs an engine over its share of the requests, all step together.

Ranks share no rows, so nothing that one computes depends on another. Each step ends with one
collective, the sum of the requests that are left: a rank without work takes part with 0 and waits
for the others, and all stop after the same step. The sum is begun after a step and read after the
next one, so that nobody waits for it; at the end that costs one step without rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any, Protocol

from bitassay.engine.distributed.collectives import PendingSum
from bitassay.engine.distributed.group import Group
from bitassay.engine.scheduling.request import Output
from bitassay.engine.scheduling.stats import Stats
from bitassay.engine.serving import of_prompt
from bitassay.engine.trace import EngineTrace
from bitassay.reference.spec.errors import SequenceError

# Called with what a step gave: prompts' numbers and outputs.
OnOutputs = Callable[[list[tuple[int, Output]]], None]


class Steps(Protocol):
    """What of an engine is used here; see Engine."""

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs."""

    @property
    def stats(self) -> Stats:
        """What was counted so far."""

    def add_request(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        ignore_eos: bool = True,
    ) -> int:
        """Queue a request and return its number."""

    def cancel(self, request: int) -> None:
        """End a request."""

    def step(self) -> list[Output]:
        """Run one step."""

    def take_all(self, requests: Sequence[int], /) -> list[EngineTrace]:
        """Return the traces of requests that have ended."""


@dataclass(frozen=True)
class Requests:
    """What is to be generated, the same on every rank.

    prompts: token ids. order: the permutation in which they are spread and added, None as given.
    arrivals: for each prompt the step at which its rank adds it, None for all at the beginning.
    cancelled: for some prompts the number of tokens after which they are cancelled, 0 for while
    they wait; they have no trace, unless they end before.
    eos_token_id: where streams stop, one id or several, None for exactly max_tokens each.
    """

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    order: Sequence[int] | None = None
    arrivals: Sequence[int] | None = None
    cancelled: Mapping[int, int] = field(default_factory=dict)
    eos_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for an order, arrivals or cancelled that do not fit the prompts."""
        number = len(self.prompts)
        if self.order is not None and sorted(self.order) != list(range(number)):
            raise ValueError(f"order: expected a permutation of 0 … {number - 1}")
        if self.arrivals is not None and (
            len(self.arrivals) != number or min(self.arrivals, default=0) < 0
        ):
            raise ValueError(f"arrivals: expected {number} steps from 0, one a prompt")
        if (
            not set(self.cancelled) <= set(range(number))
            or min(self.cancelled.values(), default=0) < 0
        ):
            raise ValueError(f"cancelled: expected prompts 0 … {number - 1}, and tokens from 0")


@dataclass(frozen=True)
class Gathered:
    """What rank 0 has in the end: a trace a prompt, None for a cancelled one, and ranks' counts.

    stats: what each rank counted in this run, in the order of ranks. seconds: from the first step
    to the end of the last, on rank 0, compilation of kernels included where it was needed.
    """

    traces: list[EngineTrace | None]
    stats: list[Stats]
    seconds: float


def share(requests: Requests, rank: int, world_size: int) -> list[int]:
    """Return the numbers of a rank's prompts, in the order in which it takes them.

    They are dealt out in turn: rank r gets number r of the order, then r + world_size, and so on.
    """
    order = range(len(requests.prompts)) if requests.order is None else requests.order
    return list(order[rank::world_size])


def run_parallel(
    engine: Steps, requests: Requests, group: Group, on_outputs: OnOutputs | None = None
) -> Gathered | None:
    """Run this rank's share to the end, with the others; return all on rank 0, None elsewhere.

    told: called after each step that gave anything, with this rank's prompts alone. Raises what
    the engine raises, RankTimeout and RankLost naming ranks that do not take part any more.
    """
    counted = replace(engine.stats)
    own = _Share(engine, requests, share(requests, group.rank, group.world_size), on_outputs)
    begun = time.perf_counter()
    pending = _step(own, group, 0)
    for step in count(1):
        before, pending = pending, _step(own, group, step)
        if before.result() == 0:
            break
    _nothing_left(pending)
    seconds = time.perf_counter() - begun
    gathered = group.gather((own.traces(), _since(counted, engine.stats)))
    if gathered is None:
        return None
    traces: list[EngineTrace | None] = [None] * len(requests.prompts)
    for part, _ in gathered:
        for prompt, trace in part.items():
            traces[prompt] = trace
    return Gathered(traces, [stats for _, stats in gathered], seconds)


def _step(own: _Share, group: Group, step: int) -> PendingSum:
    """Run a step and begin the sum of what is left after it."""
    group.note(f"in step {step}")
    own.step(step)
    group.note(f"done with step {step}")
    return group.sum(step, own.left)


def total(stats: Sequence[Stats]) -> Stats:
    """Return the sum of what ranks counted; its steps are those of the longest."""
    sums: dict[str, Any] = {
        f.name: sum(getattr(own, f.name) for own in stats) for f in fields(Stats)
    }
    return Stats(**sums | {"steps": max(own.steps for own in stats)})


def _since(before: Stats, now: Stats) -> Stats:
    """Return what was counted between the two."""
    counts = {f.name: getattr(now, f.name) - getattr(before, f.name) for f in fields(Stats)}
    return Stats(**counts)


class _Share:
    """One rank's requests, from their arrival to their traces."""

    def __init__(
        self, engine: Steps, requests: Requests, prompts: list[int], on_outputs: OnOutputs | None
    ) -> None:
        self._engine, self._requests, self._on_outputs = engine, requests, on_outputs
        self._coming = prompts
        self._running: dict[int, int] = {}  # the engine's number of a request -> prompt
        self._finished: dict[int, int] = {}
        self._counts = dict.fromkeys(prompts, 0)  # tokens so far

    @property
    def left(self) -> int:
        """How many requests have not ended."""
        return len(self._coming) + len(self._running)

    def step(self, step: int) -> None:
        """Add what arrives, run the engine if it has work, and take what has ended."""
        self._arrive(step)
        self._cancel()
        if not self._engine.has_unfinished:
            return
        found = [(self._running[output.request], output) for output in self._outputs()]
        for prompt, output in found:
            self._counts[prompt] += len(output.tokens)
            if output.finished:
                self._finished[output.request] = self._running.pop(output.request)
        self._cancel()
        if self._on_outputs is not None and found:
            self._on_outputs(found)

    def traces(self) -> dict[int, EngineTrace]:
        """Return the traces by prompt, of all that were not cancelled."""
        traces = self._engine.take_all(list(self._finished))
        return dict(zip(self._finished.values(), traces, strict=True))

    def _cancel(self) -> None:
        """Cancel what has as many tokens as it was to have."""
        for number, prompt in list(self._running.items()):
            if self._counts[prompt] >= self._requests.cancelled.get(prompt, sys.maxsize):
                self._engine.cancel(number)
                del self._running[number]

    def _outputs(self) -> list[Output]:
        try:
            return self._engine.step()
        except SequenceError as error:  # the engine numbers its own requests
            if error.request is None or error.request not in self._running:
                raise
            prompt = self._running[error.request]
            length = len(self._requests.prompts[prompt])
            raise of_prompt(error, prompt, length) from error

    def _arrive(self, step: int) -> None:
        arrivals, coming = self._requests.arrivals, self._coming
        self._coming = [p for p in coming if arrivals is not None and arrivals[p] > step]
        for prompt in coming:
            if prompt not in self._coming:
                self._running[self._add(prompt)] = prompt

    def _add(self, prompt: int) -> int:
        ids, eos = self._requests.prompts[prompt], self._requests.eos_token_id
        try:
            return self._engine.add_request(
                ids, self._requests.max_tokens, eos_token_id=eos, ignore_eos=eos is None
            )
        except SequenceError as error:  # the number that it would have had means nothing to anyone
            raise error.located(request=None, prompt=prompt) from error


def _nothing_left(last: PendingSum) -> None:
    """Wait for the collective that is still under way: it sums zeros."""
    if (left := last.result()) != 0:
        raise RuntimeError(f"expected no request after the last step, found {left}")
