"""The journal: whatever is cut off or damaged, what is left is a beginning of what was noted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitassay.golden import journal
from bitassay.golden.errors import StoreError


def trace(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "tokens": random.integers(0, 50, 4, dtype=np.int32),
        "fingerprints": random.integers(0, 2**64, (4, 3), dtype=np.uint64),
    }


def write(root: Path, identity) -> Path:
    """Two steps of two prompts, a trace, and a step of a third prompt; returns the file."""
    with journal.opened(root, identity) as notes:
        assert notes.begun == ""
        notes.chosen({0: 5, 1: 6})
        notes.chosen({0: 7, 1: 8})
        notes.finished({0: trace(0)})
        notes.chosen({2: 9})
    (path,) = root.glob(".work/*/journal")
    return path


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # an empty journal is cleared away
    path.write_bytes(data)


def test_what_was_noted_is_there_again(tmp_path, provenance):
    write(tmp_path, provenance.identity)
    with journal.opened(tmp_path, provenance.identity) as notes:
        assert notes.tokens == {0: [5, 7], 1: [6, 8], 2: [9]}
        assert notes.begun == "1 prompts finished, 2 begun"
        (found,) = notes.traces.values()
        for name, array in trace(0).items():
            assert found[name].dtype == array.dtype
            assert np.array_equal(found[name], array)


def test_a_torn_end_is_cut_off_and_written_over(tmp_path, provenance):
    path = write(tmp_path, provenance.identity)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 4
    for length in range(len(whole)):
        put(path, whole[:length])
        lines = sum(end <= length for end in ends)
        with journal.opened(tmp_path, provenance.identity) as notes:
            assert notes.tokens.get(0, []) == [5, 7][:lines]
            assert len(notes.traces) == (lines >= 3)
            if length % 37 == 0:
                notes.chosen({4: 1})
        if length % 37 == 0:
            with journal.opened(tmp_path, provenance.identity) as notes:
                assert notes.tokens[4] == [1]


def test_a_flipped_bit_ends_what_is_believed(tmp_path, provenance):
    path = write(tmp_path, provenance.identity)
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for at in range(first + 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        put(path, damaged)
        with journal.opened(tmp_path, provenance.identity) as notes:
            assert (notes.tokens, notes.traces) == ({}, {})


def test_one_process_at_a_time(tmp_path, provenance):
    with journal.opened(tmp_path, provenance.identity):
        message = "made-up/sm_90 is being recorded by another process"
        with (
            pytest.raises(StoreError, match=message),
            journal.opened(tmp_path, provenance.identity),
        ):
            pass
        other = replace(provenance.identity, arch="sm_89")
        with journal.opened(tmp_path, other) as notes:
            notes.remove()
    with journal.opened(tmp_path, provenance.identity):
        pass
    assert list(tmp_path.iterdir()) == []


def test_it_leaves_nothing_behind(tmp_path, provenance):
    write(tmp_path, provenance.identity)
    with journal.opened(tmp_path, provenance.identity) as notes:
        notes.remove()
    assert list(tmp_path.iterdir()) == []


def test_another_identity_has_another_journal(tmp_path, provenance):
    write(tmp_path, provenance.identity)
    for changed in ({"model": "x"}, {"tokens": 5}, {"contract": "x"}, {"prompts": "x"}):
        with journal.opened(tmp_path, replace(provenance.identity, **changed)) as notes:
            assert notes.tokens == {}
