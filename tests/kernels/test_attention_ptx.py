"""What the compiler makes of attention for sm_89 and sm_90, with no GPU at hand."""

from __future__ import annotations

from bitassay.kernels import attention_tiles as tiles
from bitassay.kernels.attention_split import _TOGETHER
from bitassay.kernels.attention_tiles import AttentionTile
from bitassay.reference.spec.arch import get_arch
from support.compiled_kernels import Found

COMPILED = "attention"  # of tools/compile, what `compiled` holds

KEY_BLOCK = 64


def walks(found: list[Found]) -> list[Found]:
    return [one for one in found if one["kernel"] != "_attention_fold"]


def test_every_tile_was_compiled(compiled: tuple[str, list[Found]]) -> None:
    arch, found = compiled
    assert {AttentionTile(**one["tile"]) for one in walks(found)} == set(tiles.candidates(arch))
    folded = [one["tile"] for one in found if one["kernel"] == "_attention_fold"]
    assert len(folded) == sum(tile.split for tile in tiles.in_use(arch))


def test_the_expected_tensor_core_instructions(compiled: tuple[str, list[Found]]) -> None:
    arch, found = compiled
    for one in walks(found):
        tile = AttentionTile(**one["tile"])
        assert one["other_mma_sync"] == one["other_wgmma"] == 0, one
        if arch == "sm_90" and tile.block_m % 64 == 0:
            assert one["mma_sync"] == 0 < one["wgmma"], one
        else:
            assert one["wgmma"] == 0 < one["mma_sync"], one


def test_products_and_sums_stay_apart(compiled: tuple[str, list[Found]]) -> None:
    """Every multiplication and fused multiply-add is one that the order names.

    Per thread, a loop over blocks has for each score 2 products (its scale, the power of two in
    exp2) and 6 fused steps (exp2), for each value of acc one product (acc * keep), and for each of
    the thread's rows exp2 again and one fused step (den).
    """
    _, found = compiled
    for one in walks(found):
        tile = AttentionTile(**one["tile"])
        threads = 32 * tile.warps
        scores = tile.block_m * KEY_BLOCK // threads
        values = tile.block_m * one["head_dim"] // tile.slices // threads
        loops = 1 if tile.split and not tile.unmasked else 2
        folds = not tile.split and not one["one"]
        # A fold: a product and a fused step for each value, two exp2 and one of each for a row.
        mul = one["mul"] - loops * (2 * scores + values) - folds * values
        fma = one["fma"] - loops * 6 * scores - folds * values
        rows, rest = divmod(mul, loops + 3 * folds)
        assert (rest, fma) == (0, (7 * loops + 13 * folds) * rows), one
        assert 0 < rows <= 16, one
        assert one["add"] >= loops * 4 * scores + values, one


def test_the_second_kernel_keeps_them_apart_too(compiled: tuple[str, list[Found]]) -> None:
    _, found = compiled
    for one in found:
        if one["kernel"] != "_attention_fold":
            continue
        splits = _TOGETHER.value
        values = one["tile"]["fold_rows"] * one["head_dim"] // 128
        powers, rest = divmod(one["fma"] - one["mul"], 5 * splits)  # exp2: 6 fused, 1 product
        assert (rest, one["mul"] % splits) == (0, 0), one
        assert one["mul"] // splits - powers > values, one
        assert powers >= 2, one


def test_no_stray_arithmetic(compiled: tuple[str, list[Found]]) -> None:
    _, found = compiled
    for one in found:
        assert one["ftz"] == one["approximate"] == one["packed"] == 0, one
        assert one["other_divide"] == one["other_maximum"] == 0, one
        assert one["divide"] > 0, one
        assert one["maximum"] > 0, one
        assert one["round"] > 0, one


def test_the_assembler_contracts_nothing(compiled: tuple[str, list[Found]]) -> None:
    _, found = compiled
    for one in found:
        assert one["machine_multiplications"] == one["mul"], one


def test_loads_are_asynchronous_and_wide(compiled: tuple[str, list[Found]]) -> None:
    _, found = compiled
    for one in walks(found):
        assert one["copy_16"] > 0, one


def test_shared_memory_fits(compiled: tuple[str, list[Found]]) -> None:
    arch, found = compiled
    for one in found:
        assert one["shared"] <= get_arch(arch).shared_memory, one
