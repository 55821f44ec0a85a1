"""The configurations of the serving engine that a sweep checks: every pair of settings meets.

Faults of an engine mostly take two settings to show. So of all combinations, some forty are taken
in which each setting meets each setting of every other factor at least once, and of three settings
as many as that leaves room for. The choice is greedy and the same everywhere.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any

from bitassay.golden.runs.backend import Backend
from bitassay.golden.runs.engine_options import EVICTIONS, HITS, PREEMPTIONS, EngineOptions

COUNT = 40  # of one sweep

_Choice = tuple[tuple[int, Any], ...]

# The settings of each factor, in the order of Configuration's fields.
FACTORS: dict[str, tuple[Any, ...]] = {
    "num_speculative_tokens": (0, 1, 3, 5),
    "max_num_seqs": (1, 3, 8, 64),
    "max_num_batched_tokens": (16, 64, 512, 2048),
    "blocks": ("ample", "few"),
    "prefix_cache": ("off", "cold", "warm", "evicted"),
    "arrival": ("given", "shuffled", "late"),
    "prompts": ("all", "three", "one"),
    "cancelled": (False, True),
    "enforce_eager": (True, False),
}


@dataclass(frozen=True)
class Configuration:
    """One setting of each factor.

    blocks: "few" are so few that requests are preempted. prefix_cache: "warm" has seen all prompts
    before, "evicted" too, but has room for a part of them. arrival: order and steps at which the
    prompts come. prompts: all, or the three or one longest, which are fewer than some ranks.
    cancelled: whether some prompts have a copy beside them that is cancelled midway.
    """

    num_speculative_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    blocks: str
    prefix_cache: str
    arrival: str
    prompts: str
    cancelled: bool
    enforce_eager: bool

    @property
    def valid(self) -> bool:
        """Whether it can come to what it is made for.

        A token and its drafts have to fit into a step. Preemption takes two requests at once, and
        more than a few of them; so does a cache that forgets some prompts and keeps others, whose
        size is its own.
        """
        if self.max_num_batched_tokens < self.num_speculative_tokens + 1:
            return False
        if self.blocks == "few" and (self.max_num_seqs == 1 or self.prefix_cache == "evicted"):
            return False
        return self.prompts == "all" or (self.blocks != "few" and self.prefix_cache != "evicted")

    def options(
        self,
        *,
        count: int,
        longest: int,
        filled: int,
        dp: int,
        backend: Backend,
        seed: int,
        timeout: float | None,
    ) -> EngineOptions:
        """Return the run. count: how many prompts there are in all.

        longest: blocks of the longest request. filled: blocks of all requests, without repeats.
        seed: of orders and arrivals.
        """
        few, evicted = self.blocks == "few", self.prefix_cache == "evicted"
        num_blocks = longest if few else max(longest, filled // dp * 3 // 4)
        must = (PREEMPTIONS,) if few else (HITS, EVICTIONS) if evicted else ()
        return EngineOptions(
            num_speculative_tokens=self.num_speculative_tokens,
            dp=dp,
            backend=backend,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            num_blocks=num_blocks if few or evicted else None,
            enable_prefix_caching=self.prefix_cache != "off",
            shuffle=seed if self.arrival == "shuffled" else None,
            late=seed if self.arrival == "late" else None,
            cancel=(min(4, count) if self.prompts == "all" else 1) if self.cancelled else None,
            warm=self.prefix_cache == "warm",
            mirrored=evicted,
            enforce_eager=self.enforce_eager,
            timeout=timeout,
            must=must,
        )


def sweep(*, graphs: bool) -> list[Configuration]:
    """Return COUNT configurations that cover all valid pairs; graphs: whether they may be used."""
    every = [c for c in _all(graphs) if c.valid]
    bits: dict[_Choice, int] = {}
    pairs, triples = ([_mask(c, size, bits) for c in every] for size in (2, 3))
    open_pairs, open_triples = (functools.reduce(operator.or_, masks) for masks in (pairs, triples))
    chosen: list[int] = []
    while open_pairs or len(chosen) < COUNT:
        # Of equally good ones the first, so that the same is chosen everywhere.
        left = (i for i in range(len(every)) if i not in chosen)
        gains = {i: (pairs[i] & open_pairs, triples[i] & open_triples) for i in left}
        best = max(gains, key=lambda i: [mask.bit_count() for mask in gains[i]])
        chosen.append(best)
        open_pairs &= ~pairs[best]
        open_triples &= ~triples[best]
    return [every[i] for i in chosen]


def _all(graphs: bool) -> Iterator[Configuration]:
    settings = FACTORS if graphs else FACTORS | {"enforce_eager": (True,)}
    return (Configuration(*some) for some in itertools.product(*settings.values()))


def _mask(configuration: Configuration, size: int, bits: dict[_Choice, int]) -> int:
    """All choices of so many factors with their settings, each a bit; bits: which, added to."""
    choices = itertools.combinations(enumerate(astuple(configuration)), size)
    return sum(1 << bits.setdefault(choice, len(bits)) for choice in choices)


assert tuple(FACTORS) == tuple(field.name for field in fields(Configuration))
