"""Spreads the reference's tasks over processes, longest first; each process loads the model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Any, Protocol

from bitassay.golden.errors import WorkerError
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import ModelFacts
from bitassay.golden.runs.child_process import environment, lifeline
from bitassay.golden.runs.oracle_tasks import Task, run_task
from bitassay.golden.runs.oracle_worker import CHOSEN, FAILED, FED, FINISHED, READY, open_model
from bitassay.golden.streams.traces import Arrays

# Multiply-adds below which another process costs more time to start than it saves.
_WORTH_A_PROCESS = 1_000_000_000
# What a loaded model takes, as a multiple of its files, and what Python and torch take.
_MEMORY_FACTOR, _MEMORY_BASE = 4, 1 << 29


class Listener(Protocol):
    """Who is told what the work has come to."""

    def chosen(self, tokens: dict[int, int]) -> None:
        """Take what each prompt of a task chose in one step."""

    def fed(self, rows: dict[int, int]) -> None:
        """Take how many rows of each prompt of a task are done, within a step."""

    def finished(self, arrays: dict[int, Arrays]) -> None:
        """Take the whole traces of a task's prompts."""


@dataclass(frozen=True)
class Crew:
    """How many processes there are, torch threads of each, and what to say of it, if anything.

    One process is this one, with the threads that torch has here.
    """

    jobs: int
    threads: int = 1
    note: str = ""


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    connection: Connection
    errors: IO[bytes]
    task: Task | None = None


def run(job: Job, tasks: list[Task], crew: Crew, listener: Listener) -> None:
    """Run all tasks in the crew's processes, and tell the listener.

    Raises WorkerError when a process fails or is killed, naming its prompts; whatever happens, no
    process is left.
    """
    jobs = min(crew.jobs, len(tasks))
    if jobs > 1:
        with _workers(job, jobs, crew.threads) as workers:
            _share(job, tasks, workers, listener)
    elif tasks:
        model = open_model(job)
        for task in tasks:
            listener.finished(run_task(model, job, task, listener.chosen, listener.fed))


def suitable_crew(job: Job, facts: ModelFacts, asked: int | None) -> Crew:
    """Return as many processes as were asked for, else as CPUs, work and memory allow."""
    if asked is not None:
        return Crew(asked)
    cpus = _cpus()
    rows = sum(map(job.rows, range(len(job.prompts))))
    worth = min(cpus, max(1, rows * facts.weights // _WORTH_A_PROCESS))
    fitting = max(1, _free_memory() // (_MEMORY_FACTOR * facts.file_bytes + _MEMORY_BASE))
    if fitting >= worth:
        return Crew(worth)
    note = f"{fitting} of {worth} processes, because memory holds no more copies of the model"
    return Crew(fitting, cpus // fitting, note)


def _share(job: Job, tasks: list[Task], workers: list[_Worker], listener: Listener) -> None:
    waiting = list(reversed(tasks))
    busy = {worker.connection: worker for worker in workers}
    while busy:
        for ready in wait(list(busy)):
            worker = busy[ready]  # type: ignore[index]
            kind, value = _receive(worker, job)
            if kind == CHOSEN:
                listener.chosen(value)
                continue
            if kind == FED:
                listener.fed(value)
                continue
            if kind == FINISHED:
                listener.finished(value)
            worker.task = waiting.pop() if waiting else None
            _send(worker, worker.task, job)
            if worker.task is None:
                del busy[worker.connection]


def _send(worker: _Worker, what: Job | Task | None, job: Job) -> None:
    try:
        worker.connection.send(what)
    except (BrokenPipeError, ConnectionResetError):
        raise WorkerError(f"{_named(worker, job)} {_end(worker)}") from None


def _receive(worker: _Worker, job: Job) -> tuple[str, Any]:
    try:
        kind, value = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        raise WorkerError(f"{_named(worker, job)} {_end(worker)}") from None
    if kind == FAILED:
        raise WorkerError(f"{_named(worker, job)} failed: {value.strip()}")
    assert kind in (READY, CHOSEN, FED, FINISHED)
    return kind, value


def _named(worker: _Worker, job: Job) -> str:
    if worker.task is None:
        return f"process {worker.number} (loading {job.model})"
    names = [job.prompt_names[prompt] for prompt in worker.task.prompts]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"process {worker.number} (prompts {', '.join(names[:3])}{more})"


def _end(worker: _Worker) -> str:
    status = worker.process.wait()
    if status < 0:
        reason = signal.Signals(-status).name
        short = ", as happens when memory runs out: try fewer with --jobs" if status == -9 else ""
        return f"was killed by {reason}{short}"
    worker.errors.seek(0)
    said = worker.errors.read().decode(errors="replace").strip().splitlines()[-8:]
    return "\n  ".join([f"ended with status {status}", *said])


@contextmanager
def _workers(job: Job, jobs: int, threads: int) -> Iterator[list[_Worker]]:
    """Start processes, each with its job; kill and reap them all at the end."""
    with ExitStack() as stack:
        line = stack.enter_context(lifeline())
        workers = []
        for number in range(1, jobs + 1):
            worker = _start(stack, number, line, threads)
            _send(worker, job, job)
            workers.append(worker)
        yield workers


def _start(stack: ExitStack, number: int, line: int, threads: int) -> _Worker:
    ours, theirs = Pipe()
    errors: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  (it is one)
    stack.callback(ours.close)
    passed = (theirs.fileno(), line)
    process = subprocess.Popen(
        [sys.executable, "-m", "bitassay.golden.runs.oracle_worker", *map(str, (*passed, threads))],
        env=environment(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE"),
        pass_fds=passed,
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)  # before waiting: callbacks run in reverse
    theirs.close()
    return _Worker(number, process, ours, errors)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_memory() -> int:
    """Bytes that are free or can be freed; a great many where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 1 << 60
