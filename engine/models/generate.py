"""Greedy decoding of many sequences at once, and replaying recorded ones: arguments to a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitassay.engine.models.batch import Segment
from bitassay.engine.models.run import Run
from bitassay.engine.models.schedule import schedule
from bitassay.engine.trace import Trace
from bitassay.engine.validation import Prompts, check_ids, check_lengths, check_order

if TYPE_CHECKING:
    from bitassay.engine.models.causal_lm import CausalLM


def generate(
    model: CausalLM,
    prompts: Prompts,
    max_tokens: int,
    *,
    batch_size: int | None,
    order: Sequence[int] | None,
    chunk_size: int | None,
) -> list[Trace]:
    """Return `CausalLM.generate`'s traces."""
    fed = check_ids(prompts, model.config.vocab_size, "prompt")
    order = list(range(len(fed)) if order is None else order)
    check_order(order, len(fed))
    batch_size = max(1, len(fed)) if batch_size is None else batch_size
    if max_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"expected max_tokens and batch_size of at least 1, found {max_tokens} and {batch_size}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"expected chunk_size of at least 1, or None, found {chunk_size}")
    lengths = [len(ids) for ids in fed]
    check_lengths(lengths, [max_tokens] * len(fed), model.config.max_position_embeddings)
    steps = schedule(lengths, max_tokens, batch_size=batch_size, order=order, chunk_size=chunk_size)
    unknown = [ids + [0] * max_tokens for ids in fed]
    return Run(model, unknown, lengths, list(steps)).traces(keep_choices=True)


def replay(model: CausalLM, prompts: Prompts, tokens: Prompts) -> list[Trace]:
    """Return `CausalLM.replay`'s traces."""
    fed = check_ids(prompts, model.config.vocab_size, "prompt")
    recorded = check_ids(tokens, model.config.vocab_size, "recorded tokens of prompt")
    if len(fed) != len(recorded):
        raise ValueError(f"{len(fed)} prompts, but {len(recorded)} recorded sequences")
    lengths, counts = [len(ids) for ids in fed], [len(ids) for ids in recorded]
    check_lengths(lengths, counts, model.config.max_position_embeddings)
    whole = [[*a, *b] for a, b in zip(fed, recorded, strict=True)]
    step = [Segment(s, 0, len(ids) - 1) for s, ids in enumerate(whole)]
    return Run(model, whole, lengths, [step] if step else []).traces(keep_choices=False)
