"""A process that takes tasks of the oracle: it receives its job, then tasks, until it gets None.

It sends (READY, None) when the model is loaded; for each task (CHOSEN, tokens) and (FED, rows) on
the way and (FINISHED, arrays) at its end.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch

from bitassay.golden.inputs.checkpoint_cache import read_checkpoint
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import Reference, load_reference
from bitassay.golden.runs.child_main import run_as_child
from bitassay.golden.runs.oracle_tasks import run_task

READY, CHOSEN, FED, FINISHED = "ready", "chosen", "fed", "finished"


def open_model(job: Job) -> Reference:
    """Read a job's model; GoldenError when it is no longer the one the job was made for."""
    checkpoint = read_checkpoint(job.model, job.model_digest)
    draft = None if job.draft is None else read_checkpoint(job.draft, job.draft_digest)
    return load_reference(checkpoint, job.contract, draft)


def _work(connection: Connection) -> None:
    job, threads = connection.recv()
    torch.set_num_threads(threads)
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


if __name__ == "__main__":
    run_as_child(_work)
