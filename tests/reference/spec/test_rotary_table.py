"""Rotary tables against mpmath at 60 digits, their fallback, and the digests they are known by."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from bitassay.reference.spec import rotary_table as module
from bitassay.reference.spec.rotary_table import Llama3Scaling, RotaryTable, rotary_table
from support.naive import operations as op
from support.naive import rotary as twin_rotary
from support.same_bits import assert_same_bits, from_patterns, patterns

TABLES = {
    "llama-pico": RotaryTable(10000.0, 64, 2048, Llama3Scaling(4.0, 1.0, 4.0, 512)),
    "Llama-3.1-8B": RotaryTable(500000.0, 128, 8192, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    "Llama-3.2-1B": RotaryTable(500000.0, 64, 600, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
    "Qwen3": RotaryTable(1000000.0, 128, 4096),
    "Llama-2": RotaryTable(10000.0, 128, 4096),
    "uneven": RotaryTable(12345.678, 66, 300, Llama3Scaling(3.3, 0.7, 2.9, 321)),
}
every_table = pytest.mark.parametrize("name", list(TABLES))

# Change one only together with the contract: these are the bits that engines must load.
DIGESTS = {
    "llama-pico": "52ba535f414ee1ec404ceaaaea0e215a5b2c331a3fcb7b9e1d8efd219b658d18",
    "Llama-3.1-8B": "f4ed4ffa2bc991d14f7f0cdacd4cde3799849925b39da10ef069f6f91c7d2af3",
}

# fp32 angles whose cosine or sine lies within 3 float64 ulps of the middle between two fp32:
# all there are with an error so small from 0.01 to 131072.
DOUBTFUL = {
    "cos": ("0x1.6f1b70p+5", "0x1.8f219cp+5"),
    "sin": (
        "0x1.9eab2ep-4",
        "0x1.e7061ep-2",
        "0x1.e35bc6p+7",
        "0x1.515766p+12",
        "0x1.333330p+13",
    ),
}


def named(scaling: Llama3Scaling | None) -> dict[str, float] | None:
    return None if scaling is None else vars(scaling)


@pytest.mark.parametrize("name", list(DIGESTS))
def test_digest(name: str) -> None:
    assert TABLES[name].digest == DIGESTS[name]


@every_table
def test_every_frequency_is_correctly_rounded(name: str) -> None:
    table = TABLES[name]
    want = [
        twin_rotary.frequency(i, table.theta, table.head_dim, named(table.scaling))
        for i in range(table.head_dim // 2)
    ]
    assert_same_bits(table.frequencies, from_patterns(want, torch.float32))


@every_table
def test_entries_are_correctly_rounded(name: str) -> None:
    """The first and last positions, and entries at random."""
    table, rng = TABLES[name], random.Random(name)
    half, last = table.head_dim // 2, table.positions - 1
    assert table.cos.shape == table.sin.shape == (table.positions, half)
    places = [(position, i) for position in (0, 1, last) for i in range(0, half, 5)]
    places += [(rng.randint(0, last), rng.randrange(half)) for _ in range(400)]
    frequencies = patterns(table.frequencies)
    for position, i in places:
        want = twin_rotary.cosine_and_sine(position, frequencies[i])
        got = patterns(torch.stack([table.cos[position, i], table.sin[position, i]]))
        assert got == list(want), f"position {position}, frequency {i}"


def test_scaling_has_three_regimes() -> None:
    """High frequencies stay, low ones are divided, those between are neither."""
    scaled, plain = TABLES["Llama-3.1-8B"].frequencies, RotaryTable(500000.0, 128, 1).frequencies
    stay, slowed = scaled == plain, scaled == plain / 8
    between = ~stay & ~slowed
    counts = [int(x.sum()) for x in (stay, between, slowed)]
    assert counts == [29, 6, 29]
    assert stay[:29].all()
    assert slowed[35:].all()
    assert ((scaled < plain) & (scaled > plain / 8))[29:35].all()


def test_position_0_and_head_layout() -> None:
    table = TABLES["Llama-2"]
    assert_same_bits(table.cos[0], torch.ones(64))
    assert_same_bits(table.sin[0], torch.zeros(64))
    assert table.frequencies[0] == 1.0  # the first pair turns by one radian a position
    assert_same_bits(table.cos[:5, 0], torch.arange(5).double().cos().float())


@pytest.mark.parametrize("name", ["llama-pico", "Qwen3", "uneven"])
def test_the_fallback_gives_the_same_table(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Decimal arithmetic decides every entry, not only the doubtful."""
    table = TABLES[name]
    calls = []
    cosine = module.decimal_cosine
    monkeypatch.setattr(module, "decimal_cosine", lambda x: calls.append(x) or cosine(x))
    monkeypatch.setattr(module, "LIBRARY_ULPS", 1 << 29)
    few = RotaryTable(table.theta, table.head_dim, 12, table.scaling)
    assert_same_bits(few.cos, table.cos[:12])
    assert_same_bits(few.sin, table.sin[:12])
    assert len(calls) == 2 * 12 * table.head_dim // 2


def test_decimal_cosine_at_large_angles() -> None:
    """The reduction by 2 pi keeps the digits at the last positions of a long context."""
    rng = random.Random(3)
    angles = [op.fp32(rng.uniform(0, 131072)) for _ in range(200)] + [op.fp32(131071.0)]
    values = from_patterns(angles, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LIBRARY_ULPS", 1 << 29)
        for shift, function in ((0, torch.cos), (1, torch.sin)):
            got = module._rounded(values, function, shift)
            assert patterns(got) == [correct(x, function) for x in angles]


@pytest.mark.parametrize("name", list(DOUBTFUL))
def test_a_library_off_by_some_ulps_changes_nothing(name: str) -> None:
    """Near the middle between two fp32 values decimal arithmetic decides."""
    angles = torch.tensor([float.fromhex(x) for x in DOUBTFUL[name]])
    function = getattr(torch, name)
    want = [correct(x, function) for x in patterns(angles)]
    plainly_right = []
    for error in range(-4, 5):

        def inaccurate(x: Tensor, error: int = error) -> Tensor:
            return (function(x).view(torch.int64) + error).view(torch.float64)

        got = module._rounded(angles, inaccurate, int(name == "sin"))
        assert patterns(got) == want
        plainly_right.append(patterns(inaccurate(angles.double()).float()) == want)
    assert not all(plainly_right)  # without the fallback it would show


def correct(angle: int, function: object) -> int:
    """The cosine or sine of an angle's bits by mpmath, rounded once."""
    exact = twin_rotary.mp.cos if function is torch.cos else twin_rotary.mp.sin
    return twin_rotary.to_fp32(exact(twin_rotary.value(angle)))


def test_subnormal_sines_are_rounded_once() -> None:
    """Far below any real frequency: there a cast to fp32 keeps fewer bits than usual."""
    angles = torch.tensor([2.0**-149, 3 * 2.0**-149, 1e-40, 2.0**-126, 1e-37])
    got = module._rounded(angles, torch.sin, 1)
    assert patterns(got) == [correct(x, torch.sin) for x in patterns(angles)]


def test_tables_are_made_once() -> None:
    scaling = Llama3Scaling(4.0, 1.0, 4.0, 512)
    assert rotary_table(10000.0, 64, 16, scaling) is rotary_table(10000.0, 64, 16, scaling)
    one, other = rotary_table(10000.0, 64, 16, scaling), rotary_table(10000.0, 64, 16)
    assert one is not other
    assert one.cos is one.cos


def test_digests_tell_tables_apart() -> None:
    scaling = Llama3Scaling(4.0, 1.0, 4.0, 512)
    tables = [
        RotaryTable(10000.0, 64, 16),
        RotaryTable(10000.0, 64, 17),
        RotaryTable(10001.0, 64, 16),
        RotaryTable(10000.0, 128, 16),
        RotaryTable(10000.0, 64, 16, scaling),
    ]
    assert len({table.digest for table in tables}) == len(tables)


@pytest.mark.parametrize(
    ("head_dim", "positions"), [(63, 8), (0, 8), (-2, 8), (64, 0), (64, (1 << 24) + 1)]
)
def test_sizes_that_are_refused(head_dim: int, positions: int) -> None:
    with pytest.raises(ValueError, match=rf"even head size.* found {head_dim} and {positions}"):
        rotary_table(10000.0, head_dim, positions)
