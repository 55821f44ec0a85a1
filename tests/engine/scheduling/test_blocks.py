"""Who holds which block, and which blocks are found again."""

from __future__ import annotations

import pytest

from bitassay.engine.scheduling import blocks as module
from bitassay.engine.scheduling.blocks import BLOCK_SIZE, BlockManager, blocks_for
from bitassay.engine.scheduling.request import Request
from bitassay.kernels import cache

B = BLOCK_SIZE


def request(number: int, ids: list[int]) -> Request:
    return Request(number, ids, max_tokens=4)


def admitted(manager: BlockManager, number: int, ids: list[int]) -> Request:
    """Return a request with blocks for its ids, all but the last of them computed."""
    made = request(number, ids)
    assert manager.admit(made, len(ids))
    made.computed = len(ids) - 1
    manager.register(made)
    return made


def manager(num_blocks: int = 8, *, drafting: bool = False, caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks, caching=caching, drafting=drafting)


def test_a_block_is_as_long_as_the_kernels_have_it() -> None:
    assert BLOCK_SIZE == cache.BLOCK_SIZE == module.BLOCK_SIZE
    assert [blocks_for(n) for n in (0, 1, B, B + 1)] == [0, 1, 1, 2]


def test_full_blocks_are_found_again_and_shared() -> None:
    blocks, ids = manager(), list(range(2 * B + 3))
    first = admitted(blocks, 0, ids)
    second = request(1, [*ids[: 2 * B], 99, 98])
    assert blocks.admit(second, 2 * B + 2)
    assert second.table[:2] == first.table[:2]  # while the first still holds them
    assert second.table[2] != first.table[2]
    assert second.computed == 2 * B
    assert blocks.available == 8 - 4
    blocks.release(first)
    assert blocks.available == 8 - 3
    blocks.release(second)
    assert blocks.available == 8
    assert (second.table, second.computed, second.registered, second.prefix) == ([], 0, 0, 0)


@pytest.mark.parametrize(("length", "found"), [(B, 0), (B + 1, 1), (2 * B, 1), (2 * B + 1, 2)])
def test_the_last_known_row_is_always_left_to_run(length: int, found: int) -> None:
    blocks, ids = manager(), list(range(3 * B))
    blocks.release(admitted(blocks, 0, ids))
    again = request(1, ids[:length])
    assert blocks.admit(again, length)
    assert again.computed == found * B
    assert len(again.table) == blocks_for(length)


@pytest.mark.parametrize(("drafting", "found"), [(False, B), (True, 0)])
def test_with_a_head_the_id_after_a_block_counts(drafting: bool, found: int) -> None:
    blocks = manager(drafting=drafting)
    blocks.release(admitted(blocks, 0, [*range(B), 5, 6]))
    other = request(1, [*range(B), 7, 6])
    assert blocks.admit(other, B + 2)
    assert other.computed == found


def test_the_same_ids_after_another_prefix_are_another_block() -> None:
    blocks, tail = manager(), list(range(B, 2 * B + 1))
    heads = list(range(B)), list(range(50, 50 + B))
    first = admitted(blocks, 0, [*heads[0], *tail])
    second = admitted(blocks, 1, [*heads[1], *tail])
    assert blocks.registered == 4
    for head, known in zip(heads, (first, second), strict=True):
        again = request(2, [*head, *tail])
        assert blocks.admit(again, 2 * B + 1)
        assert again.table[:2] == known.table[:2]
        blocks.release(again)


def test_only_computed_rows_are_registered() -> None:
    blocks, ids = manager(), list(range(3 * B))
    made = request(0, ids)
    assert blocks.admit(made, 3 * B)
    for computed, registered in ((0, 0), (B - 1, 0), (B, 1), (3 * B - 1, 2)):
        made.computed = computed
        blocks.register(made)
        assert blocks.registered == made.registered == registered


def test_of_two_blocks_with_the_same_rows_the_first_is_found() -> None:
    blocks, ids = manager(), list(range(B + 1))
    twins = [request(0, ids), request(1, ids)]
    for twin in twins:  # both are admitted before either has run
        assert blocks.admit(twin, B + 1)
    for twin in twins:
        twin.computed = B
        blocks.register(twin)
    assert blocks.registered == 1
    third = request(2, ids)
    assert blocks.admit(third, B + 1)
    assert third.table[0] == twins[0].table[0] != twins[1].table[0]
    for held in (*twins, third):
        blocks.release(held)
    assert blocks.available == 8


def test_free_blocks_are_taken_before_idle_ones_and_those_by_age() -> None:
    blocks = manager(4)
    old = admitted(blocks, 0, [*range(B), 1])  # one full block and one that is not
    old_block = old.table[0]
    blocks.release(old)
    new = admitted(blocks, 1, [*range(20, 20 + B), 1])
    blocks.release(new)
    assert blocks.registered == 2
    taken = request(2, list(range(90, 92)))
    assert blocks.admit(taken, 2 * B)  # the two free ones
    assert blocks.registered == 2
    assert blocks.grow(taken, 2 * B + 1)
    assert taken.table[2] == old_block
    again = request(3, [*range(B), 1])
    assert not blocks.admit(again, B + 1)  # gone, and there is but one block left
    assert blocks.grow(taken, 4 * B)
    assert (blocks.registered, blocks.available) == (0, 0)


def test_a_prefix_outlives_what_follows_it() -> None:
    blocks, ids = manager(3), list(range(2 * B + 1))
    blocks.release(admitted(blocks, 0, ids))
    filler = request(1, [1, 2])
    assert blocks.admit(filler, 2 * B)  # one free block and one idle
    blocks.release(filler)
    again = request(2, ids)
    assert blocks.admit(again, 2 * B + 1)
    assert again.computed == B


def test_what_is_refused_changes_nothing() -> None:
    blocks, ids = manager(3), list(range(2 * B + 1))
    first = admitted(blocks, 0, ids[: B + 1])
    blocks.release(first)
    holder = request(1, [7])
    assert blocks.admit(holder, 1)
    third = request(2, ids)
    # One found block is idle: to hold it leaves one for the two that are missing.
    assert not blocks.admit(third, 3 * B)
    assert third.table == []
    assert blocks.available == 2
    assert blocks.admit(third, 2 * B)
    assert third.computed == B
    assert not blocks.grow(third, 2 * B + 1)
    assert len(third.table) == 2


def test_a_block_is_given_back_once() -> None:
    blocks = manager()
    held = admitted(blocks, 0, list(range(B + 1)))
    table = list(held.table)
    blocks.release(held)
    blocks.release(held)  # holds nothing any more
    assert blocks.available == 8
    held.table = table
    with pytest.raises(RuntimeError, match="of request 0 was not held"):
        blocks.release(held)


def test_without_caching_nothing_is_found() -> None:
    blocks, ids = manager(caching=False), list(range(2 * B + 1))
    blocks.release(admitted(blocks, 0, ids))
    again = request(1, ids)
    assert blocks.admit(again, len(ids))
    assert (again.computed, blocks.registered) == (0, 0)


def test_forgetting_leaves_held_blocks_with_their_holders() -> None:
    blocks, ids = manager(), list(range(2 * B + 1))
    running = admitted(blocks, 0, ids)
    blocks.release(admitted(blocks, 1, [*range(60, 60 + B), 1]))
    blocks.forget()
    assert (blocks.registered, blocks.available) == (0, 5)
    again = request(2, ids)
    assert blocks.admit(again, len(ids))
    assert again.computed == 0
    assert not set(again.table) & set(running.table)
    for held in (running, again):
        blocks.release(held)
    assert blocks.available == 8
