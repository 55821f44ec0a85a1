"""A process that takes tasks of the reference: `python -m bitassay.golden.runs.oracle_worker`.

Its parent passes two descriptors: a connection for tasks and answers, and the read end of a pipe
that nobody writes, which ends when the parent does, however it ends; then this process ends too.
"""

from __future__ import annotations

import signal
import sys
import traceback
from multiprocessing.connection import Connection

import torch

from bitassay.golden.errors import GoldenError
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import Reference, load_reference
from bitassay.golden.runs.child_process import end_with_parent
from bitassay.golden.runs.oracle_tasks import run_task
from bitassay.reference.checkpoints.checkpoint import load_checkpoint

READY, CHOSEN, FED, FINISHED, FAILED = "ready", "chosen", "fed", "finished", "failed"
TOLD = (GoldenError, ValueError, OSError)  # bad input, told in a sentence; others are bugs


def open_model(job: Job) -> Reference:
    """Read a job's model; GoldenError when it is no longer the one the job was made for."""
    checkpoint = load_checkpoint(job.model)
    if checkpoint.digest != job.model_digest:
        raise GoldenError(f"model {job.model} was changed meanwhile: run this again")
    draft = None if job.draft is None else load_checkpoint(job.draft)
    if draft and draft.digest != job.draft_digest:
        raise GoldenError(f"draft head {job.draft} was changed meanwhile: run this again")
    return load_reference(checkpoint, job.contract, draft)


def _serve(connection: Connection) -> None:
    job: Job = connection.recv()
    model = open_model(job)
    connection.send((READY, None))
    while (task := connection.recv()) is not None:
        arrays = run_task(
            model,
            job,
            task,
            lambda tokens: connection.send((CHOSEN, tokens)),
            lambda rows: connection.send((FED, rows)),
        )
        connection.send((FINISHED, arrays))


def _main(descriptor: int, lifeline: int, threads: int) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    end_with_parent(lifeline)
    torch.set_num_threads(threads)
    connection = Connection(descriptor)
    try:
        _serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 1  # the parent is gone
    except Exception as error:
        told = isinstance(error, TOLD)
        connection.send((FAILED, str(error) if told else traceback.format_exc()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*map(int, sys.argv[1:])))
