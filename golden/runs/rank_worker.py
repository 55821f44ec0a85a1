"""One rank of an engine: a process of its own, or one that torchrun started.

As a process of its own it is passed descriptors: the read end of a pipe that ends with its parent,
a file for results, which rank 0 writes, and a pipe for lines of JSON, told as things happen:
{"tokens": [[prompt, ids, finish reason or null], …]} after a step, where that is asked for,
{"result": its end in the file} after a job, {"error": text, "kind": "told", "gave up" or "bug"} at
a bad end. Jobs come on its input, one a line, its place in torchrun's variables.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import IO, Any, NoReturn

import torch

from bitassay.engine.distributed.group import Group, Stuck
from bitassay.engine.distributed.parallel import Told, run_parallel
from bitassay.engine.distributed.rendezvous import Place, RankError
from bitassay.engine.scheduling.request import Output
from bitassay.golden.errors import CannotRunError, GoldenError
from bitassay.golden.runs.child_process import end_with_parent
from bitassay.golden.runs.engine_job import NO_GPU, Backend, EngineJob, EngineRun
from bitassay.golden.runs.oracle_worker import TOLD
from bitassay.reference.checkpoints.checkpoint import Checkpoint, load_checkpoint
from bitassay.reference.spec.contract import default_contract

_UNTOLD = 2  # the status of a process whose last words could not be written
TOLD_ERROR, GAVE_UP, BUG = "told", "gave up", "bug"
_INTERPRETED = ("1", "true", "yes", "on", "y")  # as Triton reads it


def take_part(
    jobs: Sequence[EngineJob], place: Place, told: Told | None = None, stuck: Stuck | None = None
) -> Iterator[EngineRun | None]:
    """Run a rank's share of jobs, one after another, with the other ranks.

    jobs: at least one, alike in what is loaded: model, draft head, architecture, backend. Yields
    all of a job's results on rank 0, None on others. told: called with this rank's prompts and
    outputs. stuck: see Group.join. Raises CannotRunError where the backend cannot be had,
    RankError where another rank was given another job, before anything runs, RankTimeout and
    RankLost for other ranks, and what the engine raises. After an error, end the process with
    `leave`.
    """
    first = jobs[0]
    if any(job.loaded != first.loaded for job in jobs):
        raise ValueError("jobs of one group of ranks: expected the same model, found several")
    prepare(first)
    device = "cuda" if first.backend is Backend.GPU else "cpu"
    timeout = max(job.seconds for job in jobs)
    with Group.join(place, device=device, timeout=timeout, stuck=stuck) as group:
        group.note("loading the model")
        checkpoint = _read(first.model, first.model_digest)
        draft = _read(first.draft, first.draft_digest) if first.draft else None
        group.agree(_facts(jobs, checkpoint, draft, group.device))
        model, head = _load(first, checkpoint, draft, group.device)
        del checkpoint, draft
        for job in jobs:
            group.note("making an engine")
            engine = _engine(job, model, head)
            if job.warm:
                run_parallel(engine, job.requests, group)
            gathered = run_parallel(engine, job.requests, group, told)
            yield None if gathered is None else EngineRun.of(gathered)
            del engine, gathered
            gc.collect()  # caches and graphs: the next engine needs the room


def _facts(
    jobs: Sequence[EngineJob], model: Checkpoint, draft: Checkpoint | None, device: torch.device
) -> dict[str, str]:
    """Return what decides the results of jobs, by name; what differs among them is numbered."""
    contract = default_contract(jobs[0].arch)
    found = {
        "jobs": str(len(jobs)),
        "model": model.digest,
        "draft": "none" if draft is None else draft.digest,
        "contract": contract.digest,
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["device"] = f"sm_{major}{minor}"
    for number, job in enumerate(jobs, 1):
        mark = "" if len(jobs) == 1 else f" of job {number}"
        found |= {name + mark: value for name, value in job.facts.items()}
    return found


def _load(
    job: EngineJob, checkpoint: Checkpoint, draft: Checkpoint | None, device: torch.device
) -> tuple[Any, Any]:
    """Return a job's model and its head or None; imports what the backend needs."""
    from bitassay.engine.models.causal_lm import CausalLM
    from bitassay.engine.models.eagle import EagleHead

    operations = None
    if job.backend is Backend.REFERENCE:
        from bitassay.golden.runs.reference_ops import reference_backend

        operations = reference_backend()
    model = CausalLM.from_pretrained(
        checkpoint,
        contract=default_contract(job.arch),
        device=device,
        backend=operations,
    )
    return model, draft and EagleHead.from_pretrained(draft, model)


def _engine(job: EngineJob, model: Any, head: Any) -> Any:
    """Return a new engine with room for the job."""
    from bitassay.engine.config import EngineConfig
    from bitassay.engine.engine import Engine
    from bitassay.engine.scheduling.blocks import blocks_for

    config = EngineConfig(**job.config)
    if config.num_blocks is None:  # whatever the model allows may be far more than is asked for
        longest = max(map(len, job.prompts)) + job.max_tokens - 1
        sequences = min(config.max_num_seqs, len(job.prompts))
        config = replace(config, num_blocks=sequences * blocks_for(longest))
    return Engine(model, head, config)


def prepare(job: EngineJob) -> None:
    """Set this process up for a job's backend; CannotRunError where it is too late or impossible.

    Triton reads TRITON_INTERPRET when it is imported, hence before any model is.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in _INTERPRETED
    if job.backend is Backend.GPU:
        if not torch.cuda.is_available():
            raise CannotRunError(NO_GPU)
        if interpreted:
            raise CannotRunError(
                "TRITON_INTERPRET is set, so kernels would be interpreted on the CPU: unset it"
            )
    elif job.backend is Backend.INTERPRETER:
        if "triton" in sys.modules and not interpreted:
            raise CannotRunError(
                "triton was imported for a GPU in this process: set TRITON_INTERPRET=1 before"
            )
        os.environ |= {
            "TRITON_INTERPRET": "1",
            "BITASSAY_ARCH": job.arch,
            "BITASSAY_ALLOW": "",  # nothing whose bits are undefined
        }
        importlib.import_module("bitassay.emulator")  # BITASSAY_ARCH switches it on


def leave(status: int) -> NoReturn:
    """End this process at once, as a rank must: an orderly end may wait for the GPU for ever."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, or a reader that has gone: no more can be told
            status = status or _UNTOLD
    os._exit(status)


def _read(path: Any, digest: str) -> Checkpoint:
    checkpoint = load_checkpoint(path)
    if digest and checkpoint.digest != digest:
        raise GoldenError(f"model {path} was changed meanwhile: run this again")
    return checkpoint


def _telling(events: IO[str]) -> Callable[..., None]:
    def tell(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    return tell


def _main(lifeline: int, answer: int, events: int, streaming: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    end_with_parent(lifeline)
    os.set_inheritable(events, False)  # its end tells the parent of this process's
    tell = _telling(os.fdopen(events, "w"))

    def told(outputs: list[tuple[int, Output]]) -> None:
        tell(tokens=[[prompt, output.tokens, output.finish_reason] for prompt, output in outputs])

    def stuck(error: RankError) -> NoReturn:
        tell(error=str(error), kind=GAVE_UP)
        leave(1)

    try:
        jobs = [EngineJob.from_json(line) for line in sys.stdin]
        with open(answer, "wb") as file:
            for run in take_part(
                jobs, Place.from_environment(), told if streaming else None, stuck
            ):
                if run is not None:
                    run.save(file)
                    file.flush()
                    tell(result=file.tell())
    except Exception as error:
        kind = GAVE_UP if isinstance(error, RankError) else TOLD_ERROR
        if not isinstance(error, (*TOLD, RankError)):
            traceback.print_exc()
            kind = BUG
        tell(error=str(error), kind=kind)
        leave(1)
    leave(0)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
