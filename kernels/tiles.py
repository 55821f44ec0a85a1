"""The one table of launches: which tile runs which matrix product.

A tile decides speed alone. K ascends in every one, so all give the same bits, and the choice may
follow the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bitassay.reference.spec.arch import family_of
from bitassay.reference.spec.dtypes import require_dtype

Kind = Literal["pointer", "tma"]


@dataclass(frozen=True)
class Tile:
    """One way to launch a matrix product x [M, K] @ weight [N, K].T.

    block_m, block_n, block_k: rows, columns and depth a program multiplies at a time; powers of
    two, block_k a multiple of 16. warps, stages: threads in warps, loads in flight. kind: loads
    through pointers (any strides), or through host-made descriptors in a persistent loop (the
    tensor memory accelerator of sm_90; rows 16-byte aligned). swap: multiply weight by x.T, so
    that few rows of x meet the narrow side of the instruction. halves: store the result in two
    halves, which frees registers and shared memory. per_sm: persistent programs on each
    multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    kind: Kind = "pointer"
    swap: bool = False
    halves: bool = False
    per_sm: int = 1


@dataclass(frozen=True)
class Row:
    """A tile with the shapes it serves: m up to max_m, n from min_n; the first that fits wins."""

    max_m: int
    min_n: int
    tile: Tile


_ANY = 1 << 62
GROUP = 8  # row tiles that run down together before the next column of tiles

# fp32 "ieee" is a chain of fused multiply-adds on plain cores: small tiles, few registers.
_IEEE = (
    Row(16, 0, Tile(16, 32, 32, 4, 3)),
    Row(_ANY, 0, Tile(64, 64, 16, 8, 3)),
)

# Ampere and Ada: mma.sync, asynchronous copies, 101,376 bytes of shared memory on sm_86 and sm_89.
_AMPERE = (
    Row(16, 16_384, Tile(16, 64, 128, 4, 4)),
    Row(16, 0, Tile(16, 32, 256, 4, 4)),
    Row(32, 0, Tile(32, 64, 128, 4, 4)),
    Row(64, 0, Tile(64, 64, 64, 4, 4)),
    Row(_ANY, 0, Tile(128, 128, 32, 8, 4)),
)

# Hopper: the winners of benchmarks/tiles.py on an H100. A weight that streams through once wants
# many bytes in flight; beyond that, a tile is right when its number just fills the 132
# multiprocessors, which is why the columns matter as much as the rows.
_STREAM = Row(16, 0, Tile(16, 64, 128, 4, 6, swap=True))
_WIDE = Tile(128, 256, 64, 8, 4, "tma", halves=True)
_HOPPER = (
    _STREAM,
    Row(32, 16_384, Tile(32, 128, 128, 4, 4, "tma", swap=True)),
    Row(32, 0, Tile(32, 64, 128, 4, 6, "tma", swap=True)),
    Row(64, 16_384, Tile(64, 128, 128, 4, 4, "tma")),
    Row(64, 5_120, Tile(64, 64, 128, 4, 5, "tma")),
    Row(64, 0, Tile(32, 64, 128, 4, 6, "tma", swap=True)),
    Row(128, 5_120, Tile(64, 128, 128, 4, 4, "tma")),
    Row(128, 0, Tile(64, 64, 128, 4, 5, "tma")),
    Row(256, 5_120, Tile(128, 128, 64, 8, 6, "tma")),
    Row(256, 0, Tile(64, 128, 128, 4, 4, "tma")),
    Row(512, 5_120, _WIDE),
    Row(512, 2_048, Tile(128, 128, 64, 8, 6, "tma")),
    Row(512, 0, Tile(128, 64, 128, 4, 4, "tma")),
    Row(1024, 16_384, _WIDE),
    Row(1024, 5_120, Tile(128, 128, 64, 8, 6, "tma")),
    Row(1024, 2_048, _WIDE),
    Row(1024, 0, Tile(128, 64, 128, 4, 4, "tma")),
    Row(_ANY, 0, _WIDE),
)

# Hopper, for rows that no descriptor can take.
_HOPPER_POINTER = (
    _STREAM,
    Row(32, 0, Tile(32, 64, 128, 4, 4)),
    Row(64, 0, Tile(64, 64, 128, 4, 4)),
    Row(_ANY, 0, Tile(128, 128, 64, 8, 4)),
)

# Others worth timing on another machine or compiler; the tables above keep the winners.
_AMPERE_MORE = (
    Tile(16, 16, 256, 2, 4),
    Tile(16, 32, 128, 4, 5),
    Tile(16, 64, 64, 4, 6, swap=True),
    Tile(16, 128, 64, 4, 4, swap=True),
    Tile(32, 32, 128, 4, 4),
    Tile(64, 128, 32, 4, 4),
    Tile(64, 128, 64, 4, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(128, 128, 64, 8, 3),
)
_HOPPER_MORE = (
    # M up to 16: the weight streams through once, so bytes in flight are what counts.
    Tile(16, 16, 256, 2, 5),
    Tile(16, 16, 512, 4, 4),
    Tile(16, 32, 128, 4, 8),
    Tile(16, 32, 256, 4, 6),
    Tile(16, 32, 512, 4, 3),
    Tile(16, 64, 128, 4, 4),
    Tile(16, 64, 256, 4, 3),
    Tile(16, 32, 256, 2, 4, swap=True),
    Tile(16, 16, 512, 1, 4, swap=True),
    Tile(16, 64, 128, 4, 4, swap=True),
    Tile(16, 128, 64, 4, 6, swap=True),
    Tile(16, 128, 128, 4, 4, swap=True),
    Tile(16, 64, 128, 4, 5, "tma", swap=True, per_sm=2),
    Tile(16, 64, 128, 4, 8, "tma", swap=True),
    Tile(16, 128, 128, 4, 5, "tma", swap=True),
    Tile(16, 64, 128, 4, 4, "tma", per_sm=2),
    Tile(16, 32, 256, 4, 5, "tma", per_sm=2),
    Tile(16, 32, 256, 4, 8, "tma"),
    # M of 17 to 128: still the weight's bytes, but wgmma has work.
    Tile(32, 32, 256, 4, 4),
    Tile(32, 64, 128, 4, 5, "tma", per_sm=2),
    Tile(32, 64, 128, 4, 6, "tma", swap=True),
    Tile(32, 128, 128, 4, 4, "tma", swap=True),
    Tile(64, 32, 128, 4, 6, "tma", per_sm=1),
    Tile(64, 32, 256, 4, 4),
    Tile(64, 64, 128, 4, 5, "tma", per_sm=1),
    Tile(64, 64, 128, 4, 3, "tma", per_sm=2),
    Tile(64, 128, 128, 4, 4, "tma"),
    Tile(64, 128, 64, 4, 4, "tma", per_sm=2),
    Tile(64, 256, 64, 4, 4, "tma"),
    Tile(64, 128, 128, 4, 4, "tma", swap=True),
    Tile(128, 32, 128, 4, 4, "tma"),
    Tile(128, 64, 64, 4, 4, "tma", per_sm=2),
    Tile(128, 64, 128, 4, 4, "tma"),
    Tile(128, 128, 64, 4, 4, "tma"),
    Tile(128, 128, 64, 8, 4, "tma"),
    Tile(128, 128, 64, 8, 6, "tma"),
    # M above: arithmetic; a big tile spares the caches.
    Tile(128, 128, 64, 4, 3, "tma", halves=True, per_sm=2),
    Tile(128, 128, 128, 8, 3, "tma", halves=True),
    Tile(256, 64, 64, 8, 4, "tma"),
    Tile(256, 64, 128, 8, 2, "tma"),
    Tile(256, 128, 64, 8, 3, "tma"),
    Tile(256, 128, 64, 8, 4, "tma", halves=True),
    Tile(128, 256, 64, 8, 3, "tma"),
    Tile(128, 256, 64, 8, 3, "tma", halves=True),
)


def select(
    arch: str, dtype: torch.dtype, m: int, n: int, k: int, *, descriptors: bool = True
) -> Tile:
    """Return the tile for a product of that shape: the table's first row that fits.

    descriptors: whether every operand's rows are 16-byte aligned, as descriptors need. Raises
    ValueError for an architecture, TypeError for a dtype without a row.
    """
    return next(r.tile for r in _rows(arch, dtype, descriptors) if m <= r.max_m and n >= r.min_n)


def candidates(arch: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Return every tile of an architecture and dtype: those in use first, then those to time."""
    used = in_use(arch, dtype)
    more = {"ampere": _AMPERE_MORE, "hopper": _HOPPER_MORE}[family_of(arch)]
    return tuple(dict.fromkeys((*used, *(more if dtype != torch.float32 else ()))))


def in_use(arch: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Return the tiles that `select` may choose for an architecture and dtype."""
    used = [row.tile for d in (True, False) for row in _rows(arch, dtype, d)]
    return tuple(dict.fromkeys(used))


def _rows(arch: str, dtype: torch.dtype, descriptors: bool) -> tuple[Row, ...]:
    family = family_of(arch)
    require_dtype("weight", dtype)
    if dtype == torch.float32:
        return _IEEE
    if family == "ampere":
        return _AMPERE
    return _HOPPER if descriptors else _HOPPER_POINTER
