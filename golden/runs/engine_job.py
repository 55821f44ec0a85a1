"""What ranks of an engine are to run, and what comes back: plain data, to be sent to processes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from bitassay.engine.config import EngineConfig
from bitassay.engine.distributed.group import TIMEOUT, check_timeout
from bitassay.engine.distributed.parallel import Gathered, Requests, total
from bitassay.engine.scheduling.stats import Stats
from bitassay.engine.trace import EngineTrace
from bitassay.golden.runs.check_options import NO_GPU, Backend
from bitassay.golden.streams.traces import Arrays

__all__ = ["NO_GPU", "Backend", "EngineJob", "EngineRun"]

# A step of the interpreter takes minutes, and so does one of the reference with a large model.
_SLOW_TIMEOUT = 1800.0


@dataclass(frozen=True)
class EngineJob:
    """Prompts for an engine, `max_tokens` each, and how it runs them.

    config: fields of EngineConfig. order, arrivals, cancelled, eos_token_id: see
    engine.parallel.Requests. warm: run all once before, so that the prefix cache knows them; what
    comes back is of the second time. timeout: seconds for a step's collective, None for what the
    backend usually needs. model_digest, draft_digest: what the checkpoints must be when they are
    read, "" for whatever they are.
    """

    model: Path
    arch: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    draft: Path | None = None
    backend: Backend = Backend.GPU
    config: dict[str, Any] = field(default_factory=dict)
    order: tuple[int, ...] | None = None
    arrivals: tuple[int, ...] | None = None
    cancelled: dict[int, int] = field(default_factory=dict)
    eos_token_id: tuple[int, ...] | None = None
    warm: bool = False
    timeout: float | None = None
    model_digest: str = ""
    draft_digest: str = ""

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
        digests = (self.model_digest, self.draft_digest)
        return self.model, self.draft, self.arch, self.backend, digests

    @property
    def requests(self) -> Requests:
        """What every rank is told."""
        return Requests(
            self.prompts,
            self.max_tokens,
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
        config = asdict(EngineConfig(**self.config))
        apart = {"model", "draft", "prompts", "config", "timeout", "model_digest", "draft_digest"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        values["cancelled"] = sorted(self.cancelled.items())
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {
            "prompts": f"{len(self.prompts)}, sha256 {prompts[:16]}",
            **{name: json.dumps(value) for name, value in (values | config).items()},
        }

    def to_json(self) -> str:
        """Return the job as text; paths are made absolute."""
        paths = {"model": str(self.model.resolve())}
        paths |= {"draft": str(self.draft.resolve())} if self.draft else {}
        cancelled = {"cancelled": list(self.cancelled.items())}  # keys of JSON are text
        return json.dumps(asdict(self) | paths | cancelled)

    @classmethod
    def from_json(cls, text: str) -> EngineJob:
        """Return the job that `to_json` wrote."""
        given = json.loads(text)
        job = cls(**given | {"cancelled": dict(given["cancelled"])})
        return replace(
            job,
            model=Path(job.model),
            draft=Path(job.draft) if job.draft else None,
            backend=Backend(job.backend),
            prompts=tuple(map(tuple, job.prompts)),
            order=None if job.order is None else tuple(job.order),
            arrivals=None if job.arrivals is None else tuple(job.arrivals),
            eos_token_id=None if job.eos_token_id is None else tuple(job.eos_token_id),
        )


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

    def save(self, file: IO[bytes]) -> None:
        """Write it as one .npz."""
        values: dict[str, Any] = {
            f"{prompt}/{name}": array
            for prompt, arrays in enumerate(self.traces)
            for name, array in (arrays or {}).items()
        }
        counts = {
            "prompts": len(self.traces),
            "stats": list(map(asdict, self.stats)),
            "seconds": self.seconds,
        }
        np.savez(file, counts=np.array(json.dumps(counts)), **values)

    @classmethod
    def load(cls, file: IO[bytes]) -> EngineRun:
        """Read what `save` wrote."""
        with np.load(file, allow_pickle=False) as data:
            counts = json.loads(str(data["counts"]))
            traces: list[Arrays] = [{} for _ in range(counts["prompts"])]
            for key in data.files:
                prompt, _, name = key.partition("/")
                if name:
                    traces[int(prompt)][name] = data[key]
        stats = [Stats(**own) for own in counts["stats"]]
        return cls([own or None for own in traces], stats, counts["seconds"])


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
