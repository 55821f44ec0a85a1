"""What the device does in a step: the target, the choice, verification, drafting.

No line of it waits for the device or depends on a number that lies there, so a CUDA graph may hold
all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.kv_cache import PagedCache
from bitassay.engine.models.top_logits import CHOOSING, choices
from bitassay.engine.step.drafting import Drafting
from bitassay.engine.step.fingerprints import Recorder, RowFingerprints
from bitassay.engine.step.inputs import Inputs
from bitassay.engine.step.verify import verify
from bitassay.kernels.flags import CLEAR, Flag


@dataclass(frozen=True)
class Outputs:
    """What a step leaves on the device.

    answer: int64 [S (K + 1) + S + S K + 2], what the host is told: choices, accepted, drafts, and
    the first NaN among the target's logits and among the head's. choices: int64 [S, K + 1, 18]
    and draft_fingerprints: int64 [S, K, D] for traces, None where nothing is captured.
    """

    answer: Tensor
    choices: Tensor | None = None
    draft_fingerprints: Tensor | None = None


class DeviceStep:
    """The model and, with K above 0, the drafting, over one cache; called once a step."""

    def __init__(
        self,
        model: CausalLM,
        cache: PagedCache,
        row_fingerprints: RowFingerprints | None,
        drafting: Drafting | None,
        hidden_operations: tuple[str, ...],
    ) -> None:
        self._model, self._cache, self._row_fingerprints = model, cache, row_fingerprints
        self._drafting, self._wanted = drafting, hidden_operations
        self._recorder = None
        if row_fingerprints is not None:
            self._recorder = Recorder(model.ops, model.operations, model.device)
        self._nans = Flag()  # its rows: those that choose

    def __call__(self, x: Inputs) -> Outputs | None:
        """Run a step and return its outputs; None where no sequence chooses."""
        kept: dict[str, Tensor] = {}
        recorder = self._recorder
        if recorder is not None and self._row_fingerprints is not None:
            recorder.to(self._row_fingerprints.rows, x["slots"])

        def observe(name: str, rows: Tensor) -> None:
            if name in self._wanted:
                kept[name] = rows
            if recorder is not None:
                recorder(name, rows)

        rows = self._model.forward(x.batch(x["ids"], self._cache), observe)
        if recorder is not None:
            recorder.flush()
        parts = [kept[name] for name in self._wanted]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) if parts else rows
        outputs = None
        if x.sizes.tails:
            outputs = self._choose(x, rows, hidden)
        elif self._drafting is not None:
            self._drafting.follow(x, hidden)
        if recorder is not None:
            recorder.join()
        return outputs

    def _choose(self, x: Inputs, rows: Tensor, hidden: Tensor) -> Outputs:
        flags = [self._nans, *([self._drafting.nans] if self._drafting is not None else [])]
        words = [flag.on(rows.device) for flag in flags]
        for word in words:
            word.fill_(CLEAR)
        if x.sizes.choosing < x.sizes.rows:
            rows = rows.index_select(0, x["choosing"])
        chosen, details = self._choices(rows)
        verified = verify(x, chosen)
        drafts, draft_fingerprints = chosen.new_empty(x.sizes.tails, 0), None
        if self._drafting is not None:
            drafts, draft_fingerprints = self._drafting.draft(x, chosen, hidden, verified)
        answer = [verified.choices.flatten(), verified.accepted, drafts.flatten(), *words]
        if details is not None:
            details = details[x["tails"]]
        return Outputs(torch.cat(answer), details, draft_fingerprints)

    def _choices(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:  # -> [C], [C, 18]
        """Return what rows choose, and the details for traces, a part of the rows at a time."""
        run, chosen, details = self._model.ops, [], []
        for first in range(0, len(rows), CHOOSING):
            logits = self._model.logits(rows[first : first + CHOOSING])
            if self._row_fingerprints is None:
                _, ids, _ = run.decide(logits, 2, nans=self._nans, first_row=first)
                chosen.append(ids[:, 0])
                continue
            _, top_ids, top_bits, margins = choices(run, logits, self._nans, first)
            chosen.append(top_ids[:, 0].long())
            last = torch.stack([margins, run.fingerprint_rows(logits)], dim=1)
            details.append(torch.cat([top_ids.long(), top_bits, last], dim=1))
        return torch.cat(chosen), torch.cat(details) if details else None
