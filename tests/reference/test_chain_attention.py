"""Drafted rows computed together have the bits of each row's attention alone."""

from __future__ import annotations

import pytest
import torch

from bitassay.reference.attention import attention
from bitassay.reference.chain_attention import chain_attention
from bitassay.reference.spec.contract import default_contract
from support.same_bits import assert_same_bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (4, 2), (2, 2)])
def test_rows_together_are_rows_alone(
    arch: str, dtype: torch.dtype, heads: int, kv_heads: int
) -> None:
    """Shared keys end anywhere in a block or split, and own keys cross into the next."""
    contract = default_contract(arch, key_block=16, key_split=32)
    g = torch.Generator().manual_seed(heads + kv_heads)
    shared = torch.tensor([1, 2, 13, 15, 16, 17, 29, 30, 31, 32, 33, 47, 48, 60])
    k, v = (torch.randn(60, kv_heads, 64, generator=g).to(dtype) for _ in range(2))
    for count in (1, 5):
        q = (3 * torch.randn(len(shared), heads, 64, generator=g)).to(dtype)
        own = [torch.randn(len(shared), count, kv_heads, 64, generator=g).to(dtype) for _ in "kv"]
        got = chain_attention(q, k, v, shared, *own, contract=contract)
        for r, length in enumerate(shared.tolist()):
            pieces = [torch.cat([x[:length], y[r]]) for x, y in zip((k, v), own, strict=True)]
            assert_same_bits(got[r : r + 1], attention(q[r : r + 1], *pieces, contract=contract))


def test_more_rows_than_go_through_one_product() -> None:
    contract = default_contract("sm_90")
    g = torch.Generator().manual_seed(7)
    shared = torch.arange(30, 100)
    k, v = (torch.randn(100, 1, 64, generator=g).bfloat16() for _ in range(2))
    q = torch.randn(70, 2, 64, generator=g).bfloat16()
    own = [torch.randn(70, 2, 1, 64, generator=g).bfloat16() for _ in "kv"]
    got = chain_attention(q, k, v, shared, *own, contract=contract)
    for r in (0, 31, 32, 33, 34, 35, 69):
        pieces = [torch.cat([x[: 30 + r], y[r]]) for x, y in zip((k, v), own, strict=True)]
        assert_same_bits(got[r : r + 1], attention(q[r : r + 1], *pieces, contract=contract))
