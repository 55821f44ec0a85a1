"""RMSNorm, alone and after the residual addition, against a twin in integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bitassay.reference.norm import add, add_rms_norm, rms_norm
from support.hard_matrices import KINDS, matrix
from support.naive import operations as op
from support.same_bits import assert_same_bits, from_patterns, patterns

KIND = {torch.bfloat16: "bf16", torch.float16: "fp16"}
every_dtype = pytest.mark.parametrize("dtype", list(KIND))


def rows_of(x: list[list[int]], dtype: torch.dtype) -> Tensor:
    return torch.stack([from_patterns(row, dtype) for row in x])


def twin_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    kind = KIND[x.dtype]
    want = [op.rms_norm(patterns(row), patterns(weight), eps, kind) for row in x]
    return rows_of(want, x.dtype)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_rms_norm_equals_the_twin(kind: str, dtype: torch.dtype) -> None:
    for size in (1, 2, 3, 31, 64, 65, 100):
        x = matrix(kind, 3, size, dtype, seed=size)
        weight = matrix("special" if size == 31 else "normal", 1, size, dtype, seed=7)[0]
        for eps in (1e-5, 1e-6, 0.3):
            assert_same_bits(rms_norm(x, weight, eps=eps), twin_rms_norm(x, weight, eps))


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_add_rms_norm_equals_the_twin(kind: str, dtype: torch.dtype) -> None:
    for size in (1, 5, 64, 100):
        x, residual = (matrix(kind, 3, size, dtype, seed=seed) for seed in (size, size + 1))
        weight = matrix("normal", 1, size, dtype, seed=7)[0]
        normed, stream = add_rms_norm(x, residual, weight, eps=1e-5)
        pairs = zip(x, residual, strict=True)
        want = [op.add_rows(patterns(a), patterns(b), KIND[dtype]) for a, b in pairs]
        assert_same_bits(stream, rows_of(want, dtype))
        assert_same_bits(add(x, residual), rows_of(want, dtype))
        # The rounded stream is what is normalised.
        assert_same_bits(normed, twin_rms_norm(rows_of(want, dtype), weight, 1e-5))


def test_a_large_row_equals_the_twin() -> None:
    for size in (1536, 4096):
        x = matrix("normal", 1, size, torch.bfloat16, seed=size)
        weight = matrix("normal", 1, size, torch.bfloat16, seed=9)[0]
        assert_same_bits(rms_norm(x, weight, eps=1e-5), twin_rms_norm(x, weight, 1e-5))


def left_to_right(x: Tensor) -> Tensor:
    total = x[:, 0]
    for i in range(1, x.shape[1]):
        total = total + x[:, i]
    return total


def by_neighbours(x: Tensor) -> Tensor:
    while x.shape[1] > 1:
        x = torch.nn.functional.pad(x, (0, x.shape[1] % 2))
        x = x[:, 0::2] + x[:, 1::2]
    return x[:, 0]


def halves(x: Tensor) -> Tensor:
    x = torch.nn.functional.pad(x, (0, 128 - x.shape[1]))
    while x.shape[1] > 1:
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x[:, 0]


# Ways to compute nearly the same, which 16 bits mostly hide: sum, mean and the rest as functions.
ALMOST: dict[str, Callable[[Tensor], Tensor]] = {
    "left to right": lambda h: h / root(left_to_right(h * h) / 100),
    "neighbours": lambda h: h / root(by_neighbours(h * h) / 100),
    "mean by reciprocal": lambda h: h / root(halves(h * h) * (1 / torch.tensor(100.0))),
    "no eps": lambda h: h / root(halves(h * h) / 100 - 1e-5),
    "root by reciprocal": lambda h: h * (1 / root(halves(h * h) / 100)),
    "rsqrt": lambda h: h * (halves(h * h) / 100 + 1e-5).rsqrt()[:, None],
}


def root(mean: Tensor) -> Tensor:
    # NumPy's, which is correctly rounded. torch's is not where MKL computes it: of values in
    # [1/2, 3/2) one in five is off by one ulp.
    return torch.from_numpy(np.sqrt((mean + torch.tensor(1e-5)).numpy()))[:, None]


def test_many_rows_equal_the_definition() -> None:
    """Two million outputs against the same steps with another library's square root."""
    x, weight = matrix("normal", 20000, 100, torch.float16, seed=1), torch.ones(100).half()
    h = x.float()
    want = (h / root(halves(h * h) / torch.tensor(100.0))).half()
    assert_same_bits(rms_norm(x, weight, eps=1e-5), want)
    assert_same_bits(add_rms_norm(x, torch.zeros_like(x), weight, eps=1e-5)[0], want)


@pytest.mark.parametrize("almost", list(ALMOST))
def test_every_step_shows(almost: str) -> None:
    """Rows that tell each nearly equal way from ours, found among many, equal the twin."""
    x, weight = matrix("normal", 20000, 100, torch.float16, seed=1), torch.ones(100).half()
    got = rms_norm(x, weight, eps=1e-5)
    telling = (got != ALMOST[almost](x.float()).half()).any(dim=1).nonzero()[:8, 0]
    assert len(telling) == 8
    assert_same_bits(got[telling], twin_rms_norm(x[telling], weight, 1e-5))


def test_zeros_and_huge_rows() -> None:
    weight = torch.ones(4).bfloat16()
    zeros = torch.tensor([[0.0, -0.0, 0.0, -0.0]]).bfloat16()
    assert_same_bits(rms_norm(zeros, weight, eps=1e-5), zeros)  # eps keeps it from 0 / 0
    huge = torch.full((1, 4), 3e38).bfloat16()
    # The squares overflow: infinity under the division gives zero, as on the GPU.
    assert_same_bits(rms_norm(huge, weight, eps=1e-5), torch.zeros(1, 4).bfloat16())


def test_rows_are_independent_and_may_be_strided() -> None:
    x = matrix("special", 9, 40, torch.bfloat16, seed=2)
    residual = matrix("normal", 9, 40, torch.bfloat16, seed=3)
    weight = matrix("normal", 1, 40, torch.bfloat16, seed=4)[0]
    whole = rms_norm(x, weight, eps=1e-5)
    both = add_rms_norm(x, residual, weight, eps=1e-5)
    for i in range(9):
        assert_same_bits(rms_norm(x[i : i + 1], weight, eps=1e-5), whole[i : i + 1])
        alone = add_rms_norm(x[i : i + 1], residual[i : i + 1], weight, eps=1e-5)
        for part, all_rows in zip(alone, both, strict=True):
            assert_same_bits(part, all_rows[i : i + 1])
    wide = torch.cat([x, residual], dim=1)
    assert_same_bits(rms_norm(wide[:, :40], weight, eps=1e-5), whole)
    assert_same_bits(rms_norm(x.view(3, 3, 40), weight, eps=1e-5), whole.view(3, 3, 40))
    assert rms_norm(x[:0], weight, eps=1e-5).shape == (0, 40)


def test_inputs_stay_as_they_were() -> None:
    x, residual = (matrix("normal", 2, 8, torch.bfloat16, seed=s) for s in (5, 6))
    weight, copies = x[0].clone(), (x.clone(), residual.clone())
    add_rms_norm(x, residual, weight, eps=1e-5)
    assert_same_bits(x, copies[0])
    assert_same_bits(residual, copies[1])


def test_what_is_refused() -> None:
    x, weight = torch.ones(2, 8).bfloat16(), torch.ones(8).bfloat16()
    with pytest.raises(TypeError, match="one dtype.*x torch.float32, weight torch.float32"):
        rms_norm(x.float(), weight.float(), eps=1e-5)
    with pytest.raises(TypeError, match="one dtype.*x torch.float16, weight torch.bfloat16"):
        rms_norm(x.half(), weight, eps=1e-5)
    with pytest.raises(ValueError, match=r"found \[2, 8\] and \[7\]"):
        rms_norm(x, weight[:7], eps=1e-5)
    with pytest.raises(ValueError, match=r"found \[2, 0\] and \[0\]"):
        rms_norm(x[:, :0], weight[:0], eps=1e-5)
    with pytest.raises(ValueError, match=r"alike.*\[2, 8\].*\[1, 8\]"):
        add_rms_norm(x, x[:1], weight, eps=1e-5)
    with pytest.raises(ValueError, match=r"alike.*bfloat16.*float16"):
        add_rms_norm(x, x.half(), weight, eps=1e-5)
    with pytest.raises(TypeError, match="one dtype"):
        add_rms_norm(x.float(), x.float(), weight.float(), eps=1e-5)
    with pytest.raises(ValueError, match=r"alike.*\[2, 8\].*\[1, 8\]"):
        add(x, x[:1])
    with pytest.raises(TypeError, match="bfloat16 or float16, found torch.float32"):
        add(x.float(), x.float())
