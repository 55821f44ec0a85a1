"""Which architecture kernels are emulated as in this process.

The emulator sets it and kernels read it:
neither of the two imports the other.
"""

from __future__ import annotations

_emulated: str | None = None


def emulated_arch() -> str | None:
    """Return the name of the architecture that is being emulated, None outside emulation."""
    return _emulated


def set_emulated_arch(arch: str | None) -> None:
    """Note which architecture is emulated from now on, None for none; for the emulator alone."""
    global _emulated
    _emulated = arch
