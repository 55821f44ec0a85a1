"""What ranks of an engine are to run, and what comes back: plain data, to be sent to processes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

import numpy as np

from bitassay.engine.config import EngineConfig
from bitassay.engine.distributed.parallel import Gathered, Requests, total
from bitassay.engine.distributed.rendezvous import TIMEOUT, check_timeout
from bitassay.engine.scheduling.stats import Stats
from bitassay.engine.trace import EngineTrace
from bitassay.golden.inputs.job import Job
from bitassay.golden.runs.backend import Backend
from bitassay.golden.streams.traces import Arrays

# A step of the interpreter takes minutes, and so does one of the reference with a large model.
_SLOW_TIMEOUT = 1800.0


@dataclass(frozen=True)
class EngineJob:
    """A job for an engine, and how it runs it: each of its prompts is a request.

    order, arrivals, cancelled, eos_token_id: see engine.distributed.parallel.Requests. warm: run
    all once before, so that the prefix cache knows them; what comes back is of the second time.
    timeout: seconds for a step's collective, None for what the backend usually needs.
    """

    job: Job
    config: EngineConfig = field(default_factory=EngineConfig)
    backend: Backend = Backend.GPU
    order: tuple[int, ...] | None = None
    arrivals: tuple[int, ...] | None = None
    cancelled: dict[int, int] = field(default_factory=dict)
    eos_token_id: tuple[int, ...] | None = None
    warm: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a timeout that no rank could wait for."""
        if self.timeout is not None:
            check_timeout(self.timeout)

    @property
    def seconds(self) -> float:
        """The timeout."""
        if self.timeout is not None:
            return self.timeout
        return TIMEOUT if self.backend is Backend.GPU else _SLOW_TIMEOUT

    @property
    def loaded(self) -> tuple[object, ...]:
        """What ranks load once for all jobs that have the same."""
        job = self.job
        digests = (job.model_digest, job.draft_digest)
        return job.model, job.draft, job.arch, self.backend, digests

    @property
    def requests(self) -> Requests:
        """What every rank is told."""
        return Requests(
            self.job.prompts,
            self.job.steps,
            self.order,
            self.arrivals,
            self.cancelled,
            self.eos_token_id,
        )

    @property
    def facts(self) -> dict[str, str]:
        """What decides results, as short text by name, for ranks to compare; models apart.

        Paths and timeouts are no part of it: they may differ from host to host.
        """
        prompts = hashlib.sha256(json.dumps(self.job.prompts).encode()).hexdigest()
        values = asdict(self.config) | {
            "arch": self.job.arch,
            "max_tokens": self.job.steps,
            "backend": str(self.backend),
            "order": self.order,
            "arrivals": self.arrivals,
            "cancelled": sorted(self.cancelled.items()),
            "eos_token_id": self.eos_token_id,
            "warm": self.warm,
        }
        return {
            "prompts": f"{len(self.job.prompts)}, sha256 {prompts[:16]}",
            **{name: json.dumps(value) for name, value in values.items()},
        }


@dataclass(frozen=True, eq=False)
class EngineRun:
    """What an engine's ranks gave: arrays for each prompt, None for cancelled ones, and counts.

    Arrays have the dtypes of EngineTrace, int64 for 64-bit patterns. Without drafts: tokens [T],
    top_ids [T, 8], top_bits [T, 8], margins [T], fingerprints [T, O], prompt_fingerprints [O].
    With: also rounds int64 [N, 3] (t, drafted, accepted), draft_tokens [N, K], draft_fingerprints
    [N, K, D], draft_first_pass [T, D], draft_prompt_fingerprints [D]. stats, seconds: see Gathered.
    """

    traces: list[Arrays | None]
    stats: list[Stats]
    seconds: float

    @property
    def total(self) -> Stats:
        """What all ranks counted together."""
        return total(self.stats)

    @classmethod
    def of(cls, gathered: Gathered) -> EngineRun:
        """Return what rank 0 gathered, as arrays."""
        arrays = [None if trace is None else _arrays(trace) for trace in gathered.traces]
        return cls(arrays, gathered.stats, gathered.seconds)


def _arrays(trace: EngineTrace) -> Arrays:
    names = "tokens top_ids top_bits margins fingerprints prompt_fingerprints".split()
    arrays = {name: getattr(trace, name).cpu().numpy() for name in names}
    if trace.drafts is not None:
        drafts = trace.drafts
        arrays |= {
            "rounds": np.array(drafts.rounds, dtype=np.int64).reshape(-1, 3),
            "draft_tokens": drafts.draft_tokens.cpu().numpy(),
            "draft_fingerprints": drafts.fingerprints.cpu().numpy(),
            "draft_first_pass": drafts.first_pass.cpu().numpy(),
            "draft_prompt_fingerprints": drafts.prompt_fingerprints.cpu().numpy(),
        }
    return arrays
