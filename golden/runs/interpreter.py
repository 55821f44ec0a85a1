"""Runs kernels in the GPU-emulating interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported and the emulation has one architecture a process,
so the parent starts `python -m bitassay.golden.runs.interpreter` and compares what it writes: into
a file without a name, so that nothing stays if both are killed.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from bitassay.golden.errors import CannotRunError
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import ModelFacts, model_facts
from bitassay.golden.runs.child_process import end_with_parent, environment, lifeline
from bitassay.golden.runs.collect import run_engine
from bitassay.golden.streams.token_stream import ARRAYS, TokenStream, from_parts
from bitassay.reference.checkpoints.checkpoint import load_checkpoint
from bitassay.reference.spec.arch import EMULATED

# Roughly what the interpreter takes: products of weights and rows in a second, and seconds for an
# operation of one step, however few its rows.
_MULTIPLY_ADDS, _OPERATION = 20_000_000, 0.09


def run_interpreter(job: Job) -> TokenStream:
    """Return what the engine generates on kernels under the emulation of the job's architecture.

    Raises CannotRunError for an architecture that is not emulated, and, with the last lines of
    what the process wrote, when it fails.
    """
    if job.arch not in EMULATED:
        raise CannotRunError(
            f"kernels cannot run as {job.arch} in the interpreter, which emulates "
            f"{' and '.join(EMULATED)}: use --with reference, or --with gpu on such a GPU"
        )
    with tempfile.TemporaryFile() as answer, lifeline() as line:
        passed = (line, answer.fileno())
        process = subprocess.run(
            [sys.executable, "-m", "bitassay.golden.runs.interpreter", *map(str, passed)],
            env=_environment(job.arch),
            input=json.dumps(asdict(job) | {"model": str(job.model.resolve())}),
            capture_output=True,
            text=True,
            pass_fds=passed,
        )
        if process.returncode != 0 or not answer.seek(0, os.SEEK_END):
            said = "\n  ".join((process.stderr or process.stdout).strip().splitlines()[-8:])
            raise CannotRunError(
                f"kernels in the interpreter as {job.arch} ended with status "
                f"{process.returncode}, and nothing else was run in their place:\n  {said}"
            )
        answer.seek(0)
        return _load(answer)


def estimate(job: Job, facts: ModelFacts) -> str:
    """Return how long it will take, in words, where that is more than a few minutes; else ""."""
    rows = sum(map(job.rows, range(len(job.prompts))))
    batch = job.batch_size or len(job.prompts)
    longest = max(map(len, job.prompts))
    steps = job.steps - 1 + -(-longest // (job.chunk_size or longest))
    launched = -(-len(job.prompts) // batch) * steps * len(facts.operations)
    seconds = rows * facts.weights / _MULTIPLY_ADDS + launched * _OPERATION
    if seconds < 300:
        return ""
    long = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
    return (
        f"about {long} in the interpreter; --prompts N and --tokens T compare a part of it that "
        "takes less"
    )


def _environment(arch: str) -> dict[str, str]:
    """The environment with the emulation switched on."""
    return environment(
        TRITON_INTERPRET="1",
        BITASSAY_ARCH=arch,
        BITASSAY_ALLOW="",  # a check allows nothing whose bits are undefined
    )


def _main(line: int, answer: int) -> None:
    end_with_parent(line)
    importlib.import_module("bitassay.emulator")  # BITASSAY_ARCH switches it on
    fields = json.load(sys.stdin)
    prompts = tuple(map(tuple, fields.pop("prompts")))
    names = tuple(fields.pop("prompt_names"))
    job = Job(**fields, prompts=prompts, prompt_names=names)
    job = replace(job, model=Path(job.model))
    facts = model_facts(load_checkpoint(job.model), job.contract)
    stream = run_engine(job, facts, device="cpu")
    with open(answer, "wb") as file:
        _save(stream, file)


def _save(stream: TokenStream, file: IO[bytes]) -> None:
    labels = json.dumps(stream.labels)
    values: dict[str, Any] = {**stream.arrays, "labels": np.array(labels)}
    np.savez(file, **values)


def _load(file: IO[bytes]) -> TokenStream:
    with np.load(file, allow_pickle=False) as data:
        arrays = {name: data[name] for name in ARRAYS}
        return from_parts(arrays, json.loads(str(data["labels"])))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
