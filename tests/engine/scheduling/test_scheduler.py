"""Which rows run in which step: cases that a random load would not name."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from bitassay.engine.config import EngineConfig
from bitassay.engine.scheduling.blocks import BLOCK_SIZE, BlockManager
from bitassay.engine.scheduling.request import Output, Request, Status
from bitassay.engine.scheduling.scheduler import Scheduler
from bitassay.engine.scheduling.stats import Stats
from bitassay.engine.scheduling.step_plan import Result, Rows

B = BLOCK_SIZE


class Loop:
    """A scheduler whose results a test makes up: by default 7, with K drafts of 5."""

    def __init__(self, num_blocks: int = 64, **options: Any) -> None:
        self.config = EngineConfig(num_blocks=num_blocks, **options)
        self.stats = Stats()
        depth = self.config.num_speculative_tokens or 0
        self.blocks = BlockManager(
            num_blocks, caching=self.config.enable_prefix_caching, drafting=depth > 0
        )
        self.scheduler = Scheduler(self.config, self.blocks, self.stats)
        self.numbers = count()
        self.ended: list[int] = []

    def add(self, prompt: list[int], max_tokens: int = 8) -> Request:
        made = Request(next(self.numbers), prompt, max_tokens)
        self.scheduler.add(made)
        return made

    def step(self, accepted: int = 0) -> list[Rows]:
        rows = self.scheduler.schedule()
        drafts = [5] * (self.config.num_speculative_tokens or 0)
        results = []
        for part in rows:
            if part.chooses:
                taken = min(accepted, part.drafts)
                results.append(Result(part.request, [5] * taken + [7], taken, drafts, None))  # type: ignore[arg-type]
        self.outputs: list[Output] = []
        self.scheduler.update(
            results,
            lambda result, output: self.outputs.append(output),
            lambda request: self.ended.append(len(request.table)),
        )
        return rows


def test_a_prompt_is_cut_into_chunks_and_its_last_row_chooses() -> None:
    loop = Loop(max_num_batched_tokens=16)
    loop.add(list(range(40)), max_tokens=2)
    steps = [loop.step()[0] for _ in range(4)]
    assert [(s.first, len(s.ids), s.chooses, s.next_id) for s in steps] == [
        (0, 16, False, 16),
        (16, 16, False, 32),
        (32, 8, True, None),
        (40, 1, True, None),
    ]
    assert steps[3].ids == [7]
    assert {s.limit for s in steps} == {40}
    assert loop.step() == []


def test_running_requests_go_before_waiting_ones() -> None:
    loop = Loop(max_num_batched_tokens=10)
    loop.add(list(range(9)))
    loop.add(list(range(30)))
    assert [(s.request, len(s.ids)) for s in loop.step()] == [(0, 9), (1, 1)]
    assert [(s.request, len(s.ids)) for s in loop.step()] == [(0, 1), (1, 9)]


def test_a_token_and_its_drafts_run_together_or_not_at_all() -> None:
    loop = Loop(num_speculative_tokens=3, max_num_batched_tokens=6)
    loop.add([1, 2], max_tokens=20)
    loop.add([3, 4], max_tokens=20)
    assert [(s.request, len(s.ids), s.drafts) for s in loop.step()] == [(0, 2, 0), (1, 2, 0)]
    for _ in range(3):  # 4 rows of 6 go to the first; 2 are too few for the other's tail
        assert [(s.request, len(s.ids), s.drafts) for s in loop.step()] == [(0, 4, 3)]
    assert loop.scheduler.running[1].drafts == [5, 5, 5]


def test_drafts_end_where_the_last_token_is_the_targets_own() -> None:
    loop = Loop(num_speculative_tokens=3)
    loop.add([1, 2], max_tokens=5)
    drafts = [loop.step()[0].drafts for _ in range(5)]
    assert drafts == [0, 3, 2, 1, 0]
    assert loop.outputs[0].finish_reason == "length"
    assert loop.stats.rounds == 3  # those that had drafts
    assert loop.stats.drafted == 6
    assert loop.stats.acceptance_length == 1.0


def test_accepted_drafts_are_tokens() -> None:
    loop = Loop(num_speculative_tokens=3)
    made = loop.add([1, 2], max_tokens=6)
    loop.step()
    loop.step(accepted=2)
    assert loop.outputs[0].tokens == [5, 5, 7]
    assert made.computed == 2 + 3
    loop.step(accepted=1)
    assert made.rounds == [(0, 3, 2), (3, 1, 1)]
    assert made.tokens == [7, 5, 5, 7, 5, 7]
    assert loop.stats.acceptance_length == 1 + 3 / 2


def test_a_round_keeps_what_was_accepted_behind_an_eos() -> None:
    made = Request(0, [1, 2], 20, eos_token_ids=(0, 9), ignore_eos=False)
    assert made.extend([7], 0, [5, 0, 9, 5]) == [7]
    assert made.extend([5, 0, 9, 5, 7], 4, [5, 5, 5, 5]) == [5, 0]
    assert made.rounds == [(0, 4, 4)]
    assert (made.tokens, made.finish_reason, made.drafts) == ([7, 5, 0], "stop", [])


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "blocks"),
    # After the prompt the head's chain of 5 writes 4 rows more, up to the last position P + T - 2.
    [(B - 4, 40, 1), (B - 3, 40, 2), (B - 3, 4, 1), (B - 3, 5, 2)],
)
def test_a_table_covers_the_heads_chain(prompt: int, max_tokens: int, blocks: int) -> None:
    loop = Loop(num_speculative_tokens=5)
    loop.add([1] * prompt, max_tokens)
    assert len(loop.step()[0].table) == blocks


def test_a_table_covers_drafts_and_the_chain_after_them() -> None:
    loop = Loop(num_speculative_tokens=5)
    loop.add([1] * 6, 40)
    assert len(loop.step()[0].table) == 1
    assert len(loop.step()[0].table) == 1  # rows 6 … 11, chain up to 15
    assert len(loop.step()[0].table) == 2  # rows 7 … 12, chain up to 16


def test_the_last_to_come_gives_its_blocks_to_who_came_before() -> None:
    loop = Loop(num_blocks=2, max_num_batched_tokens=64)
    first, second = loop.add([1] * B, 3), loop.add([2] * (B - 2), 3)
    loop.step()
    tokens = list(second.ids)
    assert [s.request for s in loop.step()] == [0]  # it needs a second block
    assert second.status is Status.WAITING
    assert (second.table, second.computed, second.ids) == ([], 0, tokens)
    assert loop.stats.preemptions == 1
    loop.step()
    assert first.done
    again = loop.step()[0]
    assert (again.request, again.first, again.ids) == (1, 0, tokens)  # chosen once, fed again
    assert again.chooses


def test_a_preempted_request_finds_its_own_blocks() -> None:
    loop = Loop(num_blocks=4, max_num_batched_tokens=64)
    loop.add([1] * B, 3)
    second = loop.add([2] * (2 * B), 2)
    loop.step()
    loop.step()
    assert (loop.stats.preemptions, second.status) == (1, Status.WAITING)
    loop.step()
    (again,) = loop.step()
    # One of its blocks was free again and is found; the other was not full of what is known.
    assert again.first == loop.stats.prefix_hit_tokens > 0
    assert second.done


def test_whoever_is_preempted_keeps_its_drafts() -> None:
    loop = Loop(num_blocks=2, num_speculative_tokens=2)
    loop.add([1] * (B - 4), 8)
    second = loop.add([2, 2], 8)
    loop.step()
    assert len(loop.step()) == 2
    assert [s.request for s in loop.step()] == [0]  # its chain enters a second block
    assert (second.status, second.drafts, second.generated) == (Status.WAITING, [5, 5], 2)
    while (again := loop.step()[0]).request == 0:
        pass
    assert (again.first, again.ids, again.drafts) == (0, [2, 2, 7, 7, 5, 5], 2)
    assert second.rounds == [(0, 2, 0), (1, 2, 0)]


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    """Whoever was preempted would come straight back, by what its twin has in the cache."""
    loop = Loop(num_blocks=3, max_num_batched_tokens=64)
    loop.add([1] * B, 4)
    second = loop.add([1] * B, 4)
    assert [s.request for s in loop.step()] == [0, 1]
    assert [s.request for s in loop.step()] == [0]  # it takes the last block, the twin needs one
    assert (loop.stats.preemptions, second.status) == (1, Status.WAITING)
    assert loop.blocks.available == 1  # enough, since the first block is the twin's as well
    assert [(s.request, s.first) for s in loop.step()] == [(0, B + 1), (1, B)]
    assert loop.stats.preemptions == 1


def test_the_head_of_the_queue_is_never_passed_over() -> None:
    loop = Loop(num_blocks=4, max_num_batched_tokens=256)
    loop.add([1] * (2 * B), 3)
    loop.add([2] * (3 * B), 3)
    small = loop.add([3], 3)
    assert [s.request for s in loop.step()] == [0]  # 2 of 4 blocks are left, the head needs 3
    loop.step()
    loop.step()
    assert small.status is Status.WAITING  # it would have fitted all along
    assert [s.request for s in loop.step()] == [1, 2]


def test_twins_in_one_step_both_compute() -> None:
    loop = Loop(max_num_batched_tokens=256)
    loop.add([1] * (2 * B + 1), 4)
    loop.add([1] * (2 * B + 1), 4)
    first, second = loop.step()
    assert (first.first, second.first) == (0, 0)
    assert not set(first.table) & set(second.table)
    third = loop.add([1] * (2 * B + 1), 4)
    assert [s.first for s in loop.step() if s.request == third.number] == [2 * B]


def test_no_more_run_than_may() -> None:
    loop = Loop(max_num_seqs=2)
    for _ in range(3):
        loop.add([1, 2], 2)
    assert [s.request for s in loop.step()] == [0, 1]
    assert [s.request for s in loop.step()] == [0, 1]
    assert [s.request for s in loop.step()] == [2]


def test_cancelling_gives_back_what_is_held() -> None:
    loop = Loop(num_blocks=8, max_num_seqs=2)
    running, other, waiting = (loop.add([i] * (B + 1), 4) for i in range(3))
    loop.step()
    loop.scheduler.cancel(running)
    loop.scheduler.cancel(waiting)
    assert loop.blocks.available == 6
    assert [r.finish_reason for r in (running, other, waiting)] == ["cancelled", None, "cancelled"]
    assert [s.request for s in loop.step()] == [1]
    loop.scheduler.cancel(other)
    assert loop.blocks.available == 8
    assert loop.step() == []
    assert loop.ended == []  # whoever is cancelled leaves nothing behind


def test_whoever_ends_still_holds_its_blocks_when_told() -> None:
    loop = Loop()
    loop.add([1] * (B + 1), 1)
    loop.step()
    assert loop.ended == [2]
    assert loop.blocks.available == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_speculative_tokens": 6}, "num_speculative_tokens: expected 0 … 5, found 6"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens: expected 0 … 5, found -1"),
        ({"max_num_seqs": 0}, "max_num_seqs: expected at least 1"),
        (
            {"num_speculative_tokens": 3, "max_num_batched_tokens": 3},
            "max_num_batched_tokens: expected at least 4, a token and its 3 drafts, found 3",
        ),
        ({"max_num_batched_tokens": 0}, "expected at least 1"),
        ({"num_blocks": 0}, "num_blocks: expected 1 … 16,777,216, or None, found 0"),
        ({"num_speculative_tokens": 1.0}, "num_speculative_tokens: expected an integer, found 1.0"),
        ({"max_num_seqs": 1.5}, "max_num_seqs: expected an integer, found 1.5"),
        ({"max_num_seqs": True}, "max_num_seqs: expected an integer, found True"),
        ({"max_num_batched_tokens": 64.0}, "max_num_batched_tokens: expected an integer"),
        ({"num_blocks": 10**14}, "num_blocks: expected 1 … 16,777,216, or None, found 1000000"),
        ({"num_blocks": "8"}, "num_blocks: expected an integer, found '8'"),
        ({"enforce_eager": True, "force_graphs": True}, "exclude each other"),
    ],
)
def test_limits_that_nothing_could_run_under(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)
