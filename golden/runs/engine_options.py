"""How an engine is to run in a check, and what it must be seen to do there: one record of options.

The command's options, the settings of a sweep and the jobs of ranks are all made from it; what it
shares with the engine's own configuration it inherits, defaults included.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from bitassay.engine.config import EngineConfig
from bitassay.golden.errors import GoldenError
from bitassay.golden.runs.backend import Backend

# What a run may be made for; it fails where it did not come to it.
PREEMPTIONS, HITS, EVICTIONS = "preemptions", "prefix hits", "evicted blocks"


@dataclass(frozen=True, kw_only=True)
class EngineOptions(EngineConfig):
    """One run of an engine; none of it may change a bit.

    dp: ranks. shuffle: seed of another order of the prompts, late: of the steps at which they
    arrive, None for all at the beginning. cancel: beside every so manieth prompt there is a copy
    of it that is cancelled midway. warm: run twice and compare the second time. mirrored: every
    prompt comes again, in reverse order, and both are compared. timeout: seconds for a step, None
    for what the backend usually needs. must: which of PREEMPTIONS, HITS and EVICTIONS the run has
    to come to.
    """

    dp: int = 1
    backend: Backend = Backend.GPU
    shuffle: int | None = None
    late: int | None = None
    cancel: int | None = None
    warm: bool = False
    mirrored: bool = False
    timeout: float | None = None
    must: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise GoldenError or ValueError for what does not fit together."""
        super().__post_init__()
        object.__setattr__(self, "backend", Backend(self.backend))  # also from its name
        if self.shuffle is not None and self.late is not None:
            raise GoldenError("--shuffle and --arrivals exclude each other: either changes order")
        if self.warm and not self.enable_prefix_caching:
            raise GoldenError("--warm needs the prefix cache: omit --no-prefix-caching")

    def config(self, *, head: bool) -> EngineConfig:
        """Return the configuration of each rank's engine, for a model with a draft head or without.

        Raises ValueError as `drafts`.
        """
        values = {f.name: getattr(self, f.name) for f in fields(EngineConfig)}
        return EngineConfig(**values | {"num_speculative_tokens": self.drafts(head=head)})

    @property
    def serving(self) -> list[str]:
        """The options that are set and mean nothing to a model that is run in whole batches."""
        default = EngineOptions()
        batches = {"max_num_seqs", "shuffle", "backend", "timeout", "capture", "must"}
        own = {"num_speculative_tokens"} if not self.num_speculative_tokens else set()
        names = [f.name for f in fields(self) if f.name not in batches | own]
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    def description(self, *, head: bool) -> str:
        """Return what is run, in words; head: whether there is a draft head."""
        where = "the GPU" if self.backend is Backend.GPU else f"the {self.backend}"
        parts = [f"engine on {where}"]
        if head:
            drafts = self.drafts(head=head)
            parts += [f"K = {drafts}" if drafts else "K = 0, drafts not compared"]
        parts += [f"DP = {self.dp}"] if self.dp > 1 else []
        parts += [f"{self.max_num_seqs} at once, {self.max_num_batched_tokens} rows a step"]
        parts += [] if self.num_blocks is None else [f"{self.num_blocks} blocks"]
        parts += ["no prefix cache"] if not self.enable_prefix_caching else []
        parts += ["prefix cache warm"] if self.warm else []
        parts += ["every prompt twice"] if self.mirrored else []
        parts += [f"shuffled with {self.shuffle}"] if self.shuffle is not None else []
        parts += ["late arrivals"] if self.late is not None else []
        parts += ["cancelled neighbours"] if self.cancel is not None else []
        parts += {True: ["eager"], False: ["CUDA graphs"], None: []}[self.enforce_eager]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """A sweep: ranks, backend, seconds for a step, seed of orders and arrivals."""

    dp: int = EngineOptions.dp
    backend: Backend = EngineOptions.backend
    timeout: float | None = EngineOptions.timeout
    seed: int = 0
