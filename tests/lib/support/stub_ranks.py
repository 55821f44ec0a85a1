"""A rank of a group for tests: an engine that needs no model, and one thing that goes wrong.

`python stub_ranks.py FAULT TIMEOUT PROMPTS`, with RANK, WORLD_SIZE and the store's address in the
environment. Rank 0 prints what was gathered, as JSON. The fault happens on the last rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from bitassay.engine.distributed import group as group_module
from bitassay.engine.distributed.group import Group
from bitassay.engine.distributed.parallel import Requests, run_parallel, total
from bitassay.engine.distributed.rendezvous import RankError, RankInfo
from bitassay.engine.scheduling.request import Output
from bitassay.engine.scheduling.stats import Stats
from bitassay.engine.trace import EngineTrace
from bitassay.reference.spec.errors import SequenceError

STEP = 4  # at which things go wrong


class StubEngine:
    """Runs up to two requests at once, one token a step: the sum of the ids, and their count."""

    def __init__(self) -> None:
        self.stats = Stats()
        self._queue: dict[int, tuple[list[int], int]] = {}
        self._tokens: dict[int, list[int]] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._queue)

    def add_request(
        self,
        prompt_ids: Any,
        max_tokens: int,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        ignore_eos: bool = True,
    ) -> int:
        number = len(self._tokens)
        if not prompt_ids:
            raise ValueError(f"request {number}: expected ids, found none")
        self._queue[number] = (list(prompt_ids), max_tokens)
        self._tokens[number] = []
        return number

    def cancel(self, request: int) -> None:
        del self._queue[request]

    def step(self) -> list[Output]:
        outputs = []
        for number in list(self._queue)[:2]:
            prompt, count = self._queue[number]
            own = self._tokens[number]
            own.append(sum(prompt) + len(own))
            if own[-1] == 666:
                raise SequenceError("expected no 666", request=number, step=len(own))
            finished = len(own) == count
            if finished:
                del self._queue[number]
            outputs.append(Output(number, own[-1:], finished, "length" if finished else None))
        self.stats.steps += 1
        self.stats.tokens += len(outputs)
        return outputs

    def take_all(self, requests: list[int]) -> list[EngineTrace]:
        none = torch.zeros(0, dtype=torch.int64)
        tokens = [torch.tensor(self._tokens[number], dtype=torch.int32) for number in requests]
        return [EngineTrace(own, none, none, none, none, none, None) for own in tokens]


def plant(fault: str, group: Group) -> None:
    """Make the fault happen on the last rank, at its step STEP."""
    if fault == "stuck" and group.rank == 0:
        group_module._PATIENCE = 2.0
        stepped = StubEngine.step

        def stuck(self: StubEngine) -> list[Output]:
            if self.stats.steps > STEP:
                time.sleep(600)  # as a step that waits for the GPU, which waits for the others
            return stepped(self)

        StubEngine.step = stuck  # type: ignore[method-assign]
    if group.rank != group.world_size - 1 or fault == "none":
        return
    whole = Group.sum

    def faulty(self: Group, step: int, count: int) -> Any:
        if step == STEP:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault in ("skip", "stuck"):
                time.sleep(600)  # it lives, its heart beats, and it takes no part
            if fault == "freeze in":
                assert self._heartbeat is not None
                self._heartbeat.enter(self._entered + 1)
                time.sleep(1.2)  # for two beats to say so
                os.kill(os.getpid(), signal.SIGSTOP)
        return whole(self, step + (fault == "astray" and step >= STEP), count)

    Group.sum = faulty  # type: ignore[method-assign]


def end(error: RankError | ValueError) -> NoReturn:
    """Tell an error and end this process, as a rank does."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(3)


def main(fault: str, timeout: float, prompts: list[list[int]]) -> None:
    rank_info = RankInfo.from_environment()
    requests = Requests(prompts, 9, order=list(reversed(range(len(prompts)))), cancelled={1: 1})
    with Group.join(rank_info, device="cpu", timeout=timeout, stuck=end) as group:
        plant(fault, group)
        told: list[int] = []
        gathered = run_parallel(
            StubEngine(), requests, group, lambda outputs: told.extend(p for p, _ in outputs)
        )
    if gathered is not None:
        traces = [None if t is None else t.tokens.tolist() for t in gathered.traces]
        found = {"tokens": traces, "total": total(gathered.stats).tokens, "told": sorted(set(told))}
        print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3]))
    except (RankError, ValueError) as error:
        end(error)
    sys.stdout.flush()
    os._exit(0)
