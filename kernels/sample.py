"""Greedy choice, the top k and the margin, on the device and on integers alone.

Every logit becomes one integer that orders by value first and by id second, so no two are equal
and no reduction has an order to choose. NaN sets a flag, which `check` reads at the end of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .flags import CLEAR, Flag

_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
_NANS = Flag()


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


def check() -> None:
    """Wait for the device and raise ValueError for the first NaN among logits since last."""
    first = _NANS.take()
    if first is not None:
        raise ValueError(
            f"NaN among the logits: row {first[0]}, first at id {first[1]}: discard this step"
        )


def _leading(logits: Tensor, k: int, nans: Flag, first_row: int) -> Tensor:  # -> [T, k]
    if logits.dim() == 2 and not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k = {k} is not within 1 … {logits.shape[1]}, the logits of a row")
    return torch.topk(_keys(logits, nans, first_row), k, dim=1, sorted=True).values


def _keys(logits: Tensor, nans: Flag, first_row: int) -> Tensor:  # -> rank << 32 minus id, [T, V]
    if logits.dtype not in _INTEGERS:
        raise TypeError(f"expected bfloat16, float16 or float32, found {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"expected logits [T, V], V at least 1, found {list(logits.shape)}")
    pattern = logits.view(_INTEGERS[logits.dtype]).long()
    magnitude = pattern & (1 << 8 * logits.element_size() - 1) - 1
    ids = torch.arange(logits.shape[1], device=logits.device)
    rows = torch.arange(first_row, first_row + logits.shape[0], device=logits.device)[:, None]
    place = torch.where(magnitude > _INFINITY[logits.dtype], rows << 32 | ids, CLEAR)
    nans.note(place.amin(1))
    return (torch.where(pattern < 0, -magnitude, magnitude) << 32) - ids


def _id_of(keys: Tensor) -> Tensor:
    return -keys & 0xFFFFFFFF


def _margin_of(keys: Tensor) -> Tensor:  # [T, k] -> [T]
    ranks = keys + _id_of(keys) >> 32
    return ranks[:, 0] - ranks[:, 1]
