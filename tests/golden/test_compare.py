"""The first difference of every stream: where it is, in which operation, and how it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from bitassay.golden import render
from bitassay.golden.compare import Difference, compare
from bitassay.golden.errors import GoldenError


def flipped(stream, name, *where):
    """The stream with the lowest bit of one value flipped."""
    array = getattr(stream, name).copy()
    array[where] ^= 1
    return replace(stream, **{name: array})


def printed(comparison) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(render.verdict("made-up/sm_90", "a test", comparison))
        console.print(render.difference(comparison, lambda ids: "".join(f"<{i}>" for i in ids)))
    return capture.get()


def test_equal_streams(make_stream):
    comparison = compare(make_stream(), make_stream())
    assert comparison.equal
    assert comparison.compared.tokens == 12
    assert comparison.compared.logits == 96
    assert comparison.compared.fingerprints == 24 + 6
    assert comparison.different.logits == comparison.different.fingerprints == 0


@pytest.mark.parametrize(
    ("name", "where", "expected"),
    [
        ("tokens", (1, 2), Difference(1, 2, None, ("tokens",))),
        ("top_ids", (2, 3, 7), Difference(2, 3, None, ("top_ids",))),
        ("top_bits", (0, 0, 0), Difference(0, 0, None, ("top_bits",))),
        ("margins", (0, 1), Difference(0, 1, None, ("margins",))),
        ("fingerprints", (1, 3, 0), Difference(1, 3, "embedding", ("fingerprints",))),
        ("fingerprints", (1, 3, 1), Difference(1, 3, "lm_head", ("fingerprints",))),
        ("prompt_fingerprints", (2, 0), Difference(2, None, "embedding", ("prompt_fingerprints",))),
    ],
)
def test_one_flipped_bit_in_any_array_is_found(make_stream, name, where, expected):
    comparison = compare(make_stream(), flipped(make_stream(), name, *where))
    assert comparison.differences == (expected,)
    assert comparison.different.streams == 1


def test_the_first_step_of_each_stream_is_named(make_stream):
    found = flipped(make_stream(), "tokens", 0, 3)
    found = flipped(found, "fingerprints", 0, 1, 1)
    found = flipped(found, "fingerprints", 0, 1, 0)
    found = flipped(found, "margins", 2, 0)
    first, second = compare(make_stream(), found).differences
    assert first == Difference(0, 1, "embedding", ("fingerprints",))
    assert second == Difference(2, 0, None, ("margins",))


def test_what_is_printed_of_a_difference(make_stream):
    """Prompt, step, both tokens with text, logit bits in hex, margins, the operation, counts."""
    expected = make_stream()
    found = flipped(expected, "tokens", 1, 2)
    found = flipped(found, "top_bits", 1, 2, 0)
    found = flipped(found, "fingerprints", 1, 2, 1)
    found = flipped(found, "margins", 2, 0)
    text = printed(compare(expected, found))
    token, bits = int(expected.tokens[1, 2]), int(expected.top_bits[1, 2, 0])
    margin = int(expected.margins[1, 2])
    assert "made-up/sm_90: different (a test): 2 of 3 streams differ; different: 1 tokens" in text
    assert "first prompt p1, step 2, operation lm_head" in text
    assert "prompt text   '<1><1>'" in text
    assert f"token {token} '<{token}>', logit 0x{bits:04x}, margin {margin} ulps" in text
    assert (
        f"token {token ^ 1} '<{token ^ 1}>', logit 0x{bits ^ 1:04x}, margin {margin} ulps" in text
    )
    assert f"lm_head: expected 0x{int(expected.fingerprints[1, 2, 1]):016x}" in text
    assert "also prompt p2, step 0, no operation: the choice alone" in text
    assert text.count("differs") == 1


def test_what_is_printed_of_a_difference_in_the_prompt(make_stream):
    expected = make_stream()
    text = printed(compare(expected, flipped(expected, "prompt_fingerprints", 2, 0)))
    assert "first prompt p2, its own rows, operation embedding" in text
    assert f"expected fingerprint 0x{int(expected.prompt_fingerprints[2, 0]):016x}" in text


def test_many_differing_streams_are_counted_and_not_all_listed(make_stream):
    expected = make_stream(prompts=30)
    found = replace(expected, margins=expected.margins + 1)
    text = printed(compare(expected, found))
    assert "30 of 30 streams differ" in text
    assert text.count("also prompt") == 9
    assert "and 20 more streams" in text


def test_streams_of_different_prompts_are_not_compared(make_stream):
    with pytest.raises(GoldenError, match="different prompts"):
        compare(make_stream(), flipped(make_stream(), "prompt_ids", 0))
    with pytest.raises(GoldenError, match="differ in steps: expected 4, found 5"):
        compare(make_stream(), make_stream(steps=5))
    with pytest.raises(GoldenError, match="differ in operations"):
        compare(make_stream(), replace(make_stream(), operations=("a", "b")))
