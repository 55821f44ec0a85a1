"""The twin itself against Python's own floats and facts known from outside."""

from __future__ import annotations

import math
import random
import struct
from fractions import Fraction

import pytest

from support.naive import tensor_core as twin


def as_fraction(magnitude: int) -> Fraction:
    return Fraction(magnitude, 1 << twin.UNIT)


@pytest.mark.parametrize(
    ("fmt", "code", "width"), [(twin.FP16, "e", 2), (twin.FP32, "f", 4), (twin.FP64, "d", 8)]
)
def test_decode_agrees_with_struct(fmt: twin.Format, code: str, width: int) -> None:
    rng = random.Random(1)
    every = range(1 << 16) if width == 2 else (rng.getrandbits(8 * width) for _ in range(20000))
    for bits in every:
        (value,) = struct.unpack(f"<{code}", bits.to_bytes(width, "little"))
        x = twin.decode(bits, fmt)
        assert x.kind == ("nan" if math.isnan(value) else "inf" if math.isinf(value) else "finite")
        if x.kind == "finite":
            assert as_fraction(x.signed) == Fraction(value)
            assert x.negative == (math.copysign(1, value) < 0)


def test_convert_agrees_with_struct() -> None:
    rng = random.Random(2)
    for _ in range(20000):
        value = math.ldexp(rng.uniform(-2, 2), rng.randint(-155, 127))
        (bits,) = struct.unpack("<Q", struct.pack("<d", value))
        (want,) = struct.unpack("<I", struct.pack("<f", value))
        assert twin.convert(bits, twin.FP64, twin.FP32) == want
        value = math.ldexp(value, -130 if abs(value) > 2 else 0)
        if abs(value) < 65504:
            (bits,) = struct.unpack("<Q", struct.pack("<d", value))
            (want,) = struct.unpack("<H", struct.pack("<e", value))
            assert twin.convert(bits, twin.FP64, twin.FP16) == want


@pytest.mark.parametrize(
    ("bits", "fmt", "value"),
    [
        (0x7E, twin.E4M3, 448),
        (0x01, twin.E4M3, Fraction(1, 512)),
        (0x08, twin.E4M3, Fraction(1, 64)),
        (0x7B, twin.E5M2, 57344),
        (0x01, twin.E5M2, Fraction(1, 65536)),
        (0x7F7F, twin.BF16, (2 - Fraction(1, 128)) * 2**127),
        (0x0001, twin.BF16, Fraction(1, 2**133)),
        (0x3F801FFF, twin.TF32, 1),
        (0xBF803FFF, twin.TF32, -1 - Fraction(1, 1024)),
    ],
)
def test_known_values(bits: int, fmt: twin.Format, value: Fraction) -> None:
    assert as_fraction(twin.decode(bits, fmt).signed) == value


def test_known_specials() -> None:
    assert twin.decode(0x7F, twin.E4M3).kind == "nan"
    assert twin.decode(0xFF, twin.E4M3).kind == "nan"
    assert twin.decode(0x7C, twin.E5M2).kind == "inf"
    assert twin.decode(0x7D, twin.E5M2).kind == "nan"
    assert twin.FP32.nan == 0x7FFFFFFF
    assert twin.BF16.nan == twin.FP16.nan == 0x7FFF


@pytest.mark.parametrize("arch", list(twin.STEPS))
def test_facts_of_one_step(arch: str) -> None:
    """Order inside a step is free, tiny terms vanish, 3e38·2 − 3e38·2 is +0, and −0 is +0."""
    core = twin.STEPS[arch]["bf16"]

    def step(a: list[float], b: list[float], c: float) -> int:
        stored = [
            [struct.unpack("<I", struct.pack("<f", x))[0] >> 16 for x in row] for row in (a, b)
        ]
        (start,) = struct.unpack("<I", struct.pack("<f", c))
        return twin.step(*stored, start, twin.BF16, core)

    tiny = 2.0 ** -(core.fraction_bits + 1)
    assert step([1.0, tiny], [1.0, 1.0], 0.0) == 0x3F800000
    assert step([1.0, tiny, -1.0], [1.0, 1.0, 1.0], 0.0) == 0
    assert step([1.0, 2 * tiny, -1.0], [1.0, 1.0, 1.0], 0.0) != 0
    assert step([3e38, 3e38], [2.0, -2.0], 0.0) == 0
    assert step([3e38], [2.0], 0.0) == 0x7F800000
    assert step([-0.0], [1.0], -0.0) == 0
    assert step([math.inf], [0.0], 0.0) == 0x7FFFFFFF
