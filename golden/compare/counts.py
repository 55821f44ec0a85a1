"""How many values of two streams were compared, and how many of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitassay.golden.compare.diff_drafts import DraftMasks

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Counts:
    """How many values there are, or how many of them differ; None for kinds not compared.

    logits: of which the bits are compared. drafts: drafted tokens. acceptances: counts of accepted
    drafts. top_ids, margins: those of rows of which no logits are compared, None otherwise.
    """

    streams: int
    tokens: int
    logits: int | None = None
    fingerprints: int | None = None
    drafts: int | None = None
    acceptances: int | None = None
    top_ids: int | None = None
    margins: int | None = None


def count(streams: int, arrays: Mapping[str, Mask], drafts: DraftMasks | None) -> Counts:
    """Count the values that are marked, in the arrays that both streams have.

    arrays: masks by the arrays' names, tokens [S, T] and so on. A logit counts once, whether its
    id or its bits are marked.
    """
    ids, bits, margins = (arrays.get(name) for name in ("top_ids", "top_bits", "margins"))
    logits = bits if bits is None or ids is None else bits | ids
    alone = bits is None
    fingerprints = [arrays.get("fingerprints"), arrays.get("prompt_fingerprints")]
    if drafts is not None:
        fingerprints += [drafts.fingerprints, drafts.folds]
    there = [mask for mask in fingerprints if mask is not None]
    return Counts(
        streams=streams,
        tokens=int(arrays["tokens"].sum()),
        logits=_marked(logits),
        fingerprints=sum(int(mask.sum()) for mask in there) if there else None,
        drafts=None if drafts is None else _marked(drafts.tokens),
        acceptances=None if drafts is None else _marked(drafts.accepted),
        top_ids=_marked(ids) if alone else None,
        margins=_marked(margins) if alone else None,
    )


def _marked(mask: Mask | None) -> int | None:
    return None if mask is None else int(mask.sum())
