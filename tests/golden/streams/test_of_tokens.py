"""A stream of tokens alone, as any engine has them: what it takes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitassay.golden.errors import GoldenError
from bitassay.golden.streams.token_stream import TokenStream

PROMPTS = [[1], [2, 3, 4], [5, 6]]
TOKENS = [[7, 8], [9, 0], [1, 2]]


def test_lists_of_ids_are_enough():
    stream = TokenStream.of_tokens(PROMPTS, TOKENS, vocab_size=10)
    assert stream.prompts == PROMPTS
    assert stream.tokens.tolist() == TOKENS
    assert stream.prompt_names == ("prompt 0", "prompt 1", "prompt 2")
    assert set(stream.arrays) == {"prompt_ids", "prompt_offsets", "tokens"}
    assert set(stream.labels) == {"prompt_names", "vocab_size"}


@pytest.mark.parametrize("kind", [np.array, lambda x: np.array(x, "<u2"), torch.tensor, tuple])
def test_arrays_of_integers_are_taken_too(kind):
    prompts = [kind(ids) for ids in PROMPTS]
    stream = TokenStream.of_tokens(prompts, kind(TOKENS), vocab_size=10, names=["a", "b", "c"])
    assert stream.prompts == PROMPTS
    assert stream.tokens.tolist() == TOKENS
    assert stream.prompt_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("prompts", "tokens", "names", "message"),
    [
        ([], [], None, "expected one or more, and a name for each, found 0 prompts"),
        (PROMPTS, TOKENS, ["a", "b"], "found 3 prompts and 2 names"),
        (PROMPTS, TOKENS, ["a", "b", "a"], "prompt_names: expected 3 different names, found 2"),
        ([[1], [], [2]], TOKENS, None, "prompt 'prompt 1': expected one token id or more"),
        ([[1], [10], [2]], TOKENS, None, "prompt 'prompt 1': expected ids within 0 … 9, found 10"),
        ([[1], [2.0], [2]], TOKENS, None, "prompt 'prompt 1': expected a list of integers"),
        ([1, 2, 3], TOKENS, None, "prompt 'prompt 0': expected a list of integers, found 1"),
        (PROMPTS, TOKENS[:2], None, "tokens: expected those of 3 prompts, found those of 2"),
        (PROMPTS, [[], [], []], None, "tokens of 'prompt 0': expected one token id or more"),
        (PROMPTS, [[1], [-1], [1]], None, "tokens of 'prompt 1': expected ids .*, found -1"),
        (PROMPTS, [[1], [2**40], [1]], None, "tokens of 'prompt 1': expected ids .* 1099511627776"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_prompt_s_name(prompts, tokens, names, message):
    with pytest.raises(GoldenError, match=message):
        TokenStream.of_tokens(prompts, tokens, vocab_size=10, names=names)


def test_unequally_many_tokens_are_refused_with_what_to_do():
    with pytest.raises(GoldenError) as error:
        TokenStream.of_tokens(PROMPTS, [[1, 2], [3, 4], [5]], vocab_size=10, names=list("abc"))
    assert str(error.value) == (
        "tokens of 'c': expected 2, as many as of 'a', found 1: every prompt is continued by "
        "equally many tokens, so generate past the end of sequence, or take the first 1 of each "
        "and of the golden (TokenStream.first)"
    )
