"""The one sum of floats that has no order: over an axis of two."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bitassay.emulator import RefusedError, emulate
from bitassay.reference.floats import canonical_nan
from support.hard_matrices import KINDS, matrix
from support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreting")


@triton.jit
def _pairs(x_ptr, out_ptr, HOW: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, 2), tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + j[None, :])
    if HOW == "first":
        tl.store(out_ptr + j, tl.sum(x, axis=0))
    elif HOW == "last":
        tl.store(out_ptr + j, tl.sum(tl.trans(x), axis=-1))
    elif HOW == "middle":
        y = tl.sum(tl.reshape(x, (1, 2, N)), axis=1)
        tl.store(out_ptr + j, tl.reshape(y, (N,)))
    elif HOW == "kept":
        y = tl.sum(x, axis=0, keep_dims=True)
        tl.store(out_ptr + j[None, :], y)
    elif HOW == "multiplied":
        tl.store(out_ptr + j, tl.sum(x * x, axis=0))
    elif HOW == "outer":
        weights = tl.load(x_ptr + i)
        y = tl.broadcast_to(weights[:, None], (2, N)) * tl.broadcast_to(weights[:, None], (2, N))
        tl.store(out_ptr + j, tl.sum(y, axis=0))
    elif HOW == "alone":
        tl.store(out_ptr + tl.arange(0, 2 * N), tl.sum(tl.reshape(x, (1, 2 * N)), axis=0))
    elif HOW == "scalar":
        tl.store(out_ptr + j, tl.sum(tl.load(x_ptr + i)) + tl.zeros((N,), tl.float32))
    elif HOW == "two axes":
        tl.store(out_ptr + j, tl.sum(x) + tl.zeros((N,), tl.float32))
    elif HOW == "four":
        tl.store(out_ptr + j, tl.sum(tl.reshape(x, (4, N // 2)), axis=0))


def pairs(how: str, x: torch.Tensor, **options: object) -> torch.Tensor:
    out = torch.zeros(x.shape[1], dtype=torch.float32)
    _pairs[(1,)](x, out, HOW=how, N=x.shape[1], **{"enable_fp_fusion": False, **options})
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["first", "last", "middle", "kept"])
def test_it_is_one_addition(how: str, kind: str, gpu_emulation: str) -> None:
    x = matrix(kind, 2, 64, torch.float32, 1)
    assert_same_bits(pairs(how, x), canonical_nan(x[0] + x[1]))


def test_it_starts_from_no_zero(gpu_emulation: str) -> None:
    assert_same_bits(pairs("first", torch.full((2, 16), -0.0)), torch.full((16,), -0.0))


def test_scalars_and_single_elements(gpu_emulation: str) -> None:
    x = matrix("normal", 2, 16, torch.float32, 2)
    assert_same_bits(pairs("scalar", x), (x[0, 0] + x[0, 1]).expand(16).contiguous())
    out = torch.empty(32)
    _pairs[(1,)](x, out, HOW="alone", N=16, enable_fp_fusion=False)
    assert_same_bits(out, x.flatten())


@pytest.mark.parametrize("how", ["four", "two axes"])
def test_more_than_two_are_refused(how: str, gpu_emulation: str) -> None:
    with pytest.raises(RefusedError, match="tl.sum of fp32: the order depends on .*axis of two"):
        pairs(how, torch.ones(2, 16))


def test_another_type_is_refused(gpu_emulation: str) -> None:
    with pytest.raises(RefusedError, match="tl.sum of fp16"):
        pairs("first", torch.ones(2, 16).half())


def test_a_product_of_broadcasts_is_refused() -> None:
    with emulate("sm_90"), pytest.raises(RefusedError, match="may make it a tl.dot"):
        pairs("outer", torch.ones(2, 16))
    with emulate("sm_90", allow=["sum"]):
        assert_same_bits(pairs("outer", torch.ones(2, 16)), torch.full((16,), 2.0))


def test_it_counts_as_an_addition_that_may_contract(gpu_emulation: str) -> None:
    with pytest.raises(RefusedError, match="enable_fp_fusion=False"):
        pairs("multiplied", torch.ones(2, 16), enable_fp_fusion=True)
    assert_same_bits(pairs("multiplied", torch.ones(2, 16)), torch.full((16,), 2.0))
