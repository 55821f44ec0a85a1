"""Starts the ranks of an engine as processes of their own, and follows them to their end.

This process keeps the store in which they find each other, so no port is guessed, and sees at once
how a rank ends; the ranks see it by themselves where torchrun started them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from bitassay.engine.distributed.rendezvous import serve
from bitassay.golden.errors import WorkerError
from bitassay.golden.inputs.checkpoint_cache import release_weights
from bitassay.golden.runs.backend import Backend, backend_environment, require_backend
from bitassay.golden.runs.child_process import (
    Children,
    child_environment,
    cpu_count,
    python_module,
)
from bitassay.golden.runs.engine_job import EngineJob, EngineRun
from bitassay.golden.runs.rank_worker import RESULT

OnTokens = Callable[[int, list[int], str | None], None]  # prompt, its new tokens, why it ended

RANK = python_module("bitassay.golden.runs.rank_worker")
_JOINING = 60.0  # seconds for the store to answer


def run_ranks(
    job: EngineJob,
    dp: int = 1,
    on_tokens: OnTokens | None = None,
    *,
    command: Sequence[str] = RANK,
) -> EngineRun:
    """Run a job on `dp` ranks and return what they gave; see `run_jobs`."""
    (run,) = run_jobs([job], dp, on_tokens, command=command)
    return run


def run_jobs(
    jobs: Sequence[EngineJob],
    dp: int = 1,
    on_tokens: OnTokens | None = None,
    *,
    command: Sequence[str] = RANK,
) -> Iterator[EngineRun]:
    """Run jobs one after another on the same `dp` ranks; yield what each gave, prompts in order.

    jobs: alike in what is loaded, which is loaded once: model, draft head, architecture, backend.
    on_tokens: called with tokens as they come, of prompts in any order. command: what each rank
    runs. Raises CannotRunError where the backend cannot run on so many ranks here, WorkerError
    naming a rank that failed or was killed, within seconds; whatever happens, no process is left.
    """
    if not jobs:
        return
    require_backend(jobs[0].backend, jobs[0].job.arch, dp)
    release_weights()
    given = 0
    with Children() as children:
        store = serve(_JOINING) if dp > 1 else None
        port = store.port if store is not None else 0
        for number in range(dp):
            name = f"rank {number} of {dp}" if dp > 1 else ""
            children.start(command, _environment(jobs[0], number, dp, port), name=name)
        for child in children.all:
            child.send((list(jobs), on_tokens is not None))
        for _, (kind, value) in children.messages():
            if kind == RESULT:
                given += 1
                yield value
            elif on_tokens is not None:
                for prompt, tokens, reason in value:
                    on_tokens(prompt, tokens, reason)
    if given != len(jobs):
        raise WorkerError(f"ranks ended well with {given} of {len(jobs)} results: a bug")


def _environment(job: EngineJob, rank: int, dp: int, port: int) -> dict[str, str]:
    """A rank's environment: its place as torchrun would state it, its GPU, its threads."""
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(dp),
        "LOCAL_WORLD_SIZE": str(dp),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process serves it
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": str(max(1, cpu_count() // dp)),
    }
    found = child_environment(**place, **backend_environment(job.backend, job.job.arch))
    if job.backend is Backend.GPU:  # which children do not see otherwise
        found.pop("CUDA_VISIBLE_DEVICES")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        found |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return found
