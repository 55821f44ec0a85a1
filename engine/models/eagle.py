"""EAGLE and EAGLE-3 draft heads, batched, over a paged key/value cache of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bitassay.engine.models.batch import Batch
from bitassay.engine.models.causal_lm import CausalLM, take, within
from bitassay.engine.models.decoder_layer import DecoderLayer, Observe, Shared
from bitassay.engine.models.kv_cache import PagedCache
from bitassay.reference.checkpoints.checkpoint import Checkpoint, load_checkpoint
from bitassay.reference.checkpoints.eagle_config import EagleConfig


class EagleHead:
    """A loaded draft head beside its target, whose ops, contract and tables it shares.

    A row is fed the id after its position and a hidden row: in the first pass what the target
    left of it, in a chain the head's own of the row before. Its keys and values lie in a cache of
    one layer, in the slots of the target's.
    """

    def __init__(self, checkpoint: Checkpoint, target: CausalLM) -> None:
        self.config = config = EagleConfig.from_checkpoint(checkpoint, target.config)
        self.target = target
        self.operations = config.operations
        self.device, self._run, self._contract = target.device, target.ops, target.contract
        weights = {name: t.to(self.device) for name, t in config.weights(checkpoint).items()}
        self._embed_tokens = weights.get("embed_tokens.weight", target.embed_tokens)
        self._lm_head = weights.get("lm_head.weight", target.lm_head)
        self._fc, self._fc_bias = weights["fc.weight"], weights.get("fc.bias")
        self._hidden_norm = weights.get("layer.hidden_norm.weight")
        self._norm = weights.get("norm.weight")
        self._d2t = weights.get("d2t")
        table = config.rotary_table
        shared = Shared(
            config, self._contract, self._run, table.cos.to(self.device), table.sin.to(self.device)
        )
        self._layer = DecoderLayer.load(shared, take(weights, "layer."))

    @classmethod
    def from_pretrained(cls, path: str | Path | Checkpoint, target: CausalLM) -> EagleHead:
        """Load from a head's directory or a checkpoint already read, for a target.

        Raises CheckpointError for an unfit checkpoint, or one that does not fit the target.
        """
        return cls(path if isinstance(path, Checkpoint) else load_checkpoint(path), target)

    def new_cache(self, blocks: int) -> PagedCache:
        """Return a cache of as many blocks as the target's, for the head's layer."""
        return PagedCache.empty(self.config, blocks, self.device)

    def forward(  # [T, F] -> [T, H], [T, H]
        self, batch: Batch, hidden: Tensor, observe: Observe, *, chain: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the rows that `logits` takes and the hidden rows that a chain goes on with.

        batch: its ids are those after the rows' positions, its cache the head's. hidden: in the
        first pass the target's rows of `hidden_operations` side by side, in a chain the second
        result of the row before. observe: called with the names of `contract.draft_operations`.
        """
        embedded = self._run.embedding(batch.ids, self._embed_tokens)
        observe("draft.embedding", embedded)
        third = self._hidden_norm is not None
        fed, residual = (self._third if third else self._first)(embedded, hidden, observe, chain)
        update, residual = self._layer.forward(fed, residual, batch, 0, within("draft.", observe))
        if self._norm is None:
            out = self._run.add(update, residual)
            observe("draft.hidden", out)
            return out, out
        eps = self.config.rms_norm_eps
        normed, out = self._run.add_rms_norm(update, residual, self._norm, eps=eps)
        observe("draft.hidden", out)
        observe("draft.norm", normed)
        return normed, out

    def logits(self, rows: Tensor) -> Tensor:  # [R, H] -> [R, draft vocabulary]
        """Return the logits of rows of `forward`."""
        return self._run.lm_head(rows, self._lm_head, contract=self._contract)

    def token_ids(self, draft_ids: Tensor) -> Tensor:  # [R] -> [R]
        """Return the target's ids of places among the logits."""
        return draft_ids if self._d2t is None else draft_ids + self._d2t[draft_ids]

    def _first(
        self, embedded: Tensor, hidden: Tensor, observe: Observe, chain: bool
    ) -> tuple[Tensor, Tensor]:
        """Return what EAGLE's layer is fed, and its residual stream: the same, without a norm."""
        x = self._project(torch.cat([embedded, hidden], dim=1))
        observe("draft.fc", x)
        return x, x

    def _third(
        self, embedded: Tensor, hidden: Tensor, observe: Observe, chain: bool
    ) -> tuple[Tensor, Tensor]:
        """Return what EAGLE-3's layer is fed, and its residual stream: the hidden input."""
        eps, run = self.config.rms_norm_eps, self._run
        hidden = hidden if chain else self._project(hidden)
        observe("draft.fc", hidden)
        fed = embedded.new_empty(len(embedded), 2 * embedded.shape[1])
        left, right = fed.chunk(2, dim=1)
        run.rms_norm(embedded, self._layer.input_layernorm, eps=eps, out=left)
        observe("draft.input_layernorm", left)
        run.rms_norm(hidden, self._hidden_norm, eps=eps, out=right)
        observe("draft.hidden_norm", right)
        return fed, hidden

    def _project(self, x: Tensor) -> Tensor:
        return self._run.linear(x, self._fc, self._fc_bias, contract=self._contract)
