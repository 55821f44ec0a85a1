"""The architectures' records, under their public name; they stand in `reference.spec.arch`."""

from __future__ import annotations

from bitassay.reference.spec.arch import ARCHES, Arch, TensorCore, get_arch

__all__ = ["ARCHES", "Arch", "TensorCore", "get_arch"]
