"""Greedy choice, the top k, the margin between the first two, and log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.reference.elementary import exp, log
from bitassay.reference.floats import bits
from bitassay.reference.spec.contract import Contract
from bitassay.reference.spec.dtypes import require_dtype
from bitassay.reference.tree import tree_sum


def greedy(logits: Tensor) -> Tensor:  # [T, V] -> [T]
    """Return the id of the highest logit of each row as int64; the lowest id wins a tie.

    -0 equals +0. Raises ValueError naming the first row and id that hold NaN.
    """
    _refuse_nan(logits)
    best = logits.amax(1, keepdim=True)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == best, ids, logits.shape[1]).amin(1)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [T, V] -> [T, k], [T, k]
    """Return the k highest logits and their ids (int64), by value descending, then id ascending.

    torch.topk alone ignores ids on ties, so it sorts keys that are all distinct. Raises ValueError
    for NaN and when k is not within 1 … V.
    """
    _refuse_nan(logits)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k = {k} is not within 1 … {logits.shape[1]}")
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordinal(logits.float()) << 32) + (0xFFFFFFFF - ids)
    chosen = 0xFFFFFFFF - (torch.topk(keys, k, dim=1).values & 0xFFFFFFFF)
    return logits.gather(1, chosen), chosen


def margin_ulps(logits: Tensor) -> Tensor:  # [T, V] -> [T]
    """Return how many representable values of the logits' dtype the first is above the second."""
    values, _ = top_k(logits, 2)
    order = ordinal(values)
    return order[:, 0] - order[:, 1]


def log_softmax(logits: Tensor, *, contract: Contract) -> Tensor:  # [T, V] -> [T, V]
    """Return the log-probabilities in fp32.

    logits: bf16, fp16 or fp32; -inf (padding) stays -inf. Each `contract.sum_width` columns are
    summed as a tree, and these sums one after another, ascending. Raises ValueError naming the
    first row and id that hold NaN or +inf, and the first row that is -inf throughout.
    """
    _refuse_nan(logits)
    highest = logits.amax(1, keepdim=True).float()
    if highest.isinf().any():
        row = int(highest.isinf().nonzero()[0, 0])
        raise ValueError(
            f"row {row}: expected a finite highest logit, found {float(highest[row])}, first at id "
            f"{int(greedy(logits[row : row + 1]))}"
        )
    below = logits.float() - highest  # RN
    total = torch.zeros_like(highest[:, 0])
    for columns in below.split(contract.sum_width, dim=1):
        total = total + tree_sum(exp(columns))  # RN; the first is added to +0, exactly
    return below - log(total)[:, None]  # RN


def ordinal(x: Tensor) -> Tensor:
    """Return each value's rank among its dtype's numbers as int64, with -0 and +0 both 0."""
    facts = require_dtype("logits", x.dtype)
    pattern = bits(x).long()
    return torch.where(pattern >= 0, pattern, -(pattern & facts.magnitude))


def _refuse_nan(logits: Tensor) -> None:
    nan = logits.isnan()
    if nan.any():
        row, token = nan.nonzero()[0].tolist()
        raise ValueError(f"NaN among the logits: row {row}, first at id {token}")
