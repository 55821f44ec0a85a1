"""SwiGLU's activation against a twin in integers."""

from __future__ import annotations

import pytest
import torch

from bitassay.reference.activation import silu_and_mul
from support.hard_matrices import KINDS, matrix
from support.naive import operations as op
from support.same_bits import assert_same_bits, from_patterns, patterns

KIND = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.mark.parametrize("dtype", list(KIND))
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_twin(kind: str, dtype: torch.dtype) -> None:
    for width in (1, 7, 32):
        x = matrix(kind, 3, 2 * width, dtype, seed=width)
        want = [op.silu_and_mul(patterns(row), KIND[dtype]) for row in x]
        assert_same_bits(
            silu_and_mul(x).flatten(), from_patterns([v for row in want for v in row], dtype)
        )


@pytest.mark.parametrize("dtype", list(KIND))
def test_gates_of_every_size_equal_the_twin(dtype: torch.dtype) -> None:
    """From where silu is the identity to where it underflows, beside large factors."""
    gate = torch.linspace(-110, 30, 600).to(dtype)
    up = matrix("huge", 1, 600, dtype, seed=1)[0]
    x = torch.cat([gate, up])[None]
    want = op.silu_and_mul(patterns(x), KIND[dtype])
    assert_same_bits(silu_and_mul(x)[0], from_patterns(want, dtype))


def test_the_first_half_is_the_gate() -> None:
    x = torch.tensor([[0.0, 100.0, -0.0, 3.0, 2.0, 5.0]]).bfloat16()
    assert_same_bits(silu_and_mul(x), torch.tensor([[0.0, 200.0, -0.0]]).bfloat16())


def test_rows_are_independent() -> None:
    x = matrix("special", 6, 20, torch.bfloat16, seed=2)
    whole = silu_and_mul(x)
    for i in range(6):
        assert_same_bits(silu_and_mul(x[i : i + 1]), whole[i : i + 1])
    assert silu_and_mul(x[:0]).shape == (0, 10)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="bfloat16 or float16, found gate_up torch.float32"):
        silu_and_mul(torch.ones(2, 4))
    for shape in ((2, 3), (4,), (1, 2, 4)):
        with pytest.raises(ValueError, match=r"expected \[T, 2 \* F\], found"):
            silu_and_mul(torch.ones(shape).bfloat16())
