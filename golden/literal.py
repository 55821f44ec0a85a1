"""The literal loop of drafts and verification, with what it does not come to from a replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitassay.reference.generation import Progress
from bitassay.reference.rounds import draft_count

from .drafts import compared_fingerprints
from .runners import Arrays, trace_arrays

LITERAL_DRAFTS = 3  # draft tokens a round


def literal(model: Any, prompt: Sequence[int], steps: int, progress: Progress) -> Arrays:
    """Return the arrays of one prompt as the loop itself gives them, round by round.

    A golden has drafts after every token, and the loop drafts only where a round begins. What the
    loop said stands; the rest is replayed from its tokens. So a comparison sees every bit of the
    loop, and where it contradicts the replay.
    """
    said = trace_arrays(model.generate(prompt, steps, LITERAL_DRAFTS))
    tokens = said["tokens"].tolist()
    (trace,) = model.replay_many([prompt], [tokens], progress)
    return overlaid(said, trace_arrays(trace))


def overlaid(said: Arrays, replayed: Arrays) -> Arrays:
    """Return a replay's arrays with what the loop said in their place, wherever it said it."""
    found = said | {name: array.copy() for name, array in replayed.items() if "draft" in name}
    found["accepted"] = replayed["accepted"].copy()
    steps, operations = len(said["tokens"]), said["draft_prompt_fingerprints"].size
    run = []
    for t in np.flatnonzero(said["accepted"] >= 0).tolist():
        drafted, right = draft_count(t, steps, LITERAL_DRAFTS), int(said["accepted"][t])
        run.append((t, drafted, right))
        some = min(drafted, right + 1)
        found["draft_tokens"][t, :some] = said["draft_tokens"][t, :some]
        if right < drafted or replayed["accepted"][t] < right:
            found["accepted"][t] = right
    (there,) = compared_fingerprints([run], steps, operations)
    found["draft_fingerprints"][there] = said["draft_fingerprints"][there]
    if any(drafted for _, drafted, _ in run):
        found["draft_prompt_fingerprints"] = said["draft_prompt_fingerprints"]
    return found
