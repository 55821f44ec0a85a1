"""Greedy choice, the top k and the margin, on integers alone; and log-probabilities.

For a choice every logit becomes one integer that orders by value first and by id second, so no two
are equal and no reduction has an order to choose. NaN sets a flag, which `check` reads at the end
of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.checks import adjacent
from bitassay.kernels.device import check_device, is_interpreted, on_device
from bitassay.kernels.elementary import exp, log
from bitassay.kernels.flags import CLEAR, Flag
from bitassay.kernels.tree import tree_sum
from bitassay.reference.spec.contract import Contract
from bitassay.reference.spec.dtypes import require_dtype

_NANS = Flag()
_NO_MAXIMUM = Flag()


def greedy(logits: Tensor) -> Tensor:  # [T, V] -> [T]
    """Return the id of the highest logit of each row as int64; the lowest id wins a tie.

    logits: bf16, fp16 or fp32. -0 equals +0. `check` raises for a NaN.
    """
    return _id_of(_keys(logits, _NANS, 0).amax(1))


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [T, V] -> [T, k], [T, k]
    """Return the k highest logits and their ids (int64), by value descending, then id ascending.

    Raises ValueError when k is not within 1 … V; `check` raises for a NaN.
    """
    ids = _id_of(_leading(logits, k, _NANS, 0))
    return logits.gather(1, ids), ids


def margin_ulps(logits: Tensor) -> Tensor:  # [T, V] -> [T]
    """Return how many representable values of the logits' dtype the first is above the second.

    Raises ValueError for rows of one logit; `check` raises for a NaN.
    """
    return _margin_of(_leading(logits, 2, _NANS, 0))


def decide(  # [T, V] -> [T, k], [T, k], [T]
    logits: Tensor, k: int, *, nans: Flag = _NANS, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `top_k`'s values and ids and `margin_ulps`, from one pass; ids[:, 0] is `greedy`.

    k: at least 2. nans: the flag that keeps the first NaN, as row first_row + t and its id.
    """
    keys = _leading(logits, k, nans, first_row)
    ids = _id_of(keys)
    return logits.gather(1, ids), ids, _margin_of(keys)


@triton.jit
def _log_softmax(
    x_ptr, out_ptr, flag_ptr,  # [T, V], [T, V], [1]
    V,
    stride_x, stride_out,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    x_row, out_row = x_ptr + row * stride_x, out_ptr + row * stride_out
    lowest = float("-inf")
    highest = tl.full((WIDTH,), lowest, tl.float32)
    wrong = tl.full((WIDTH,), 2147483647, tl.int32)  # the first id that holds NaN or +inf
    for start in range(0, V, WIDTH):
        ids = start + cols
        x = tl.load(x_row + ids, mask=ids < V, other=lowest).to(tl.float32)
        highest = tl.maximum(highest, x)
        wrong = tl.minimum(wrong, tl.where((x != x) | (x == float("inf")), ids, 2147483647))
    maximum, first = tl.max(highest, axis=0), tl.min(wrong, axis=0)
    first = tl.where((maximum == lowest) & (first == 2147483647), 0, first)
    tl.atomic_min(flag_ptr, (row << 32) | first.to(tl.int64), mask=first != 2147483647)
    total = tl.zeros((1,), tl.float32)
    for start in range(0, V, WIDTH):
        ids = start + cols
        x = tl.load(x_row + ids, mask=ids < V, other=lowest).to(tl.float32)
        total = total + tree_sum(tl.reshape(exp(x - maximum), (1, WIDTH)))  # ascending
    y = log(total)
    for start in range(0, V, WIDTH):
        ids = start + cols
        x = tl.load(x_row + ids, mask=ids < V, other=lowest).to(tl.float32)
        tl.store(out_row + ids, (x - maximum) - y, mask=ids < V)


def log_softmax(logits: Tensor, *, contract: Contract) -> Tensor:  # [T, V] -> [T, V]
    """Return the log-probabilities in fp32.

    logits: bf16, fp16 or fp32, any row stride; -inf (padding) stays -inf. Each
    `contract.sum_width` columns are summed as a tree, and these sums one after another, ascending.
    `check` raises for a row that holds NaN or +inf, or nothing but -inf. Raises TypeError or
    ValueError for what does not fit, RuntimeError for another architecture than the contract's.
    """
    require_dtype("logits", logits.dtype)
    if logits.dim() != 2 or logits.shape[1] == 0 or not adjacent(logits):
        raise ValueError(
            "expected logits [T, V] with adjacent columns, V at least 1, found "
            f"{list(logits.shape)} with strides {list(logits.stride())}"
        )
    check_device(is_interpreted(_log_softmax), logits.device, contract.arch)
    height, width = logits.shape
    out = torch.empty(height, width, dtype=torch.float32, device=logits.device)
    if height:
        with on_device(logits.device):
            _log_softmax[(height,)](
                logits, out, _NO_MAXIMUM.on(logits.device),
                width,
                logits.stride(0), out.stride(0),
                WIDTH=contract.sum_width,
                num_warps=log_softmax_warps(contract.sum_width), enable_fp_fusion=False,
            )  # fmt: skip
    return out


def log_softmax_warps(width: int) -> int:
    """Return the warps of a program that takes so many columns at a time."""
    return 4 if width < 2048 else 8


def check() -> None:
    """Wait for the device and raise ValueError for the first row that was refused since last.

    That is a NaN among logits, and for log_softmax also +inf or a row that is -inf throughout.
    """
    first, unbounded = _NANS.take(), _NO_MAXIMUM.take()
    if first is not None:
        raise ValueError(
            f"NaN among the logits: row {first[0]}, first at id {first[1]}: discard this step"
        )
    if unbounded is not None:
        raise ValueError(
            f"row {unbounded[0]}: expected a finite highest logit, found NaN, +inf or -inf "
            f"throughout, first at id {unbounded[1]}: discard this step"
        )


def _leading(logits: Tensor, k: int, nans: Flag, first_row: int) -> Tensor:  # -> [T, k]
    if logits.dim() == 2 and not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k = {k} is not within 1 … {logits.shape[1]}, the logits of a row")
    return torch.topk(_keys(logits, nans, first_row), k, dim=1, sorted=True).values


def _keys(logits: Tensor, nans: Flag, first_row: int) -> Tensor:  # -> rank << 32 minus id, [T, V]
    facts = require_dtype("logits", logits.dtype)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"expected logits [T, V], V at least 1, found {list(logits.shape)}")
    pattern = logits.view(facts.integer).long()
    magnitude = pattern & facts.magnitude
    ids = torch.arange(logits.shape[1], device=logits.device)
    rows = torch.arange(first_row, first_row + logits.shape[0], device=logits.device)[:, None]
    place = torch.where(magnitude > facts.last_number, rows << 32 | ids, CLEAR)
    nans.note(place.amin(1))
    return (torch.where(pattern < 0, -magnitude, magnitude) << 32) - ids


def _id_of(keys: Tensor) -> Tensor:
    return -keys & 0xFFFFFFFF


def _margin_of(keys: Tensor) -> Tensor:  # [T, k] -> [T]
    ranks = keys + _id_of(keys) >> 32
    return ranks[:, 0] - ranks[:, 1]
