"""cache.write compiled on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bitassay.kernels import cache
from bitassay.kernels.cache import BLOCK_SIZE, write
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]


@pytest.fixture(autouse=True)
def clear_flag() -> Iterator[None]:
    yield
    cache._OUTSIDE.take()


@pytest.mark.parametrize("tokens", [1, 7, 2048])
@pytest.mark.parametrize(("heads", "width"), [(8, 128), (2, 64), (1, 96)])
def test_rows_land_in_their_slots(cuda: torch.device, heads: int, width: int, tokens: int) -> None:
    packed = matrix("patterns", tokens, 3 * heads * width, torch.bfloat16, 1).to(cuda)
    packed = packed.view(tokens, 3 * heads, width)
    k, v = packed[:, heads : 2 * heads], packed[:, 2 * heads :]
    blocks = tokens // 8 + 3
    pages = torch.zeros(2, blocks, BLOCK_SIZE, heads, width, dtype=torch.bfloat16, device=cuda)
    slots = torch.randperm(blocks * BLOCK_SIZE, device=cuda)[:tokens]
    slots[::5] = -1
    kept = slots >= 0
    want = torch.zeros_like(pages)
    for page, x in zip(want, (k, v), strict=True):
        page.flatten(0, 1)[slots[kept]] = x[kept]
    write(k, v, pages[0], pages[1], slots)
    assert_same_bits(pages, want)
    cache.check()


def test_slots_outside_are_told_afterwards(cuda: torch.device) -> None:
    k = torch.ones(4, 8, 128, device=cuda).bfloat16()
    pages = torch.zeros(2, BLOCK_SIZE, 8, 128, dtype=torch.bfloat16, device=cuda)
    write(k, k, pages, pages.clone(), torch.tensor([3, 32, -2, 2**40], device=cuda))
    assert pages.sum() == 8 * 128
    with pytest.raises(ValueError, match="row 1: slot 32 is outside the cache"):
        cache.check()
    cache.check()
