"""The table of attention's launches: whole, frozen, and chosen as it says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from bitassay.kernels import attention_tiles as tiles
from bitassay.reference.spec.arch import ARCHES


@pytest.mark.parametrize("arch", ARCHES)
def test_every_batch_has_a_tile(arch: str) -> None:
    known = tiles.in_use(arch)
    for load in (0.01, 1.0, 1e6):
        for rows in (1, 16, 17, 64, 1000):
            tile = tiles.few(arch, rows, load)
            assert tile in known
            assert tile.split  # few rows over many keys: splits are what there is to share
            assert (
                tile.block_m >= min(rows, 64) or tile.block_m == tiles.few(arch, 64, load).block_m
            )
        for splits in (1, 2, 16):
            assert tiles.many(arch, splits, load) in known
    assert set(tiles.candidates(arch)) >= set(known)


@pytest.mark.parametrize("arch", ARCHES)
def test_tiles_are_sound(arch: str) -> None:
    found = tiles.candidates(arch)
    assert len(set(found)) == len(found)
    for tile in found:
        for size in (tile.block_m, tile.warps, tile.slices, tile.fold_rows):
            assert size & (size - 1) == 0, tile
        assert tile.block_m >= 16, tile
        assert tile.fold_rows <= tile.block_m, tile
        assert 64 // tile.slices >= 16, tile  # columns of values a program multiplies
        if not tile.split:
            assert (tile.slices, tile.unmasked) == (1, False), tile


@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_long_contexts_of_few_rows_are_split(arch: str) -> None:
    assert tiles.many(arch, splits=16, load=1.0).split
    assert not tiles.many(arch, splits=1, load=1.0).split  # there is nothing to split
    assert not tiles.many(arch, splits=16, load=1e4).split


def test_unknown_is_refused() -> None:
    for ask in (
        lambda: tiles.few("sm_70", 1, 1.0),
        lambda: tiles.many("sm_70", 1, 1.0),
        lambda: tiles.candidates("sm_70"),
    ):
        with pytest.raises(ValueError, match="unknown architecture 'sm_70': known are sm_80"):
            ask()


def test_a_tile_is_data() -> None:
    with pytest.raises(FrozenInstanceError):
        tiles.few("sm_90", 1, 1.0).warps = 1  # type: ignore[misc]
