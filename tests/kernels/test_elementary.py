"""exp2, exp, silu, log and the tree in the emulator: the reference's bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitassay.reference.floats import canonical_nan
from bitassay.reference.tree import tree_sum
from support.hard_matrices import KINDS, matrix, specials
from support.kernel_elementary import DOMAIN, REFERENCE, from_range, run, run_tree
from support.same_bits import assert_same_bits, from_patterns

pytestmark = pytest.mark.usefixtures("interpreting")


def values(name: str) -> Tensor:
    """Ends of the domain, both sides of every power of two, special values, numbers."""
    parts = []
    for first, beyond in DOMAIN[name]:
        parts += [
            from_range(first, min(first + 300, beyond)),
            from_range(max(first, beyond - 300), beyond),
        ]
        step = (beyond - first) // 20_000 + 1
        parts.append(torch.arange(first, beyond, step).to(torch.int32).view(torch.float32))
    corners = torch.tensor([-126.0, 127.0, 127.5, -87.336544, -103.97, 88.72, 0.5, -0.5, 1.5])
    near = corners.view(torch.int32)[:, None] + torch.arange(-40, 41)
    near = near.flatten().to(torch.int32).view(torch.float32)
    drawn = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 40
    numbers = torch.cat([near, specials(torch.float32).view(torch.float32), drawn])
    if name == "exp":
        numbers = -numbers.abs()
    elif name == "log":
        numbers = numbers.abs()[(numbers.abs() >= 1) & numbers.isfinite()]
    return torch.cat([*parts, numbers])


@pytest.mark.parametrize("name", REFERENCE)
def test_reference(name: str, gpu_emulation: str) -> None:
    x = values(name)
    assert_same_bits(run(name, x), REFERENCE[name](x))


def test_what_the_ends_are(gpu_emulation: str) -> None:
    x = from_patterns([0, 0x80000000, 0xFF800000, 0x7F800000, 0x7FC00000], torch.float32)
    inf = torch.inf
    assert_same_bits(
        run("exp2", torch.cat([x, torch.tensor([127.5, -126.0, -126.00001, 3.0])])),
        torch.cat([torch.tensor([1.0, 1.0, 0.0, inf]), from_patterns([0x7FFFFFFF], torch.float32),
                   torch.tensor([inf, 2.0**-126, 0.0, 8.0])]),
    )  # fmt: skip
    nan = 0x7FFFFFFF
    assert_same_bits(
        run("silu", x), from_patterns([0, 0x80000000, nan, 0x7F800000, nan], torch.float32)
    )
    assert_same_bits(run("exp", x[[0, 1, 2, 4]])[:3].contiguous(), torch.tensor([1.0, 1.0, 0.0]))
    assert_same_bits(run("log", torch.ones(3)), torch.zeros(3))


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("width", [1, 2, 3, 64, 100])
def test_tree(width: int, rows: int, gpu_emulation: str) -> None:
    x = torch.cat([matrix(kind, 4, width, torch.float32, 7) for kind in KINDS])
    x = canonical_nan(x)  # a sum of one element keeps what it has
    assert_same_bits(run_tree(x, rows), canonical_nan(tree_sum(x)))
