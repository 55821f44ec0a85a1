"""Which classes run a model, and what a golden notes of it, by config.json's model_type."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bitassay.reference.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    config_dtype,
    config_int,
)
from bitassay.reference.generation import OnTokens, Progress
from bitassay.reference.spec.contract import Contract, operations
from bitassay.reference.trace import Trace

TRANSFORMERS = ("llama", "qwen3")


class Reference(Protocol):
    """What every model of the reference can do; see ContextLM, whose methods these are."""

    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        progress: Progress,
        on_tokens: OnTokens | None = None,
        /,
    ) -> Sequence[Trace]:
        """Generate a step of all prompts at a time; on_tokens: called with what each chose."""

    def replay_many(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        progress: Progress,
        /,
    ) -> Sequence[Trace]:
        """Say what is chosen after every recorded token."""


@dataclass(frozen=True)
class ModelFacts:
    """What a golden notes of a model, and how large it is.

    operations: the fingerprinted ones, in running order. logits_dtype: as the contract leaves
    them. rotary_table: digest, "" without one. weights: how many; file_bytes: what they take.
    draft_operations: those of the draft head, none without one.
    """

    operations: tuple[str, ...]
    logits_dtype: str
    vocab_size: int
    rotary_table: str
    weights: int
    file_bytes: int
    draft_operations: tuple[str, ...] = ()

    @property
    def has_cache(self) -> bool:
        """Whether it keeps keys and values of what it was fed: every transformer does."""
        return self.rotary_table != ""


def model_facts(
    checkpoint: Checkpoint, contract: Contract, draft: Checkpoint | None = None
) -> ModelFacts:
    """Return the facts of a checkpoint, and of the draft head that goes with it, if any.

    Raises CheckpointError for a model_type that is not supported, and for a head that does not fit.
    """
    model_type = _model_type(checkpoint)
    layers, rotary_table = 0, ""
    draft_operations: tuple[str, ...] = ()
    if draft:
        _require_transformer(checkpoint)
    if model_type in TRANSFORMERS:
        from bitassay.reference.checkpoints.model_config import ModelConfig

        config = ModelConfig.from_checkpoint(checkpoint)
        layers, rotary_table = config.num_layers, config.rotary_table.digest
        if draft:
            from bitassay.reference.checkpoints.eagle_config import EagleConfig

            head = EagleConfig.from_checkpoint(draft, config)
            draft_operations = head.operations
            rotary_table = _of_both(rotary_table, head.rotary_table.digest)
    dtype = torch.float32 if contract.logits_dtype == "float32" else config_dtype(checkpoint)
    tensors = [*checkpoint.tensors.values(), *(draft.tensors.values() if draft else ())]
    return ModelFacts(
        operations=operations(model_type, layers),
        logits_dtype=str(dtype).removeprefix("torch."),
        vocab_size=config_int(checkpoint, "vocab_size"),
        rotary_table=rotary_table,
        weights=sum(tensor.numel() for tensor in tensors),
        file_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        draft_operations=draft_operations,
    )


def load_reference(
    checkpoint: Checkpoint, contract: Contract, draft: Checkpoint | None = None
) -> Reference:
    """Return the reference's model for a checkpoint, with the draft head that goes with it."""
    if draft:
        from bitassay.reference.eagle import Eagle

        _require_transformer(checkpoint)
        eagle: Reference = Eagle.from_pretrained(checkpoint, draft, contract=contract)
        return eagle
    if _model_type(checkpoint) in TRANSFORMERS:
        from bitassay.reference.model import load_model

        model: Reference = load_model(checkpoint, contract=contract)
        return model
    from bitassay.reference.context_lm import ContextLM

    return ContextLM.from_pretrained(checkpoint, contract=contract)


def is_transformer(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint's model is a transformer, which keeps keys and values.

    Raises CheckpointError for a model_type that is not supported.
    """
    return _model_type(checkpoint) in TRANSFORMERS


def _of_both(target: str, head: str) -> str:
    """One digest of two rotary tables, the target's where the head has the same."""
    return target if head == target else hashlib.sha256((target + head).encode()).hexdigest()


def _require_transformer(checkpoint: Checkpoint) -> None:
    if (found := _model_type(checkpoint)) not in TRANSFORMERS:
        raise CheckpointError(
            f"{checkpoint.path}: expected a target of one of {', '.join(TRANSFORMERS)} for a draft "
            f"head, found {found}: omit the head"
        )


def _model_type(checkpoint: Checkpoint) -> str:
    found = checkpoint.config.get("model_type")
    known = ("context-lm", *TRANSFORMERS)
    if found not in known:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: expected model_type to be one of "
            f"{', '.join(known)}, found {found!r}: this model is not supported"
        )
    return str(found)
