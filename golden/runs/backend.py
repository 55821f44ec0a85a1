"""What an engine's operations run on, whether that can be had here, and setting a process up."""

from __future__ import annotations

import importlib
import os
import sys
from enum import StrEnum

from bitassay.golden.errors import CannotRunError
from bitassay.reference.spec.arch import EMULATED, get_arch

NO_GPU = (
    "no GPU: kernels on a GPU need a CUDA device that torch can use, and nothing else was run in "
    "their place; on a CPU use the interpreter or the reference"
)
_INTERPRETED = ("1", "true", "yes", "on", "y")  # as Triton reads TRITON_INTERPRET


class Backend(StrEnum):
    """What an engine's operations run on."""

    GPU = "gpu"
    INTERPRETER = "interpreter"
    REFERENCE = "reference"


def require_backend(backend: Backend, arch: str, ranks: int = 1) -> None:
    """Raise CannotRunError where so many ranks of this host cannot run on a backend.

    arch: whose bits are wanted; of a GPU, it must be the GPU's own.
    """
    if ranks < 1:
        raise CannotRunError(f"--dp: expected at least 1 rank, found {ranks}")
    if backend is Backend.GPU:
        _require_gpus(arch, ranks)
    elif backend is Backend.INTERPRETER and get_arch(arch).emulation is None:
        raise CannotRunError(
            f"kernels cannot run as {arch} in the interpreter, which emulates "
            f"{' and '.join(EMULATED)}: use the reference, or a GPU of that architecture"
        )


def gpu_arch() -> str:
    """Return the architecture of the current GPU (`sm_90`); CannotRunError without one."""
    import torch

    if not torch.cuda.is_available():
        raise CannotRunError(NO_GPU)
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def prepare_process(backend: Backend, arch: str) -> None:
    """Set this process up for a backend, before any model is loaded.

    Triton reads TRITON_INTERPRET when it is imported. Raises CannotRunError where it is too late.
    """
    if backend is Backend.GPU:
        _refuse_interpreter()
    elif backend is Backend.INTERPRETER:
        if "triton" in sys.modules and not _interpreting():
            raise CannotRunError(
                "triton was imported for a GPU in this process: set TRITON_INTERPRET=1 before"
            )
        os.environ |= backend_environment(backend, arch)
        importlib.import_module("bitassay.emulator")  # BITASSAY_ARCH switches it on


def backend_environment(backend: Backend, arch: str) -> dict[str, str]:
    """Return the variables that a process of a backend is started with."""
    if backend is Backend.INTERPRETER:
        # A check allows nothing whose bits are undefined.
        return {"TRITON_INTERPRET": "1", "BITASSAY_ARCH": arch, "BITASSAY_ALLOW": ""}
    return {}


def _require_gpus(arch: str, ranks: int) -> None:
    import torch

    found = gpu_arch()
    _refuse_interpreter()
    if get_arch(arch).name != found:
        raise CannotRunError(
            f"the GPU ({torch.cuda.get_device_name()}) is {found}, the golden is {arch}: check "
            f"the golden of {found}, or run this one on a GPU of its kind"
        )
    if (count := torch.cuda.device_count()) < ranks:
        raise CannotRunError(
            f"--dp {ranks}: expected a GPU for every rank, found {count}: NCCL cannot share one; "
            "start fewer ranks, or use another backend"
        )


def _refuse_interpreter() -> None:
    if _interpreting():
        raise CannotRunError(
            "TRITON_INTERPRET is set, so kernels would be interpreted on the CPU: unset it"
        )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in _INTERPRETED
