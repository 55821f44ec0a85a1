"""The tensor core's bits for ordinary numbers, in fp32 and int32 instead of float64.

Same order and roundings as `tensor_core.dot_add`, about thirty times faster. A guard admits a tile
only if every intermediate value is exact in these types: finite operands, and exponents so far
inside fp32's range that nothing overflows, and nothing that still counts underflows. Everything
else is handed back for the exact path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitassay.reference.spec.arch import TensorCore
from bitassay.reference.spec.dtypes import DTYPES, FLOAT32


@dataclass(frozen=True)
class Tiling:
    """How much is computed at a time; it decides speed and memory alone.

    outputs: of a tile. columns: of a tile, where there are so many. decomposed: elements of b that
    are decomposed at a time. depth: the least K of that, a multiple of every group.
    """

    outputs: int
    columns: int = 512
    decomposed: int = 1 << 22
    depth: int = 128


# On a CPU products, terms and exponents of one group stay near a core's L2 cache; on a GPU a tile
# only has to be large enough to hide the launches.
TILINGS = {"cpu": Tiling(1 << 14), "cuda": Tiling(1 << 22, decomposed=1 << 25)}

# Guard, as exponents of products. Above _LEAST every unit is at least 2**-101, so sums are
# multiples of it, their scale 2**126 fits fp32 and no result is subnormal.
_LEAST, _MOST = -76, 100
_LEAST_UNIT = _LEAST - 25
_ZERO = -8192  # the exponent of zero: never the largest, and two of them still fit int16
_NONE = -4096  # below this a group held no product at all
_NOT_FINITE = 4096

# Of fp32, as numbers: they are asked for in the innermost loop.
_MAGNITUDE, _EXPONENT_FIELD, _ONE = FLOAT32.magnitude, FLOAT32.exponent_field, FLOAT32.one

Tile = tuple[slice, slice, Tensor]


@dataclass(frozen=True)
class Operand:
    """Columns of a matrix as the fast path wants them: fp32 values and int16 exponents, [K, N]."""

    value: Tensor
    exponent: Tensor


@dataclass(frozen=True)
class PreparedWeight:
    """A weight b [K, N] decomposed once; what `tensor_core.prepare` returns."""

    weight: Tensor
    core: TensorCore
    operand: Operand
    smallest: Tensor
    largest: Tensor

    @property
    def shape(self) -> torch.Size:
        """The weight's shape, [K, N]."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype."""
        return self.weight.dtype


def prepare(weight: Tensor, core: TensorCore) -> PreparedWeight:
    """Decompose b [K, N] whole."""
    smallest, largest = _range(weight)
    return PreparedWeight(weight, core, _decompose(weight, core.group), smallest, largest)


def matmul_(a: Tensor, b: Tensor | PreparedWeight, d: Tensor, core: TensorCore) -> Iterator[Tile]:
    """Add a @ b to d in place where the guard admits it; yield what is left, untouched.

    Yields (rows of d, columns of d, b's columns) for the exact path.
    """
    n = b.shape[1]
    rows, columns, depth = _tiling(a.shape[0], n, a.device)
    left = _decompose(a.t(), core.group)
    smallest, largest = _range(a.t())
    for start in range(0, n, columns):
        cut = slice(start, start + columns)
        right = _columns(b, cut)
        admitted = []
        for m in range(0, a.shape[0], rows):
            at = slice(m, m + rows), cut
            low = int(smallest[at[0]].min()) + right.smallest
            high = int(largest[at[0]].max()) + right.largest
            if _admits(d[at], high, a.shape[1]):
                admitted.append((at, low < _LEAST))
            else:
                yield *at, right.weight
        yield from _add_tiles(left, right, d, admitted, depth, core)


@dataclass(frozen=True)
class _Columns:
    """Some columns of b, decomposed already or as they come."""

    weight: Tensor
    prepared: Operand | None
    smallest: int
    largest: int

    def chunk(self, at: slice, group: int) -> Operand:
        if self.prepared is None:
            return _decompose(self.weight[at], group)
        return Operand(self.prepared.value[at], self.prepared.exponent[at])


def _columns(b: Tensor | PreparedWeight, cut: slice) -> _Columns:
    if isinstance(b, PreparedWeight):
        kept = Operand(b.operand.value[:, cut], b.operand.exponent[:, cut])
        smallest, largest = b.smallest[cut], b.largest[cut]
        weight = b.weight[:, cut]
    else:
        kept, weight = None, b[:, cut]
        smallest, largest = _range(weight)
    return _Columns(weight, kept, int(smallest.min()), int(largest.max()))


def _tiling(m: int, n: int, device: torch.device) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and the K that is decomposed at a time."""
    most = TILINGS["cpu" if device.type == "cpu" else "cuda"]
    columns = min(n, max(most.columns, most.outputs // m))
    depth = most.decomposed // columns // most.depth * most.depth
    return max(1, most.outputs // columns), columns, max(most.depth, depth)


def _magnitude(x: Tensor) -> Tensor:
    """Return fp32 bit patterns without the sign, as int32."""
    return x.float().view(torch.int32) & _MAGNITUDE


def _range(x: Tensor) -> tuple[Tensor, Tensor]:  # [K, N] -> [N], [N]
    """Return the least and largest exponent of every column's nonzero values, as int32."""
    smallest = torch.full((x.shape[1],), _ONE, dtype=torch.int32, device=x.device)
    largest = torch.zeros_like(smallest)
    most = TILINGS["cpu" if x.device.type == "cpu" else "cuda"]
    step = max(most.depth, most.decomposed // max(1, len(smallest)))
    for k in range(0, len(x), step):
        magnitude = _magnitude(x[k : k + step])
        largest = torch.maximum(largest, magnitude.amax(0))
        magnitude = magnitude.masked_fill_(magnitude == 0, _ONE)
        smallest = torch.minimum(smallest, magnitude.amin(0))
    smallest = ((smallest >> 23) - 127).clamp_min(DTYPES[x.dtype].least_exponent)
    largest = (largest >> 23) - 127
    return smallest, torch.where(largest > 127, _NOT_FINITE, largest)


def _decompose(x: Tensor, group: int) -> Operand:  # [K, N] -> [K', N], K' a multiple of group
    padding = -len(x) % group
    value = x.float().contiguous()
    if padding:
        value = torch.cat([value, value.new_zeros(padding, x.shape[1])])
    magnitude = value.view(torch.int32) & _MAGNITUDE
    exponent = ((magnitude >> 23) - 127).clamp_min(DTYPES[x.dtype].least_exponent)
    return Operand(value, exponent.masked_fill_(magnitude == 0, _ZERO).to(torch.int16))


def _admits(c: Tensor, high: int, k: int) -> bool:
    if high + k.bit_length() > _MOST:
        return False
    magnitude = _magnitude(c)
    small = (magnitude > 0) & (magnitude < _LEAST_UNIT + 127 << 23)
    return not bool((small | (magnitude > _MOST + 127 << 23)).any())


def _add_tiles(
    left: Operand,
    right: _Columns,
    d: Tensor,
    tiles: list[tuple[tuple[slice, slice], bool]],
    depth: int,
    core: TensorCore,
) -> list[Tile]:
    """Add the products of all admitted row tiles; return those that turned out to need care."""
    work = {}
    for at, _ in tiles:
        shape = d[at].shape
        if shape not in work:
            work[shape] = _Workspace(shape, core, d.device)
    sums = [d[at].clone(memory_format=torch.contiguous_format) for at, _ in tiles]
    kept = [True] * len(tiles)
    for k in range(0, len(left.value), depth):
        chunk = slice(k, k + depth)
        b = right.chunk(chunk, core.group)
        for i, (at, careful) in enumerate(tiles):
            if kept[i]:
                a = Operand(left.value[chunk, at[0]], left.exponent[chunk, at[0]])
                kept[i] = work[sums[i].shape].add(sums[i], a, b, careful)
    for (at, _), total, good in zip(tiles, sums, kept, strict=True):
        if good:
            d[at].copy_(total)
    return [(*at, right.weight) for (at, _), good in zip(tiles, kept, strict=True) if not good]


class _Workspace:
    """Buffers of one tile shape, so that a step allocates nothing."""

    def __init__(self, shape: torch.Size, core: TensorCore, device: torch.device) -> None:
        # Terms are below 2**(F + 2); two half-sums where a whole one could leave int32.
        fits = (core.group << core.fraction_bits + 2) + (1 << core.fraction_bits + 1) < 1 << 31
        self.core, self.parts = core, 1 if fits else 2
        g, parts = core.group, self.parts

        def new(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.exponents = new(g, *shape, dtype=torch.int16)
        self.largest16 = new(*shape, dtype=torch.int16)
        self.largest = new(*shape, dtype=torch.int32)
        self.product = new(g, *shape, dtype=torch.float32)
        self.terms = new(parts, g // parts, *shape, dtype=torch.int32)
        self.sums = new(parts, *shape, dtype=torch.int32)
        self.totals = new(parts, *shape, dtype=torch.float64)
        self.of_c = new(*shape, dtype=torch.int32)
        self.scale_bits = new(*shape, dtype=torch.int32)
        self.scaled = new(*shape, dtype=torch.float32)

    def add(self, c: Tensor, a: Operand, b: Operand, careful: bool) -> bool:
        """Add every group of a [K, m] and b [K, n] to c [m, n] in place, in ascending order.

        Returns False, with c spoilt, when careful and a group lies too low for fp32.
        """
        for k in range(0, len(a.value), self.core.group):
            step = slice(k, k + self.core.group)
            torch.add(a.exponent[step, :, None], b.exponent[step, None, :], out=self.exponents)
            torch.amax(self.exponents, 0, out=self.largest16)
            if careful and bool(((self.largest16 < _LEAST) & (self.largest16 > _NONE)).any()):
                return False
            torch.mul(a.value[step, :, None], b.value[step, None, :], out=self.product)  # exact
            self._step(c)
        return True

    def _step(self, c: Tensor) -> None:
        core = self.core
        # Exponents live in fp32's exponent field: powers of two by their bits, never by exp2.
        self.largest.copy_(self.largest16).clamp_(min=_LEAST_UNIT).add_(127)
        self.largest.bitwise_left_shift_(23)
        torch.bitwise_and(c.view(torch.int32), _EXPONENT_FIELD, out=self.of_c)
        torch.maximum(self.largest, self.of_c, out=self.largest)
        # Biased, F - E is 254 + F less E's field; modulo 2**32, as the difference fits again.
        torch.sub(((254 + core.fraction_bits) << 23) - (1 << 32), self.largest, out=self.scale_bits)
        scale = self.scale_bits.view(torch.float32)  # 2**(F - E), exact
        self.product.mul_(scale)
        terms = self.terms.view(core.group, *c.shape)
        terms.copy_(self.product)  # RZ: conversion to int32 drops, as the adder does
        torch.sum(self.terms, 1, dtype=torch.int32, out=self.sums)
        torch.mul(c, scale, out=self.scaled)
        self.of_c.copy_(self.scaled)  # RZ: the accumulator is cut like any term
        self.sums[0].add_(self.of_c)
        self.totals.copy_(self.sums)
        total = self.totals[0]
        if self.parts == 2:
            total.add_(self.totals[1])
        # RZ: keep the result's fraction bits of float64's 52; then exact in fp32.
        total.view(torch.int64).bitwise_and_(-1 << 52 - core.result_fraction_bits)
        c.copy_(total)
        self.largest.sub_(core.fraction_bits << 23)
        c.mul_(self.largest.view(torch.float32))  # exact: times 2**(E - F)
