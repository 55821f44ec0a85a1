"""The ways to obtain a stream: the reference, kernels in the interpreter, kernels on a GPU.

Each runs exactly what it is named after or raises; none falls back to another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitassay.reference.checkpoint import Checkpoint
from bitassay.reference.context_lm import ContextLM
from bitassay.reference.contract import Contract, default_contract, operations

from .errors import GoldenError
from .stream import ARRAYS, TokenStream, ragged

Progress = Callable[[int, int], None]  # called with what is done and what there is in all


@dataclass(frozen=True)
class Job:
    """What to continue: prompts by name, for `steps` tokens each, under an architecture.

    batch_size: sequences at once, None for all; shuffle: seed of the order in which an engine
    takes the prompts, None for as given. Neither may change a bit.
    """

    model: Path
    arch: str
    prompt_names: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    steps: int
    batch_size: int | None = None
    shuffle: int | None = None

    @property
    def contract(self) -> Contract:
        """The contract of this build for the architecture."""
        return default_contract(self.arch)

    @property
    def order(self) -> list[int] | None:
        """The prompts' order for an engine; None as given."""
        if self.shuffle is None:
            return None
        return random.Random(self.shuffle).sample(range(len(self.prompts)), len(self.prompts))


def generate(job: Job, checkpoint: Checkpoint, progress: Progress) -> TokenStream:
    """Generate with the reference, one step at a time, all prompts in one product per step."""
    model = ContextLM.from_pretrained(checkpoint, contract=job.contract)
    traces = model.generate_many(job.prompts, job.steps, progress)
    return collect([_arrays(trace) for trace in traces], job, checkpoint)


def generate_sequentially(job: Job, checkpoint: Checkpoint, progress: Progress) -> TokenStream:
    """Generate with the reference, one prompt and one token at a time: the sequential truth."""
    model = ContextLM.from_pretrained(checkpoint, contract=job.contract)
    traces = []
    for number, prompt in enumerate(job.prompts):
        progress(number, len(job.prompts))
        traces.append(_arrays(model.generate(prompt, job.steps)))
    progress(len(job.prompts), len(job.prompts))
    return collect(traces, job, checkpoint)


def replay(
    job: Job, checkpoint: Checkpoint, tokens: Sequence[Sequence[int]], progress: Progress
) -> TokenStream:
    """Ask the reference for its choice after every recorded token, all rows in one product.

    A row sees only tokens before it, so if every choice is the recorded token, the record is what
    `generate` gives, by induction over the steps.
    """
    model = ContextLM.from_pretrained(checkpoint, contract=job.contract)
    progress(0, 1)
    traces = model.replay_many(job.prompts, tokens)
    progress(1, 1)
    return collect([_arrays(trace) for trace in traces], job, checkpoint)


def run_engine(job: Job, checkpoint: Checkpoint, device: str) -> TokenStream:
    """Generate with the engine on this process's kernels, step by step in batches."""
    from bitassay.engine.context_lm import ContextLM as Engine  # imports triton: one mode a process

    model = Engine.from_pretrained(job.model, contract=job.contract, device=device)
    prompts = [list(prompt) for prompt in job.prompts]
    traces = model.generate(prompts, job.steps, batch_size=job.batch_size, order=job.order)
    return collect([_arrays(trace) for trace in traces], job, checkpoint)


def collect(
    traces: list[dict[str, np.ndarray[Any, Any]]], job: Job, checkpoint: Checkpoint
) -> TokenStream:
    """Return the traces of a job's prompts, in their order, as one stream."""
    if len(traces) != len(job.prompts):
        raise GoldenError(f"expected {len(job.prompts)} traces, one a prompt, found {len(traces)}")
    arrays = ragged([list(prompt) for prompt in job.prompts])
    for name in ARRAYS.keys() - arrays.keys():
        arrays[name] = np.stack([trace[name] for trace in traces])
    logits_dtype = "float32"
    if job.contract.logits_dtype == "weight":
        logits_dtype = str(checkpoint.tensors["lm_head.weight"].dtype).removeprefix("torch.")
    return TokenStream(
        **arrays,
        operations=operations(checkpoint.config["model_type"]),
        prompt_names=job.prompt_names,
        logits_dtype=logits_dtype,
        vocab_size=checkpoint.config["vocab_size"],
    )


def _arrays(trace: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A trace's tensors in a golden's dtypes: int64 that hold unsigned bits become unsigned."""
    names = [name for name in ARRAYS if not name.startswith("prompt_") or "finger" in name]
    arrays = {name: getattr(trace, name).cpu().numpy() for name in names}
    return {name: _cast(array, ARRAYS[name][0]) for name, array in arrays.items()}


def _cast(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if array.dtype == np.int64 and dtype == "<u8":
        return array.view(dtype)
    cast = array.astype(dtype)
    if (cast.astype(array.dtype) != array).any():
        raise GoldenError(f"a trace holds values that do not fit {np.dtype(dtype)}")
    return cast
