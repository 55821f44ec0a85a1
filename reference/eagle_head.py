"""An EAGLE or EAGLE-3 draft head: what one row of it computes, whichever row that is."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.reference.checkpoints.checkpoint import Checkpoint
from bitassay.reference.checkpoints.eagle_config import EagleConfig
from bitassay.reference.decoder_layer import Attend, DecoderLayer, Linear, readiness
from bitassay.reference.embedding import embedding
from bitassay.reference.generation import Observe
from bitassay.reference.linear import lm_head
from bitassay.reference.model import CausalLM
from bitassay.reference.norm import add, add_rms_norm, rms_norm


class EagleHead:
    """A loaded head beside its target, under the target's contract.

    Raises CheckpointError for a head that does not fit the target or has unfit weights.
    """

    def __init__(self, checkpoint: Checkpoint, target: CausalLM) -> None:
        self.config = EagleConfig.from_checkpoint(checkpoint, target.config)
        self.contract, self.operations = target.contract, self.config.operations
        weights = self.config.weights(checkpoint)
        ready = readiness(weights, self.contract)
        self._embed_tokens = weights.get("embed_tokens.weight", target.embed_tokens)
        self._fc = Linear(ready(weights["fc.weight"]), weights.get("fc.bias"), self.contract)
        self._layer = DecoderLayer.of(weights, "layer.", self.config, self.contract, ready)
        self._target = target
        self._third = self.config.kind == "eagle3"
        if self._third:
            self._input_layernorm = weights["layer.input_layernorm.weight"]
            self._hidden_norm = weights["layer.hidden_norm.weight"]
            self._norm = weights["norm.weight"]
            self._lm_head = ready(weights["lm_head.weight"])
            self._target_ids = weights["d2t"] + torch.arange(self.config.draft_vocab_size)

    def taken(self, hidden: Tensor) -> Tensor:  # [R, H] or [R, 3 * H] -> [R, H]
        """Return the target's rows (`hidden_operations`, side by side) as rows' hidden input."""
        return self._fc(hidden) if self._third else hidden

    def rows(  # [R], [R, H], [R] -> [R, H], [R, H]
        self,
        ids: Tensor,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend,
        observe: Observe | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the rows' own hidden output, which a chain's next row takes, and `logits`' input.

        hidden: `taken` of the target's rows, or the output of rows before. observe: see `Observe`.
        """
        note = observe or (lambda name, rows: None)

        def draft(name: str, rows: Tensor) -> None:
            note(f"draft.{name}", rows)

        embedded = embedding(ids, self._embed_tokens)
        draft("embedding", embedded)
        if self._third:
            return self._eagle3(embedded, hidden, positions, attend, draft)
        x = self._fc(torch.cat([embedded, hidden], dim=1))
        draft("fc", x)
        out = add(*self._layer(x, x, positions, attend, draft))
        draft("hidden", out)
        return out, out

    def logits(self, scored: Tensor) -> Tensor:  # [R, H] -> [R, draft vocabulary]
        """Return the logits of rows, in the dtype the contract names."""
        if self._third:
            return lm_head(scored, self._lm_head, contract=self.contract)
        return self._target.logits(scored)

    def target_ids(self, ids: Tensor) -> Tensor:  # [R] -> [R]
        """Return ids of the head's vocabulary as ids of the target's."""
        return self._target_ids[ids] if self._third else ids

    def _eagle3(
        self, embedded: Tensor, hidden: Tensor, positions: Tensor, attend: Attend, draft: Observe
    ) -> tuple[Tensor, Tensor]:
        eps = self.config.rms_norm_eps
        draft("fc", hidden)
        own = rms_norm(embedded, self._input_layernorm, eps=eps)
        draft("input_layernorm", own)
        normed = rms_norm(hidden, self._hidden_norm, eps=eps)
        draft("hidden_norm", normed)
        x, residual = self._layer(torch.cat([own, normed], dim=1), hidden, positions, attend, draft)
        normed, out = add_rms_norm(x, residual, self._norm, eps=eps)
        draft("hidden", out)
        draft("norm", normed)
        return out, normed
