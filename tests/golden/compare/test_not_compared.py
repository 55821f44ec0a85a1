"""What a stream lacks is not compared, not counted, not called equal; what it has is compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bitassay.golden.compare.diff import Difference, compare
from bitassay.golden.errors import GoldenError
from bitassay.golden.report import text
from bitassay.golden.report.text_counts import counts as counts_in_words
from bitassay.golden.streams.drafts import run_of
from bitassay.golden.streams.token_stream import TokenStream

REPEATABLE = settings(max_examples=80, derandomize=True, deadline=None, database=None)
OWN = ("top_ids", "top_bits", "margins", "fingerprints", "prompt_fingerprints")
DRAFTED = ("draft_fingerprints", "draft_prompt_fingerprints")
OPERATIONS = tuple(f"layers.{i}.{name}" for i in range(4) for name in ("attention", "o_proj"))


def without(stream, names):
    """The stream without those arrays, the drafts' among them; "drafts" means all of these."""
    own = dict.fromkeys(name for name in names if name in OWN)
    drafts = None if "drafts" in names else stream.drafts
    if drafts is not None:
        drafts = replace(drafts, **dict.fromkeys(name for name in names if name in DRAFTED))
    return replace(stream, **own, drafts=drafts)


def flipped(stream, name, where):
    """The stream with the lowest bit of one value flipped."""
    of_drafts = stream.drafts is not None and name in stream.drafts.arrays
    array = stream.arrays[name].copy()
    array[where] ^= array.dtype.type(1)
    if not of_drafts:
        return replace(stream, **{name: array})
    return replace(stream, drafts=replace(stream.drafts, **{name: array}))


def of_many_operations(make_stream, chosen=range(8)):
    """A stream of eight operations, or of some of them."""
    chosen = [*chosen]
    rows = np.arange(3 * 4 * 8, dtype=np.uint64).reshape(3, 4, 8)
    folds = np.arange(3 * 8, dtype=np.uint64).reshape(3, 8)
    return replace(
        make_stream(),
        operations=tuple(OPERATIONS[o] for o in chosen),
        fingerprints=rows[..., chosen],
        prompt_fingerprints=folds[..., chosen],
    )


def printed(comparison) -> str:
    console = Console(width=250)
    with console.capture() as capture:
        console.print(text.verdict("made-up/sm_90", "a test", comparison))
        if not comparison.equal:
            console.print(text.difference(comparison, lambda ids: "".join(f"<{i}>" for i in ids)))
    return capture.get()


def line(comparison) -> str:
    return text.verdict("x", "w", comparison).plain


def bare(stream) -> TokenStream:
    return TokenStream.of_tokens(stream.prompts, stream.tokens, vocab_size=stream.vocab_size)


def test_tokens_alone_are_equal_and_not_the_whole(make_drafted):
    comparison = compare(make_drafted(), bare(make_drafted()))
    assert comparison.equal
    assert not comparison.whole
    assert comparison.not_compared == (*OWN, "drafts")
    for counts in (comparison.compared, comparison.different):
        kinds = "logits fingerprints drafts acceptances top_ids margins".split()
        assert [getattr(counts, kind) for kind in kinds] == [None] * 6
    assert line(comparison) == (
        "x: equal (w): 3 prompts, 36 tokens; 0 different, not compared: logits, fingerprints, "
        "drafts"
    )


def test_a_difference_of_tokens_alone_names_no_operation(make_stream):
    found = flipped(bare(make_stream()), "tokens", (1, 2))
    comparison = compare(make_stream(), found)
    assert comparison.differences == (Difference(1, 2, (), ("tokens",)),)
    printed_lines = printed(comparison).splitlines()
    assert printed_lines[0] == (
        "made-up/sm_90: different (a test): 1 of 3 streams differ; different: 1 tokens; compared: "
        "3 prompts, 12 tokens, not compared: logits, fingerprints"
    )
    assert printed_lines[1] == (
        "  p1, token 2: tokens differ; no fingerprints were given, so no operation can be named"
    )
    token, margin = int(make_stream().tokens[1, 2]), int(make_stream().margins[1, 2])
    bits = int(make_stream().top_bits[1, 2, 0])
    assert printed_lines[4:] == [
        f"  expected      token {token} '<{token}>', logit 0x{bits:04x}, margin {margin} ulps",
        f"  found         token {token ^ 1} '<{token ^ 1}>'",
        "  differing     tokens",
    ]


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ({"top_ids", "top_bits", "margins"}, "logits"),
        ({"top_ids", "top_bits"}, "ids of the top logits, bits of the top logits"),
        ({"top_bits"}, "bits of the top logits"),
        ({"margins"}, "margins"),
        ({"fingerprints", "prompt_fingerprints"}, "fingerprints"),
        ({"fingerprints"}, "fingerprints of generated rows"),
        ({"prompt_fingerprints"}, "fingerprints of prompt rows"),
        ({"drafts"}, "drafts"),
        ({*DRAFTED}, "fingerprints of drafts"),
        ({"draft_fingerprints"}, "fingerprints of drafted rows"),
        ({"draft_prompt_fingerprints"}, "fingerprints of the draft head's prompt rows"),
        ({"margins", "prompt_fingerprints"}, "margins, fingerprints of prompt rows"),
    ],
)
def test_what_was_not_compared_is_named_in_the_line(make_drafted, lacking, words):
    comparison = compare(make_drafted(), without(make_drafted(), lacking))
    assert line(comparison).endswith(f"; 0 different, not compared: {words}")
    assert set(comparison.not_compared) == lacking


def test_only_the_kinds_of_logits_that_are_given_are_counted(make_stream):
    stream = make_stream()
    ids = compare(stream, without(stream, {"top_bits", "margins"}))
    assert (ids.compared.logits, ids.compared.top_ids, ids.compared.margins) == (None, 96, None)
    assert "12 tokens, 96 ids of top logits, 30 fingerprints; 0 different" in line(ids)
    bits = compare(stream, without(stream, {"top_ids"}))
    assert (bits.compared.logits, bits.compared.top_ids, bits.compared.margins) == (96, None, None)
    margins = compare(stream, without(stream, {"top_ids", "top_bits"}))
    assert "12 tokens, 12 margins, 30 fingerprints; 0 different" in line(margins)


@pytest.mark.parametrize("lacking", ["top_ids", "top_bits"])
def test_the_top_logits_are_listed_with_what_is_given(make_stream, lacking):
    stream = make_stream()
    given = {"top_ids": "top_bits", "top_bits": "top_ids"}[lacking]
    found = without(flipped(stream, given, (0, 1, 3)), {lacking})
    comparison = compare(stream, found)
    assert comparison.differences == (Difference(0, 1, (), (given,)),)
    rows = printed(comparison).split("rank ")[1].splitlines()[1:]
    assert [number for number, row in enumerate(rows) if row.rstrip().endswith("differs")] == [3]
    bits = int(found.arrays[given][0, 1, 3])
    assert (f"0x{bits:04x}" if given == "top_bits" else f"{bits} '<{bits}>'") in rows[3]


@st.composite
def cases(draw):
    """Arrays that either side lacks, and a value to flip: its array and where, as fractions."""
    names = st.sets(st.sampled_from((*OWN, *DRAFTED, "drafts")))
    array = draw(
        st.sampled_from(("tokens", *OWN, "draft_tokens", "accepted", *DRAFTED)) | st.none()
    )
    where = draw(st.lists(st.floats(0, 0.999), min_size=4, max_size=4))
    # Drafts that only the found side has are refused, so the expected side has them here.
    return draw(names) - {"drafts"}, draw(names), array, where


@REPEATABLE
@given(case=cases())
def test_a_difference_in_what_both_have_is_found_and_nothing_else(make_drafted, case):
    stream = make_drafted()
    expected_lacks, found_lacks, name, where = case
    other = stream
    if name is not None:
        array = stream.arrays[name]
        at = tuple(int(part * size) for part, size in zip(where, array.shape, strict=False))
        if (
            name in ("draft_tokens", "draft_fingerprints")
            and stream.drafts.draft_tokens[at[:3]] < 0
        ):
            at = (0, 0, 0, 0)[: array.ndim]
        other = flipped(stream, name, at)
    expected, found = without(stream, expected_lacks), without(other, found_lacks)
    comparison = compare(expected, found)

    absent = found_lacks - expected_lacks
    if "drafts" in found_lacks:
        absent = (absent - {*DRAFTED}) | {"drafts"}
    order = [*stream.arrays, "drafts"]
    assert [*comparison.not_compared] == sorted(absent, key=order.index)
    assert comparison.whole == (not absent)

    both = expected.arrays.keys() & found.arrays.keys()
    assert comparison.equal == (name not in both)
    if name in both:
        assert name in comparison.differences[0].arrays
    for counts in (comparison.compared, comparison.different):
        assert (counts.logits is None) == ("top_bits" not in both)
        assert (counts.top_ids is None) == ("top_ids" not in both or "top_bits" in both)
        assert (counts.fingerprints is None) == (not any("fingerprints" in x for x in both))
        assert (counts.drafts is None) == ("draft_tokens" not in both)
        assert (counts.acceptances is None) == ("accepted" not in both)
    fingerprints = sum(stream.arrays[x].size for x in both & {*OWN} if "fingerprints" in x)
    drafted = int((stream.drafts.draft_tokens >= 0).sum()) * 3
    fingerprints += drafted * ("draft_fingerprints" in both)
    fingerprints += stream.drafts.draft_prompt_fingerprints.size * (DRAFTED[1] in both)
    assert (comparison.compared.fingerprints or 0) == fingerprints
    kinds = {words.split(" ", 1)[1] for words in counts_in_words(comparison.compared).split(", ")}
    of_kinds = {"logits": "top_bits", "drafts": "draft_tokens", "acceptance counts": "accepted"}
    assert {kind for kind in of_kinds if kind in kinds} == {
        kind for kind, array in of_kinds.items() if array in both
    }
    assert printed(comparison)


@REPEATABLE
@given(
    chosen=st.sets(st.integers(0, 7), min_size=1).map(sorted),
    flip=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 7)),
    folded=st.booleans(),
)
def test_fingerprints_of_some_operations_are_compared_by_name(make_stream, chosen, flip, folded):
    expected, found = of_many_operations(make_stream), of_many_operations(make_stream, chosen)
    comparison = compare(expected, found)
    lacking = [name for name in OPERATIONS if name not in found.operations]
    named = f" of {', '.join(lacking)}"
    both = (f"fingerprints{named}", f"prompt_fingerprints{named}") if lacking else ()
    assert comparison.equal
    assert comparison.not_compared == both
    assert comparison.compared.fingerprints == len(chosen) * (3 * 4 + 3)

    s, t, o = flip
    name, where = ("prompt_fingerprints", (s, o)) if folded else ("fingerprints", (s, t, o))
    comparison = compare(flipped(expected, name, where), found)
    assert comparison.equal == (o not in chosen)
    if o in chosen:
        step = None if folded else t
        assert comparison.differences == (Difference(s, step, (OPERATIONS[o],), (name,)),)


def test_what_is_printed_of_some_operations(make_stream):
    expected, found = of_many_operations(make_stream), of_many_operations(make_stream, [1, 3, 5])
    assert line(compare(expected, found)).endswith(
        "45 fingerprints; 0 different, not compared: fingerprints of layers.0.attention, "
        "layers.1.attention, layers.2.attention, layers.3.attention and 1 more"
    )
    comparison = compare(expected, flipped(found, "fingerprints", (1, 2, 1)))
    words = printed(comparison)
    first = "layers.1.o_proj"
    assert f"p1, token 2: {first} differs (first in running order of those compared)\n" in words
    assert "equal before  1 of 3 operations, up to layers.0.o_proj\n" in words
    bits = int(expected.fingerprints[1, 2, 3])
    assert f"{first}: expected {bits:#018x}, found {bits ^ 1:#018x}" in words
    words = printed(compare(expected, flipped(found, "margins", (1, 2))))
    assert "p1, token 2: none of the 3 operations compared differs, only margins\n" in words


def test_rows_without_fingerprints_name_no_operation(make_drafted):
    found = without(make_drafted(), {"fingerprints"})
    words = printed(compare(make_drafted(), flipped(found, "tokens", (1, 2))))
    assert (
        "p1, token 2: tokens differ; no fingerprints of such rows were given, so no operation can "
        "be named\n"
    ) in words
    found = without(make_drafted(), {"draft_fingerprints"})
    words = printed(compare(make_drafted(), flipped(found, "draft_tokens", (1, 2, 0))))
    assert "p1, token 2, draft 0: draft_tokens differ; no fingerprints of such rows" in words
    found = flipped(without(make_drafted(), {"prompt_fingerprints"}), DRAFTED[1], (1, 1))
    words = printed(compare(make_drafted(), found))
    assert "p1, prompt rows: draft.attention differs (first in running order of those" in words
    assert "equal before  1 of 3 operations, up to draft.fc\n" in words


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("chosen", [(2,), (0, 1), (1, 2)])
def test_a_run_is_compared_in_what_its_rounds_come_to(make_drafted, count, chosen):
    """The lm_head runs only where drafts begin, whichever operations are given."""
    stream = make_drafted(prompts=4, steps=20)
    run = replace(stream, drafts=run_of(stream.drafts, count))
    columns = [*chosen]
    some = replace(
        run.drafts,
        draft_fingerprints=run.drafts.draft_fingerprints[..., columns],
        draft_prompt_fingerprints=run.drafts.draft_prompt_fingerprints[..., columns],
        draft_operations=tuple(run.drafts.draft_operations[o] for o in chosen),
    )
    comparison = compare(run, replace(run, drafts=some))
    assert comparison.equal
    assert len(comparison.not_compared) == 2
    own = compare(replace(run, drafts=some), replace(run, drafts=some))
    assert own.whole
    assert comparison.compared == own.compared
    tokens = compare(run, without(run, {*DRAFTED}))
    assert tokens.compared.drafts == comparison.compared.drafts
    between = next(t for t in range(19) if t not in {t for t, *_ in run.drafts.rounds[1]})
    for o, name in enumerate(some.draft_operations):
        array = some.draft_fingerprints.copy()
        array[1, between, 0, o] ^= np.uint64(1)
        wrong = replace(run, drafts=replace(some, draft_fingerprints=array))
        assert compare(run, wrong).equal == (name == "draft.lm_head")


def test_more_than_the_golden_has_is_left_out(make_stream):
    """Arrays that only the found side has judge nothing; another model's operations are refused."""
    stream = make_stream()
    comparison = compare(bare(stream), flipped(stream, "top_bits", (0, 0, 0)))
    assert comparison.equal
    assert comparison.whole
    assert comparison.compared.logits is None
    many = of_many_operations(make_stream)
    with pytest.raises(GoldenError, match="differ in operations"):
        compare(of_many_operations(make_stream, [0, 1]), many)
    with pytest.raises(GoldenError, match="differ in operations"):
        compare(many, of_many_operations(make_stream, [1, 0]))
    with pytest.raises(GoldenError, match="differ in logits_dtype"):
        compare(stream, replace(stream, logits_dtype="float32"))
    for unknown in (bare(stream), without(stream, {"top_bits", "margins"})):
        assert compare(stream, replace(unknown, logits_dtype=None)).equal


def test_a_whole_stream_lacks_nothing(make_drafted):
    stream = make_drafted()
    comparison = compare(stream, make_drafted())
    assert comparison.whole
    assert comparison.not_compared == ()
    assert "not compared" not in line(comparison)
    assert "not compared" not in printed(compare(stream, flipped(stream, "tokens", (0, 0))))
