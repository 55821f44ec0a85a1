"""Great matrices on a device: awkward rows first, numbers for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from support.matmul_cases import mixed

AWKWARD = 66  # rows of every kind, six times


def many(rows: int, columns: int, dtype: torch.dtype, seed: int, device: torch.device) -> Tensor:
    """A [rows, columns] matrix; drawn on the device, so its numbers depend on that."""
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, columns, device=device, generator=g).to(dtype)
    few = min(rows, AWKWARD)
    x[:few] = mixed(few, columns, dtype, seed).to(device)
    return x
