"""Llama and Qwen3, whole and batched on the kernels, over a paged key/value cache."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bitassay.engine.models.batch import Batch
from bitassay.engine.models.decoder_layer import DecoderLayer, Observe, Shared
from bitassay.engine.models.kv_cache import PagedCache
from bitassay.engine.models.ops import Ops, kernel_ops
from bitassay.reference.checkpoints.checkpoint import Checkpoint, load_checkpoint
from bitassay.reference.checkpoints.model_config import ModelConfig
from bitassay.reference.spec.contract import Contract, operations


class CausalLM:
    """A loaded Llama or Qwen3 under one contract, on one device.

    Holds weights alone: keys and values live in the cache that a batch brings along, so one model
    may serve several.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        contract: Contract,
        device: str | torch.device,
        ops: Ops | None = None,
    ) -> None:
        config = ModelConfig.from_checkpoint(checkpoint)
        self.config, self.contract = config, contract
        self.ops = ops = kernel_ops() if ops is None else ops
        self.operations = operations(config.model_type, config.num_layers)
        weights = {name: t.to(device) for name, t in config.weights(checkpoint).items()}
        self.embed_tokens = weights["model.embed_tokens.weight"]
        self.lm_head = weights["lm_head.weight"]
        self.device = self.embed_tokens.device
        ops.check_device(self.device, contract.arch)
        table = config.rotary_table
        shared = Shared(config, contract, ops, table.cos.to(device), table.sin.to(device))
        self.layers = [
            DecoderLayer.load(shared, take(weights, f"model.layers.{i}."))
            for i in range(config.num_layers)
        ]
        # What the rows before each layer, and after the last, are normalised with.
        self._norms = [
            *(_norm_of(layer.input_layernorm) for layer in self.layers),
            weights["model.norm.weight"],
        ]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Checkpoint,
        *,
        contract: Contract,
        device: str | torch.device = "cuda",
        ops: Ops | None = None,
    ) -> CausalLM:
        """Load from a Hugging Face directory or a checkpoint already read.

        device: a CUDA device of the contract's architecture, or the CPU in the emulator. ops:
        what it runs on, None for the kernels. Raises CheckpointError for an unfit checkpoint,
        RuntimeError for another device.
        """
        checkpoint = path if isinstance(path, Checkpoint) else load_checkpoint(path)
        return cls(checkpoint, contract, device, ops)

    def new_cache(self, blocks: int) -> PagedCache:
        """Return a cache of so many blocks of 16 positions for this model."""
        return PagedCache.empty(self.config, blocks, self.device)

    def forward(self, batch: Batch, observe: Observe | None = None) -> Tensor:  # -> [T, H]
        """Return the batch's rows after the final norm; keys and values go into its cache.

        Rows of any sequences, prompts and decoding mixed; a row's bits depend on its own sequence
        alone. observe: called with each operation's name, as `contract.operations` has it, and
        its rows, which nothing overwrites later. Nothing waits for the device: `check` tells of
        ids, positions and slots that were out of range.
        """
        tell = observe or _nothing
        eps, run = self.config.rms_norm_eps, self.ops
        residual = run.embedding(batch.ids, self.embed_tokens)
        tell("embedding", residual)
        normed = run.rms_norm(residual, self._norms[0], eps=eps)
        tell("layers.0.input_layernorm", normed)
        for i, layer in enumerate(self.layers):
            update, residual = layer.forward(
                normed, residual, batch, i, within(f"layers.{i}.", observe)
            )
            normed, residual = run.add_rms_norm(update, residual, self._norms[i + 1], eps=eps)
            tell(f"layers.{i}.mlp_residual", residual)
            last = i + 1 == len(self.layers)
            tell("norm" if last else f"layers.{i + 1}.input_layernorm", normed)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:  # [R, H] -> [R, V]
        """Return the logits of rows of `forward`."""
        return self.ops.lm_head(hidden, self.lm_head, contract=self.contract)

    def check(self) -> None:
        """Wait for the device; ValueError for an id, position or slot out of range since last."""
        self.ops.check()


def take(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors below a prefix out of weights, which frees those that will be packed."""
    names = [name for name in weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): weights.pop(name) for name in names}


def within(prefix: str, observe: Observe | None) -> Observe:
    """Return an observer that is told of names below a prefix."""
    if observe is None:
        return _nothing
    return lambda name, rows: observe(prefix + name, rows)


def _norm_of(weight: Tensor | None) -> Tensor:
    """Return the weight of a norm that every layer of these models has."""
    if weight is None:
        raise ValueError("expected a layer with an input_layernorm, found none")
    return weight


def _nothing(name: str, rows: Tensor) -> None:
    """Observe nothing."""
