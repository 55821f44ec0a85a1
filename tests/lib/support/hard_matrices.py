"""Awkward matrices on purpose: each a function of its kind, shape, dtype and seed alone."""

from __future__ import annotations

import torch
from torch import Tensor

# (exponent bits, fraction bits) of the stored formats.
_FIELDS = {
    torch.float32: (8, 23),
    torch.bfloat16: (8, 7),
    torch.float16: (5, 10),
    torch.float8_e4m3fn: (4, 3),
    torch.float8_e5m2: (5, 2),
}
_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32}

KINDS = (
    "normal",  # what a network holds
    "scaled",  # every row and column of its own magnitude
    "wide",  # every exponent alike: most terms vanish in the alignment
    "cancelling",  # large terms that sum to almost nothing
    "subnormal",  # around and below the smallest normal number
    "small",  # normal factors whose products underflow in fp32
    "huge",  # around the largest finite value: infinities arise in the sum
    "sparse",  # mostly zeros, of either sign
    "ties",  # small whole numbers: halves and exact zeros are common
    "special",  # infinities, NaN, zeros, subnormals among ordinary numbers
    "patterns",  # any stored bits at all
)


def matrix(kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A [rows, columns] matrix of one of KINDS."""
    g = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    exponent_bits, _ = _FIELDS[dtype]
    top = (1 << exponent_bits) - 1
    bias = top >> 1

    def fields(low: int, high: int) -> Tensor:
        return _compose(torch.randint(low, high, shape, generator=g), dtype, g)

    if kind == "normal":
        return torch.randn(shape, generator=g).to(dtype)
    if kind == "scaled":
        by_row = torch.randint(-bias // 4, bias // 4 + 1, (rows, 1), generator=g)
        by_column = torch.randint(-bias // 4, bias // 4 + 1, (1, columns), generator=g)
        powers = (by_row + by_column + 127 << 23).to(torch.int32).view(torch.float32)
        return (torch.randn(shape, generator=g) * powers).to(dtype)
    if kind == "wide":
        return fields(0, top)
    if kind == "subnormal":
        return fields(0, 3)
    if kind == "small":
        return fields(max(0, bias // 2 - 8), bias // 2 + 8)
    if kind == "huge":
        return fields(top - 3, top)
    if kind == "patterns":
        return fields(0, top + 1)
    if kind == "ties":
        return torch.randint(-3, 4, shape, generator=g).to(torch.float32).to(dtype)
    if kind == "cancelling":
        x = torch.randn(shape, generator=g)
        half = columns // 2
        x[:, half : 2 * half] = -x[:, :half] * (1 + 2.0**-9 * (x[:, :half] > 1))
        return x.to(dtype)
    if kind == "sparse":
        x = torch.randn(shape, generator=g)
        keep = torch.rand(shape, generator=g) < 0.1
        return torch.where(keep, x, torch.copysign(torch.zeros(()), x)).to(dtype)
    if kind == "special":
        x = torch.randn(shape, generator=g).to(dtype)
        pool = specials(dtype)
        odd = pool[torch.randint(0, len(pool), shape, generator=g)]
        chosen = torch.rand(shape, generator=g) < 0.08
        integer = _INT[dtype.itemsize]
        return torch.where(chosen, odd, x.view(integer)).view(dtype)
    raise ValueError(f"unknown kind {kind!r}: known are {', '.join(KINDS)}")


def specials(dtype: torch.dtype) -> Tensor:
    """Stored bits, as integers, of every kind of special value, with either sign."""
    exponent_bits, fraction_bits = _FIELDS[dtype]
    one = 1 << fraction_bits
    top = ((1 << exponent_bits) - 1) << fraction_bits
    positive = [0, 1, one - 1, one, one + 1, top - 1, top, top + 1, top + one - 1, top - one]
    sign = 1 << (8 * dtype.itemsize - 1)
    integer = _INT[dtype.itemsize]
    return torch.tensor(positive + [x - sign for x in positive], dtype=integer)


def addend(kind: str, product: Tensor, seed: int) -> Tensor:
    """A fp32 c of the shape of `product`: one of ADDENDS."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(product.shape, generator=g)
    if kind == "normal":
        return noise
    if kind == "large":
        return noise * 2.0**100
    if kind == "tiny":
        return _compose(torch.randint(0, 4, product.shape, generator=g), torch.float32, g)
    if kind == "faint":  # normal, but lost beside any product that is not faint too
        return _compose(torch.randint(1, 40, product.shape, generator=g), torch.float32, g)
    if kind == "negative zero":
        return torch.full(product.shape, -0.0)
    if kind == "opposite":  # cancels the product in its last places
        return -product + noise * product.abs() * 2.0**-22
    rows, columns = product.shape
    return matrix(kind, rows, columns, torch.float32, seed)


ADDENDS = (
    "normal",
    "large",
    "tiny",
    "faint",
    "negative zero",
    "opposite",
    "wide",
    "special",
    "patterns",
)


def _compose(field: Tensor, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Numbers with the given exponent fields and any sign and fraction."""
    exponent_bits, fraction_bits = _FIELDS[dtype]
    fraction = torch.randint(0, 1 << fraction_bits, field.shape, generator=g)
    sign = torch.randint(0, 2, field.shape, generator=g)
    pattern = ((sign << exponent_bits | field) << fraction_bits) | fraction
    width = 8 * dtype.itemsize
    pattern = torch.where(pattern >= 1 << (width - 1), pattern - (1 << width), pattern)
    return pattern.to(_INT[dtype.itemsize]).view(dtype)
