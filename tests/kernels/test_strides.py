"""Every tensor of one call has strides of its own; whoever takes another's is found out."""

from __future__ import annotations

import pytest
import torch

from bitassay.kernels import cache, rotary
from bitassay.kernels.attention import paged_attention
from bitassay.kernels.attention_tiles import AttentionTile
from bitassay.kernels.norm import add_rms_norm
from bitassay.reference import attention as reference_attention
from bitassay.reference import norm as reference_norm
from bitassay.reference import rotary as reference_rotary
from bitassay.reference.spec.contract import default_contract
from bitassay.reference.spec.rotary_table import RotaryTable
from support.attention_cases import Shape, batch, of_lengths
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits
from support.strided import loose

pytestmark = pytest.mark.usefixtures("interpreting")
BF16 = torch.bfloat16


def test_cache(gpu_emulation: str) -> None:
    k, v = (matrix("patterns", 4, 3 * 32, BF16, seed).view(4, 3, 32) for seed in (1, 2))
    slots = torch.tensor([40, 3, 25, 10])
    empty = torch.zeros(3, 16, 3, 32, dtype=BF16)
    want = [empty.clone(), empty.clone()]
    for page, x in zip(want, (k, v), strict=True):
        page.view(-1, 3, 32)[slots] = x
    k_cache, v_cache = loose(empty, 0, 0, 1, 2), loose(empty, 0, 2, 0, 5)
    cache.write(loose(k, 0, 2, 3), loose(v, 0, 0, 9), k_cache, v_cache, slots)
    assert_same_bits(k_cache.contiguous(), want[0])
    assert_same_bits(v_cache.contiguous(), want[1])


def test_rotary(gpu_emulation: str) -> None:
    q = matrix("normal", 3, 9 * 64, BF16, 1).view(3, 9, 64)
    k = matrix("normal", 3, 2 * 64, BF16, 2).view(3, 2, 64)
    table, positions = RotaryTable(10_000.0, 64, 40), torch.tensor([5, 39, 17])
    want = reference_rotary.apply(q, k, positions, table.cos, table.sin)
    spread = torch.stack([positions, positions + 1], 1)[:, 0]
    out = loose(torch.zeros_like(q), 0, 1, 2), loose(torch.zeros_like(k), 0, 3, 6)
    cos, sin = loose(table.cos, 0, 3), loose(table.sin, 0, 5)
    rotary.apply(loose(q, 0, 2, 1), loose(k, 0, 1, 4), spread, cos, sin, out=out)
    for got, one in zip(out, want, strict=True):
        assert_same_bits(got.contiguous(), one)


def test_norm(gpu_emulation: str) -> None:
    x, residual = (matrix("normal", 6, 3 * 40, BF16, seed).view(6, 3, 40) for seed in (1, 2))
    weight = matrix("normal", 1, 40, BF16, 3)[0]
    want = reference_norm.add_rms_norm(x, residual, weight, eps=1e-5)
    out, total = loose(torch.zeros_like(x), 0, 3, 6), loose(torch.zeros_like(x), 0, 3, 8)
    places = {"out": out, "residual_out": total}
    add_rms_norm(loose(x, 0, 1, 3), loose(residual, 0, 2, 4), weight, eps=1e-5, **places)
    assert_same_bits(out.contiguous(), want[0])
    assert_same_bits(total.contiguous(), want[1])


@pytest.mark.parametrize(
    "tile",
    [AttentionTile(16, 4, 2, fold_rows=8), AttentionTile(32, 4, 2, split=False)],
    ids=["split", "whole"],
)
def test_attention(gpu_emulation: str, tile: AttentionTile) -> None:
    contract = default_contract(gpu_emulation, key_block=16, key_split=32)
    drawn = batch(of_lengths(((1, 50), (9, 37)), Shape(4, 2, 64)))
    want = reference_attention.paged_attention(*drawn.arguments, contract=contract)
    q, k, v, tables, *rest = drawn.arguments
    out = loose(torch.zeros_like(q), 0, 2, 5)
    caches = loose(k, 0, 0, 1, 2), loose(v, 0, 3, 0, 5)
    paged_attention(
        loose(q, 0, 1, 3),
        *caches,
        loose(tables, 0, 2),
        *rest,
        contract=contract,
        tile=tile,
        out=out,
    )
    assert_same_bits(out.contiguous(), want)


def test_tables_of_one_column(gpu_emulation: str) -> None:
    """An axis of one entry has no gaps, whatever its stride."""
    q, k, v, tables, *rest = batch(of_lengths(((1, 9), (1, 5)), Shape(2, 1, 64))).arguments
    contract = default_contract(gpu_emulation)
    column = tables[:, :1].t().contiguous().t()
    assert column.is_contiguous()
    assert column.stride(1) != 1
    got = paged_attention(q, k, v, column, *rest, contract=contract)
    assert_same_bits(got, paged_attention(q, k, v, tables, *rest, contract=contract))


def test_far_positions_are_told(gpu_emulation: str) -> None:
    table = RotaryTable(10_000.0, 64, 40)
    q = matrix("normal", 2, 64, BF16, 1).view(2, 1, 64)
    for far, shown in ((2**40, 2**31 - 1), (-(2**40), -(2**31))):
        rotary.apply(q, q, torch.tensor([0, far]), table.cos, table.sin)
        with pytest.raises(ValueError, match=f"row 1: position {shown} "):
            rotary.check()


@pytest.mark.parametrize("entry", [-1, 10**6])
def test_a_block_outside_the_cache(gpu_emulation: str, entry: int) -> None:
    q, k, v, tables, *rest = batch(of_lengths(((1, 20),), Shape(2, 1, 64))).arguments
    tables[0, 1] = entry
    contract = default_contract(gpu_emulation)
    with pytest.raises(ValueError, match=f"block_tables: sequence 0 .* found {entry}"):
        paged_attention(q, k, v, tables, *rest, contract=contract)
    with pytest.raises(ValueError, match="block_tables: sequence 0 .* the cache has 0"):
        paged_attention(q, k[:0], v[:0], tables, *rest, contract=contract)
