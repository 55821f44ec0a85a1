"""The reference's operations as a backend of the engine: its logic on any CPU, without Triton."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bitassay.engine.models.ops import Backend
from bitassay.kernels.flags import CLEAR, Flag
from bitassay.reference import activation, embedding, fingerprint, linear, norm, rotary, sample
from bitassay.reference.attention import attention
from bitassay.reference.spec.contract import Contract
from bitassay.reference.tensor_core import PreparedWeight

# As in reference/model.py: a prepared weight takes three times the memory, for few rows.
_PREPARED_ELEMENTS = 1 << 27


def reference_backend() -> Backend:
    """Return the oracle's operations, exact and slow, for an engine on the CPU.

    Nothing is flagged and told later: what is out of range raises at once.
    """
    ready = _Prepared()
    return Backend(
        name="reference",
        embedding=_embedding,
        linear=ready.linear,
        lm_head=ready.lm_head,
        rms_norm=_rms_norm,
        add_rms_norm=_add_rms_norm,
        add=_add,
        rotary=_rotary,
        silu_and_mul=_silu_and_mul,
        write_cache=_write_cache,
        paged_attention=_paged_attention,
        decide=_decide,
        fingerprint_rows=_fingerprint_rows,
        fingerprint_into=_fingerprint_into,
        fold=fingerprint.fold,
        check=lambda: None,
        check_device=_check_device,
    )


class _Prepared:
    """Products with weights that are prepared when first met, as long as there is room."""

    def __init__(self) -> None:
        # By where it lies; the weight is kept, so that nothing else ever lies there.
        self._kept: dict[tuple[int, torch.Size, str], tuple[Tensor, PreparedWeight]] = {}
        self._elements = 0

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, contract: Contract
    ) -> Tensor:
        """Return `reference.linear.linear`."""
        return linear.linear(x, self._of(weight, contract), bias, contract=contract)

    def lm_head(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        contract: Contract,
        vocab_size: int | None = None,
    ) -> Tensor:
        """Return `reference.linear.lm_head`."""
        prepared = self._of(weight, contract)
        return linear.lm_head(hidden, prepared, bias, contract=contract, vocab_size=vocab_size)

    def _of(self, weight: Tensor, contract: Contract) -> Tensor | PreparedWeight:
        key = (weight.data_ptr(), weight.shape, contract.arch)
        if key not in self._kept:
            if weight.dtype == torch.float32:
                return weight  # multiplied by chains of fma, for which nothing is prepared
            if self._elements + weight.numel() > _PREPARED_ELEMENTS:
                return weight
            self._elements += weight.numel()
            self._kept[key] = (weight, linear.prepare(weight, contract))
        return self._kept[key][1]


def _into(out: Tensor | None, values: Tensor) -> Tensor:
    return values if out is None else out.copy_(values)


def _embedding(ids: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _into(out, embedding.embedding(ids, weight))


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float, out: Tensor | None = None) -> Tensor:
    return _into(out, norm.rms_norm(x, weight, eps=eps))


def _add_rms_norm(
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


def _add(x: Tensor, residual: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _into(out, norm.add(x, residual))


def _silu_and_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _into(out, activation.silu_and_mul(gate_up))


def _rotary(
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


def _write_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    count = k_cache.shape[0] * k_cache.shape[1]
    if bool(((slots < -1) | (slots >= count)).any()):
        raise ValueError(f"expected slots within -1 … {count - 1}, found {slots.tolist()}")
    stored = slots >= 0
    for rows, cache in ((k, k_cache), (v, v_cache)):
        cache.flatten(0, 1)[slots[stored]] = rows[stored]


def _paged_attention(
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


def _decide(
    logits: Tensor, k: int, *, nans: Flag, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    wrong = logits.isnan()
    ids = torch.arange(logits.shape[1])
    rows = torch.arange(first_row, first_row + logits.shape[0])[:, None]
    nans.note(torch.where(wrong, rows << 32 | ids, CLEAR).amin(1))
    numbers = torch.where(wrong, -torch.inf, logits)
    values, chosen = sample.top_k(numbers, k)
    return values, chosen, sample.margin_ulps(numbers)


def _fingerprint_rows(x: Tensor, columns: int | None = None) -> Tensor:
    return fingerprint.fingerprint_rows(x[:, :columns])


def _fingerprint_into(
    rows: Sequence[Tensor], out: Tensor, columns: Sequence[int], slots: Tensor
) -> None:
    stored = slots >= 0
    for values, column in zip(rows, columns, strict=True):
        out[slots[stored], column] = fingerprint.fingerprint_rows(values[stored])


def _check_device(device: torch.device, arch: str) -> None:
    if device.type != "cpu":
        raise RuntimeError(
            f"the reference's operations run on the CPU, found {device}: leave out the backend for "
            f"kernels of {arch}"
        )
