"""Verification: how many drafts the target chose as well, decided on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitassay.engine.step.inputs import Inputs


@dataclass(frozen=True)
class Verified:
    """What S sequences that choose got.

    choices: int64 [S, K + 1], the target's choice after the last known token and each draft.
    accepted: int64 [S], leading drafts that equal the choices. base: int64 [S], the step's row
    that chose the last of accepted + 1 tokens. position: int64 [S], where that row stands.
    """

    choices: Tensor
    accepted: Tensor
    base: Tensor
    position: Tensor


def verify(x: Inputs, chosen: Tensor) -> Verified:
    """Return what is accepted; chosen: int64 [C], the choices of the choosing rows."""
    tails, choosing = x["tails"], x["choosing"]
    choices = chosen[tails]
    drafts = x["ids"][choosing[tails[:, 1:]]]
    depth = torch.arange(drafts.shape[1], device=drafts.device)
    equal = (choices[:, :-1] == drafts) & (depth < x["drafted"][:, None])
    accepted = equal.long().cumprod(1).sum(1)
    base = choosing[tails.gather(1, accepted[:, None])[:, 0]]
    return Verified(choices, accepted, base, x["first"] + accepted)
