"""The first difference of every stream: where it is, in which operation, what is printed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from bitassay.golden.compare.diff import Difference, compare
from bitassay.golden.errors import GoldenError
from bitassay.golden.report import text


def flipped(stream, name, *where):
    """The stream with the lowest bit of one value flipped."""
    array = getattr(stream, name).copy()
    array[where] ^= 1
    return replace(stream, **{name: array})


def printed(comparison) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(text.verdict("made-up/sm_90", "a test", comparison))
        console.print(text.difference(comparison, lambda ids: "".join(f"<{i}>" for i in ids)))
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
        ("tokens", (1, 2), Difference(1, 2, (), ("tokens",))),
        ("top_ids", (2, 3, 7), Difference(2, 3, (), ("top_ids",))),
        ("top_bits", (0, 0, 0), Difference(0, 0, (), ("top_bits",))),
        ("margins", (0, 1), Difference(0, 1, (), ("margins",))),
        ("fingerprints", (1, 3, 0), Difference(1, 3, ("embedding",), ("fingerprints",))),
        ("fingerprints", (1, 3, 1), Difference(1, 3, ("lm_head",), ("fingerprints",))),
        (
            "prompt_fingerprints",
            (2, 0),
            Difference(2, None, ("embedding",), ("prompt_fingerprints",)),
        ),
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
    assert first == Difference(0, 1, ("embedding", "lm_head"), ("fingerprints",))
    assert second == Difference(2, 0, (), ("margins",))


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
    assert "  p1, token 2: lm_head differs (first in running order)\n" in text
    assert "equal before  1 of 2 operations, up to embedding" in text
    assert "prompt text   '<1><1>'" in text
    assert f"token {token} '<{token}>', logit 0x{bits:04x}, margin {margin} ulps" in text
    assert (
        f"token {token ^ 1} '<{token ^ 1}>', logit 0x{bits ^ 1:04x}, margin {margin} ulps" in text
    )
    assert f"lm_head: expected 0x{int(expected.fingerprints[1, 2, 1]):016x}" in text
    assert "also p2, token 0: no operation differs, only margins" in text
    assert text.count("differs") == 3  # of the ranks, one


def test_what_is_printed_of_a_difference_in_the_prompt(make_stream):
    expected = make_stream()
    text = printed(compare(expected, flipped(expected, "prompt_fingerprints", 2, 0)))
    assert "  p2, prompt rows: embedding differs (first in running order)" in text
    assert f"embedding: expected 0x{int(expected.prompt_fingerprints[2, 0]):016x}" in text


OPERATIONS = ("embedding", *(f"layers.{i}.{o}" for i in range(4) for o in "abcdefghijk"), "lm_head")


def of_many_operations(make_stream):
    stream = make_stream()
    width = len(OPERATIONS)
    prints = np.arange(3 * 4 * width, dtype=np.uint64).reshape(3, 4, width)
    folds = np.arange(3 * width, dtype=np.uint64).reshape(3, width)
    return replace(stream, operations=OPERATIONS, fingerprints=prints, prompt_fingerprints=folds)


def test_of_many_operations_the_first_in_running_order_are_named(make_stream):
    expected = of_many_operations(make_stream)
    prints = expected.fingerprints.copy()
    prints[1, 2, 20:] ^= np.uint64(1)
    prints[1, 3] ^= np.uint64(1)
    text = printed(compare(expected, replace(expected, fingerprints=prints)))
    names = OPERATIONS[20:]
    assert (
        f"  p1, token 2: {names[0]} differs (first in running order), then {names[1]}, {names[2]} "
        f"and {len(names) - 3} more\n"
    ) in text
    assert f"equal before  20 of 46 operations, up to {OPERATIONS[19]}\n" in text
    assert [line.split()[1] for line in text.splitlines() if "  fingerprint " in line] == [
        f"{name}:" for name in names[:4]
    ]
    assert f"different too {len(names) - 4} more operations" in text
    assert len(text.splitlines()) < 30


def test_prompt_rows_come_before_tokens(make_stream):
    expected = of_many_operations(make_stream)
    found = flipped(flipped(expected, "fingerprints", 1, 0, 0), "prompt_fingerprints", 1, 5)
    text = printed(compare(expected, found))
    assert f"  p1, prompt rows: {OPERATIONS[5]} differs (first in running order)\n" in text


def test_many_differing_streams_are_counted_and_not_all_listed(make_stream):
    expected = make_stream(prompts=30)
    found = replace(expected, margins=expected.margins + 1)
    text = printed(compare(expected, found))
    assert "30 of 30 streams differ" in text
    assert text.count("  also p") == 9
    assert "and 20 more streams" in text


def test_streams_of_different_prompts_are_not_compared(make_stream):
    with pytest.raises(GoldenError, match="different prompts"):
        compare(make_stream(), flipped(make_stream(), "prompt_ids", 0))
    with pytest.raises(GoldenError, match="differ in steps: expected 4, found 5"):
        compare(make_stream(), make_stream(steps=5))
    with pytest.raises(GoldenError, match="differ in operations"):
        compare(make_stream(), replace(make_stream(), operations=("a", "b")))
