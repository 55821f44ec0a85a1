"""What steps leave on the device for traces, and gathering it, without waiting, at the end.

A step's outputs are kept until the last request that has a row in them is collected. For S
sequences, K drafts and D operations of the head they take 8 S (18 (K + 1) + K D) bytes: of 64
sequences with 5 drafts, under 100 KiB a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitassay.engine.scheduling.step_plan import Result
from bitassay.engine.trace import TOP

CHOICE = 2 * TOP + 2  # words of a choice: ids, bits, margin, fingerprint of the logits


@dataclass(frozen=True, eq=False)
class StepHandle:
    """A step's outputs on the device, for the sequences that chose, in their order.

    choices: int64 [S, K + 1, CHOICE], the target's row after the last known token, then after
    each draft. draft_fingerprints: int64 [S, K, D], the rows that chose the drafts; None without a
    head.
    """

    choices: Tensor
    draft_fingerprints: Tensor | None


@dataclass(frozen=True, eq=False)
class Collected:
    """One request's outputs on the device: T tokens, and N sets of drafts.

    top_ids int32 [T, 8], top_bits int64 [T, 8], margins int64 [T] as a trace has them; lm_head
    int64 [T]: fingerprints of the logits. drafts: int64 [N, K, D], after each of N results.
    """

    top_ids: Tensor
    top_bits: Tensor
    margins: Tensor
    lm_head: Tensor
    drafts: Tensor | None


def collect(results: Sequence[Result]) -> Collected | None:
    """Return what the results of one request, in their order, left on the device.

    None where nothing is captured, or there are none. Nothing waits for the device.
    """
    handles = [(r.handle, r) for r in results if isinstance(r.handle, StepHandle)]
    if not handles:
        return None
    rows = torch.cat([h.choices[r.row, : r.accepted + 1] for h, r in handles])
    drafts = [h.draft_fingerprints[r.row] for h, r in handles if h.draft_fingerprints is not None]
    return Collected(
        top_ids=rows[:, :TOP].int(),
        top_bits=rows[:, TOP : 2 * TOP].contiguous(),
        margins=rows[:, 2 * TOP].contiguous(),
        lm_head=rows[:, 2 * TOP + 1].contiguous(),
        drafts=torch.stack(drafts) if drafts else None,
    )
