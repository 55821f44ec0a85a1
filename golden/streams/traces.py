"""Traces of models as arrays of a stream: one prompt's, in a golden's dtypes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from bitassay.golden.errors import GoldenError
from bitassay.golden.streams.drafts import DRAFT_ARRAYS
from bitassay.golden.streams.token_stream import ALL_ARRAYS, ARRAYS
from bitassay.reference.trace import Drafts

Arrays = dict[str, np.ndarray[Any, Any]]  # one prompt's trace, in a golden's dtypes


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
