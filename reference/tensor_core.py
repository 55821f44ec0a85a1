"""The tensor core: matrix products with the order and the roundings of the hardware.

One step adds a group of products to an accumulator. Products are exact and not normalised; every
term, the accumulator included, is cut off a fixed number of bits below the largest exponent; the
sum is cut to fp32. So order inside a group cannot matter and order between groups does.

`dot_add` is the definition, in float64, where every intermediate value is exact. `matmul` walks K
in ascending groups and leaves ordinary numbers to `fast`, which computes the same bits in narrower
types. Models: Fasi et al. (2021), MMA-Sim (arXiv 2511.10909), Khattak and Mikaitis.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from bitassay.reference import tensor_core_fast
from bitassay.reference.floats import bits, canonical_nan, exponent, fma, power_of_two, round_to
from bitassay.reference.spec.arch import Arch, TensorCore, get_arch
from bitassay.reference.spec.dtypes import DTYPES, FLOAT32
from bitassay.reference.tensor_core_fast import PreparedWeight as PreparedWeight

Precision = Literal["tf32", "ieee"]

EXACT_OUTPUTS = 1 << 18  # per tile of the exact path: times a group of float64, about 32 MiB


@torch.no_grad()
def matmul(  # [M, K], [K, N], [M, N] -> [M, N]
    a: Tensor,
    b: Tensor | PreparedWeight,
    c: Tensor | None = None,
    *,
    arch: str | Arch,
    precision: Precision | None = None,
) -> Tensor:
    """Return c + a @ b in fp32 with the bits of `arch`.

    a [M, K] and b [K, N]: one dtype of bf16, fp16, float8_e4m3fn, float8_e5m2, or fp32, which
    needs precision "tf32" (operands cut to 10 fraction bits) or "ieee" (one ascending chain of
    fused multiply-adds). c: fp32 [M, N], +0 when left out. b may be the result of `prepare`. A
    last group that K does not fill is padded with zeros. Works on CPU and CUDA tensors alike.

    Raises ValueError for shapes that do not fit, an unknown architecture or precision, TypeError
    for a dtype that `arch` has no tensor core for.
    """
    arch = get_arch(arch)
    n = _check(a, b, c, arch, precision)
    with _one_thread():
        d = torch.zeros(a.shape[0], n, device=a.device) if c is None else c.clone()
        if d.numel() == 0:
            return d
        if precision == "ieee":
            return _fma_chain(a, b.weight if isinstance(b, PreparedWeight) else b, d)
        core = tensor_core(arch, a.dtype)
        if a.dtype == torch.float32:
            a = _cut_to_tf32(a)
            b = b if isinstance(b, PreparedWeight) else _cut_to_tf32(b)
        for rows, columns, weight in tensor_core_fast.matmul_(a, b, d, core):
            _exact_(a[rows], weight, d[rows, columns], core)
        return d


def prepare(
    weight: Tensor, *, arch: str | Arch, precision: Precision | None = None
) -> PreparedWeight:
    """Decompose b [K, N] once, for many products with few rows.

    Takes three times the memory of a 16-bit weight. Errors as `matmul`.
    """
    arch = get_arch(arch)
    if weight.dim() != 2:
        raise ValueError(f"expected a weight [K, N], found {list(weight.shape)}")
    if (precision == "tf32") != (weight.dtype == torch.float32) or precision == "ieee":
        raise ValueError(
            f'only tensor-core weights are prepared: precision is "tf32" for fp32 and None for '
            f"others, found {precision!r} for {weight.dtype}"
        )
    core = tensor_core(arch, weight.dtype)
    return tensor_core_fast.prepare(_cut_to_tf32(weight) if precision == "tf32" else weight, core)


def tensor_core(arch: Arch, dtype: torch.dtype) -> TensorCore:
    """Return the tensor core that multiplies a dtype (fp32 means tf32) on an architecture.

    Raises TypeError where there is none.
    """
    facts = DTYPES.get(dtype)
    core: TensorCore | None = None if facts is None else getattr(arch, facts.tensor_core)
    if core is None:
        raise TypeError(f"{arch.name} has no tensor core for {dtype}")
    return core


def dot_add(  # [..., G], [..., G], [...] -> [...]
    a: Tensor, b: Tensor, c: Tensor, core: TensorCore, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return one step of the tensor core: c + sum over the last axis of a * b.

    a, b: one input dtype (tf32 operands already cut), G up to core.group; shapes broadcast. c:
    fp32. out_dtype: fp32, or fp16 for the instructions that accumulate in it (c is then rounded
    to fp16 first). NaN is canonical; a zero result is always +0.
    """
    if out_dtype == torch.float16:
        c = round_to(c, torch.float16)
    # Subnormals keep their format's least exponent: the adder does not normalise them.
    least, least_c = DTYPES[a.dtype].least_exponent, FLOAT32.least_exponent
    a, b, c = a.double(), b.double(), c.double()
    product = a * b  # exact: at most 22 bits, exponents far inside float64's
    special = (product.sum(-1) + c) * 0.0 != 0.0  # NaN or infinity anywhere; finite sums stay so
    of_product = exponent(a).clamp_min(least) + exponent(b).clamp_min(least)
    of_product = of_product.where(product != 0, core.exponent_floor)  # zero terms are ignored
    of_c = exponent(c).clamp_min(least_c).where(c != 0, core.exponent_floor)
    largest = torch.maximum(of_product.amax(-1), of_c).clamp_(core.exponent_floor, 512)
    unit = power_of_two(largest - core.fraction_bits)
    terms = torch.trunc(product / unit.unsqueeze(-1))  # RZ: the adder drops, it never rounds
    total = (terms.sum(-1) + torch.trunc(c / unit)) * unit  # exact: below 2**34 units
    if out_dtype == torch.float16:
        result = round_to(total, torch.float16)  # RN: fp16 results alone
    else:
        result = _cut_to_fp32(total, core.result_fraction_bits)
    result = torch.where(special, (product.sum(-1) + c).to(out_dtype), result + 0.0)  # -0 to +0
    return canonical_nan(result)


def _cut_to_fp32(x: Tensor, fraction_bits: int) -> Tensor:
    """Round float64 toward zero to fp32 with the given fraction bits; overflow is infinity."""
    unit = power_of_two((exponent(x) - fraction_bits).clamp_min(-149))
    cut = torch.trunc(x / unit) * unit  # RZ, before a cast that would round to nearest
    return torch.where(cut.abs() >= 2.0**128, cut.sign() * torch.inf, cut).to(torch.float32)


def _cut_to_tf32(x: Tensor) -> Tensor:
    return (bits(x) >> 13 << 13).view(torch.float32)  # RZ: the unit reads the upper 19 bits


def _exact_(a: Tensor, b: Tensor, d: Tensor, core: TensorCore) -> None:
    """Add a @ b to d in place with `dot_add`, for any values."""
    bt = b.t()
    rows = max(1, EXACT_OUTPUTS // max(1, min(d.shape[1], EXACT_OUTPUTS)))
    for m in range(0, d.shape[0], rows):
        for n in range(0, d.shape[1], EXACT_OUTPUTS):
            tile = d[m : m + rows, n : n + EXACT_OUTPUTS]
            for k in range(0, a.shape[1], core.group):
                left = a[m : m + rows, None, k : k + core.group]
                right = bt[None, n : n + EXACT_OUTPUTS, k : k + core.group]
                tile.copy_(dot_add(left, right, tile, core))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep each operation on one core: they are so short that threads would mostly wait.

    On a busy machine torch's threads make them a hundred times slower; processes scale instead.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fma_chain(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    for k in range(a.shape[1]):
        d = fma(a[:, k, None], b[k], d)
    return d + 0.0  # -0 to +0, so that K padded with zeros cannot show


def _check(
    a: Tensor, b: Tensor | PreparedWeight, c: Tensor | None, arch: Arch, precision: str | None
) -> int:
    weight = b.weight if isinstance(b, PreparedWeight) else b
    if a.dim() != 2 or weight.dim() != 2 or a.shape[1] != weight.shape[0]:
        raise ValueError(
            f"expected a [M, K] and b [K, N], found {list(a.shape)} and {list(weight.shape)}"
        )
    if a.dtype != weight.dtype:
        raise TypeError(f"expected one dtype, found {a.dtype} and {weight.dtype}")
    if (a.dtype == torch.float32) != (precision in ("tf32", "ieee")):
        raise ValueError(
            f'precision is "tf32" or "ieee" for fp32 inputs and None for others, found '
            f"{precision!r} for {a.dtype}"
        )
    core = None if precision == "ieee" else tensor_core(arch, a.dtype)
    if isinstance(b, PreparedWeight) and b.core != core:
        raise ValueError(f"the weight was prepared for {b.core}, {arch.name} has {core}")
    if c is not None and (c.dtype != torch.float32 or c.shape != (a.shape[0], weight.shape[1])):
        raise ValueError(
            f"c: expected float32 [{a.shape[0]}, {weight.shape[1]}], found {c.dtype} "
            f"{list(c.shape)}"
        )
    return weight.shape[1]
