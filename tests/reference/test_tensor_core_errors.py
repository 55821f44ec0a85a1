"""Inputs that matmul and prepare refuse, and what they say."""

from __future__ import annotations

import pytest
import torch

from bitassay.reference.tensor_core import matmul, prepare

BF16 = torch.ones(3, 16, dtype=torch.bfloat16)
RIGHT = torch.ones(16, 5, dtype=torch.bfloat16)
SM_90 = {"arch": "sm_90"}


def test_an_unknown_architecture_lists_the_known() -> None:
    for call in (lambda: matmul(BF16, RIGHT, arch="sm_75"), lambda: prepare(RIGHT, arch="sm_75")):
        with pytest.raises(ValueError, match=r"sm_75.*sm_80.*sm_86.*sm_89.*sm_90"):
            call()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (BF16, RIGHT[:15]),
        (BF16[:, :15], RIGHT),
        (BF16[0], RIGHT),
        (BF16, RIGHT[:, 0]),
        (BF16[None], RIGHT),
    ],
)
def test_shapes_that_do_not_fit(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[M, K\]") as caught:
        matmul(a, b, **SM_90)
    assert str(list(a.shape)) in str(caught.value)
    assert str(list(b.shape)) in str(caught.value)


@pytest.mark.parametrize(
    "c",
    [
        torch.zeros(3, 4),
        torch.zeros(5),
        torch.zeros(3, 1),
        torch.zeros(3, 5).half(),
        torch.zeros(3, 5, dtype=torch.float64),
    ],
)
def test_addends_that_do_not_fit(c: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"c: expected float32 \[3, 5\]"):
        matmul(BF16, RIGHT, c, **SM_90)


def test_two_dtypes() -> None:
    with pytest.raises(TypeError, match=r"bfloat16.*float16"):
        matmul(BF16, RIGHT.half(), **SM_90)
    with pytest.raises(TypeError, match=r"float16.*bfloat16"):
        matmul(BF16.half(), prepare(RIGHT, **SM_90), **SM_90)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fnuz])
def test_dtypes_without_a_tensor_core(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"sm_90.*{dtype}"):
        matmul(BF16.to(dtype), RIGHT.to(dtype), **SM_90)
    with pytest.raises(TypeError, match=rf"sm_90.*{dtype}"):
        prepare(RIGHT.to(dtype), **SM_90)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_before_ada(arch: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"{arch}.*{dtype}"):
        matmul(BF16.to(dtype), RIGHT.to(dtype), arch=arch)


def test_fp32_needs_a_precision_and_others_have_none() -> None:
    with pytest.raises(ValueError, match=r'"tf32" or "ieee"'):
        matmul(BF16.float(), RIGHT.float(), **SM_90)
    with pytest.raises(ValueError, match="highest"):
        matmul(BF16.float(), RIGHT.float(), precision="highest", **SM_90)
    for precision in ("tf32", "ieee"):
        with pytest.raises(ValueError, match=r"precision.*bfloat16"):
            matmul(BF16, RIGHT, precision=precision, **SM_90)


def test_weights_that_are_not_prepared() -> None:
    with pytest.raises(ValueError, match=r"\[K, N\].*\[16\]"):
        prepare(RIGHT[:, 0], **SM_90)
    for precision in ("ieee", None):
        with pytest.raises(ValueError, match="tf32"):
            prepare(RIGHT.float(), precision=precision, **SM_90)
    with pytest.raises(ValueError, match="precision"):
        prepare(RIGHT, precision="tf32", **SM_90)


def test_a_weight_prepared_for_another_core() -> None:
    with pytest.raises(ValueError, match="prepared for"):
        matmul(BF16, prepare(RIGHT, arch="sm_89"), **SM_90)
    # The same core under another name is the same preparation.
    got = matmul(BF16, prepare(RIGHT, arch="sm_80"), arch="sm_89")
    assert torch.equal(got, torch.full((3, 5), 16.0))


def test_an_empty_weight_is_prepared() -> None:
    for k, n in ((0, 5), (16, 0)):
        weight = prepare(torch.zeros(k, n, dtype=torch.bfloat16), **SM_90)
        assert torch.equal(matmul(BF16[:, :k], weight, **SM_90), torch.zeros(3, n))
