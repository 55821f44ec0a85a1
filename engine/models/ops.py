"""Which operations a model runs on: one record of functions, all with the kernels' signatures.

Models and runs call nothing else, so the same engine runs on the Triton kernels and, on a CPU, on
any other operations of the same bits. Where each function is stands in `spec.operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from bitassay.kernels.flags import Flag
from bitassay.reference.spec.operations import ENGINE_OPERATIONS, Operation


class FingerprintInto(Protocol):
    """Fingerprints of row r of rows[i] to out[slots[r], columns[i]]; slot -1 is skipped."""

    def __call__(
        self, rows: Sequence[Tensor], out: Tensor, columns: Sequence[int], slots: Tensor
    ) -> None:
        """Write them."""


class Decide(Protocol):
    """The k highest logits, their ids and the first two's distance, from one pass."""

    def __call__(
        self, logits: Tensor, k: int, *, nans: Flag, first_row: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return them; nans keeps the first NaN, as row first_row + t and its id."""


@dataclass(frozen=True, kw_only=True)
class Ops:
    """Operations with the names of `ENGINE_OPERATIONS` and the signatures of the kernels.

    name: whose they are. check: waits for the device and raises ValueError for the first id,
    position or slot that was out of range since last. check_device: raises RuntimeError unless
    the operations run on a device with an architecture's arithmetic.
    """

    name: str
    embedding: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    lm_head: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    add: Callable[..., Tensor]
    rotary: Callable[..., tuple[Tensor, Tensor]]
    silu_and_mul: Callable[..., Tensor]
    write_cache: Callable[..., None]
    paged_attention: Callable[..., Tensor]
    decide: Decide
    fingerprint_rows: Callable[..., Tensor]
    fingerprint_into: FingerprintInto
    fold: Callable[[Tensor], Tensor]
    check: Callable[[], None]
    check_device: Callable[[torch.device, str], None]


def kernel_ops() -> Ops:
    """Return the Triton kernels; imports triton, which has one mode a process."""
    from bitassay.kernels.device import check_device
    from bitassay.kernels.linear_pointer import INTERPRETED

    functions = {one.name: getattr(_module(one), one.function) for one in ENGINE_OPERATIONS}
    flagged = [_module(one) for one in ENGINE_OPERATIONS if one.flagged]

    def check() -> None:
        errors = []
        for module in flagged:  # all, so that none is left for later
            try:
                module.check()
            except ValueError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    return Ops(
        name="kernels",
        **functions,
        check=check,
        check_device=lambda device, arch: check_device(INTERPRETED, device, arch),
    )


def _module(operation: Operation) -> Any:
    return import_module(f"bitassay.kernels.{operation.module}")
