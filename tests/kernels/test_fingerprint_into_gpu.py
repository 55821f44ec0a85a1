"""Fingerprints of a layer's operations, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bitassay.kernels.fingerprint_into import Shape, fingerprint_into
from bitassay.reference import fingerprint as reference
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYER = (4096, 6144, 5120, 4096, 4096, 4096, 4096, 28672, 14336, 4096, 4096)
UNTOUCHED = 0x5EED


def drawn(
    count: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows on the device, their slots (one of them dropped) and where the prints go."""
    rows = [matrix("patterns", count, w, dtype, i).to(device) for i, w in enumerate(widths)]
    slots = torch.randperm(count + 3, device=device)[:count]
    slots[count // 2 :: 97] = -1
    out = torch.full((count + 3, len(widths)), UNTOUCHED, dtype=torch.int64, device=device)
    return rows, slots, out


def expected(rows: Sequence[Tensor], slots: Tensor, out: Tensor) -> Tensor:
    want, kept = torch.full_like(out, UNTOUCHED), (slots >= 0).nonzero().flatten()
    for column, x in enumerate(rows):
        want[slots[kept], column] = reference.fingerprint_rows(x)[kept]
    return want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 64, 65, 300])
def test_a_layer(cuda: torch.device, count: int, dtype: torch.dtype) -> None:
    rows, slots, out = drawn(count, LAYER, dtype, cuda)
    fingerprint_into(rows, out, range(len(rows)), slots)
    assert_same_bits(out, expected(rows, slots, out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [3, 700])
def test_any_width_and_more_than_a_launch_takes(
    cuda: torch.device, count: int, dtype: torch.dtype
) -> None:
    rows, slots, out = drawn(count, [*range(1, 40, 2), 4097, 30, 64, 66, 128], dtype, cuda)
    rows[-1] = rows[-1][:, 1:]  # begins between words
    fingerprint_into(rows, out, range(len(rows)), slots)
    assert_same_bits(out, expected(rows, slots, out))


@pytest.mark.parametrize("shape", [Shape(1, 512, 4), Shape(2, 256, 2), Shape(8, 128, 1)])
def test_no_launch_changes_a_bit(cuda: torch.device, shape: Shape) -> None:
    rows, slots, out = drawn(30, LAYER, torch.bfloat16, cuda)
    fingerprint_into(rows, out, range(len(rows)), slots, shape=shape)
    assert_same_bits(out, expected(rows, slots, out))


def test_in_a_graph_beside_other_work(cuda: torch.device) -> None:
    rows, slots, out = drawn(9, LAYER, torch.bfloat16, cuda)
    side = torch.cuda.Stream(cuda)
    fingerprint_into(rows, out, range(len(rows)), slots)
    torch.cuda.synchronize(cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream(cuda))
        with torch.cuda.stream(side):
            fingerprint_into(rows, out, range(len(rows)), slots)
        torch.cuda.current_stream(cuda).wait_stream(side)
    for x in rows:
        x.copy_(x.flip(0))
    out.fill_(UNTOUCHED)
    graph.replay()
    assert_same_bits(out, expected(rows, slots, out))
