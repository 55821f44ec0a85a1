"""RMSNorm, alone or after adding to the residual stream, and that addition alone."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.reference.floats import round_to
from bitassay.reference.spec.dtypes import require_dtype
from bitassay.reference.tree import tree_sum


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:  # [..., D], [D] -> [..., D]
    """Return x / sqrt(mean(x**2) + eps) * weight in the weight's dtype, rounded to it once.

    x, weight: one dtype, bf16 or fp16; all arithmetic in fp32. Raises TypeError or ValueError for
    other dtypes or shapes.
    """
    _check(x, weight)
    h = x.float()
    square = tree_sum(h * h)  # RN, then the tree's
    # Tensors, not numbers: on a GPU torch multiplies by the reciprocal of a number.
    size, small = torch.tensor([h.shape[-1], eps], dtype=torch.float32, device=x.device)
    # torch's fp32 root is off by an ulp on some CPUs. Through float64, good to far less than the
    # distance that an exact root keeps from the middle between two fp32 values, it is right.
    rms = (square / size + small).double().sqrt().float()  # RN, RN, RN
    return round_to(h / rms[..., None] * weight.float(), weight.dtype)  # RN, RN, RN


def add_rms_norm(  # [T, D], [T, D], [D] -> [T, D], [T, D]
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `rms_norm` of the new residual stream, and that stream: x + residual.

    The sum is rounded to the dtype before it is normalised, so a later layer that reads the
    residual sees what this one saw. Dtypes and errors as `rms_norm`.
    """
    _check_alike(x, residual)
    _check(x, weight)
    residual = add(x, residual)
    return rms_norm(residual, weight, eps=eps), residual


def add(x: Tensor, residual: Tensor) -> Tensor:  # [T, D], [T, D] -> [T, D]
    """Return x + residual: the fp32 sum, rounded once to their dtype, bf16 or fp16.

    Raises TypeError for another dtype and ValueError where the two are not alike.
    """
    _check_alike(x, residual)
    require_dtype("transformer", x.dtype)
    return round_to(x.float() + residual.float(), x.dtype)  # RN, RN


def _check_alike(x: Tensor, residual: Tensor) -> None:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"expected x and residual alike, found {x.dtype} {list(x.shape)} and {residual.dtype} "
            f"{list(residual.shape)}"
        )


def _check(x: Tensor, weight: Tensor) -> None:
    require_dtype("transformer", x=x.dtype, weight=weight.dtype)
    if x.dim() < 1 or weight.shape != x.shape[-1:] or weight.shape[0] == 0:
        raise ValueError(
            f"expected x [..., D] and weight [D], found {list(x.shape)} and {list(weight.shape)}"
        )
