"""Starts the ranks of an engine as processes of their own, and watches them to their end.

This process keeps the store in which they find each other, so no port is guessed, and sees at once
how a rank ends; the ranks see it by themselves where torchrun started them.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BytesIO
from typing import IO, Any

import torch

from bitassay.engine.distributed.rendezvous import serve
from bitassay.golden.errors import CannotRunError, WorkerError
from bitassay.golden.runs.child_process import environment, lifeline
from bitassay.golden.runs.engine_job import NO_GPU, Backend, EngineJob, EngineRun
from bitassay.golden.runs.rank_worker import GAVE_UP
from bitassay.reference.spec.arch import EMULATED

Told = Callable[[int, list[int], str | None], None]  # prompt, its new tokens, why it ended

COMMAND = (sys.executable, "-m", "bitassay.golden.runs.rank_worker")
_GRACE = 1.0  # seconds for the others to say what they saw when a rank ends
_LAST_LINES = 8
_JOINING = 60.0  # seconds for the store to answer


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    events: int  # descriptor
    errors: IO[bytes]
    unread: bytes = b""
    said: list[dict[str, str]] = field(default_factory=list)


def run_ranks(job: EngineJob, dp: int = 1, told: Told | None = None) -> EngineRun:
    """Run a job on `dp` ranks and return what they gave; see `run_jobs`."""
    (run,) = run_jobs([job], dp, told)
    return run


def run_jobs(
    jobs: Sequence[EngineJob], dp: int = 1, told: Told | None = None
) -> Iterator[EngineRun]:
    """Run jobs one after another on the same `dp` ranks; yield what each gave, prompts in order.

    jobs: alike in what is loaded, which is loaded once: model, draft head, architecture, backend.
    told: called with tokens as they come, of prompts in any order. Raises CannotRunError where
    the backend cannot run on so many ranks here, WorkerError naming a rank that failed or was
    killed, within seconds; whatever happens, no process is left.
    """
    for job in jobs[:1]:
        require(job, dp)
    with ExitStack() as stack:
        answer = stack.enter_context(tempfile.TemporaryFile())
        line = stack.enter_context(lifeline())
        store = serve(_JOINING) if dp > 1 else None
        port = store.port if store is not None else 0
        text = "".join(job.to_json() + "\n" for job in jobs).encode()
        passed = (line, answer.fileno(), told is not None)
        ranks = [
            _start(stack, number, _environment(jobs[0], number, dp, port), passed, text)
            for number in range(dp if jobs else 0)
        ]
        begin = given = 0
        for end in _watch(ranks, told):
            yield EngineRun.load(BytesIO(os.pread(answer.fileno(), end - begin, begin)))
            begin, given = end, given + 1
        if given != len(jobs):
            raise WorkerError(f"ranks ended well with {given} of {len(jobs)} results: a bug")


def require(job: EngineJob, dp: int) -> None:
    """Raise CannotRunError where a job cannot run on `dp` ranks of this host."""
    if dp < 1:
        raise CannotRunError(f"--dp: expected at least 1 rank, found {dp}")
    if job.backend is Backend.GPU:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise CannotRunError(NO_GPU)
        if count < dp:
            raise CannotRunError(
                f"--dp {dp}: expected a GPU for every rank, found {count}: NCCL cannot share one; "
                "start fewer ranks, or use --backend reference"
            )
    elif job.backend is Backend.INTERPRETER and job.arch not in EMULATED:
        raise CannotRunError(
            f"kernels cannot run as {job.arch} in the interpreter, which emulates "
            f"{' and '.join(EMULATED)}: use --backend reference, or such a GPU"
        )


def _environment(job: EngineJob, rank: int, dp: int, port: int) -> dict[str, str]:
    """A rank's environment: its place as torchrun would state it, its GPU, its threads."""
    values = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(dp),
        "LOCAL_WORLD_SIZE": str(dp),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process serves it
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": str(max(1, _cpus() // dp)),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if job.backend is Backend.INTERPRETER:
        values |= {"TRITON_INTERPRET": "1", "BITASSAY_ARCH": job.arch}
    found = environment(**values)
    if job.backend is Backend.GPU:  # which children do not see otherwise
        found.pop("CUDA_VISIBLE_DEVICES")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        found |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return found


def _start(
    stack: ExitStack,
    number: int,
    environment: dict[str, str],
    passed: tuple[int, int, bool],
    jobs: bytes,
) -> _Rank:
    """Start a rank; passed: lifeline, file for results, whether it tells tokens as they come."""
    line, answer, streaming = passed
    errors: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  (it is one)
    given: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    given.write(jobs)
    given.seek(0)
    ours, theirs = os.pipe()
    stack.callback(os.close, ours)
    try:
        process = subprocess.Popen(
            [*COMMAND, *map(str, (line, answer, theirs, int(streaming)))],
            env=environment,
            pass_fds=(line, answer, theirs),
            stdin=given,
            stdout=errors,
            stderr=errors,
        )
    finally:
        os.close(theirs)
    stack.callback(process.wait)
    stack.callback(process.kill)  # before waiting: callbacks run in reverse
    return _Rank(number, process, ours, errors)


def _watch(ranks: list[_Rank], told: Told | None) -> Iterator[int]:
    """Read what ranks tell until all have ended; yield where results end in the file.

    WorkerError as soon as a rank has ended badly.
    """
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.events, selectors.EVENT_READ, rank)
        deadline: float | None = None  # to hear from the others, once one has ended badly
        while selector.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            for key, _ in selector.select(left):
                rank = key.data
                events = _read(rank)
                for event in events or []:
                    yield from _take(rank, event, told)
                if events is None:
                    selector.unregister(rank.events)
                    if rank.process.wait() != 0 and deadline is None:
                        deadline = time.monotonic() + _GRACE
    if bad := [rank for rank in ranks if rank.process.poll()]:
        raise WorkerError(_end(min(bad, key=_blame), len(ranks)))


def _read(rank: _Rank) -> list[dict[str, Any]] | None:
    """Return what a rank has told since; None at its end."""
    data = os.read(rank.events, 1 << 16)
    *lines, rank.unread = (rank.unread + data).split(b"\n")
    return [json.loads(line) for line in lines] if data else None


def _take(rank: _Rank, event: dict[str, Any], told: Told | None) -> Iterator[int]:
    """Pass an event on; yield where a result ends."""
    if "result" in event:
        yield event["result"]
    elif "error" in event:
        rank.said.append(event)
    elif told is not None:
        for prompt, tokens, reason in event["tokens"]:
            told(prompt, tokens, reason)


def _blame(rank: _Rank) -> tuple[int, int]:
    """Order ranks that ended badly: killed ones are the cause, those that gave up the effect."""
    killed = rank.process.returncode < 0
    gave_up = bool(rank.said) and rank.said[-1]["kind"] == GAVE_UP
    return (0 if killed else 2 if gave_up else 1), rank.number


def _end(rank: _Rank, count: int) -> str:
    name = f"rank {rank.number} of {count}" if count > 1 else "the engine's process"
    status = rank.process.returncode
    if rank.said and status > 0:
        error, kind = rank.said[-1]["error"], rank.said[-1]["kind"]
        if kind == GAVE_UP:
            return error  # it says who and why
        if kind == "told":
            return f"{name}: {error}" if count > 1 else error
    rank.errors.seek(0)
    lines = rank.errors.read().decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
    if status < 0:
        reason = signal.Signals(-status).name
        memory = ", as happens when memory runs out" if status == -signal.SIGKILL else ""
        return "\n  ".join([f"{name} was killed by {reason}{memory}", *lines])
    return "\n  ".join([f"{name} ended with status {status}", *lines])


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
