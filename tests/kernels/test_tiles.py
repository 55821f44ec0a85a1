"""The table of launches: whole, frozen, and within what the hardware has."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from bitassay.kernels import tiles
from bitassay.reference.spec.arch import ARCHES, emulation_of, family_of, get_arch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("descriptors", [True, False])
def test_every_product_has_a_tile(arch: str, dtype: torch.dtype, descriptors: bool) -> None:
    for n in (1, 4096, 151_936):
        chosen = [
            tiles.select(arch, dtype, m, n, 4096, descriptors=descriptors)
            for m in (1, 2, 16, 17, 64, 65, 128, 256, 1000, 8192, 1 << 40)
        ]
        few, many = chosen[0], chosen[-1]
        assert few.block_m == 16
        assert many.block_m > few.block_m
        assert set(chosen) <= set(tiles.candidates(arch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHES)
def test_tiles_are_sound(arch: str, dtype: torch.dtype) -> None:
    found = tiles.candidates(arch, dtype)
    assert len(set(found)) == len(found)
    for tile in found:
        for size in (tile.block_m, tile.block_n, tile.block_k, tile.warps):
            assert size & (size - 1) == 0, tile
        assert tile.block_m >= 16, tile
        assert tile.block_k % 16 == 0, tile  # the groups of the contract
        assert 32 * tile.warps * tile.per_sm <= 2048, tile
        assert tile.kind == "pointer" or (arch == "sm_90" and dtype != torch.float32), tile
        assert tile.kind == "tma" or (tile.per_sm == 1 and not tile.halves), tile


def test_pointers_where_descriptors_cannot_be() -> None:
    for m in (1, 100, 8192):
        assert tiles.select("sm_90", torch.float16, m, 33, 33, descriptors=False).kind == "pointer"


def test_large_products_of_hopper_go_through_descriptors() -> None:
    assert tiles.select("sm_90", torch.bfloat16, 2048, 6144, 4096).kind == "tma"


def test_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'sm_70': known are sm_80"):
        tiles.select("sm_70", torch.bfloat16, 1, 16, 16)
    with pytest.raises(TypeError, match="found torch.float64"):
        tiles.select("sm_90", torch.float64, 1, 16, 16)
    with pytest.raises(ValueError, match="unknown architecture"):
        tiles.candidates("sm_70", torch.bfloat16)


def test_an_architecture_without_tiles_is_refused_by_name() -> None:
    """A new record is nobody's relative until somebody says so."""
    newer = replace(get_arch("sm_90"), name="sm_100", family=None, emulation=None)
    with pytest.raises(ValueError, match="no tile for architecture 'sm_100': known are sm_80, "):
        family_of(newer)
    with pytest.raises(ValueError, match="cannot emulate 'sm_100': known are sm_89, sm_90"):
        emulation_of(newer)


def test_a_tile_is_data() -> None:
    with pytest.raises(FrozenInstanceError):
        tiles.select("sm_90", torch.bfloat16, 1, 16, 16).warps = 1  # type: ignore[misc]
