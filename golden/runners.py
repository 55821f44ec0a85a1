"""What is to be run, what kernels make of it, and how traces become a stream.

Each way runs exactly what it is named after or raises; none falls back to another.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bitassay.reference.contract import DRAFT_DEPTH, Contract, default_contract
from bitassay.reference.trace import Drafts

from .drafts import DRAFT_ARRAYS
from .errors import GoldenError
from .loading import ModelFacts, load_engine
from .stream import ALL_ARRAYS, ARRAYS, TokenStream, from_parts, ragged

Progress = Callable[[int, int], None]  # called with what is done and what there is in all
Arrays = dict[str, np.ndarray[Any, Any]]  # one prompt's trace, in a golden's dtypes


@dataclass(frozen=True)
class Job:
    """What to continue: prompts by name, for `steps` tokens each, under an architecture.

    model_digest: what the model must be when it is read. batch_size: sequences at once, None for
    all; shuffle: seed of the order in which an engine takes the prompts, None for as given;
    chunk_size: prompt tokens an engine takes a step, None for all. None of these may change a bit.
    draft: the draft head, if any; draft_digest: what it must be when it is read.
    """

    model: Path
    model_digest: str
    arch: str
    prompt_names: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    steps: int
    batch_size: int | None = None
    shuffle: int | None = None
    chunk_size: int | None = None
    draft: Path | None = None
    draft_digest: str = ""

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

    def rows(self, prompt: int) -> int:
        """How many rows a prompt and its continuation have; the last token is never fed.

        With a draft head its rows count as well: those of its first pass, and of the chains, of
        which only a run tells the number, half of the longest.
        """
        fed = len(self.prompts[prompt]) + self.steps - 1
        return fed if self.draft is None else 2 * fed + self.steps * DRAFT_DEPTH // 2


def run_engine(job: Job, facts: ModelFacts, device: str) -> TokenStream:
    """Generate with the engine on this process's kernels, step by step in batches."""
    model = load_engine(job.model, job.contract, device)
    options: dict[str, Any] = {"batch_size": job.batch_size, "order": job.order}
    if job.chunk_size is not None:
        options["chunk_size"] = job.chunk_size
    prompts = [list(prompt) for prompt in job.prompts]
    traces = model.generate(prompts, job.steps, **options)
    return collect([trace_arrays(trace) for trace in traces], job, facts)


def collect(traces: list[Arrays], job: Job, facts: ModelFacts) -> TokenStream:
    """Return the traces of a job's prompts, in their order, as one stream."""
    if len(traces) != len(job.prompts):
        raise GoldenError(f"expected {len(job.prompts)} traces, one a prompt, found {len(traces)}")
    arrays = ragged([list(prompt) for prompt in job.prompts])
    wanted = ARRAYS if job.draft is None else ALL_ARRAYS
    for name in wanted.keys() - arrays.keys():
        arrays[name] = np.stack([trace[name] for trace in traces])
    labels = {
        "operations": facts.operations,
        "prompt_names": job.prompt_names,
        "logits_dtype": facts.logits_dtype,
        "vocab_size": facts.vocab_size,
    }
    if job.draft is not None:
        labels["draft_operations"] = facts.draft_operations
    return from_parts(arrays, labels)


def trace_arrays(trace: Any) -> Arrays:
    """Return a trace's tensors in a golden's dtypes: int64 that hold unsigned bits as unsigned.

    Drafts of an EagleTrace are taken along; those of an engine's rounds are not (engine_way).
    """
    names = [name for name in ARRAYS if not name.startswith("prompt_") or "finger" in name]
    tensors = {name: getattr(trace, name) for name in names}
    drafts = getattr(trace, "drafts", None)
    if isinstance(drafts, Drafts):
        own = {field.name: getattr(drafts, field.name) for field in fields(drafts)}
        tensors |= {name: own[name.removeprefix("draft_")] for name in DRAFT_ARRAYS}
    return {name: as_stored(x.cpu().numpy(), name) for name, x in tensors.items()}


def as_stored(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Return an array of a trace in the dtype in which a golden has the array of that name."""
    dtype = ALL_ARRAYS[name][0]
    if array.dtype == np.int64 and dtype == "<u8":
        return array.view(dtype)
    cast = array.astype(dtype)
    if (cast.astype(array.dtype) != array).any():
        raise GoldenError(f"a trace holds values that do not fit {np.dtype(dtype)}")
    return cast
