"""The reference's operations for the engine: its logic on any CPU, without Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bitassay.engine.models.ops import Ops
from bitassay.kernels.flags import CLEAR, Flag
from bitassay.reference import activation, embedding, fingerprint, linear, norm, rotary, sample
from bitassay.reference.attention import attention
from bitassay.reference.spec.contract import Contract
from bitassay.reference.spec.operations import ENGINE_OPERATIONS, Operation
from bitassay.reference.tensor_core import PreparedWeight

# As in reference/model.py: a prepared weight takes three times the memory, for few rows.
PREPARED_ELEMENTS = 1 << 27


def reference_ops() -> Ops:
    """Return the oracle's operations, exact and slow, for an engine on the CPU.

    Nothing is flagged and told later: what is out of range raises at once.
    """
    adapted = _Adapted()
    return Ops(
        name="reference",
        **{one.name: getattr(adapted, one.name, None) or _own(one) for one in ENGINE_OPERATIONS},
        check=lambda: None,
        check_device=_check_device,
    )


def _own(operation: Operation) -> Callable[..., Any]:
    """Return the reference's own function of an operation that needs no adapter."""
    module = import_module(f"bitassay.reference.{operation.module}")
    found: Callable[..., Any] = getattr(module, operation.function)
    return found


class _Prepared:
    """Weights that are prepared when first met, as long as there is room."""

    def __init__(self) -> None:
        # By where it lies; the weight is kept, so that nothing else ever lies there.
        self._kept: dict[tuple[int, torch.Size, str], tuple[Tensor, PreparedWeight]] = {}
        self._elements = 0

    def of(self, weight: Tensor, contract: Contract) -> Tensor | PreparedWeight:
        """Return a weight prepared, or itself where that is not to be."""
        key = (weight.data_ptr(), weight.shape, contract.arch)
        if key not in self._kept:
            if weight.dtype == torch.float32:
                return weight  # multiplied by chains of fma, for which nothing is prepared
            if self._elements + weight.numel() > PREPARED_ELEMENTS:
                return weight
            self._elements += weight.numel()
            self._kept[key] = (weight, linear.prepare(weight, contract))
        return self._kept[key][1]


class _Adapted:
    """Operations that the engine calls with more than the reference takes, under their names.

    More is where to write, a paged cache, a flag to note errors in, and prepared weights. What is
    not here is the reference's own function.
    """

    def __init__(self) -> None:
        self._prepared = _Prepared()

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, contract: Contract
    ) -> Tensor:
        return linear.linear(x, self._prepared.of(weight, contract), bias, contract=contract)

    def lm_head(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        contract: Contract,
        vocab_size: int | None = None,
    ) -> Tensor:
        prepared = self._prepared.of(weight, contract)
        return linear.lm_head(hidden, prepared, bias, contract=contract, vocab_size=vocab_size)

    @staticmethod
    def embedding(ids: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        return _into(out, embedding.embedding(ids, weight))

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, *, eps: float, out: Tensor | None = None) -> Tensor:
        return _into(out, norm.rms_norm(x, weight, eps=eps))

    @staticmethod
    def add_rms_norm(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        *,
        eps: float,
        out: Tensor | None = None,
        residual_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        normed, total = norm.add_rms_norm(x, residual, weight, eps=eps)
        return _into(out, normed), _into(residual_out, total)

    @staticmethod
    def add(x: Tensor, residual: Tensor, *, out: Tensor | None = None) -> Tensor:
        return _into(out, norm.add(x, residual))

    @staticmethod
    def silu_and_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
        return _into(out, activation.silu_and_mul(gate_up))

    @staticmethod
    def rotary(
        q: Tensor,
        k: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        turned = rotary.apply(q, k, positions, cos, sin)
        return turned if out is None else (out[0].copy_(turned[0]), out[1].copy_(turned[1]))

    @staticmethod
    def write_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        count = k_cache.shape[0] * k_cache.shape[1]
        if bool(((slots < -1) | (slots >= count)).any()):
            raise ValueError(f"expected slots within -1 … {count - 1}, found {slots.tolist()}")
        stored = slots >= 0
        for rows, cache in ((k, k_cache), (v, v_cache)):
            cache.flatten(0, 1)[slots[stored]] = rows[stored]

    @staticmethod
    def paged_attention(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        *,
        contract: Contract,
        max_query_len: int | None = None,
        max_seq_len: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        starts, lengths = query_start.tolist(), seq_lens.tolist()
        most = max((b - a for a, b in pairwise(starts)), default=0)
        for name, hint, longest in (
            ("max_query_len", max_query_len, most),
            ("max_seq_len", max_seq_len, max(lengths, default=0)),
        ):
            if hint is not None and hint < longest:
                raise ValueError(f"{name} is {hint}, a sequence has {longest}")
        for r, length in enumerate(lengths):
            rows = slice(starts[r], starts[r + 1])
            if rows.start == rows.stop:
                continue
            blocks = block_tables[r, : -(-length // k_cache.shape[1])].long()
            k, v = (cache[blocks].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
            out[rows] = attention(q[rows], k, v, contract=contract)
        return out

    @staticmethod
    def decide(
        logits: Tensor, k: int, *, nans: Flag, first_row: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        wrong = logits.isnan()
        ids = torch.arange(logits.shape[1])
        rows = torch.arange(first_row, first_row + logits.shape[0])[:, None]
        nans.note(torch.where(wrong, rows << 32 | ids, CLEAR).amin(1))
        numbers = torch.where(wrong, -torch.inf, logits)
        values, chosen = sample.top_k(numbers, k)
        return values, chosen, sample.margin_ulps(numbers)

    @staticmethod
    def fingerprint_rows(x: Tensor, columns: int | None = None) -> Tensor:
        return fingerprint.fingerprint_rows(x[:, :columns])

    @staticmethod
    def fingerprint_into(
        rows: Sequence[Tensor], out: Tensor, columns: Sequence[int], slots: Tensor
    ) -> None:
        stored = slots >= 0
        for values, column in zip(rows, columns, strict=True):
            out[slots[stored], column] = fingerprint.fingerprint_rows(values[stored])


def _into(out: Tensor | None, values: Tensor) -> Tensor:
    return values if out is None else out.copy_(values)


def _check_device(device: torch.device, arch: str) -> None:
    if device.type != "cpu":
        raise RuntimeError(
            f"the reference's operations run on the CPU, found {device}: leave out the backend for "
            f"kernels of {arch}"
        )
