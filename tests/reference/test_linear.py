"""linear and lm_head against the twin: roundings, bias, padding of the vocabulary, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitassay.reference import linear as module
from bitassay.reference.linear import linear, lm_head
from bitassay.reference.sample import greedy
from bitassay.reference.spec.contract import default_contract
from support.hard_matrices import KINDS, matrix
from support.naive import tensor_core as twin
from support.same_bits import assert_same_bits, from_patterns, patterns

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNITS = [(arch, kind) for arch in ("sm_80", "sm_89", "sm_90") for kind in DTYPES]
every_unit = pytest.mark.parametrize(("arch", "kind"), UNITS)
C90 = default_contract("sm_90")


def by_twin(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, arch: str, *, fp32: bool = False
) -> Tensor:
    """[T, K], [N, K], [N] -> [T, N]; fp32 leaves out the last rounding."""
    rows, columns = [patterns(row) for row in x], [patterns(row) for row in weight]
    shifts = [None] * len(columns) if bias is None else patterns(bias)
    values = []
    for row in rows:
        for column, shift in zip(columns, shifts, strict=True):
            if not fp32:
                values.append(twin.linear(row, column, shift, kind, arch))
                continue
            acc = twin.output(row, column, 0, kind, arch)
            if shift is not None:
                acc = twin.add(acc, twin.convert(shift, twin.FORMATS[kind], twin.FP32))
            values.append(acc)
    dtype = torch.float32 if fp32 else DTYPES[kind]
    return from_patterns(values, dtype).view(len(rows), len(columns))


@every_unit
def test_linear_and_lm_head(arch: str, kind: str) -> None:
    contract = default_contract(arch)
    wide = default_contract(arch, logits_dtype="float32")

    @settings(max_examples=60, derandomize=True, deadline=None, database=None)
    @given(
        left=st.sampled_from(KINDS),
        right=st.sampled_from(KINDS),
        third=st.sampled_from((None, *KINDS)),
        depth=st.integers(1, 40),
        tokens=st.integers(1, 3),
        columns=st.integers(1, 6),
        seed=st.integers(0, 2**20),
    )
    def check(
        left: str,
        right: str,
        third: str | None,
        depth: int,
        tokens: int,
        columns: int,
        seed: int,
    ) -> None:
        x = matrix(left, tokens, depth, DTYPES[kind], seed)
        weight = matrix(right, columns, depth, DTYPES[kind], seed + 1)
        bias = None if third is None else matrix(third, 1, columns, DTYPES[kind], seed + 2)[0]
        want = by_twin(x, weight, bias, kind, arch)
        assert_same_bits(linear(x, weight, bias, contract=contract), want)
        assert_same_bits(lm_head(x, weight, bias, contract=contract), want)
        want = by_twin(x, weight, bias, kind, arch, fp32=True)
        assert_same_bits(lm_head(x, weight, bias, contract=wide), want)

    check()


def test_bias_is_added_in_fp32_before_the_rounding() -> None:
    """Rounding the product to bf16 first would lose the 2^-9 that the bias completes."""
    x = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    bias = torch.tensor([2.0**-9 + 2.0**-12], dtype=torch.bfloat16)
    got = linear(x, weight, bias, contract=C90)
    assert_same_bits(got, torch.tensor([[1 + 2.0**-7]], dtype=torch.bfloat16))


@pytest.mark.parametrize("logits_dtype", ["weight", "float32"])
def test_nan_that_the_bias_makes_is_canonical(logits_dtype: str) -> None:
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    bias = torch.tensor([-torch.inf], dtype=torch.bfloat16)
    contract = default_contract("sm_90", logits_dtype=logits_dtype)
    got = lm_head(one * torch.inf, one, bias, contract=contract)
    assert patterns(got) == [0x7FFF if logits_dtype == "weight" else 0x7FFFFFFF]


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_a_row_is_the_same_in_any_batch_and_prepared(kind: str) -> None:
    x, weight = (matrix("normal", rows, 70, DTYPES[kind], rows) for rows in (19, 45))
    bias = matrix("normal", 1, 45, DTYPES[kind], 3)[0]
    whole = linear(x, weight, bias, contract=C90)
    for size in (1, 4, 7):
        for t in range(0, 19, size):
            rows = slice(t, t + size)
            assert_same_bits(linear(x[rows], weight, bias, contract=C90), whole[rows])
    if kind != "fp32":
        prepared = module.prepare(weight, C90)
        assert_same_bits(linear(x, prepared, bias, contract=C90), whole)
        assert_same_bits(lm_head(x[:1], prepared, bias, contract=C90), whole[:1])
    assert_same_bits(linear(x.t().contiguous().t(), weight, bias, contract=C90), whole)
    assert linear(x[:0], weight, bias, contract=C90).shape == (0, 45)


@pytest.mark.parametrize("vocab_size", [1, 30, 44, 45])
@pytest.mark.parametrize("logits_dtype", ["weight", "float32"])
def test_padding_of_the_vocabulary_never_wins(vocab_size: int, logits_dtype: str) -> None:
    contract = default_contract("sm_89", logits_dtype=logits_dtype)
    hidden = matrix("normal", 6, 32, torch.bfloat16, 4)
    table = matrix("normal", 45, 32, torch.bfloat16, 5)
    table[vocab_size:] *= 1000  # would win everywhere, or make NaN
    table[vocab_size + 1 :] = torch.nan
    got = lm_head(hidden, table, contract=contract, vocab_size=vocab_size)
    want = lm_head(hidden, table[:vocab_size], contract=contract)
    assert_same_bits(got[:, :vocab_size], want)
    assert bool((got[:, vocab_size:] == -torch.inf).all())
    assert bool((greedy(got) < vocab_size).all())
    assert_same_bits(greedy(got), greedy(want))


def test_padding_loses_even_to_logits_of_minus_infinity() -> None:
    hidden, table = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((4, 1), -torch.inf)
    got = lm_head(hidden, table.to(torch.bfloat16), contract=C90, vocab_size=2)
    assert greedy(got).tolist() == [0]


@pytest.mark.parametrize("vocab_size", [0, -1, 46])
def test_vocabulary_sizes_that_are_refused(vocab_size: int) -> None:
    table = torch.ones(45, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"vocab_size {vocab_size}.*1 … 45"):
        lm_head(table[:1], table, contract=C90, vocab_size=vocab_size)


def test_shapes_and_dtypes_that_are_refused() -> None:
    x, weight = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(5, 8, dtype=torch.bfloat16)
    bias = torch.ones(5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"\[2, 7\]"):
        linear(x[:, :7], weight, contract=C90)
    with pytest.raises(TypeError, match="float16"):
        linear(x.half(), weight, contract=C90)
    with pytest.raises(ValueError, match=r"bias.*\[5\].*\[4\]"):
        linear(x, weight, bias[:4], contract=C90)
    with pytest.raises(ValueError, match=r"bias.*bfloat16.*float32"):
        linear(x, weight, bias.float(), contract=C90)
    with pytest.raises(TypeError, match="float8"):
        linear(*(z.to(torch.float8_e5m2) for z in (x, weight)), contract=C90)
    with pytest.raises(TypeError, match="float64"):
        linear(x.double(), weight.double(), contract=C90)


def test_a_prepared_weight_belongs_to_its_architecture() -> None:
    weight = torch.ones(5, 8, dtype=torch.bfloat16)
    prepared = module.prepare(weight, default_contract("sm_89"))
    with pytest.raises(ValueError, match="prepared for"):
        linear(weight, prepared, contract=C90)
