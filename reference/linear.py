"""Linear layers and the lm_head: K ascending through the tensor core, then bias, then rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.reference import tensor_core
from bitassay.reference.floats import round_to
from bitassay.reference.spec.contract import Contract

Weight = Tensor | tensor_core.PreparedWeight


def prepare(weight: Tensor, contract: Contract) -> tensor_core.PreparedWeight:  # [N, K]
    """Decompose a weight once, for many calls of `linear` or `lm_head` with few rows."""
    return tensor_core.prepare(weight.t(), arch=contract.arch)


def linear(  # [T, K], [N, K], [N] -> [T, N]
    x: Tensor, weight: Weight, bias: Tensor | None = None, *, contract: Contract
) -> Tensor:
    """Return x @ weight.T + bias in the weight's dtype.

    x, weight, bias: one dtype, bf16, fp16 or fp32. weight may be the result of `prepare`. Raises
    TypeError or ValueError for other dtypes or shapes that do not fit.
    """
    acc = _accumulate(x, weight, bias, contract)
    return round_to(acc, x.dtype)  # RN: the second and last rounding


def lm_head(  # [T, H], [V, H], [V] -> [T, V]
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    contract: Contract,
    vocab_size: int | None = None,
) -> Tensor:
    """Return the logits: `linear`, in fp32 where the contract says so, padding at -inf.

    vocab_size: ids from there on are padding of the table and can never win. Raises ValueError
    when it is not within 1 … V.
    """
    acc = _accumulate(hidden, weight, bias, contract)
    logits = round_to(acc, torch.float32 if contract.logits_dtype == "float32" else hidden.dtype)
    if vocab_size is not None:
        if not 1 <= vocab_size <= logits.shape[1]:
            raise ValueError(f"vocab_size {vocab_size} is not within 1 … {logits.shape[1]}")
        logits[:, vocab_size:] = -torch.inf
    return logits


def _accumulate(x: Tensor, weight: Weight, bias: Tensor | None, contract: Contract) -> Tensor:
    b = weight if isinstance(weight, tensor_core.PreparedWeight) else weight.t()
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (b.shape[1],)):
        raise ValueError(
            f"bias: expected {x.dtype} [{b.shape[1]}], found {bias.dtype} {list(bias.shape)}"
        )
    precision: tensor_core.Precision | None = "ieee" if x.dtype == torch.float32 else None
    acc = tensor_core.matmul(x, b, arch=contract.arch, precision=precision)
    return acc if bias is None else acc + bias.float()  # RN: one fp32 addition
