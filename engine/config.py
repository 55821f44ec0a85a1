"""How a serving engine runs: sizes and switches, none of which may change a bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from bitassay.reference.spec.contract import DRAFT_DEPTH

# Blocks of a cache: of more, no GPU could hold even one layer's keys and values.
MAX_BLOCKS = 2**24
SPECULATIVE_TOKENS = 3  # a round, where there is a draft head and nobody says how many


class OptionError(ValueError):
    """Fields of a configuration that no run could work with.

    options: the fields' names, for whoever names them otherwise. reason: expected, found, what to
    do.
    """

    def __init__(self, options: str | list[str], reason: str) -> None:
        super().__init__(options, reason)
        self.options = [options] if isinstance(options, str) else options
        self.reason = reason

    def __str__(self) -> str:
        return f"{', '.join(self.options)}: {self.reason}"


def check_integer(name: str, value: Any) -> None:
    """Raise OptionError unless a value is an integer, of whatever type; no bool is one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(name, f"expected an integer, found {value!r}")


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
        """Raise OptionError for a size that no run could work with."""
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
            raise OptionError(
                "num_speculative_tokens", f"expected 0 … {DRAFT_DEPTH}, found {drafts}"
            )
        if self.max_num_seqs < 1:
            raise OptionError("max_num_seqs", f"expected at least 1, found {self.max_num_seqs}")
        # A token and its drafts are verified in one step: cut, they would be accepted otherwise.
        if self.max_num_batched_tokens < drafts + 1:
            raise OptionError(
                "max_num_batched_tokens",
                f"expected at least {drafts + 1}, a token and its {drafts} drafts, found "
                f"{self.max_num_batched_tokens}",
            )
        if self.num_blocks is not None and not 1 <= self.num_blocks <= MAX_BLOCKS:
            raise OptionError(
                "num_blocks", f"expected 1 … {MAX_BLOCKS:,}, or None, found {self.num_blocks}"
            )
        if self.enforce_eager and self.force_graphs:
            raise ValueError("enforce_eager and force_graphs exclude each other: set one of them")

    def drafts(self, *, head: bool) -> int:
        """Return K for a model with a draft head, or without one.

        Raises OptionError where drafts are asked for without a head, and where none are asked for
        and the default does not fit into a step.
        """
        if self.num_speculative_tokens is None:
            drafts = SPECULATIVE_TOKENS if head else 0
        elif self.num_speculative_tokens and not head:
            raise OptionError(
                "num_speculative_tokens",
                f"expected 0 without a draft head, found {self.num_speculative_tokens}: ask for "
                "no drafts, or load a head where there is one",
            )
        else:
            drafts = self.num_speculative_tokens
        replace(self, num_speculative_tokens=drafts)  # whether it fits
        return drafts
