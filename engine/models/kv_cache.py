"""The paged key/value cache: blocks of 16 positions, and how many of them there is room for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitassay.engine.scheduling.blocks import BLOCK_SIZE, blocks_for

# The rest is for what a step computes: rows of every layer, and logits of a whole vocabulary.
_OF_FREE_GPU_MEMORY = 0.6
_OF_CPU_MEMORY = 0.25


class CacheSizes(Protocol):
    """What a model's configuration says of its cache."""

    @property
    def num_layers(self) -> int:
        """How many layers keep keys and values."""

    @property
    def num_kv_heads(self) -> int:
        """How many heads of keys and of values a layer has."""

    @property
    def head_dim(self) -> int:
        """How many elements a head has."""

    @property
    def dtype(self) -> torch.dtype:
        """What they are stored in."""


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of every layer, each [blocks, 16, Hkv, D].

    Which block belongs to which sequence is the scheduler's business; what a slot holds before it
    is written is undefined, and nothing may read it.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    @classmethod
    def empty(cls, config: CacheSizes, blocks: int, device: torch.device) -> PagedCache:
        """Return a cache of so many blocks, unwritten."""
        shape = (blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)

        def layers() -> tuple[Tensor, ...]:
            each = range(config.num_layers)
            return tuple(torch.empty(shape, dtype=config.dtype, device=device) for _ in each)

        return cls(layers(), layers())

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self.k[0].device


def slots_of(blocks: list[int], positions: Iterable[int]) -> list[int]:
    """Return where the positions of a sequence with these blocks lie: block * 16 + offset."""
    return [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]


class Cached(Protocol):
    """A model or a draft head whose rows' keys, values and fingerprints are kept."""

    @property
    def config(self) -> CacheSizes:
        """Its sizes."""

    @property
    def operations(self) -> tuple[str, ...]:
        """What is fingerprinted of a row."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""


def default_blocks(
    parts: Sequence[Cached], positions: int, *, max_num_seqs: int, capture: bool
) -> int:
    """Return room for max_num_seqs of the longest sequence, or what memory has, if that is less.

    parts: the model and the head, if one runs. positions: of the longest sequence. capture: whether
    fingerprints are kept. Never less than one block; a request that does not fit is refused when it
    comes.
    """
    wanted = max_num_seqs * blocks_for(positions)
    taken = BLOCK_SIZE * sum(_position_bytes(part, capture) for part in parts)
    return max(1, min(wanted, _memory(parts[0].device) // taken))


def _position_bytes(part: Cached, capture: bool) -> int:
    """What a position takes: keys and values of every layer, and the fingerprints of its row."""
    sizes = part.config
    heads = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim
    return heads * sizes.dtype.itemsize + (8 * len(part.operations) if capture else 0)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(_OF_FREE_GPU_MEMORY * torch.cuda.mem_get_info(device)[0])
    return int(_OF_CPU_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
