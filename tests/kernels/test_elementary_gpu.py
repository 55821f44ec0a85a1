"""exp2, exp, silu, log and the tree compiled on a GPU: every fp32 pattern they are defined on."""

from __future__ import annotations

import pytest
import torch

from bitassay.reference.floats import canonical_nan
from bitassay.reference.tree import tree_sum
from support.hard_matrices import KINDS, matrix
from support.kernel_elementary import DOMAIN, REFERENCE, from_range, run, run_tree
from support.same_bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]
CHUNK = 1 << 26


@pytest.mark.parametrize("name", REFERENCE)
def test_every_pattern(cuda: torch.device, name: str) -> None:
    compared = 0
    for first, beyond in DOMAIN[name]:
        for start in range(first, beyond, CHUNK):
            x = from_range(start, min(start + CHUNK, beyond), cuda)
            got, want = run(name, x), REFERENCE[name](x)
            if not torch.equal(got.view(torch.int32), want.view(torch.int32)):  # on the device
                assert_same_bits(got, want)
            compared += len(x)
    assert compared == sum(beyond - first for first, beyond in DOMAIN[name])


@pytest.mark.parametrize("warps", [1, 4, 8, 16])
@pytest.mark.parametrize("width", [1, 2, 3, 33, 64, 128, 1000, 2048, 4096, 16384])
def test_tree(cuda: torch.device, width: int, warps: int) -> None:
    x = torch.cat([matrix(kind, 16, width, torch.float32, 7) for kind in KINDS])
    x = canonical_nan(x).to(cuda)  # a sum of one element keeps what it has
    want = canonical_nan(tree_sum(x))
    for rows in (0, 1, 2, 16):
        if rows * width <= 2048 * warps:  # what registers hold
            assert_same_bits(run_tree(x, rows, warps), want)
