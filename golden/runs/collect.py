"""Traces of a job's prompts as one stream."""

from __future__ import annotations

import numpy as np

from bitassay.golden.errors import GoldenError
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import ModelFacts
from bitassay.golden.streams.token_stream import ALL_ARRAYS, ARRAYS, TokenStream, from_parts, ragged
from bitassay.golden.streams.traces import Arrays


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
