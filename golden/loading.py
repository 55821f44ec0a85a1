"""Which classes run a model, and what a golden notes of it, by config.json's model_type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitassay.reference.checkpoint import (
    Checkpoint,
    CheckpointError,
    config_dtype,
    config_int,
    load_checkpoint,
)
from bitassay.reference.contract import Contract, operations
from bitassay.reference.generation import Progress
from bitassay.reference.trace import Trace

TRANSFORMERS = ("llama", "qwen3")


class Reference(Protocol):
    """What every model of the reference can do; see ContextLM, whose methods these are."""

    def logits(self, hidden: Tensor, /) -> Tensor:
        """Return the logits of the rows that choose; asked for once a step."""

    def generate_many(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, progress: Progress, /
    ) -> list[Trace]:
        """Generate a step of all prompts at a time."""

    def replay_many(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        progress: Progress,
        /,
    ) -> list[Trace]:
        """Say what is chosen after every recorded token."""


@dataclass(frozen=True)
class ModelFacts:
    """What a golden notes of a model, and how large it is.

    operations: the fingerprinted ones, in running order. logits_dtype: as the contract leaves
    them. rotary_table: digest, "" without one. weights: how many; file_bytes: what they take.
    """

    operations: tuple[str, ...]
    logits_dtype: str
    vocab_size: int
    rotary_table: str
    weights: int
    file_bytes: int

    @property
    def has_cache(self) -> bool:
        """Whether it keeps keys and values of what it was fed: every transformer does."""
        return self.rotary_table != ""


def model_facts(checkpoint: Checkpoint, contract: Contract) -> ModelFacts:
    """Return the facts of a checkpoint; CheckpointError for a model_type that is not supported."""
    model_type = _model_type(checkpoint)
    layers, rotary_table = 0, ""
    if model_type in TRANSFORMERS:
        from bitassay.reference.config import ModelConfig

        config = ModelConfig.from_checkpoint(checkpoint)
        layers, rotary_table = config.num_layers, config.rotary_table.digest
    dtype = torch.float32 if contract.logits_dtype == "float32" else config_dtype(checkpoint)
    return ModelFacts(
        operations=operations(model_type, layers),
        logits_dtype=str(dtype).removeprefix("torch."),
        vocab_size=config_int(checkpoint, "vocab_size"),
        rotary_table=rotary_table,
        weights=sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        file_bytes=sum(t.numel() * t.element_size() for t in checkpoint.tensors.values()),
    )


def load_reference(checkpoint: Checkpoint, contract: Contract) -> Reference:
    """Return the reference's model for a checkpoint."""
    if _model_type(checkpoint) in TRANSFORMERS:
        from bitassay.reference.model import load_model

        model: Reference = load_model(checkpoint, contract=contract)
        return model
    from bitassay.reference.context_lm import ContextLM

    return ContextLM.from_pretrained(checkpoint, contract=contract)


def load_engine(path: Path, contract: Contract, device: str) -> Any:
    """Return the engine's model for a directory; imports triton, which has one mode a process."""
    checkpoint = load_checkpoint(path)
    if _model_type(checkpoint) in TRANSFORMERS:
        from bitassay.engine.model import CausalLM

        return CausalLM.from_pretrained(path, contract=contract, device=device)
    from bitassay.engine.context_lm import ContextLM

    return ContextLM.from_pretrained(path, contract=contract, device=device)


def _model_type(checkpoint: Checkpoint) -> str:
    found = checkpoint.config.get("model_type")
    known = ("context-lm", *TRANSFORMERS)
    if found not in known:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: expected model_type to be one of "
            f"{', '.join(known)}, found {found!r}: this model is not supported"
        )
    return str(found)
