"""How a serving engine runs: sizes and switches, none of which may change a bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from bitassay.reference.spec.contract import DRAFT_DEPTH

SPECULATIVE_TOKENS = 3  # a round, where there is a draft head and nobody says how many


def check_integer(name: str, value: Any) -> None:
    """Raise ValueError unless a value is an integer, of whatever type; no bool is one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: expected an integer, found {value!r}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The limits of one engine.

    num_speculative_tokens: K, drafts a round; 0 decodes plainly, None is 3 with a draft head and 0
    without. max_num_seqs: requests running at once. max_num_batched_tokens: rows a step.
    num_blocks: blocks of 16 positions in the cache, None for room for max_num_seqs of the longest
    request, or as much as memory has. enforce_eager: True never uses CUDA graphs, None leaves it to
    the device. force_graphs: graphs also where they are not trusted. capture: whether fingerprints
    and the top logits are kept; without, requests yield tokens alone.
    """

    num_speculative_tokens: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool | None = None
    force_graphs: bool = False
    capture: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for a size that no run could work with."""
        for name in (
            "num_speculative_tokens",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_blocks",
        ):
            value = getattr(self, name)
            if value is not None or name.startswith("max_"):
                check_integer(name, value)
        drafts = self.num_speculative_tokens or 0
        if not 0 <= drafts <= DRAFT_DEPTH:
            raise ValueError(f"num_speculative_tokens: expected 0 … {DRAFT_DEPTH}, found {drafts}")
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs: expected at least 1, found {self.max_num_seqs}")
        # A token and its drafts are verified in one step: cut, they would be accepted otherwise.
        if self.max_num_batched_tokens < drafts + 1:
            raise ValueError(
                f"max_num_batched_tokens: expected at least {drafts + 1}, a token and its {drafts} "
                f"drafts, found {self.max_num_batched_tokens}"
            )
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ValueError(f"num_blocks: expected at least 1, or None, found {self.num_blocks}")
        if self.enforce_eager and self.force_graphs:
            raise ValueError("enforce_eager and force_graphs exclude each other: set one of them")

    def drafts(self, *, head: bool) -> int:
        """Return K for a model with a draft head, or without one.

        Raises ValueError where drafts are asked for without a head, and where none are asked for
        and the default does not fit into a step.
        """
        if self.num_speculative_tokens is None:
            drafts = SPECULATIVE_TOKENS if head else 0
        elif self.num_speculative_tokens and not head:
            raise ValueError(
                f"num_speculative_tokens: expected 0 without a draft head, found "
                f"{self.num_speculative_tokens}: load one, or ask for no drafts"
            )
        else:
            drafts = self.num_speculative_tokens
        replace(self, num_speculative_tokens=drafts)  # whether it fits
        return drafts
