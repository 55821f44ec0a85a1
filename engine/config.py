"""How a serving engine runs: sizes and switches, none of which may change a bit."""

from __future__ import annotations

from dataclasses import dataclass

from bitassay.engine.validation import check_integer
from bitassay.reference.spec.contract import DRAFT_DEPTH


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The limits of one engine.

    num_draft_tokens: K, drafts a round; 0 decodes plainly. max_num_seqs: requests running at once.
    max_num_batched_tokens: rows a step. num_blocks: blocks of 16 positions in the cache, None for
    room for max_num_seqs of the longest request, or as much as memory has. enforce_eager: True
    never uses CUDA graphs, None leaves it to the device. force_graphs: graphs also where they are
    not trusted. capture: whether fingerprints and the top logits are kept; without, requests yield
    tokens alone.
    """

    num_draft_tokens: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool | None = None
    force_graphs: bool = False
    capture: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for a size that no run could work with."""
        for name in ("num_draft_tokens", "max_num_seqs", "max_num_batched_tokens"):
            check_integer(name, getattr(self, name))
        if self.num_blocks is not None:
            check_integer("num_blocks", self.num_blocks)
        if not 0 <= self.num_draft_tokens <= DRAFT_DEPTH:
            raise ValueError(
                f"num_draft_tokens: expected 0 … {DRAFT_DEPTH}, found {self.num_draft_tokens}"
            )
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs: expected at least 1, found {self.max_num_seqs}")
        # A token and its drafts are verified in one step: cut, they would be accepted otherwise.
        if self.max_num_batched_tokens < self.num_draft_tokens + 1:
            raise ValueError(
                f"max_num_batched_tokens: expected at least {self.num_draft_tokens + 1}, a token "
                f"and its {self.num_draft_tokens} drafts, found {self.max_num_batched_tokens}"
            )
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ValueError(f"num_blocks: expected at least 1, or None, found {self.num_blocks}")
        if self.enforce_eager and self.force_graphs:
            raise ValueError("enforce_eager and force_graphs exclude each other: set one of them")
