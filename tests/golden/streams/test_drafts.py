"""Drafts: what fits, what a golden may hold, what of it a run with K comes to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitassay.golden.errors import CorruptError, GoldenError
from bitassay.golden.storage import layout
from bitassay.golden.streams.draft_chains import accepted_of, limits
from bitassay.golden.streams.drafts import DRAFT_ARRAYS, run_of
from bitassay.reference.spec.contract import DRAFT_DEPTH


def changed(stream, name, where, value):
    """The stream with one value of its drafts replaced."""
    array = getattr(stream.drafts, name).copy()
    array[where] = value
    return replace(stream, drafts=replace(stream.drafts, **{name: array}))


def test_counts_follow_from_tokens(make_drafted):
    stream = make_drafted()
    assert np.array_equal(
        accepted_of(stream.drafts.draft_tokens, stream.tokens), [*stream.drafts.accepted]
    )
    assert limits(4).tolist() == [2, 1, 0, 0]
    assert limits(9).tolist() == [5, 5, 5, 4, 3, 2, 1, 0, 0]
    assert limits(1).tolist() == [0]
    assert stream.drafts.accepted.max() > 2


@pytest.mark.parametrize("name", DRAFT_ARRAYS)
def test_another_dtype_or_shape_is_refused(make_drafted, name):
    stream = make_drafted()
    array = getattr(stream.drafts, name)
    for wrong in (array.astype("<i2"), array[:-1], array[..., :-1]):
        with pytest.raises(GoldenError, match=f"draft stream, {name}: expected"):
            replace(stream, drafts=replace(stream.drafts, **{name: wrong}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("draft_tokens", 50), ("draft_tokens", -2), ("accepted", -2), ("accepted", DRAFT_DEPTH + 1)],
)
def test_values_outside_their_range_are_refused(make_drafted, name, value):
    with pytest.raises(GoldenError, match=rf"{name}\[1, 2.*expected -1 … .*, found {value}"):
        changed(make_drafted(), name, (1, 2), value)


def test_a_golden_holds_what_tokens_and_drafts_say(make_drafted, provenance):
    """Contradictions can be compared, so that they are told; they cannot be published."""
    stream = make_drafted()
    layout.encode(stream, provenance)
    s, t = next(
        (int(s), int(t))
        for s, t in np.argwhere(stream.drafts.accepted == 1)
        if stream.drafts.draft_tokens[s, t, 1] >= 0
    )
    wrong = int(stream.drafts.draft_tokens[s, t, 0]) ^ 1
    for name, where, value, message in (
        ("accepted", (s, t), 2, rf"accepted\[{s}, {t}\]: expected 1, .*found 2"),
        ("draft_tokens", (s, t, 0), wrong, rf"accepted\[{s}, {t}\]: expected 0, .*found 1"),
        ("draft_tokens", (s, t, 1), -1, rf"draft_tokens\[{s}, {t}, 1\]: expected a draft"),
        ("draft_tokens", (s, t, 2), 3, rf"draft_tokens\[{s}, {t}, 2\]: expected -1"),
        ("draft_tokens", (s, 11, 0), 3, rf"draft_tokens\[{s}, 11, 0\]: expected -1"),
        ("draft_fingerprints", (s, t, 2, 0), 7, "draft_fingerprints: expected 0 where nothing"),
    ):
        with pytest.raises(GoldenError, match=message):
            layout.encode(changed(stream, name, where, value), provenance)
    run = replace(stream, drafts=run_of(stream.drafts, 3))
    with pytest.raises(GoldenError, match="rounds: expected all drafts after every token"):
        layout.encode(run, provenance)


def test_what_is_decoded_is_what_was_encoded(make_drafted, make_stream, provenance):
    stream = make_drafted()
    files = layout.encode(stream, provenance)
    again, _ = layout.decode(files)
    for name, array in stream.drafts.arrays.items():
        assert np.array_equal(getattr(again.drafts, name), array)
    assert again.drafts.draft_operations == stream.drafts.draft_operations
    assert again.labels == stream.labels
    assert layout.decode(layout.encode(make_stream(), provenance))[0].drafts is None


def test_every_array_of_the_drafts_changes_the_content_digest(make_drafted, provenance):
    stream = make_drafted()
    digests = {layout.content_digest(stream, provenance.identity)}
    for name in DRAFT_ARRAYS:
        array = getattr(stream.drafts, name)
        other = changed(stream, name, (0,) * array.ndim, 3 - int(array.flat[0] == 3))
        digests.add(layout.content_digest(other, provenance.identity))
    renamed = replace(stream.drafts, draft_operations=("a", "b", "c"))
    digests.add(layout.content_digest(replace(stream, drafts=renamed), provenance.identity))
    digests.add(layout.content_digest(replace(stream, drafts=None), provenance.identity))
    assert len(digests) == 7


def test_drafts_without_their_label_are_no_golden(make_drafted, make_stream, provenance):
    """The digest of the content says so: the arrays that nobody names are not in it."""
    files = layout.encode(make_drafted(), provenance)
    plain = layout.encode(replace(make_drafted(), drafts=None), provenance)
    stream, _ = layout.decode(files | {"zarr.json": plain["zarr.json"]})
    whole = layout.content_digest(make_drafted(), provenance.identity)
    assert layout.content_digest(stream, provenance.identity) != whole
    with pytest.raises((KeyError, CorruptError)):
        layout.decode(plain | {"zarr.json": files["zarr.json"]})


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12])
def test_fewer_tokens_leave_fewer_drafts(make_drafted, provenance, steps):
    whole = make_drafted()
    cut = whole.first(2, steps)
    cut.drafts.require_recorded(cut.tokens)
    layout.encode(cut, provenance)
    for s, t in np.ndindex(2, steps):
        most = max(0, min(DRAFT_DEPTH, steps - 2 - t))
        assert np.array_equal(
            cut.drafts.draft_tokens[s, t, :most], whole.drafts.draft_tokens[s, t, :most]
        )
        assert (cut.drafts.draft_tokens[s, t, most:] == -1).all()
        assert not cut.drafts.draft_fingerprints[s, t, most:].any()
        assert cut.drafts.accepted[s, t] == min(most, whole.drafts.accepted[s, t])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_run_comes_to_its_rounds_and_nothing_else(make_drafted, count):
    stream = make_drafted(prompts=6, steps=20)
    run = run_of(stream.drafts, count)
    for s in range(6):
        t, drafting = 0, []
        for at, drafted, right in run.rounds[s]:
            assert at == t
            assert drafted == max(0, min(count, 18 - t))
            assert right == min(drafted, stream.drafts.accepted[s, t])
            assert run.accepted[s, t] == right
            met = min(drafted, right + 1)
            for name in ("draft_tokens", "draft_fingerprints"):
                here, there = (getattr(x, name)[s, t] for x in (run, stream.drafts))
                assert np.array_equal(here[:met], there[:met])
                assert (here[met:] == (-1 if name == "draft_tokens" else 0)).all()
            drafting += [t] if drafted else []
            t += right + 1
        assert t == 19
        begins = {at for at, _, _ in run.rounds[s]}
        for between in set(range(20)) - begins:
            assert run.accepted[s, between] == -1
            assert (run.draft_tokens[s, between] == -1).all()
            # The head's first pass has a row for it, which the lm_head does not see.
            first, *rest = run.draft_fingerprints[s, between]
            known = between <= drafting[-1]
            assert np.array_equal(
                first[:-1], stream.drafts.draft_fingerprints[s, between, 0, :-1] * known
            )
            assert not first[-1]
            assert not np.any(rest)


def test_the_acceptance_length_is_that_of_the_rounds(make_drafted):
    drafts = make_drafted(prompts=6, steps=20).drafts
    rounds = [r for run in run_of(drafts, 3).rounds for r in run if r[1]]
    assert drafts.acceptance_length(3) == sum(r[2] + 1 for r in rounds) / len(rounds) > 1.5
    assert drafts.first(6, 2).acceptance_length(3) == 1.0
