"""Linear layers and the lm_head: K ascends in every tile, so no tile changes a bit.

The accumulator starts at +0 and feeds every tensor-core step as its addend; a tail of K is padded
with zeros in both operands. Then one fp32 addition of the bias, then one conversion. There is no
split of K and no shortcut for any batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.kernels import tiles
from bitassay.kernels.device import check_device, check_same_device, on_device
from bitassay.kernels.linear_pointer import INTERPRETED, linear_pointer
from bitassay.kernels.linear_tma import fits, linear_tma
from bitassay.kernels.tiles import Tile
from bitassay.reference.spec.contract import Contract
from bitassay.reference.spec.dtypes import require_dtype


def linear(  # [T, K], [N, K], [N] -> [T, N]
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    contract: Contract,
    tile: Tile | None = None,
) -> Tensor:
    """Return x @ weight.T + bias in the weight's dtype.

    x, weight, bias: one dtype, bf16, fp16 or fp32, any strides, one CUDA device (or the CPU in
    the emulator). tile: another launch than the table's; it never changes a bit. Raises TypeError
    or ValueError for other dtypes or shapes that do not fit, RuntimeError for another
    architecture than the contract's.
    """
    return accumulate(x, weight, bias, contract=contract, tile=tile)


def lm_head(  # [T, H], [V, H], [V] -> [T, V]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    contract: Contract,
    vocab_size: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return the logits: `linear`, in fp32 where the contract says so, padding at -inf.

    vocab_size: ids from there on are padding of the table and can never win. Raises ValueError
    when it is not within 1 … V; otherwise as `linear`.
    """
    dtype = torch.float32 if contract.logits_dtype == "float32" else weight.dtype
    if vocab_size is not None and not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size {vocab_size} is not within 1 … {weight.shape[0]}")
    return accumulate(
        hidden, weight, bias, contract=contract, tile=tile, dtype=dtype, vocab_size=vocab_size
    )


def accumulate(  # [T, K], [N, K], [N] -> [T, N]
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    contract: Contract,
    tile: Tile | None = None,
    dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Return `linear` rounded to the weight's dtype or left in fp32; errors as `linear`."""
    _check(x, weight, bias)
    check_device(INTERPRETED, x.device, contract.arch)
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=weight.dtype if dtype is None else dtype, device=x.device)
    if out.numel() == 0:
        return out
    descriptors = fits(x, weight, out)
    if tile is None:
        tile = tiles.select(contract.arch, x.dtype, m, n, k, descriptors=descriptors)
    valid = n if vocab_size is None else vocab_size
    bias = None if bias is None else bias.contiguous()
    with on_device(x.device):
        if tile.kind == "pointer":
            linear_pointer(x[None], weight[None], bias, out[None], valid, tile)
        elif not descriptors:
            raise ValueError(f"{tile} needs 16-bit operands whose rows are 16-byte aligned")
        else:
            linear_tma(x, weight, bias, out, valid, tile)
    return out


def bmm(x: Tensor, weight: Tensor, *, contract: Contract) -> Tensor:  # [B, M, K], [B, N, K]
    """Return x @ weight.mT [B, M, N], each product as `linear` without bias; errors as `linear`."""
    if x.dim() != 3 or weight.dim() != 3 or x.shape[0] != weight.shape[0]:
        raise ValueError(
            f"expected x [B, M, K] and weight [B, N, K], found {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    (count, m, k), n = x.shape, weight.shape[1]
    out = torch.empty(count, m, n, dtype=weight.dtype, device=x.device)
    if count:
        _check(x[0], weight[0], None)
    check_device(INTERPRETED, x.device, contract.arch)
    if out.numel():
        tile = tiles.select(contract.arch, x.dtype, m, n, k, descriptors=False)
        with on_device(x.device):
            linear_pointer(x, weight, None, out, n, tile)
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected x [T, K] and weight [N, K], found {list(x.shape)} and {list(weight.shape)}"
        )
    require_dtype("weight", x=x.dtype, weight=weight.dtype)
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (weight.shape[0],)):
        raise ValueError(
            f"bias: expected {x.dtype} [{weight.shape[0]}], found {bias.dtype} {list(bias.shape)}"
        )
    check_same_device(x, weight, bias)
