"""The table of launches of attention: which tile runs which query rows.

A tile decides speed alone: blocks and splits of keys are the contract's, and every tile walks them
in the same order. So the choice may follow the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitassay.reference.spec.arch import family_of

FEW_ROWS = 64  # query tokens times group, up to which a sequence counts as short


@dataclass(frozen=True)
class AttentionTile:
    """One way to launch attention for block_m query rows of one key/value head.

    block_m: query tokens times group, a power of two from 16 on. warps, stages: threads in warps,
    loads in flight; as keys are found through the block table, it takes two stages more to have
    another block of them under way: 3, 5, 7. split: one program per split of keys instead of a
    loop over them. Only then: slices, programs that share the values' columns, each repeating the
    scores; unmasked, a loop of its own for blocks that all rows see; fold_rows, rows that a program
    of the second kernel folds.
    """

    block_m: int
    warps: int
    stages: int
    split: bool = True
    slices: int = 1
    unmasked: bool = False
    fold_rows: int = 4


@dataclass(frozen=True)
class Row:
    """A tile with the short sequences it serves; the first row that fits wins.

    max_rows: query rows of a sequence. max_load: splits of all sequences and key/value heads for
    each multiprocessor; few of them leave room for slices.
    """

    max_rows: int
    max_load: float
    tile: AttentionTile


_ANY = float("inf")

_FEW = {
    "hopper": (
        Row(16, 2.5, AttentionTile(16, 2, 5)),
        Row(16, _ANY, AttentionTile(16, 2, 3)),
        Row(32, _ANY, AttentionTile(32, 4, 5, fold_rows=8)),
        Row(FEW_ROWS, _ANY, AttentionTile(64, 4, 3, fold_rows=16)),
    ),
    "ampere": (
        Row(16, _ANY, AttentionTile(16, 4, 3)),
        Row(32, _ANY, AttentionTile(32, 4, 3, fold_rows=8)),
        Row(FEW_ROWS, _ANY, AttentionTile(64, 4, 2, fold_rows=16)),
    ),
}
_WHOLE = {
    "hopper": AttentionTile(128, 8, 5, split=False),
    "ampere": AttentionTile(128, 8, 2, split=False),
}
# For a chunk of a prompt at batch 1: too few tiles for the device, but many splits.
CHUNK = {
    "hopper": AttentionTile(64, 4, 5, unmasked=True, fold_rows=16),
    "ampere": AttentionTile(64, 4, 2, unmasked=True, fold_rows=16),
}

# Others worth timing; benchmarks/attention.py --tune times them beside the tables'.
_MORE_FEW = (
    AttentionTile(16, 1, 3),
    AttentionTile(16, 2, 3),
    AttentionTile(16, 4, 2),
    AttentionTile(16, 4, 3),
    AttentionTile(16, 4, 5),
    AttentionTile(16, 2, 5),
    AttentionTile(16, 4, 3, unmasked=True),
    AttentionTile(16, 4, 3, fold_rows=1),
    AttentionTile(16, 4, 3, slices=2),
    AttentionTile(16, 4, 3, slices=4),
    AttentionTile(16, 2, 3, slices=4),
    AttentionTile(32, 4, 3, fold_rows=8),
)
_MORE = {
    "hopper": (
        *_MORE_FEW,
        AttentionTile(16, 4, 7),
        AttentionTile(16, 8, 5),
        AttentionTile(16, 1, 5),
        AttentionTile(16, 4, 5, fold_rows=1),
        AttentionTile(16, 4, 7, slices=2),
        AttentionTile(16, 4, 7, slices=4),
        AttentionTile(16, 4, 5, slices=4, fold_rows=1),
        AttentionTile(64, 4, 5, fold_rows=16),
        AttentionTile(64, 4, 3, slices=2, fold_rows=16),
        AttentionTile(64, 4, 3, unmasked=True, fold_rows=16),
        AttentionTile(128, 8, 3, unmasked=True, fold_rows=16),
        AttentionTile(64, 4, 2, split=False),
        AttentionTile(64, 4, 3, split=False),
        AttentionTile(64, 4, 5, split=False),
        AttentionTile(128, 4, 3, split=False),
        AttentionTile(128, 8, 2, split=False),
        AttentionTile(128, 8, 3, split=False),
    ),
    "ampere": (
        *_MORE_FEW,
        AttentionTile(64, 4, 2, split=False),
        AttentionTile(128, 8, 3, split=False),
    ),
}


def few(arch: str, rows: int, load: float) -> AttentionTile:
    """Return the tile for sequences of up to `rows` query rows (tokens times group).

    load: splits of all sequences and key/value heads for each multiprocessor. Raises ValueError
    for an architecture without a table.
    """
    table = _FEW[family_of(arch)]
    return next(
        (r.tile for r in table if rows <= r.max_rows and load <= r.max_load), table[-1].tile
    )


def many(arch: str, splits: int, load: float) -> AttentionTile:
    """Return the tile for longer sequences.

    splits: of the longest. load: query rows of all sequences, times key/value heads, for each
    multiprocessor. Where whole walks would leave half of them idle, splits make programs of their
    own. Raises ValueError for an architecture without a table.
    """
    whole, chunk = _WHOLE[family_of(arch)], CHUNK[family_of(arch)]
    return chunk if splits > 1 and 2 * load < whole.block_m else whole


def in_use(arch: str) -> tuple[AttentionTile, ...]:
    """Return the tiles that `few` and `many` may choose for an architecture."""
    family = family_of(arch)
    used = [row.tile for row in _FEW[family]]
    return tuple(dict.fromkeys((*used, CHUNK[family], _WHOLE[family])))


def candidates(arch: str) -> tuple[AttentionTile, ...]:
    """Return every tile of an architecture: those in use first, then those to time."""
    return tuple(dict.fromkeys((*in_use(arch), *_MORE[family_of(arch)])))
