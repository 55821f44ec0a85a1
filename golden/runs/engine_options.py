"""How the serving engine is to run in a check, and what it must be seen to do there."""

from __future__ import annotations

from dataclasses import dataclass

from bitassay.golden.errors import GoldenError
from bitassay.reference.spec.contract import DRAFT_DEPTH

DRAFTS = 3  # draft tokens a round, unless asked for otherwise
BACKENDS = ("gpu", "interpreter", "reference")
# What a run may be made for; it fails where it did not come to it.
PREEMPTIONS, HITS, EVICTIONS = "preemptions", "prefix hits", "evicted blocks"


@dataclass(frozen=True)
class EngineOptions:
    """One run of the engine; none of it may change a bit.

    draft_tokens: K, None for 3 with a draft head and 0 without. dp: ranks. num_blocks: of the
    cache, None for room for all. shuffle: seed of another order of the prompts, late: of the steps
    at which they arrive, None for all at the beginning. cancel: so many prompts apart there is a
    copy of one that is cancelled midway. warm: run twice and compare the second time. mirrored:
    every prompt comes again, in reverse order, and both are compared. eager: True without CUDA
    graphs, False with, None as the device's default. timeout: seconds for a step, None for the
    backend's. must: which of PREEMPTIONS, HITS and EVICTIONS the run has to come to.
    """

    draft_tokens: int | None = None
    dp: int = 1
    backend: str = "gpu"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    num_blocks: int | None = None
    prefix_caching: bool = True
    shuffle: int | None = None
    late: int | None = None
    cancel: int | None = None
    warm: bool = False
    mirrored: bool = False
    eager: bool | None = None
    timeout: float | None = None
    must: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise GoldenError for what does not fit together."""
        if self.backend not in BACKENDS:
            raise GoldenError(
                f"--backend: expected one of {', '.join(BACKENDS)}, found {self.backend}"
            )
        if self.draft_tokens is not None and not 0 <= self.draft_tokens <= DRAFT_DEPTH:
            raise GoldenError(
                f"--k: expected 0 … {DRAFT_DEPTH}, as many as a golden has, found "
                f"{self.draft_tokens}"
            )
        if self.max_num_batched_tokens < (self.draft_tokens or 0) + 1:
            raise GoldenError(
                f"--max-num-batched-tokens: expected at least {(self.draft_tokens or 0) + 1}, a "
                f"token and its drafts, found {self.max_num_batched_tokens}"
            )
        if self.shuffle is not None and self.late is not None:
            raise GoldenError("--shuffle and --arrivals exclude each other: either changes order")
        if self.warm and not self.prefix_caching:
            raise GoldenError("--warm needs the prefix cache: leave --no-prefix-caching away")

    def drafting(self, has_draft: bool) -> int:
        """Return K for a golden with a draft head or without; GoldenError without and K > 0."""
        if self.draft_tokens and not has_draft:
            raise GoldenError(f"--k {self.draft_tokens}: this golden has no draft head: use --k 0")
        return (DRAFTS if has_draft else 0) if self.draft_tokens is None else self.draft_tokens

    @property
    def description(self) -> str:
        """What is run, in words."""
        k = "" if self.draft_tokens is None else f"K = {self.draft_tokens}"
        parts = [{"gpu": "engine on the GPU"}.get(self.backend, f"engine, {self.backend}"), k]
        parts += [f"DP = {self.dp}"] if self.dp > 1 else []
        parts += [f"{self.max_num_seqs} at once, {self.max_num_batched_tokens} rows a step"]
        parts += [] if self.num_blocks is None else [f"{self.num_blocks} blocks"]
        parts += ["no prefix cache"] if not self.prefix_caching else []
        parts += ["prefix cache warm"] if self.warm else []
        parts += ["every prompt twice"] if self.mirrored else []
        parts += [f"shuffled with {self.shuffle}"] if self.shuffle is not None else []
        parts += ["late arrivals"] if self.late is not None else []
        parts += ["cancelled neighbours"] if self.cancel is not None else []
        parts += {True: ["eager"], False: ["CUDA graphs"], None: []}[self.eager]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class SweepOptions:
    """A sweep: ranks, backend, seconds for a step, seed of orders and arrivals."""

    dp: int = 1
    backend: str = "gpu"
    timeout: float | None = None
    seed: int = 0
