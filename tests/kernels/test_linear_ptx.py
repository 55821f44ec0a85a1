"""What the compiler makes of every tile of the products, and of the kernels of integers."""

from __future__ import annotations

import torch

from bitassay.kernels import tiles
from bitassay.kernels.tiles import Tile
from bitassay.reference.spec.arch import get_arch
from support.compiled_kernels import Found

COMPILED = "tiles"  # of tools/compile, what `compiled` holds


def linears(found: list[Found]) -> list[Found]:
    return [one for one in found if "tile" in one]


def test_every_tile_was_compiled(compiled: tuple[str, list[Found]]) -> None:
    arch, found = compiled
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        done = {Tile(**one["tile"]) for one in linears(found) if one["dtype"] == name}
        assert done >= set(tiles.in_use(arch, dtype))
        if name == "bf16":
            assert done == set(tiles.candidates(arch, dtype))


def test_the_expected_tensor_core_instructions(compiled: tuple[str, list[Found]]) -> None:
    arch, found = compiled
    for one in linears(found):
        tile = Tile(**one["tile"])
        assert one["other_mma_sync"] == one["other_wgmma"] == 0, one
        if one["dtype"] == "fp32":  # ieee has no tensor core: a chain of fused multiply-adds
            assert one["mma_sync"] == one["wgmma"] == 0 < one["fma"], one
            continue
        height = tile.block_n if tile.swap else tile.block_m
        if arch == "sm_90" and height % 64 == 0 and tile.warps % 4 == 0:
            assert one["mma_sync"] == 0 < one["wgmma"], one
        else:
            assert one["wgmma"] == 0 < one["mma_sync"], one


def test_no_stray_arithmetic(compiled: tuple[str, list[Found]]) -> None:
    _, found = compiled
    for one in linears(found):
        assert one["ftz"] == one["approximate"] == one["packed"] == one["mul"] == 0, one
        tile = Tile(**one["tile"])
        # Per thread one output or a few; small tiles are held twice.
        outputs = -(-tile.block_m * tile.block_n // (32 * tile.warps))
        ieee = one["dtype"] == "fp32"
        if not ieee:
            assert one["fma"] == 0, one
        additions = one["bias"] + ieee  # the bias; and + 0.0 after a chain
        if additions:
            assert outputs * additions <= one["add"] <= 4 * outputs * additions, one
        else:
            assert one["add"] == 0, one
        assert (one["round"] > 0) is (one["out"] != "fp32"), one


def test_integer_kernels_hold_no_float(compiled: tuple[str, list[Found]]) -> None:
    _, found = compiled
    integers = [one for one in found if "tile" not in one]
    assert [one["kernel"] for one in integers] == ["_embedding", "_fingerprint_rows", "_fold"]
    for one in integers:
        assert one["float"] == 0, one


def test_loads_are_asynchronous_and_wide(compiled: tuple[str, list[Found]]) -> None:
    _, found = compiled
    for one in linears(found):
        if one["tile"]["kind"] == "tma":
            assert one["copy_16"] == 0 < one["descriptor"], one
        elif one["dtype"] != "fp32" or one["whole"]:
            assert one["descriptor"] == 0 < one["copy_16"], one


def test_shared_memory_fits(compiled: tuple[str, list[Found]]) -> None:
    arch, found = compiled
    limit = get_arch(arch).shared_memory
    for one in found:
        assert one["shared"] <= limit, one
        # Programs that share a multiprocessor share its memory, each with 1 KiB for the system.
        together = one.get("tile", {}).get("per_sm", 1)
        assert together * (one["shared"] + 1024) <= limit + 1024, one
