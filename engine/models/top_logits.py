"""What rows of logits choose, as traces have it."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.engine.models.ops import Ops
from bitassay.engine.trace import TOP
from bitassay.kernels.flags import Flag

CHOOSING = 256  # rows whose logits are looked at together: a vocabulary makes them wide


def choices(  # [R, V] -> [R], [R, 8], [R, 8], [R]
    run: Ops, logits: Tensor, nans: Flag, first_row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, top ids, top bits and margins of rows of logits, in a trace's dtypes.

    nans: keeps the first NaN, as row first_row + t and its id.
    """
    values, ids, margins = run.decide(logits, TOP, nans=nans, first_row=first_row)
    width = 8 * values.element_size()
    bits = values.view(torch.int16 if width == 16 else torch.int32).long() & (1 << width) - 1
    return ids[:, 0].int(), ids.int(), bits, margins
