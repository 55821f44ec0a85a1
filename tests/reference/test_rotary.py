"""Rotary embedding against a twin in integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitassay.reference.rotary import apply
from bitassay.reference.spec.rotary_table import rotary_table
from support.hard_matrices import KINDS, matrix
from support.naive import operations as op
from support.same_bits import assert_same_bits, from_patterns, patterns

KIND = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SIZE = 64
TABLE = rotary_table(10000.0, SIZE, 50)
POSITIONS = torch.tensor([0, 1, 49, 7, 7])


def heads(kind: str, rows: int, count: int, dtype: torch.dtype, seed: int) -> Tensor:
    return matrix(kind, rows * count, SIZE, dtype, seed).view(rows, count, SIZE)


def twin_apply(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = []
    for row, position in zip(x, positions.tolist(), strict=True):
        angle = patterns(cos[position]), patterns(sin[position])
        for head in row:
            turned += op.rotate(patterns(head), *angle, KIND[x.dtype])
    return from_patterns(turned, x.dtype).view(x.shape)


@pytest.mark.parametrize("dtype", list(KIND))
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_twin(kind: str, dtype: torch.dtype) -> None:
    q, k = heads(kind, 5, 2, dtype, 1), heads(kind, 5, 1, dtype, 2)
    got = apply(q, k, POSITIONS, TABLE.cos, TABLE.sin)
    for turned, x in zip(got, (q, k), strict=True):
        assert_same_bits(turned, twin_apply(x, POSITIONS, TABLE.cos, TABLE.sin))


def test_size_128_equals_the_twin() -> None:
    table = rotary_table(500000.0, 128, 20)
    q = matrix("normal", 6, 128, torch.bfloat16, 3).view(2, 3, 128)
    k, positions = q[:, :1], torch.tensor([19, 4])
    got = apply(q, k, positions, table.cos, table.sin)
    assert_same_bits(got[0], twin_apply(q, positions, table.cos, table.sin))
    assert_same_bits(got[1], twin_apply(k, positions, table.cos, table.sin))


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a.double() * b.double() + c.double()).float()  # rounds twice at most once in 2**29


ALMOST = {
    "the other product fused": lambda a, b, c, s: (fused(-b, s, a * c), fused(a, s, b * c)),
    "nothing fused": lambda a, b, c, s: (a * c - b * s, b * c + a * s),
    "everything fused": lambda a, b, c, s: (
        (a.double() * c - b.double() * s).float(),
        (b.double() * c + a.double() * s).float(),
    ),
}


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("almost", list(ALMOST))
def test_every_rounding_shows(almost: str, half: int) -> None:
    """Heads that tell each nearly equal way from ours, found among many, equal the twin."""
    q = heads("normal", 20000, 1, torch.float16, 8)
    positions = torch.arange(20000) % 50
    got, _ = apply(q, q, positions, TABLE.cos, TABLE.sin)
    x, columns = q[:, 0].float(), slice(32 * half, 32 * half + 32)
    turned = ALMOST[almost](x[:, :32], x[:, 32:], TABLE.cos[positions], TABLE.sin[positions])
    telling = (got[:, 0, columns] != turned[half].half()).any(dim=1).nonzero()[:8, 0]
    assert len(telling) == 8
    want = twin_apply(q[telling], positions[telling], TABLE.cos, TABLE.sin)
    assert_same_bits(got[telling], want)


def test_position_0_changes_nothing() -> None:
    q, k = heads("normal", 3, 2, torch.bfloat16, 4), heads("normal", 3, 1, torch.bfloat16, 5)
    zeros = torch.zeros(3, dtype=torch.int64)
    for got, want in zip(apply(q, k, zeros, TABLE.cos, TABLE.sin), (q, k), strict=True):
        assert_same_bits(got, want)


def test_a_quarter_turn_shows_halves_and_sign() -> None:
    """cos 0, sin 1: the first half becomes minus the second, the second becomes the first."""
    x = torch.arange(1.0, 9.0).view(1, 1, 8).bfloat16()
    cos, sin = torch.zeros(1, 4), torch.ones(1, 4)
    q, k = apply(x, x, torch.tensor([0]), cos, sin)
    want = torch.tensor([-5.0, -6, -7, -8, 1, 2, 3, 4]).view(1, 1, 8).bfloat16()
    assert_same_bits(q, want)
    assert_same_bits(k, want)


def test_rows_are_independent() -> None:
    q, k = heads("special", 5, 2, torch.bfloat16, 6), heads("special", 5, 1, torch.bfloat16, 7)
    whole = apply(q, k, POSITIONS, TABLE.cos, TABLE.sin)
    for i in range(5):
        one = slice(i, i + 1)
        alone = apply(q[one], k[one], POSITIONS[one], TABLE.cos, TABLE.sin)
        for part, rows in zip(alone, whole, strict=True):
            assert_same_bits(part, rows[one])
    narrow = apply(q, k, POSITIONS.int(), TABLE.cos, TABLE.sin)
    assert_same_bits(narrow[0], whole[0])


def test_what_is_refused() -> None:
    q, k = heads("normal", 5, 2, torch.bfloat16, 1), heads("normal", 5, 1, torch.bfloat16, 2)
    tables = TABLE.cos, TABLE.sin
    with pytest.raises(TypeError, match="one dtype.*q torch.float32, k torch.float32"):
        apply(q.float(), k.float(), POSITIONS, *tables)
    with pytest.raises(TypeError, match="q torch.bfloat16, k torch.float16"):
        apply(q, k.half(), POSITIONS, *tables)
    with pytest.raises(ValueError, match=r"expected q and k \[4, heads, 64\].*\[5, 2, 64\]"):
        apply(q, k, POSITIONS[:4], *tables)
    with pytest.raises(ValueError, match=r"\[5, heads, 64\].*\[5, 2, 32\]"):
        apply(q[..., :32], k, POSITIONS, *tables)
    with pytest.raises(ValueError, match=r"found \[10, 64\]"):
        apply(q.flatten(0, 1), k, POSITIONS, *tables)
    for outside in (50, -1):
        positions = POSITIONS.clone()
        positions[3] = outside
        with pytest.raises(ValueError, match=rf"row 3: position {outside} .* 0 … 49"):
            apply(q, k, positions, *tables)
