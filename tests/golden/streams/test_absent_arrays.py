"""Streams that lack arrays: what must be there, what is checked, what a golden still needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.golden.errors import GoldenError
from bitassay.golden.storage import layout
from bitassay.golden.storage.store import find_store
from bitassay.golden.streams.drafts import DRAFT_ARRAYS, run_of
from bitassay.golden.streams.token_stream import ARRAYS, TokenStream, from_parts, take

NEEDED = ("prompt_ids", "prompt_offsets", "tokens")
OPTIONAL = tuple(name for name in ARRAYS if name not in NEEDED)
REPEATABLE = settings(max_examples=40, derandomize=True, deadline=None, database=None)
DRAFT_OPTIONAL = ("draft_fingerprints", "draft_prompt_fingerprints")


def without(stream, names):
    """The stream without those arrays, the drafts' among them."""
    own = dict.fromkeys(name for name in names if name in ARRAYS)
    drafts = stream.drafts and replace(
        stream.drafts, **dict.fromkeys(name for name in names if name in DRAFT_ARRAYS)
    )
    return replace(stream, **own, drafts=drafts)


def absences():
    """Any arrays that may be absent, none and all of them included."""
    return st.sets(st.sampled_from(OPTIONAL + DRAFT_OPTIONAL))


@REPEATABLE
@given(names=absences())
def test_what_is_there_is_what_arrays_give(make_drafted, names):
    stream = make_drafted()
    partial = without(stream, names)
    assert [*partial.arrays] == [name for name in stream.arrays if name not in names]
    assert partial.labels == stream.labels
    again = from_parts(partial.arrays, {k: v for k, v in partial.labels.items() if v is not None})
    assert [*again.arrays] == [*partial.arrays]
    for name, array in partial.arrays.items():
        assert array is again.arrays[name]


@REPEATABLE
@given(names=absences())
def test_streams_that_lack_arrays_are_cut_as_whole_ones(make_drafted, names):
    stream = make_drafted()
    for whole, partial in (
        (stream.first(2, 7), without(stream, names).first(2, 7)),
        (take(stream, [2, 0, 2]), take(without(stream, names), [2, 0, 2])),
    ):
        assert [*partial.arrays] == [name for name in whole.arrays if name not in names]
        assert all(np.array_equal(whole.arrays[name], x) for name, x in partial.arrays.items())
    run, part = run_of(stream.drafts, 3), run_of(without(stream, names).drafts, 3)
    assert part.rounds == run.rounds
    assert all(np.array_equal(run.arrays[name], x) for name, x in part.arrays.items())


@pytest.mark.parametrize("operations", [(0,), (2,), (2, 0), (0, 1, 2)])
def test_a_run_comes_to_the_same_rows_of_some_operations(make_drafted, operations):
    """The lm_head is known by its name, wherever it is among them."""
    drafts = make_drafted(prompts=6, steps=20).drafts
    chosen = [*operations]
    some = replace(
        drafts,
        draft_fingerprints=drafts.draft_fingerprints[..., chosen],
        draft_prompt_fingerprints=drafts.draft_prompt_fingerprints[..., chosen],
        draft_operations=tuple(drafts.draft_operations[o] for o in chosen),
    )
    whole = run_of(drafts, 3).draft_fingerprints
    assert np.array_equal(run_of(some, 3).draft_fingerprints, whole[..., chosen])


@pytest.mark.parametrize("name", OPTIONAL)
def test_each_array_is_checked_without_the_others(make_stream, name):
    stream = make_stream()
    alone = without(stream, set(OPTIONAL) - {name})
    assert set(alone.arrays) == {*NEEDED, name}
    array = getattr(stream, name)
    for wrong in (array.astype("<i2"), array[:-1]):
        with pytest.raises(GoldenError, match=f"token stream, {name}: expected"):
            replace(alone, **{name: wrong})


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("top_bits", "logits_dtype"),
        ("margins", "logits_dtype"),
        ("fingerprints", "operations"),
        ("prompt_fingerprints", "operations"),
    ],
)
def test_a_label_is_needed_where_an_array_depends_on_it(make_stream, name, label):
    alone = without(make_stream(), set(OPTIONAL) - {name})
    with pytest.raises(GoldenError, match=f"token stream, {label}: expected .*, found"):
        replace(alone, **{label: None})
    assert replace(alone, **{name: None, label: None}).labels.get(label) is None


def test_names_of_operations_are_as_many_as_fingerprints_and_distinct(make_stream):
    stream = make_stream()
    with pytest.raises(GoldenError, match="operations: expected 2 different names, found 1"):
        replace(stream, operations=("lm_head", "lm_head"))
    with pytest.raises(GoldenError, match=r"fingerprints: expected uint64 \[3, 4, 1\]"):
        replace(stream, operations=("lm_head",))
    empty = {"fingerprints": stream.fingerprints[..., :0], "prompt_fingerprints": None}
    with pytest.raises(GoldenError, match="operations: expected the names"):
        replace(stream, **empty, operations=())


def test_fingerprints_of_drafts_need_names(make_drafted):
    stream = make_drafted()
    with pytest.raises(GoldenError, match="draft_operations: expected the names"):
        replace(stream, drafts=replace(stream.drafts, draft_operations=None))
    bare = replace(without(stream, DRAFT_OPTIONAL).drafts, draft_operations=None)
    assert set(replace(stream, drafts=bare).drafts.arrays) == {"draft_tokens", "accepted"}
    assert "draft_operations" not in replace(stream, drafts=bare).labels


@pytest.mark.parametrize("name", [*NEEDED, "prompt_names", "vocab_size", "draft_tokens"])
def test_what_every_stream_has_must_be_among_the_parts(make_drafted, name):
    stream = make_drafted()
    parts = [{k: v for k, v in x.items() if k != name} for x in (stream.arrays, stream.labels)]
    with pytest.raises(GoldenError, match=f"stream, {name}: expected .*, found none"):
        from_parts(*parts)


@pytest.mark.parametrize("name", OPTIONAL + DRAFT_OPTIONAL)
def test_a_golden_needs_every_array(make_drafted, provenance, tmp_path, name):
    whole = make_drafted()
    partial = without(whole, {name})
    message = f"stream, {name}: expected the array, found none"
    with pytest.raises(GoldenError, match=message):
        layout.encode(partial, provenance)
    with pytest.raises(GoldenError, match=message):
        layout.content_digest(partial, provenance.identity)
    store = find_store(str(tmp_path / "store"))
    with pytest.raises(GoldenError, match=message):
        store.publish(partial, provenance, accept=True)
    assert not (tmp_path / "store").exists()


def test_rows_that_are_not_there_are_not_counted(make_stream):
    with pytest.raises(GoldenError, match="fingerprints: expected the array, found none"):
        _ = without(make_stream(), {"fingerprints"}).distinct_rows
    with pytest.raises(GoldenError, match="logits_dtype: expected one of bfloat16"):
        _ = TokenStream.of_tokens([[1]], [[2]], vocab_size=3).logit_width
