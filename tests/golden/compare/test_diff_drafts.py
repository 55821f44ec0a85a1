"""Every kind of difference among drafts is found, named by its place, and counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from bitassay.golden.compare.diff import Difference, compare
from bitassay.golden.errors import GoldenError
from bitassay.golden.report import text
from bitassay.golden.streams.drafts import run_of

FC, ATTENTION, HEAD = OPERATIONS = ("draft.fc", "draft.attention", "draft.lm_head")


def planted(stream, name, where, change):
    """The stream with one value of its drafts, or of itself, changed."""
    drafted = hasattr(stream.drafts, name)
    array = getattr(stream.drafts if drafted else stream, name).copy()
    array[where] = change(array[where])
    if not drafted:
        return replace(stream, **{name: array})
    return replace(stream, drafts=replace(stream.drafts, **{name: array}))


def other(value):
    return value ^ type(value)(1)


def printed(comparison) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(text.verdict("made-up/sm_90", "a test", comparison))
        if not comparison.equal:
            console.print(text.difference(comparison, lambda ids: "".join(f"<{i}>" for i in ids)))
    return capture.get()


def where_accepted(stream, count: int, prompt: int = 1) -> int:
    """A token of a prompt after which so many drafts are accepted and another one is drafted."""
    drafts = stream.drafts
    fitting = drafts.accepted[prompt] == count
    if count < 5:
        fitting &= drafts.draft_tokens[prompt, :, count] >= 0
    return int(np.flatnonzero(fitting)[0])


def run(stream, count: int = 3):
    """What a run with so many drafts a round is expected to give."""
    return replace(stream, drafts=run_of(stream.drafts, count))


def engine(stream, count: int, rounds=None):
    """What an engine gives: drafts beyond the first mismatch too, and rounds of its own."""
    true = run_of(stream.drafts, count)
    tokens, prints = true.draft_tokens.copy(), true.draft_fingerprints.copy()
    accepted = true.accepted.copy()
    runs = list(true.rounds)
    if rounds is not None:
        runs[1] = tuple(rounds)
        accepted[1] = -1
        for t, _, right in rounds:
            accepted[1, t] = right
    for s, own in enumerate(runs):
        for t, drafted, _ in own:
            for j in range(drafted):
                if tokens[s, t, j] < 0:
                    kept = stream.drafts.draft_tokens[s, t, j] >= 0
                    tokens[s, t, j] = stream.drafts.draft_tokens[s, t, j] if kept else 7
                    prints[s, t, j] = stream.drafts.draft_fingerprints[s, t, j] if kept else 8
    drafts = replace(
        true,
        draft_tokens=tokens,
        draft_fingerprints=prints,
        accepted=accepted,
        rounds=tuple(runs),
    )
    return replace(stream, drafts=drafts)


def test_equal_drafts_are_counted(make_drafted):
    stream = make_drafted()
    comparison = compare(stream, make_drafted())
    drafted = int((stream.drafts.draft_tokens >= 0).sum())
    plain = compare(replace(stream, drafts=None), replace(stream, drafts=None))
    assert comparison.equal
    assert (comparison.compared.drafts, comparison.compared.acceptances) == (drafted, 36)
    added = 3 * drafted + 3 * 3
    assert comparison.compared.fingerprints == plain.compared.fingerprints + added
    assert f"fingerprints, {drafted} drafts, 36 acceptance counts; 0 different" in printed(
        comparison
    )
    assert "drafts" not in printed(plain)


@pytest.mark.parametrize("draft", [0, 2])
def test_a_draft_token_and_a_fingerprint_are_named(make_drafted, draft):
    stream = make_drafted(steps=20)
    t = where_accepted(stream, draft)
    at = (1, t, draft)
    found = planted(stream, "draft_tokens", at, other)
    comparison = compare(stream, found)
    assert comparison.differences == (Difference(1, t, (), ("draft_tokens",), draft),)
    assert (comparison.different.drafts, comparison.different.acceptances) == (1, 0)
    text = printed(comparison)
    assert f"  p1, token {t}, draft {draft}: no operation differs, only draft_tokens" in text
    token = int(stream.drafts.draft_tokens[at])
    assert f"{token} '<{token}>'; {draft} accepted" in text
    assert f"{token ^ 1} '<{token ^ 1}>'; {draft} accepted" in text

    found = planted(stream, "draft_fingerprints", (*at, 1), other)
    comparison = compare(stream, found)
    expected = Difference(1, t, (ATTENTION,), ("draft_fingerprints",), draft)
    assert comparison.differences == (expected,)
    assert comparison.different.fingerprints == 1
    text = printed(comparison)
    assert f"p1, token {t}, draft {draft}: draft.attention differs (first in running order)" in text
    assert "equal before  1 of 3 operations, up to draft.fc" in text
    bits = int(stream.drafts.draft_fingerprints[(*at, 1)])
    assert f"draft.attention: expected {bits:#018x}, found {bits ^ 1:#018x}" in text


@pytest.mark.parametrize("operation", range(3))
def test_every_operation_of_a_draft_is_compared(make_drafted, operation):
    stream = make_drafted()
    found = planted(stream, "draft_fingerprints", (2, 0, 0, operation), other)
    (difference,) = compare(stream, found).differences
    assert difference.operations == (OPERATIONS[operation],)


def test_a_fold_over_the_prompt_is_named(make_drafted):
    stream = make_drafted()
    found = planted(stream, "draft_prompt_fingerprints", (2, 1), other)
    arrays = ("draft_prompt_fingerprints",)
    assert compare(stream, found).differences == (Difference(2, None, (ATTENTION,), arrays),)
    assert "p2, prompt rows: draft.attention differs" in printed(compare(stream, found))
    both = planted(found, "prompt_fingerprints", (2, 1), other)
    (difference,) = compare(stream, both).differences
    assert difference.operations == ("lm_head", ATTENTION)
    assert difference.arrays == ("prompt_fingerprints", *arrays)
    assert "lm_head differs (first in running order), then draft.attention" in printed(
        compare(stream, both)
    )


def test_an_accepted_count_is_named(make_drafted):
    stream = make_drafted(steps=20)
    t = where_accepted(stream, 2)
    comparison = compare(stream, planted(stream, "accepted", (1, t), other))
    assert comparison.differences == (Difference(1, t, (), ("accepted",)),)
    assert (comparison.different.drafts, comparison.different.acceptances) == (0, 1)
    text = printed(comparison)
    assert f"  p1, token {t}: the count of accepted drafts differs" in text
    assert "; 2 accepted" in text
    assert "; 3 accepted" in text


def test_a_chain_that_ends_elsewhere_is_the_count_s_difference(make_drafted):
    """Where the target chooses otherwise, a chain ends earlier: the target is what differs."""
    stream = make_drafted(steps=20)
    t = where_accepted(stream, 3)
    found = planted(stream, "accepted", (1, t), lambda count: count - 2)
    for j in (2, 3):
        found = planted(found, "draft_tokens", (1, t, j), lambda _: -1)
        found = planted(found, "draft_fingerprints", (1, t, j), lambda _: 0)
    assert compare(stream, found).differences == (Difference(1, t, (), ("accepted",)),)
    found = planted(found, "tokens", (1, t + 2), other)
    assert compare(stream, found).differences == (Difference(1, t + 2, (), ("tokens",)),)
    unequal = planted(stream, "draft_tokens", (1, t, 3), lambda _: -1)
    (difference,) = compare(stream, unequal).differences
    assert (difference.draft, difference.arrays) == (3, ("draft_tokens",))


def test_target_and_head_are_named_in_the_order_of_the_run(make_drafted):
    stream = make_drafted(steps=20)
    t = where_accepted(stream, 2)
    found = planted(stream, "draft_tokens", (1, t, 1), other)
    for step, expected in ((t, None), (t + 1, 1)):
        both = planted(found, "margins", (1, step), other)
        (difference,) = compare(stream, both).differences
        assert (difference.step, difference.draft) == (t, expected)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_run_is_equal_whatever_lies_beyond_its_mismatches(make_drafted, count):
    stream = make_drafted(prompts=6, steps=20)
    comparison = compare(run(stream, count), engine(stream, count))
    assert comparison.equal
    rounds = [r for own in run_of(stream.drafts, count).rounds for r in own]
    assert comparison.compared.acceptances == len(rounds)
    assert comparison.compared.drafts == sum(min(d, a + 1) for _, d, a in rounds)
    assert f"{len(rounds)} acceptance counts; 0 different" in printed(comparison)


def test_differences_of_a_run_are_named(make_drafted):
    """A draft token, fingerprints of a base row, a chain row and a row of the first pass."""
    stream = make_drafted(prompts=4, steps=20)
    true, clean = run(stream), engine(stream, 3)
    rounds = true.drafts.rounds[1]
    t = next(t for t, drafted, right in rounds if drafted == 3 and right >= 2)
    for j in (0, 2):
        found = planted(clean, "draft_tokens", (1, t, j), other)
        assert compare(true, found).differences == (Difference(1, t, (), ("draft_tokens",), j),)
        for o in (0, 2):
            found = planted(clean, "draft_fingerprints", (1, t, j, o), other)
            expected = Difference(1, t, (OPERATIONS[o],), ("draft_fingerprints",), j)
            assert compare(true, found).differences == (expected,)
    between = t + 1  # a row of the first pass, where no round begins
    found = planted(clean, "draft_fingerprints", (1, between, 0, 1), other)
    expected = Difference(1, between, (ATTENTION,), ("draft_fingerprints",), 0)
    assert compare(true, found).differences == (expected,)
    for o in (2,):  # the lm_head does not run there
        found = planted(clean, "draft_fingerprints", (1, between, 0, o), other)
        assert compare(true, found).equal
    found = planted(clean, "draft_prompt_fingerprints", (3, 0), other)
    arrays = ("draft_prompt_fingerprints",)
    assert compare(true, found).differences == (Difference(3, None, (FC,), arrays),)


@pytest.mark.parametrize("by", [-1, 1])
def test_acceptance_off_by_one_is_found_though_all_tokens_are_equal(make_drafted, by):
    stream = make_drafted(prompts=4, steps=20)
    true = run(stream)
    rounds = list(true.drafts.rounds[1])
    place = next(i for i, (t, d, a) in enumerate(rounds) if 0 <= a + by <= d == 3)
    t, drafted, right = rounds[place]
    wrong, at = [*rounds[:place], (t, drafted, right + by)], t + right + by + 1
    while at < 19:
        most = max(0, min(3, 18 - at))
        wrong.append((at, most, min(most, int(stream.drafts.accepted[1, at]))))
        at += wrong[-1][2] + 1
    comparison = compare(true, engine(stream, 3, wrong))
    assert comparison.differences == (Difference(1, t, (), ("accepted",)),)
    assert comparison.different.tokens == 0
    assert comparison.different.acceptances >= 1
    text = printed(comparison)
    assert f"p1, token {t}: the count of accepted drafts differs" in text
    assert f"expected      rounds ({t}, 3, {right})" in text
    assert f"found         rounds ({t}, 3, {right + by})" in text


def test_fewer_drafts_in_a_round_or_no_rounds_are_found(make_drafted):
    stream = make_drafted(prompts=4, steps=20)
    true = run(stream)
    rounds = list(true.drafts.rounds[1])
    place = next(i for i, (_, drafted, right) in enumerate(rounds) if right < drafted == 3)
    t, _, right = rounds[place]
    fewer = engine(stream, 3, [*rounds[:place], (t, right, right), *rounds[place + 1 :]])
    assert compare(true, fewer).differences == (Difference(1, t, (), ("accepted",)),)
    (t, _, right), *rest = rounds
    lost = engine(stream, 3, [])
    assert compare(true, lost).differences[0].arrays == ("accepted",)
    repeated = engine(stream, 3, [(t, 3, right), (t, 3, right), *rest])
    assert compare(true, repeated).differences == (Difference(1, t, (), ("accepted",)),)


def test_drafts_that_were_not_expected_and_others_are_refused(make_drafted):
    stream = make_drafted()
    plain = replace(stream, drafts=None)
    with pytest.raises(GoldenError, match="differ in drafts: expected no drafts, found drafts"):
        compare(plain, stream)
    with pytest.raises(GoldenError, match="of a run are compared with those of a run alone"):
        compare(run(stream), stream)
    renamed = replace(stream.drafts, draft_operations=("a", "b", "c"))
    with pytest.raises(GoldenError, match="differ in draft_operations"):
        compare(stream, replace(stream, drafts=renamed))
