"""What wrappers of row-wise arithmetic ask of their tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitassay.kernels.device import check_device, check_same_device, is_interpreted
from bitassay.reference.spec.target import emulated_arch


def check_shape(name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise ValueError unless x has a dtype, a shape, and adjacent elements in its last axis."""
    if x.dtype != dtype or x.shape != tuple(shape) or not adjacent(x):
        raise ValueError(
            f"{name}: expected {dtype} {list(shape)} with adjacent columns, found {x.dtype} "
            f"{list(x.shape)} with strides {list(x.stride())}"
        )


def adjacent(x: Tensor) -> bool:
    """Return whether the last axis is without gaps, or too short to have any."""
    return x.numel() == 0 or x.shape[-1] == 1 or x.stride(-1) == 1


def check_runs(kernel: object, *tensors: Tensor | None) -> None:
    """Raise unless a kernel of exact float arithmetic may run on the tensors' one device.

    ValueError for several devices. RuntimeError for compiled kernels on the CPU, and in Triton's
    own interpreter, which rounds otherwise than any GPU.
    """
    check_same_device(*tensors)
    device = next(t.device for t in tensors if t is not None)
    interpreted = is_interpreted(kernel)
    check_device(interpreted, device)
    if interpreted and emulated_arch() is None:
        raise RuntimeError(
            "the interpreter computes as NumPy: import bitassay.emulator with BITASSAY_ARCH=sm_90 "
            "(or another), or use its emulate"
        )
