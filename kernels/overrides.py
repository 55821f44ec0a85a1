"""What the switch puts in place of torch's kernels: ATen's operations on the invariant ones.

Each takes the replaced kernel as a call without arguments, for whatever is not covered: then
torch computes, or says in its own words what is wrong with the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitassay.kernels.embedding import embedding
from bitassay.kernels.linear import accumulate, bmm
from bitassay.reference.spec.contract import Contract
from bitassay.reference.spec.dtypes import with_role

DTYPES = tuple(record.dtype for record in with_role("weight"))
NOT_COVERED = (
    "other dtypes, other devices, sparse and nested tensors",
    "baddbmm, addbmm, addmv, vdot, and mm, addmm, bmm with out_dtype",
    "attention, convolutions and every reduction that is not a matrix product",
    "code that torch.compile generates itself",
)

Contracts = Callable[[torch.device], Contract]
Compute = Callable[..., "Tensor | None"]  # None: not covered


def _covered(*tensors: Tensor) -> bool:
    first = tensors[0]
    return first.dtype in DTYPES and all(
        t.dtype == first.dtype and t.device == first.device and t.layout == torch.strided
        for t in tensors
    )


def _mm(contract_of: Contracts, a: Tensor, b: Tensor) -> Tensor | None:  # [M, K], [K, N]
    if not _covered(a, b) or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        return None
    return accumulate(a, b.t(), contract=contract_of(a.device))


def _addmm(  # [M, N] or what expands to it, [M, K], [K, N]
    contract_of: Contracts, c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Tensor | None:
    """Round alpha * acc, beta * c and their sum to fp32 each, then to the dtype, once."""
    if not _covered(c, a, b) or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        return None
    shape = torch.Size((a.shape[0], b.shape[1]))
    if c.dim() > 2 or any(
        n not in (1, m) for n, m in zip(c.shape[::-1], shape[::-1], strict=False)
    ):
        return None
    contract = contract_of(a.device)
    if alpha == 1 and beta == 1 and c.shape == shape[1:]:
        return accumulate(a, b.t(), c, contract=contract)
    acc = accumulate(a, b.t(), contract=contract, dtype=torch.float32)
    if alpha != 1:
        acc = acc * alpha  # one kernel an operation, so that nothing fuses
    if beta != 0:  # as torch: with beta 0 a NaN in c does not count
        acc = acc + (c.float() if beta == 1 else c.float() * beta)
    return acc.to(a.dtype)


def _bmm(contract_of: Contracts, a: Tensor, b: Tensor) -> Tensor | None:  # [B, M, K], [B, K, N]
    if not _covered(a, b) or a.dim() != 3 or b.dim() != 3:
        return None
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        return None
    return bmm(a, b.mT, contract=contract_of(a.device))


def _mv(contract_of: Contracts, a: Tensor, x: Tensor) -> Tensor | None:  # [M, K], [K] -> [M]
    if not _covered(a, x) or a.dim() != 2 or x.dim() != 1 or a.shape[1] != x.shape[0]:
        return None
    return accumulate(x[None], a, contract=contract_of(a.device))[0]


def _dot(contract_of: Contracts, x: Tensor, y: Tensor) -> Tensor | None:  # [K], [K] -> []
    if not _covered(x, y) or x.dim() != 1 or x.shape != y.shape:
        return None
    return accumulate(x[None], y[None], contract=contract_of(x.device))[0, 0]


def _embedding(
    contract_of: Contracts, weight: Tensor, ids: Tensor, *args: Any, **kwargs: Any
) -> Tensor | None:  # [V, H], [...] -> [..., H]; the rest concerns gradients alone
    if not _covered(weight) or weight.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        return None
    if ids.device != weight.device or ids.layout != torch.strided:
        return None
    return embedding(ids.reshape(-1), weight).view(*ids.shape, weight.shape[1])


def _linear(
    contract_of: Contracts, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:  # [..., K], [N, K], [N] -> [..., N]
    """Reduce linear to mm or addmm, for which torch knows the gradients.

    torch's own decomposition rounds before it adds the bias where x is not contiguous.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not _covered(*tensors) or x.dim() == 0 or weight.dim() != 2:
        return None
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    weight = weight.t()
    out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
    return out.view(*x.shape[:-1], weight.shape[1])


def _functional(compute: Compute) -> Callable[..., Tensor]:
    def run(
        original: Callable[[], Tensor], contract_of: Contracts, *args: Any, **kw: Any
    ) -> Tensor:
        result = compute(contract_of, *args, **kw)
        return original() if result is None else result

    return run


def _out(compute: Compute) -> Callable[..., Tensor]:
    def run(
        original: Callable[[], Tensor], contract_of: Contracts, *args: Any, out: Tensor, **kw: Any
    ) -> Tensor:
        result = compute(contract_of, *args, **kw) if _covered(args[0], out) else None
        if result is None:
            return original()
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)

    return run


def _in_place(compute: Compute) -> Callable[..., Tensor]:
    def run(
        original: Callable[[], Tensor], contract_of: Contracts, c: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        result = compute(contract_of, c, *args, **kw)
        if result is None or result.shape != c.shape:
            return original()
        return c.copy_(result)

    return run


# (operation, implementation, whether autograd goes through it rather than over it). matmul is not
# named: torch reduces it to mm, bmm, mv and dot.
OVERRIDES: tuple[tuple[str, Callable[..., Tensor], bool], ...] = (
    ("mm", _functional(_mm), False),
    ("mm.out", _out(_mm), False),
    ("addmm", _functional(_addmm), False),
    ("addmm.out", _out(_addmm), False),
    ("addmm_", _in_place(_addmm), False),
    ("bmm", _functional(_bmm), False),
    ("bmm.out", _out(_bmm), False),
    ("mv", _functional(_mv), False),
    ("mv.out", _out(_mv), False),
    ("dot", _functional(_dot), False),
    ("linear", _functional(_linear), True),
    ("embedding", _functional(_embedding), False),
)
