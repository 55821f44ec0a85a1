"""Fingerprints of many tensors' rows in one launch, each written to the slot of its row.

`fingerprint.fingerprint_rows` sums a row in pieces, which needs a sum of zeros to add to. Here one
program walks whole rows, keeps its sums in registers and writes each once: nothing is allocated,
nothing needs to be zero, and so a decoder layer's operations cost one launch in a CUDA graph.
Elements of 16 bits are taken in pairs, as words; a row's last word or tile is filled up with
zeros, whose share of the sum is known beforehand and taken off.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.device import check_device, check_same_device, is_interpreted, on_device
from bitassay.kernels.hash import mix, mix_16
from bitassay.reference.spec.dtypes import DType, require_dtype

MOST = 16  # tensors a launch takes
_FEW, _MANY = 64, 512  # rows, up to which launches differ
_EMULATED_GRAIN = 1 << 18  # words of a program; in the emulator few programs are quicker than many
_WORD = (1 << 64) - 1


class Shape(NamedTuple):
    """Rows a program takes, words of each that it takes at a time, its warps; never the bits."""

    rows: int
    words: int
    warps: int


@functools.lru_cache(1024)
def shape_for(count: int, words: int) -> Shape:
    """Return the launch for so many rows, the widest of so many words; measured on an H100.

    Few rows get many lanes each, for the widest decides how long it takes. Of many rows a program
    takes several, which share what the column alone decides.
    """
    padded = max(32, triton.next_power_of_2(words))
    if count <= _FEW:
        at_once = min(padded, 2048)
        return Shape(1, at_once, max(1, at_once // 128))
    if count <= _MANY:
        at_once = min(padded, 512)
        return Shape(512 // at_once, at_once, 4)
    at_once = min(padded, 256)
    return Shape(1024 // at_once, at_once, 4)


@triton.jit
def _load(
    x_ptr, rows, words, D, stride, known,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return words [BLOCK_R, WORDS] of rows: each one fp32, or two 16-bit floats, zeros outside."""
    if WIDTH == 32:
        pointers = x_ptr.to(tl.pointer_type(tl.uint32)) + rows * stride + words
        word = tl.load(pointers, mask=known & (words < D), other=0)
    elif PAIRS:  # D and stride are even, rows begin at a word
        pointers = x_ptr.to(tl.pointer_type(tl.uint32)) + rows * (stride // 2) + words
        word = tl.load(pointers, mask=known & (words < D // 2), other=0)
    else:
        pointers = x_ptr.to(tl.pointer_type(tl.uint16)) + rows * stride + 2 * words
        low = tl.load(pointers, mask=known & (2 * words < D), other=0)
        high = tl.load(pointers + 1, mask=known & (2 * words + 1 < D), other=0)
        word = low.to(tl.uint32) | (high.to(tl.uint32) << 16)
    return word


@triton.jit(
    do_not_specialize=["R", "S", "stride_s", "stride_o", "stride_slot"],
)
def _fingerprint_into(
    x_ptrs, marks, out_ptr, slots_ptr,  # N of [R, D_i], N, [S, O], [R]
    R, S,
    stride_s, stride_o, stride_slot,
    WIDTHS: tl.constexpr, STRIDES: tl.constexpr, EXCESS: tl.constexpr,
    INFINITY: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    x_ptr = x_ptrs[0]
    D = tl.full((), WIDTHS[0], tl.int32)
    stride = tl.full((), STRIDES[0], tl.int64)
    mark = marks[0]
    excess = tl.full((), EXCESS[0], tl.int64)
    for i in tl.static_range(1, len(WIDTHS)):
        x_ptr = tl.where(which == i, x_ptrs[i], x_ptr)
        D = tl.where(which == i, WIDTHS[i], D)
        stride = tl.where(which == i, tl.full((), STRIDES[i], tl.int64), stride)
        mark = tl.where(which == i, marks[i], mark)
        excess = tl.where(which == i, tl.full((), EXCESS[i], tl.int64), excess)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot = tl.load(slots_ptr + row * stride_slot, mask=row < R, other=-1)
    rows, known, lanes = row[:, None], (row < R)[:, None], tl.arange(0, WORDS)[None, :]
    quiet: tl.constexpr = (1 << (WIDTH - 1)) - 1
    EACH: tl.constexpr = 32 // WIDTH  # elements a word
    sums = tl.zeros((BLOCK_R, WORDS), tl.uint64)
    following = _load(x_ptr, rows, lanes, D, stride, known, PAIRS, WIDTH)
    for first in range(0, tl.cdiv(D, EACH), WORDS):
        word = following  # while these are mixed, the next ones arrive
        following = _load(x_ptr, rows, lanes + (first + WORDS), D, stride, known, PAIRS, WIDTH)
        place = ((lanes + first) * EACH + 1).to(tl.uint32)
        if WIDTH == 32:
            word = tl.where((word & quiet) > INFINITY, quiet, word)  # every NaN counts alike
            sums += mix((place.to(tl.uint64) << 32) | word.to(tl.uint64))
        else:
            # The same for both halves at once: the sign's place tells which are beyond infinity.
            both: tl.constexpr = quiet * 0x10001
            beyond = ((word & both) + (quiet - INFINITY) * 0x10001) & 0x80008000
            word = (word | (beyond - (beyond >> 15))) & (beyond ^ 0xFFFFFFFF)
            sums += mix_16(place, word & 0xFFFF)
            sums += mix_16(place + 1, word >> 16)
    total = tl.sum(sums.to(tl.int64), axis=1) - excess
    target = out_ptr + slot * stride_s + (mark >> 1).to(tl.int64) * stride_o - stride_o
    tl.store(target, total, mask=(slot >= 0) & (slot < S))


class _Plan(NamedTuple):
    """Which of the tensors a launch takes, widest first, and what it is compiled for."""

    taken: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    pairs: bool

    @property
    def words(self) -> int:
        """The words of the widest row."""
        return -(-self.widths[0] * self.dtype.bits // 32)


def fingerprint_into(
    rows: Sequence[Tensor],
    out: Tensor,
    columns: Sequence[int],
    slots: Tensor,
    *,
    shape: Shape | None = None,
) -> None:  # N of [R, D_i], [S, O], N, [R]
    """Write to out[slots[r], columns[i]] the fingerprint that `fingerprint_rows` has of rows[i][r].

    rows: fp32, bf16 or fp16, rows of adjacent elements at any stride. out: int64, any strides;
    nothing else in it is touched. columns: distinct. slots: int64, distinct besides -1, which is
    skipped, as any slot outside `out` is. Nothing is allocated and nothing waits: one launch for
    every 16 tensors of a dtype. A program walks a row, so for few rows of a whole vocabulary
    `fingerprint_rows` is quicker. shape: another launch than the table's; it never changes a bit.
    Raises TypeError or ValueError for what does not fit.
    """
    if out.dtype != torch.int64 or slots.dtype != torch.int64:
        raise TypeError(f"expected out and slots int64, found {out.dtype} and {slots.dtype}")
    if out.dim() != 2 or slots.dim() != 1:
        found = f"{list(out.shape)} and {list(slots.shape)}"
        raise ValueError(f"expected out [S, O] and slots [R], found {found}")
    interpreted = is_interpreted(_fingerprint_into)
    check_device(interpreted, out.device)
    check_same_device(out, slots, *rows)
    count = slots.shape[0]
    # This runs once a layer: what depends on shapes alone is decided once and kept. Of a pointer,
    # the last bits tell whether rows begin at a word.
    layout = tuple([(x.dtype, x.shape, x.stride(), x.data_ptr() & 3 == 0) for x in rows])
    plans, marks = _plans(layout, count), _marks(tuple(columns), len(rows), out.shape[1])
    if not count:
        return
    with on_device(out.device):
        for plan in plans:
            some = shape or (_emulated if interpreted else shape_for)(count, plan.words)
            _fingerprint_into[(triton.cdiv(count, some.rows), len(plan.taken))](
                tuple([rows[i] for i in plan.taken]), tuple([marks[i] for i in plan.taken]),
                out, slots,
                count, out.shape[0],
                *out.stride(), slots.stride(0),
                WIDTHS=plan.widths, STRIDES=plan.strides,
                EXCESS=_excesses(plan.widths, plan.dtype.bits, some.words),
                INFINITY=plan.dtype.last_number, WIDTH=plan.dtype.bits, PAIRS=plan.pairs,
                BLOCK_R=some.rows, WORDS=some.words,
                num_warps=some.warps, enable_fp_fusion=False,
            )  # fmt: skip


def _emulated(count: int, words: int) -> Shape:
    padded = triton.next_power_of_2(max(1, words))
    return Shape(max(1, min(triton.next_power_of_2(count), _EMULATED_GRAIN // padded)), padded, 4)


@functools.lru_cache(1024)
def _plans(
    layout: tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], bool], ...], count: int
) -> list[_Plan]:
    """Check dtypes, shapes and strides of the tensors; return the launches that take them."""
    groups: dict[tuple[DType, bool], list[tuple[int, int, int]]] = {}
    for i, (dtype, shape, strides, aligned) in enumerate(layout):
        facts = require_dtype("result", **{f"rows[{i}]": dtype})
        if len(shape) != 2 or shape[0] != count or (strides[1] != 1 and shape[1] > 1):
            found = f"{list(shape)} with strides {list(strides)}"
            raise ValueError(f"rows[{i}]: expected [{count}, D] of adjacent columns, found {found}")
        pairs = aligned and shape[1] % 2 == 0 and strides[0] % 2 == 0
        group = groups.setdefault((facts, pairs or facts.bits == 32), [])
        group.append((shape[1], strides[0], i))
    plans = []
    for (facts, pairs), group in groups.items():
        group.sort(key=lambda one: -one[0])  # widest first, so that none of these begins late
        for first in range(0, len(group), MOST):
            widths, strides, taken = zip(*group[first : first + MOST], strict=True)
            plans.append(_Plan(taken, widths, strides, facts, pairs))
    return plans


@functools.lru_cache(1024)
def _marks(columns: tuple[int, ...], count: int, width: int) -> tuple[int, ...]:
    """Check columns; return them as numbers that Triton would not compile anew for.

    It does for 1 and for what 16 divides: these are odd and at least 3.
    """
    distinct = len(set(columns)) == len(columns) == count
    if not distinct or not all(0 <= column < width for column in columns):
        raise ValueError(f"expected {count} distinct columns below {width}, found {list(columns)}")
    return tuple(2 * column + 3 for column in columns)


@functools.lru_cache(1024)
def _excesses(widths: tuple[int, ...], bits: int, words: int) -> tuple[int, ...]:
    """Return what the zeros behind each row, up to whole tiles of so many words, add to its sum."""
    tile = words * 32 // bits
    return tuple(_excess(width, -(-width // tile) * tile) for width in widths)


@functools.lru_cache(1024)
def _excess(first: int, end: int) -> int:
    total = sum(_mixed((i + 1) << 32) for i in range(first, end)) & _WORD
    return total - (total >> 63 << 64)  # as the int64 of those bits


def _mixed(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31
