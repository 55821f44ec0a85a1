"""TokenStream refuses arrays that do not fit together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitassay.golden.errors import GoldenError
from bitassay.golden.streams.token_stream import ARRAYS


@pytest.mark.parametrize("name", ARRAYS)
def test_another_dtype_is_refused(make_stream, name):
    stream = make_stream()
    with pytest.raises(GoldenError, match=f"{name}: expected"):
        replace(stream, **{name: getattr(stream, name).astype("<i2")})


@pytest.mark.parametrize("name", ARRAYS)
def test_another_shape_is_refused(make_stream, name):
    stream = make_stream()
    with pytest.raises(GoldenError, match="expected"):
        replace(stream, **{name: getattr(stream, name)[:-1]})


@pytest.mark.parametrize("name", ["prompt_ids", "tokens", "top_ids"])
@pytest.mark.parametrize("wrong", [-1, 50])
def test_an_id_outside_the_vocabulary_is_refused(make_stream, name, wrong):
    array = getattr(make_stream(), name).copy()
    array.flat[-1] = wrong
    with pytest.raises(GoldenError, match=rf"{name}.*within 0 … 49, found {wrong}"):
        replace(make_stream(), **{name: array})


@pytest.mark.parametrize("offsets", [[0, 1, 1, 6], [0, 3, 1, 6], [1, 2, 3, 6], [0, 1, 3, 5]])
def test_offsets_that_do_not_cut_the_prompts_are_refused(make_stream, offsets):
    with pytest.raises(GoldenError, match="prompt_offsets: expected rising from 0 to 6"):
        replace(make_stream(), prompt_offsets=np.array(offsets, "<i8"))


def test_bits_wider_than_the_logits_are_refused(make_stream):
    bits = make_stream().top_bits.copy()
    bits[1, 2, 3] = 0x10000
    with pytest.raises(GoldenError, match="16-bit patterns"):
        replace(make_stream(), top_bits=bits)
    assert replace(make_stream(), top_bits=bits, logits_dtype="float32").logit_width == 32


def test_a_negative_margin_and_repeated_names_are_refused(make_stream):
    with pytest.raises(GoldenError, match="margins"):
        replace(make_stream(), margins=make_stream().margins - 9)
    with pytest.raises(GoldenError, match="prompt_names: expected 3 different names"):
        replace(make_stream(), prompt_names=("a", "b", "a"))


def test_first_keeps_whole_prompts(make_stream):
    cut = make_stream().first(2)
    assert cut.prompts == [[1], [1, 1]]
    assert np.array_equal(cut.fingerprints, make_stream().fingerprints[:2])
    for count in (0, 4):
        with pytest.raises(GoldenError, match="expected 1 to 3"):
            make_stream().first(count)


def test_distinct_rows_counts_the_last_operations_rows(make_stream):
    fingerprints = make_stream().fingerprints.copy()
    fingerprints[0, 0, 1] = fingerprints[2, 3, 1]
    assert make_stream().distinct_rows == 12
    assert replace(make_stream(), fingerprints=fingerprints).distinct_rows == 11
