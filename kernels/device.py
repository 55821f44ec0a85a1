"""What every wrapper asks before a launch: the right device, the right architecture."""

from __future__ import annotations

import functools
import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bitassay.reference.spec.arch import get_arch
from bitassay.reference.spec.target import emulated_arch

_thread = threading.local()
_has_device = True  # whether what a wrapper launches runs
_EMULATED_MULTIPROCESSORS = 2  # enough that a persistent program takes several tiles


def is_interpreted(kernel: object) -> bool:
    """Return whether a kernel runs in Triton's interpreter, decided when it was decorated."""
    return isinstance(kernel, InterpretedFunction)


def compile_without_device() -> None:
    """Let wrappers take tensors of any device from now on, for programs that launch nothing.

    They compile what a wrapper would launch, for an architecture that is not here.
    """
    global _has_device
    _has_device = False


def check_device(interpreted: bool, device: torch.device, arch: str | None = None) -> None:
    """Raise RuntimeError unless a launch there computes with that architecture's arithmetic.

    arch None: a kernel of integers, which all architectures compute alike.
    """
    if interpreted:
        emulated = emulated_arch()
        if arch is not None and emulated != get_arch(arch).name:
            raise RuntimeError(
                f"the contract is {arch}'s, the interpreter computes as {emulated or 'NumPy'}: "
                f"import bitassay.emulator with BITASSAY_ARCH={arch}, or use its emulate({arch!r})"
            )
        return
    if not _has_device:
        return
    if device.type != "cuda":
        raise RuntimeError(
            f"kernels run on CUDA tensors, found {device}: move them to a GPU, or set "
            "TRITON_INTERPRET=1 before importing triton and run in the emulator"
        )
    if arch is None:
        return
    capability = _capability(device.index)
    if capability != get_arch(arch).compute_capability:
        raise RuntimeError(
            f"the contract is {arch}'s, {device} has compute capability "
            f"{capability[0]}.{capability[1]}: use the contract of the device, or the emulator"
        )


def check_same_device(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"expected one device, found {', '.join(sorted(map(str, devices)))}")


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; a small number in the emulator."""
    return _multiprocessors(device.index) if device.type == "cuda" else _EMULATED_MULTIPROCESSORS


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on a device, from any thread."""
    if device.type != "cuda":
        return nullcontext()
    if device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if not getattr(_thread, "has_context", False):
        # The driver makes descriptors in the thread's CUDA context, and a new thread has none
        # until its first call of the runtime; torch's allocator may answer without one.
        torch.cuda.mem_get_info(device)
        _thread.has_context = True
    return nullcontext()


def fits_descriptor(x: Tensor) -> bool:
    """Return whether x [R, C] can be read through a descriptor: whole, 16-byte aligned rows."""
    stride = _row_stride(x)
    aligned = stride * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return aligned and x.stride(1) == 1 and stride >= x.shape[1]


def make_descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Return a host-made descriptor of x [R, C] that moves blocks of that shape."""
    return TensorDescriptor(x, list(x.shape), [_row_stride(x), 1], block)


def _row_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else (x.shape[1] + 7) // 8 * 8  # of one row: free


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
