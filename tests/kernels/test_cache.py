"""cache.write in the emulator: rows land in their slots, bit for bit, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitassay.kernels import cache
from bitassay.kernels.cache import BLOCK_SIZE, write
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreting")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def clear_flag() -> Iterator[None]:
    yield
    cache._OUTSIDE.take()


def rows(tokens: int, heads: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all, NaN of every kind included: a copy keeps them."""
    return matrix("patterns", tokens, heads * width, dtype, seed).view(tokens, heads, width)


def expected(pages: Tensor, x: Tensor, slots: Tensor) -> Tensor:
    flat = pages.clone().flatten(0, 1)
    for row, slot in zip(x, slots.tolist(), strict=True):
        if 0 <= slot < len(flat):
            flat[slot] = row
    return flat.view(pages.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(1, 1), (2, 64), (3, 96), (8, 128)])
def test_rows_land_in_their_slots(gpu_emulation: str, heads: int, width: int, dtype: str) -> None:
    kind = DTYPES[dtype]
    k, v = (rows(6, heads, width, kind, seed) for seed in (1, 2))
    pages = [rows(5 * BLOCK_SIZE, heads, width, kind, seed) for seed in (3, 4)]
    pages = [x.view(5, BLOCK_SIZE, heads, width) for x in pages]
    slots = torch.tensor([0, 79, -1, 17, 16, 31])
    want = [expected(x, row, slots) for x, row in zip(pages, (k, v), strict=True)]
    write(k, v, *pages, slots)
    for got, one in zip(pages, want, strict=True):
        assert_same_bits(got, one)
    cache.check()


def test_views_of_packed_rows_and_of_one_cache(gpu_emulation: str) -> None:
    packed = rows(4, 8, 32, torch.bfloat16, 5)
    k, v = packed[:, 4:6], packed[:, 6:]
    both = torch.zeros(3, 2, BLOCK_SIZE, 2, 32, dtype=torch.bfloat16)
    heads_first = torch.zeros(3, 2, BLOCK_SIZE, 32, dtype=torch.bfloat16).transpose(1, 2)
    slots = torch.stack([torch.tensor([40, 3, 25, 10])] * 2, 1)[:, 0]
    write(k, v, both[:, 0], both[:, 1], slots)
    empty = torch.zeros(3, BLOCK_SIZE, 2, 32, dtype=torch.bfloat16)
    assert_same_bits(both[:, 0].contiguous(), expected(empty, k, slots))
    assert_same_bits(both[:, 1].contiguous(), expected(empty, v, slots))
    write(k, v, heads_first, both[:, 1], slots)
    assert_same_bits(heads_first.contiguous(), expected(empty, k, slots))


def test_slots_outside_are_told_afterwards(gpu_emulation: str) -> None:
    k = rows(4, 2, 16, torch.bfloat16, 6)
    pages = torch.zeros(2, BLOCK_SIZE, 2, 16, dtype=torch.bfloat16)
    slots = torch.tensor([5, 32, -2, 6])
    want = expected(pages, k, slots)
    write(k, k, pages, pages.clone(), slots)
    assert_same_bits(pages, want)
    with pytest.raises(ValueError, match="row 1: slot 32 is outside the cache"):
        cache.check()
    write(k, k, pages, pages.clone(), torch.tensor([-1, -1, -1, -(2**40)]))
    assert_same_bits(pages, want)
    with pytest.raises(ValueError, match="row 3: slot -2147483648 "):
        cache.check()
    cache.check()


def test_nothing_to_do(gpu_emulation: str) -> None:
    k = rows(1, 2, 16, torch.bfloat16, 7)[:0]
    pages = torch.zeros(2, BLOCK_SIZE, 2, 16, dtype=torch.bfloat16)
    write(k, k, pages, pages, torch.zeros(0, dtype=torch.int64))
    assert not pages.any()


def test_what_does_not_fit_is_refused(gpu_emulation: str) -> None:
    k = rows(4, 2, 16, torch.bfloat16, 8)
    pages = torch.zeros(2, BLOCK_SIZE, 2, 16, dtype=torch.bfloat16)
    slots = torch.arange(4)
    with pytest.raises(TypeError, match="k_cache torch.float16"):
        write(k, k, pages.half(), pages, slots)
    with pytest.raises(TypeError, match="k torch.float32"):
        write(*(x.float() for x in (k, k, pages, pages)), slots)
    with pytest.raises(TypeError, match="slots int64, found torch.int32"):
        write(k, k, pages, pages, slots.int())
    wrong = [
        (k, k[:3], pages, pages, slots),
        (k, k, pages, pages[:1], slots),
        (k, k, pages[:, :8], pages[:, :8], slots),
        (k, k, pages[:, :, :1], pages[:, :, :1], slots),
        (k, k, pages, pages, slots[:3]),
        (k[0], k[0], pages, pages, slots),
        (k, k, pages[0], pages[0], slots),
    ]
    for case in wrong:
        with pytest.raises(ValueError, match=r"caches \[B, 16, Hkv, D\] and slots \[T\], found"):
            write(*case)
    with pytest.raises(ValueError, match="v: expected adjacent columns"):
        write(k, k.transpose(1, 2).contiguous().transpose(1, 2), pages, pages, slots)
    with pytest.raises(ValueError, match="one device, found cpu, meta"):
        write(k, k, pages, pages.to("meta"), slots)
