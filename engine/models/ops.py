"""Which operations a model runs on: one record of functions, all with the kernels' signatures.

Models and runs call nothing else, so the same engine runs on the Triton kernels and, on a CPU, on
any other operations of the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitassay.kernels.flags import Flag


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
class Backend:
    """Operations with the names and signatures of the kernels; `kernels_backend` has them.

    add: x + residual, rounded once. rotary: `kernels.rotary.apply`. write_cache:
    `kernels.cache.write`. check: waits for the device and raises ValueError for the first id,
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


def kernels_backend() -> Backend:
    """Return the Triton kernels; imports triton, which has one mode a process."""
    from bitassay.kernels import (
        activation,
        attention,
        cache,
        embedding,
        fingerprint,
        linear,
        norm,
        rotary,
        sample,
    )
    from bitassay.kernels.device import check_device
    from bitassay.kernels.linear_pointer import INTERPRETED

    def check() -> None:
        errors = []
        for operation in (embedding, rotary, cache):  # all, so that none is left for later
            try:
                operation.check()
            except ValueError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    return Backend(
        name="kernels",
        embedding=embedding.embedding,
        linear=linear.linear,
        lm_head=linear.lm_head,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        add=norm.add,
        rotary=rotary.apply,
        silu_and_mul=activation.silu_and_mul,
        write_cache=cache.write,
        paged_attention=attention.paged_attention,
        decide=sample.decide,
        fingerprint_rows=fingerprint.fingerprint_rows,
        fingerprint_into=fingerprint.fingerprint_into,
        fold=fingerprint.fold,
        check=check,
        check_device=lambda device, arch: check_device(INTERPRETED, device, arch),
    )
