"""The journal: whatever is cut off or damaged, what is left is a beginning of what was noted."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from bitassay.golden.digests import canonical, sha256
from bitassay.golden.errors import StoreError
from bitassay.golden.storage import journal


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
    assert len(ends) == 5
    for length in range(len(whole)):
        put(path, whole[:length])
        lines = sum(end <= length for end in ends) - 1  # the first names the identity
        with journal.opened(tmp_path, provenance.identity) as notes:
            assert notes.tokens.get(0, []) == [5, 7][: max(lines, 0)]
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
    for at in range(whole.index(b"\n", first + 1) + 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        put(path, damaged)
        with journal.opened(tmp_path, provenance.identity) as notes:
            assert (notes.tokens, notes.traces) == ({}, {})


def test_a_journal_of_another_recording_is_refused(tmp_path, provenance):
    """Its lines are whole: taken over, they would be published under this identity."""
    path = write(tmp_path, replace(provenance.identity, model="x"))
    mine = tmp_path / ".work" / sha256(canonical(asdict(provenance.identity))) / "journal"
    path.parent.rename(mine.parent)
    before = mine.read_bytes()
    headless = before.partition(b"\n")[2]
    for data, found in ((before, "another identity, "), (headless, "no identity")):
        message = f"journal {mine}: expected .*found {found}.* in its first line: delete this file"
        mine.write_bytes(data)
        with (
            pytest.raises(StoreError, match=message),
            journal.opened(tmp_path, provenance.identity),
        ):
            pass
        assert mine.read_bytes() == data  # whoever it belongs to may still want it
    journal.discard(tmp_path, provenance.identity)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "facts",
    [
        5,
        [1, 2],
        {},
        {"tokens": 5},
        {"tokens": [[0]]},
        {"tokens": [["x", 1]]},
        {"tokens": [[0, "x"]]},
        {"tokens": [[0, 1.5]]},
        {"tokens": [[0, True]]},
        {"traces": [[0, []]]},
        {"traces": [[0, {"tokens": ["<i4", [4], "!!!"]}]]},
        {"traces": [[0, {"tokens": ["<i4", [4], "AAAA"]}]]},
        {"traces": [[0, {"tokens": ["nonsense", [4], "eJxjYGBgAAAABAAB"]}]]},
        {"hopes": []},
    ],
)
def test_lines_that_nobody_noted_are_refused(tmp_path, provenance, facts):
    path = write(tmp_path, provenance.identity)
    with path.open("ab") as file:
        file.write(journal._line(facts))
    message = f"journal {path}: expected .*found a line that nobody noted.*: delete this file"
    with pytest.raises(StoreError, match=message), journal.opened(tmp_path, provenance.identity):
        pass


def whole_trace(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """All arrays of one prompt, of 4 steps and 2 operations."""
    return {
        "tokens": np.zeros(4, np.int32),
        "top_ids": np.zeros((4, 8), np.int32),
        "top_bits": np.zeros((4, 8), np.uint32),
        "margins": np.zeros(4, np.int64),
        "fingerprints": np.zeros((4, 2), np.uint64),
        "prompt_fingerprints": np.zeros(2, np.uint64),
    } | changes


@pytest.mark.parametrize(
    ("tokens", "traces"),
    [
        ({3: 1}, {}),
        ({-1: 1}, {}),
        ({0: 50}, {}),
        ({0: -1}, {}),
        ({}, {3: whole_trace()}),
        ({}, {0: trace(0)}),
        ({}, {0: whole_trace(tokens=np.zeros(5, np.int32))}),
        ({}, {0: whole_trace(tokens=np.zeros(4, np.int64))}),
        ({}, {0: whole_trace(tokens=np.full(4, 50, np.int32))}),
        ({}, {0: whole_trace(top_ids=np.full((4, 8), -1, np.int32))}),
    ],
)
def test_what_does_not_fit_the_job_is_refused(tmp_path, provenance, tokens, traces):
    with journal.opened(tmp_path, provenance.identity) as notes:
        notes.chosen({0: 49, 2: 0})
        notes.finished({1: whole_trace()})
        notes.require_fits(3, 4, 50, operations=2)
        notes.chosen(tokens)
        notes.finished(traces)
        with pytest.raises(StoreError, match=r"journal .*\.work.*: delete this file"):
            notes.require_fits(3, 4, 50, operations=2)


def test_more_tokens_than_steps_are_refused(tmp_path, provenance):
    with journal.opened(tmp_path, provenance.identity) as notes:
        for _ in range(5):
            notes.chosen({0: 1})
        with pytest.raises(StoreError, match="found 5 tokens of prompt 0"):
            notes.require_fits(3, 4, 50, operations=2)


def test_a_full_disk_is_told_with_what_to_do(tmp_path, provenance, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with journal.opened(tmp_path, provenance.identity) as notes:
        notes.chosen({0: 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            message = r"written \(No space left on device\): free space there.*goes on from here"
            with pytest.raises(StoreError, match=message):
                notes.chosen({0: 2})
            patch.undo()
            patch.setattr(os, "write", lambda descriptor, data: len(data) - 1)
            with pytest.raises(StoreError, match=message):
                notes.chosen({0: 2})


@pytest.mark.parametrize("call", ["open", "flock", "stat"])
def test_folders_removed_by_another_process_are_made_again(tmp_path, provenance, monkeypatch, call):
    """Whoever finishes last removes the shared folder, between any two steps of this one."""
    where = {"open": (os, "open"), "flock": (fcntl, "flock"), "stat": (Path, "stat")}[call]
    usual, removals = getattr(*where), []

    def removed_first(what, *rest, **options):
        if len(removals) < 3 and (call == "flock" or str(what).endswith("journal")):
            removals.append(what)
            shutil.rmtree(tmp_path / ".work")
        return usual(what, *rest, **options)

    monkeypatch.setattr(*where, removed_first)
    with journal.opened(tmp_path, provenance.identity) as notes:
        notes.chosen({0: 1})
        assert len(list(tmp_path.glob(".work/*/journal"))) == 1
    assert len(removals) == 3


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
