"""How many blocks of cache an engine makes where nobody says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from .blocks import BLOCK_SIZE, blocks_for

if TYPE_CHECKING:
    from .config import EngineConfig
    from .eagle import EagleHead
    from .model import CausalLM

# The rest is for what a step computes: rows of every layer, and logits of a whole vocabulary.
_OF_FREE_GPU_MEMORY = 0.6
_OF_CPU_MEMORY = 0.25


def default_blocks(model: CausalLM, head: EagleHead | None, config: EngineConfig) -> int:
    """Return room for max_num_seqs of the longest sequence, or what memory has, if that is less.

    head: None where it does not run. Never less than one block; a request that does not fit is
    refused when it comes.
    """
    wanted = config.max_num_seqs * blocks_for(model.config.max_position_embeddings)
    return max(1, min(wanted, _memory(model.device) // _block_bytes(model, head, config.capture)))


def _block_bytes(model: CausalLM, head: EagleHead | None, capture: bool) -> int:
    """What a block takes: keys and values of every layer, and the fingerprints of its rows."""
    bytes_ = 0
    for part in (model, head):
        if part is not None:
            sizes = part.config
            heads = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim
            bytes_ += heads * sizes.dtype.itemsize + (8 * len(part.operations) if capture else 0)
    return BLOCK_SIZE * bytes_


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(_OF_FREE_GPU_MEMORY * torch.cuda.mem_get_info(device)[0])
    return int(_OF_CPU_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
