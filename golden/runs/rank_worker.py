"""One rank of an engine: a process of its own, or one that torchrun started.

As a process of its own it receives its jobs, its place in torchrun's variables, and sends
(TOKENS, [[prompt, ids, finish reason or None], …]) after a step, where that is asked for, and
(RESULT, an EngineRun) after each job, from rank 0 alone.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch

from bitassay.engine.distributed.group import Group, Stuck
from bitassay.engine.distributed.parallel import Gathered, OnOutputs, run_parallel
from bitassay.engine.distributed.rendezvous import RankError, RankInfo
from bitassay.engine.scheduling.request import Output
from bitassay.engine.scheduling.stats import Stats
from bitassay.engine.trace import EngineTrace
from bitassay.golden.inputs.checkpoint_cache import read_checkpoint
from bitassay.golden.inputs.model_info import is_transformer
from bitassay.golden.runs.backend import Backend, prepare_process, require_backend
from bitassay.golden.runs.child_main import FAILED, Failure, leave, run_as_child
from bitassay.golden.runs.engine_job import EngineJob, EngineRun
from bitassay.reference.checkpoints.checkpoint import Checkpoint
from bitassay.reference.spec.errors import SequenceError

TOKENS, RESULT = "tokens", "result"


def take_part(
    jobs: Sequence[EngineJob],
    rank_info: RankInfo,
    on_outputs: OnOutputs | None = None,
    stuck: Stuck | None = None,
) -> Iterator[EngineRun | None]:
    """Run a rank's share of jobs, one after another, with the other ranks.

    jobs: at least one, alike in what is loaded: model, draft head, architecture, backend. Yields
    all of a job's results on rank 0, None on others. on_outputs: called with this rank's prompts
    and outputs. stuck: see Group.join. Raises CannotRunError where the backend cannot be had,
    RankError where another rank was given another job, before anything runs, RankTimeout and
    RankLost for other ranks, and what the engine raises, prompts by their names. After an error,
    end the process with `leave`.
    """
    first = jobs[0]
    if any(job.loaded != first.loaded for job in jobs):
        raise ValueError("jobs of one group of ranks: expected the same model, found several")
    prepare_process(first.backend, first.job.arch)
    require_backend(first.backend, first.job.arch)
    device = "cuda" if first.backend is Backend.GPU else "cpu"
    timeout = max(job.seconds for job in jobs)
    with Group.join(rank_info, device=device, timeout=timeout, stuck=stuck) as group:
        group.note("loading the model")
        checkpoint = read_checkpoint(first.job.model, first.job.model_digest)
        draft = None
        if first.job.draft is not None:
            draft = read_checkpoint(first.job.draft, first.job.draft_digest)
        group.agree(_facts(jobs, checkpoint, draft, group.device))
        run = _Loaded(first, checkpoint, draft, group)
        del checkpoint, draft
        for job in jobs:
            try:
                gathered = run(job, on_outputs)
            except SequenceError as error:
                raise _named(error, job) from error
            yield None if gathered is None else EngineRun.of(gathered)
            del gathered
            gc.collect()  # caches and graphs: the next engine needs the room


class _Loaded:
    """A model on a rank's device, on the operations of a backend; runs jobs."""

    def __init__(
        self, job: EngineJob, checkpoint: Checkpoint, draft: Checkpoint | None, group: Group
    ) -> None:
        # Imported here: what the kernels import decides triton's mode for the whole process.
        from bitassay.engine.models.causal_lm import CausalLM
        from bitassay.engine.models.context_lm import ContextLM
        from bitassay.engine.models.eagle import EagleHead

        self._group = group
        options: dict[str, Any] = {"contract": job.job.contract, "device": group.device}
        if job.backend is Backend.REFERENCE:
            from bitassay.golden.runs.reference_ops import reference_ops

            options["ops"] = reference_ops()
        self._serves = is_transformer(checkpoint)
        model_class: Any = CausalLM if self._serves else ContextLM
        self._model = model_class.from_pretrained(checkpoint, **options)
        self._head = None if draft is None else EagleHead.from_pretrained(draft, self._model)

    def __call__(self, job: EngineJob, on_outputs: OnOutputs | None) -> Gathered | None:
        """Run a job; all of it on rank 0, None elsewhere."""
        if not self._serves:
            return self._in_batches(job)
        from bitassay.engine.engine import Engine

        self._group.note("making an engine")
        engine = Engine(self._model, self._head, _with_room(job))
        if job.warm:
            run_parallel(engine, job.requests, self._group)
        return run_parallel(engine, job.requests, self._group, on_outputs)

    def _in_batches(self, job: EngineJob) -> Gathered:
        """Run a model without a cache, which no engine serves: whole batches, one after another."""
        begun = time.perf_counter()
        order = None if job.order is None else list(job.order)
        traces = self._model.generate(
            job.job.prompts, job.job.steps, batch_size=job.config.max_num_seqs, order=order
        )
        found: list[EngineTrace | None] = [EngineTrace(**vars(t), drafts=None) for t in traces]
        stats = Stats(tokens=len(traces) * job.job.steps)
        return Gathered(found, [stats], time.perf_counter() - begun)


def _with_room(job: EngineJob) -> Any:
    """Return the engine's configuration with room for the job's prompts, and for no more.

    Whatever the model allows may be far more than is asked for.
    """
    from bitassay.engine.scheduling.blocks import blocks_for

    config = job.config
    if config.num_blocks is not None:
        return config
    longest = max(map(len, job.job.prompts)) + job.job.steps - 1
    sequences = min(config.max_num_seqs, len(job.job.prompts))
    return replace(config, num_blocks=sequences * blocks_for(longest))


def _facts(
    jobs: Sequence[EngineJob], model: Checkpoint, draft: Checkpoint | None, device: torch.device
) -> dict[str, str]:
    """Return what decides the results of jobs, by name; what differs among them is numbered."""
    found = {
        "jobs": str(len(jobs)),
        "model": model.digest,
        "draft": "none" if draft is None else draft.digest,
        "contract": jobs[0].job.contract.digest,
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["device"] = f"sm_{major}{minor}"
    for number, job in enumerate(jobs, 1):
        mark = "" if len(jobs) == 1 else f" of job {number}"
        found |= {name + mark: value for name, value in job.facts.items()}
    return found


def _named(error: SequenceError, job: EngineJob) -> SequenceError:
    """Return an error with the prompt's name in place of its number."""
    if not isinstance(error.prompt, int):
        return error
    return error.located(prompt=job.job.prompt_names[error.prompt])


def _work(connection: Connection) -> None:
    jobs, streaming = connection.recv()
    sending = threading.Lock()  # `stuck` is called in the heartbeat's thread

    def on_outputs(outputs: list[tuple[int, Output]]) -> None:
        found = [(prompt, output.tokens, output.finish_reason) for prompt, output in outputs]
        with sending:
            connection.send((TOKENS, found))

    def stuck(error: RankError) -> NoReturn:
        with sending:
            connection.send((FAILED, Failure(str(error), "gave up")))
        leave(1)

    for run in take_part(
        jobs, RankInfo.from_environment(), on_outputs if streaming else None, stuck
    ):
        if run is not None:
            with sending:
                connection.send((RESULT, run))


if __name__ == "__main__":
    run_as_child(_work, gave_up=RankError)
