"""The sum of many values as a tree whose shape depends on their number alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def tree_sum(x: Tensor) -> Tensor:  # [..., n] -> [...]
    """Return the sum over the last axis: padded with +0 to a power of two, then halved.

    x: fp32, n at least 1. Element i is added to element i + n/2, each addition rounded to
    nearest-even, until one is left.
    """
    n = x.shape[-1]
    x = F.pad(x, (0, (1 << (n - 1).bit_length()) - n))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]  # RN
    return x[..., 0]
