"""Which rows run in the next step: continuous batching within a budget of rows and of blocks.

Requests are served in the order of their arrival, running ones before waiting ones: whoever waits
has arrived after all that run, and the head of the queue is never passed over, so that none
starves.

A step always advances the first running request. Its rows fit the budget, which is at least K + 1.
Its blocks can be had, if need be by preempting everybody after it, since alone it never needs more
than blocks_for(P + T - 1), and requests that do are refused (`checks.check_blocks`). So it is never
preempted itself and ends in finitely many steps; then the next one is first. With none running the
head of the queue is admitted, because all blocks are available then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from bitassay.engine.config import EngineConfig
from bitassay.engine.scheduling.blocks import BlockManager
from bitassay.engine.scheduling.request import Output, Request, Status
from bitassay.engine.scheduling.stats import Stats
from bitassay.engine.scheduling.step_plan import Result, Rows

Given = Callable[[Result, Output], None]


class Scheduler:
    """The queue, the running requests and their blocks; no tensor is touched here."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, stats: Stats) -> None:
        self._config, self._blocks, self._stats = config, blocks, stats
        # The head's chain writes rows after the last draft: those of drafts 1 … K - 1.
        self._lookahead = max(0, (config.num_speculative_tokens or 0) - 1)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._scheduled: list[tuple[Request, Rows]] = []
        self._torn = False

    def check(self) -> None:
        """Raise RuntimeError if an error or an interrupt came while requests were being changed."""
        if self._torn:
            raise RuntimeError(
                "expected whole books of requests and blocks, found them as an error or an "
                "interrupt left them halfway: go on with a new engine"
            )

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue; it must fit the cache (`check_blocks`)."""
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request that waits or runs; its blocks come back, nobody else's rows change."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._blocks.release(request)
        else:
            self.waiting.remove(request)
        request.status, request.finish_reason = Status.CANCELLED, "cancelled"

    def schedule(self) -> list[Rows]:
        """Return the rows of the next step, at most one part a request; none if none is left."""
        self.check()
        self._torn = True
        self._scheduled = []
        budget, preempted = self._config.max_num_batched_tokens, self._stats.preemptions
        for request in list(self.running):
            count = _count(request, budget)
            if request.status is Status.RUNNING and count and self._make_room(request, count):
                budget -= self._plan(request, count)
        if self._stats.preemptions == preempted:  # else they would come straight back
            self._admit(budget)
        self._torn = False
        return [rows for _, rows in self._scheduled]

    def update(
        self, results: Sequence[Result], given: Given, ended: Callable[[Request], None]
    ) -> None:
        """Take the results of the rows last scheduled.

        given: called with each result and what is new by it, in the order of the rows. ended:
        called with each request that ends, while it still holds its blocks.
        """
        found = {result.request: result for result in results}
        self._torn = True
        for request, rows in self._scheduled:
            if rows.chooses:
                result = found[request.number]
                given(result, self._extend(request, result))
            else:
                request.computed += len(rows.ids)
            self._blocks.register(request)
            if request.done:
                ended(request)
                self.running.remove(request)
                self._blocks.release(request)
        self._torn = False

    def _extend(self, request: Request, result: Result) -> Output:
        """Give a request its tokens, and count them."""
        if request.drafts:
            self._stats.rounds += 1
            self._stats.drafted += len(request.drafts)
            self._stats.accepted += result.accepted
        tokens = request.extend(result.tokens, result.accepted, result.drafts)
        self._stats.tokens += len(tokens)
        return Output(request.number, tokens, request.done, request.finish_reason)

    def _admit(self, budget: int) -> None:
        """Start requests from the head of the queue, until one does not fit."""
        while self.waiting and len(self.running) < self._config.max_num_seqs:
            request = self.waiting[0]
            # Blocks for all that is known, though a first chunk needs less: to begin what cannot
            # go on would only displace others. The cache may hold all rows but the tail's.
            known = self._end(request, request.untouched + request.tail)
            if budget < request.tail or not self._blocks.admit(request, known):
                return
            self._stats.prefix_hit_tokens += request.computed
            request.status = Status.RUNNING
            self.running.append(self.waiting.popleft())
            budget -= self._plan(request, _count(request, budget))

    def _make_room(self, request: Request, count: int) -> bool:
        """Give a request the blocks for its next rows, if need be those of whoever came last.

        False if that is the request itself. Nobody before it is touched, so no rows that are
        already in the step lose their blocks.
        """
        while not self._blocks.grow(request, self._end(request, count)):
            last = self.running.pop()
            self._blocks.release(last)
            last.status = Status.WAITING  # it keeps its ids and drafts: what they were is known
            self.waiting.appendleft(last)
            self._stats.preemptions += 1
            if last is request:
                return False
        return True

    def _end(self, request: Request, count: int) -> int:
        """Return the position after the last that `count` more rows write, the chain included."""
        end = request.computed + count
        if count > request.untouched:  # only the tail is followed by a chain
            end = min(end + self._lookahead, request.limit + 1)
        return end

    def _plan(self, request: Request, count: int) -> int:
        """Put the next `count` rows of a request into the step."""
        first, end = request.computed, request.computed + count
        chooses = count > request.untouched
        rows = Rows(
            request=request.number,
            table=list(request.table),
            first=first,
            ids=request.ids[first:end] + (request.drafts if chooses else []),
            drafts=len(request.drafts) if chooses else 0,
            chooses=chooses,
            next_id=None if chooses else request.ids[end],
            limit=request.limit,
        )
        self._scheduled.append((request, rows))
        return count


def _count(request: Request, budget: int) -> int:
    """Return how many rows of a request run within a budget: its tail whole, or not at all."""
    if request.untouched + request.tail <= budget:
        return request.untouched + request.tail
    return min(request.untouched, budget)
