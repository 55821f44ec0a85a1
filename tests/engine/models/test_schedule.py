"""Which rows run when, in which blocks of the cache: lists of integers, no kernel runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitassay.engine.models.batch import Segment, place, upload
from bitassay.engine.models.kv_cache import BlockAllocator, blocks_for, slots_of
from bitassay.engine.models.schedule import schedule
from bitassay.kernels.cache import BLOCK_SIZE


def test_the_next_sequence_starts_where_one_ended() -> None:
    steps = list(schedule([1, 4, 2], 3, batch_size=2, order=[1, 2, 0], chunk_size=3))
    assert [[(s.sequence, s.first, s.count) for s in step] for step in steps] == [
        [(1, 0, 3), (2, 0, 2)],
        [(1, 3, 1), (2, 2, 1)],
        [(1, 4, 1), (2, 3, 1)],
        [(1, 5, 1), (0, 0, 1)],  # 2 has its three tokens, 1 is still decoding
        [(0, 1, 1)],
        [(0, 2, 1)],
    ]


@given(
    prompts=st.lists(st.integers(1, 40), max_size=6),
    max_tokens=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    chunk_size=st.none() | st.integers(1, 45),
    data=st.data(),
)
def test_every_row_runs_once_and_in_order(prompts, max_tokens, batch_size, chunk_size, data):
    order = data.draw(st.permutations(range(len(prompts))))
    done = [0] * len(prompts)
    began = []
    for step in schedule(
        prompts, max_tokens, batch_size=batch_size, order=order, chunk_size=chunk_size
    ):
        assert 0 < len(step) <= batch_size
        assert len({s.sequence for s in step}) == len(step)
        for s in step:
            began += [s.sequence] if s.first == 0 else []
            assert s.first == done[s.sequence]
            assert 1 <= s.count <= (chunk_size or 40)
            assert s.count == 1 or s.end <= prompts[s.sequence]  # tokens come one by one
            done[s.sequence] = s.end
    assert done == [prompt + max_tokens - 1 for prompt in prompts]
    assert began == list(order)


def test_blocks_are_handed_out_once_and_taken_back() -> None:
    allocator = BlockAllocator(5)
    first = allocator.grow(7, 17)
    second = allocator.grow(8, 16)
    assert allocator.grow(7, 32) == first  # there is room in its last block
    assert len({*first, *second}) == 3
    assert allocator.free == 2
    longer = allocator.grow(8, 33)
    assert longer[:1] == second
    assert len(longer) == 3
    with pytest.raises(RuntimeError, match="sequence 7: expected 1 free blocks .* found 0 of 5"):
        allocator.grow(7, 33)
    allocator.release(8)
    assert allocator.free == 3
    assert allocator.grow(7, 33)[:2] == first  # the refusal took nothing
    allocator.release(7)
    assert allocator.free == 5
    with pytest.raises(KeyError, match="sequence 7 holds no blocks"):
        allocator.release(7)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 70)), max_size=30))
def test_no_block_is_held_twice(requests: list[tuple[int, int]]) -> None:
    """A request of 0 positions ends the sequence."""
    allocator, held, lengths = BlockAllocator(9), {}, {}
    for sequence, length in requests:
        if length == 0:
            if sequence in held:
                allocator.release(sequence)
                del held[sequence], lengths[sequence]
        elif blocks_for(length) - len(held.get(sequence, [])) > allocator.free:
            with pytest.raises(RuntimeError, match="run fewer sequences at once"):
                allocator.grow(sequence, length)
        else:
            before = held.get(sequence, [])
            held[sequence] = allocator.grow(sequence, length)
            lengths[sequence] = max(length, lengths.get(sequence, 0))
            assert held[sequence][: len(before)] == before
        used = [block for table in held.values() for block in table]
        assert len(set(used)) == len(used) == 9 - allocator.free
        assert all(len(held[s]) == blocks_for(lengths[s]) for s in held)


def test_a_batch_says_where_its_rows_are() -> None:
    size = BLOCK_SIZE
    assert slots_of([5, 2], [0, size - 1, size, size + 3]) == [
        5 * size, 6 * size - 1, 2 * size, 2 * size + 3,
    ]  # fmt: skip
    batch = place([Segment(0, size - 1, 2), Segment(4, 0, 3)], [[5, 2], [7]])
    assert batch.positions.tolist() == [size - 1, size, 0, 1, 2]
    assert batch.slots.tolist() == [6 * size - 1, 2 * size, 7 * size, 7 * size + 1, 7 * size + 2]
    assert batch.query_start.tolist() == [0, 2, 5]
    assert batch.seq_lens.tolist() == [size + 1, 3]
    assert batch.block_tables[0].tolist() == [5, 2]
    assert int(batch.block_tables[1, 0]) == 7
    assert (batch.max_query_len, batch.max_seq_len) == (3, size + 1)


def test_uploading_together_changes_nothing() -> None:
    made = [
        place([Segment(0, 3, 2), Segment(1, 0, 17)], [[1], [2, 3]]),
        place([Segment(0, 5, 1)], [[1]]),
    ]
    for one, other in zip(made, upload(made, torch.device("cpu")), strict=True):
        assert vars(one).keys() == vars(other).keys()
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(other, name)), name
                assert value.dtype == getattr(other, name).dtype, name
            else:
                assert value == getattr(other, name), name
    assert upload([], torch.device("cpu")) == []
