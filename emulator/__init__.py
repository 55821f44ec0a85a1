"""A GPU on a CPU: Triton's interpreter with the arithmetic of a chosen architecture.

With `TRITON_INTERPRET=1` (before triton is imported) and `BITASSAY_ARCH=sm_89` or `sm_90`,
importing this module makes every `@triton.jit` kernel of the process compute the bits that the
compiled kernel computes on that architecture. `emulate` does the same for a block of code.
Operations whose bits are not defined, or not known, raise `RefusedError` unless they are allowed
by name: `BITASSAY_ALLOW=exp,sum` or `allow=("exp", "sum")`; these then compute what Triton's
interpreter computes, which is not what a GPU does.

The interpreter is one per process, and so is the emulator: kernels of several threads would mix.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

from bitassay.emulator.errors import EmulationError, RefusedError
from bitassay.reference.spec.arch import EMULATED
from bitassay.reference.spec.target import emulated_arch

TRITON_VERSIONS = ("3.6.0", "3.7.1", "3.9")

__all__ = [
    "TRITON_VERSIONS",
    "EmulationError",
    "RefusedError",
    "active_arch",
    "emulate",
    "install",
    "uninstall",
]


def install(arch: str, allow: Iterable[str] = ()) -> None:
    """Make every interpreted kernel of this process compute as `arch` does ("sm_89", "sm_90").

    allow: names of refused operations to let through. Raises ValueError for another architecture,
    EmulationError where triton is not interpreting or its version is not supported.
    """
    if arch not in EMULATED:
        raise ValueError(f"cannot emulate {arch!r}: known are {', '.join(EMULATED)}")
    check_triton()
    # It imports triton, in the mode that the environment asks for.
    from bitassay.emulator.interpreted import launch

    launch.put(launch.new(arch, frozenset(allow)))


def uninstall() -> None:
    """Give the process Triton's own interpreter back."""
    if active_arch() is not None:
        from bitassay.emulator.interpreted import launch

        launch.put(None)


def active_arch() -> str | None:
    """Return the architecture being emulated, None outside emulation."""
    return emulated_arch()


@contextmanager
def emulate(arch: str, allow: Iterable[str] = ()) -> Iterator[None]:
    """Emulate `arch` inside a block, then return to what was in place; blocks nest.

    Arguments and errors as `install`.
    """
    check_triton()
    from bitassay.emulator.interpreted import launch

    before = launch.current()
    install(arch, allow)
    try:
        yield
    finally:
        launch.put(before)


def check_triton() -> None:
    """Raise EmulationError unless a supported Triton interprets in this process."""
    found = version("triton")
    release = found.split("+")[0]
    if not any(release == known or release.startswith(f"{known}.") for known in TRITON_VERSIONS):
        raise EmulationError(
            f"Triton {found} is not supported by the emulator: its interpreter or its compiler may "
            f"round elsewhere. Supported are {', '.join(TRITON_VERSIONS)}; install one of them"
        )
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(triton.language.cdiv, InterpretedFunction):
        raise EmulationError(
            "triton was imported without its interpreter: set TRITON_INTERPRET=1 in the "
            "environment before anything imports triton"
        )


if os.environ.get("BITASSAY_ARCH"):
    install(
        os.environ["BITASSAY_ARCH"],
        filter(None, os.environ.get("BITASSAY_ALLOW", "").replace(" ", "").split(",")),
    )
