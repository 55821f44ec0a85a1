"""What the emulator says when it cannot vouch for the bits."""

from __future__ import annotations


class EmulationError(RuntimeError):
    """The emulator cannot run as asked: Triton's version, its mode, the architecture."""


class RefusedError(EmulationError):
    """A kernel used an operation whose bits on the GPU are not defined, or not known here."""
