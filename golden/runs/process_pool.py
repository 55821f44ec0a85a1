"""Spreads the reference's tasks over processes, longest first; each process loads the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bitassay.golden.inputs.checkpoint_cache import release_weights
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import ModelFacts
from bitassay.golden.runs.child_process import Children, child_environment, cpu_count, python_module
from bitassay.golden.runs.oracle_tasks import Task, run_task
from bitassay.golden.runs.oracle_worker import CHOSEN, FED, FINISHED, open_model
from bitassay.golden.streams.traces import Arrays

WORKER = python_module("bitassay.golden.runs.oracle_worker")

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


def run(job: Job, tasks: list[Task], crew: Crew, listener: Listener) -> None:
    """Run all tasks in the crew's processes, and tell the listener.

    Raises WorkerError when a process fails or is killed, naming its prompts; whatever happens, no
    process is left.
    """
    jobs = min(crew.jobs, len(tasks))
    if jobs > 1:
        release_weights()  # each process reads them itself
        with Children() as children:
            _share(job, tasks, crew.threads, jobs, children, listener)
    elif tasks:
        model = open_model(job)
        for task in tasks:
            listener.finished(run_task(model, job, task, listener.chosen, listener.fed))


@dataclass(frozen=True)
class Machine:
    """What there is to share work among: CPUs, and bytes of memory that are free or can be freed.

    worth: multiply-adds below which another process costs more time to start than it saves.
    """

    cpus: int
    free_memory: int
    worth: int = 1_000_000_000

    @classmethod
    def here(cls) -> Machine:
        """Return this one."""
        return cls(cpu_count(), _free_memory())


def suitable_crew(
    job: Job, facts: ModelFacts, asked: int | None, machine: Machine | None = None
) -> Crew:
    """Return as many processes as were asked for, else as CPUs, work and memory allow.

    machine: None for this one.
    """
    if asked is not None:
        return Crew(asked)
    machine = machine or Machine.here()
    rows = sum(map(job.rows, range(len(job.prompts))))
    worth = min(machine.cpus, max(1, rows * facts.weights // machine.worth))
    fitting = max(1, machine.free_memory // (_MEMORY_FACTOR * facts.file_bytes + _MEMORY_BASE))
    if fitting >= worth:
        return Crew(worth)
    note = f"{fitting} of {worth} processes, because memory holds no more copies of the model"
    return Crew(fitting, machine.cpus // fitting, note)


def _share(
    job: Job, tasks: list[Task], threads: int, jobs: int, children: Children, listener: Listener
) -> None:
    environment = child_environment(OMP_NUM_THREADS=str(threads))
    for number in range(1, jobs + 1):
        name = f"process {number} (loading {job.model})"
        children.start(WORKER, environment, name=name, advice=": try fewer with --jobs")
    for child in children.all:
        child.send((job, threads))
    waiting = list(reversed(tasks))
    numbers = {child: number for number, child in enumerate(children.all, 1)}
    for child, (kind, value) in children.messages():
        if kind == CHOSEN:
            listener.chosen(value)
        elif kind == FED:
            listener.fed(value)
        else:  # READY or FINISHED: it can take another
            if kind == FINISHED:
                listener.finished(value)
            task = waiting.pop() if waiting else None
            if task is not None:
                child.name = f"process {numbers[child]} (prompts {_listed(task, job)})"
            child.send(task)


def _listed(task: Task, job: Job) -> str:
    names = [job.prompt_names[prompt] for prompt in task.prompts]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _free_memory() -> int:
    """Bytes that are free or can be freed; a great many where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 1 << 60
