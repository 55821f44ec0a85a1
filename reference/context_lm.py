"""The model context-lm: the embeddings of the last tokens, concatenated, then the lm_head.

The sequential truth: `generate` feeds one token at a time. `replay` checks a finished sequence in
one pass: a row sees only the tokens before it, so if each row chooses the token recorded after it,
the record is what `generate` gives, by induction over the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitassay.reference.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    config_dtype,
    config_int,
    load_checkpoint,
    require,
)
from bitassay.reference.decoding import Ids, check_ids, choose
from bitassay.reference.embedding import embedding
from bitassay.reference.fingerprint import fingerprint_rows, fold
from bitassay.reference.generation import OnTokens
from bitassay.reference.linear import lm_head, prepare
from bitassay.reference.spec.contract import Contract
from bitassay.reference.trace import TOP, Trace


class ContextLM:
    """A loaded model under one contract.

    embed_tokens: one table [V, E] per position, the newest token's first. lm_head: [V, C·E] and
    bias [V], with V = vocab_size, C = context_size, E = embedding_size.
    """

    def __init__(self, checkpoint: Checkpoint, contract: Contract) -> None:
        if checkpoint.config.get("model_type") != "context-lm":
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: expected model_type 'context-lm', found "
                f"{checkpoint.config.get('model_type')!r}: name another checkpoint"
            )
        self.contract = contract
        self.vocab_size = config_int(checkpoint, "vocab_size", minimum=TOP)
        self.context_size = config_int(checkpoint, "context_size")
        self.pad_token_id = config_int(checkpoint, "pad_token_id", minimum=0)
        if self.pad_token_id >= self.vocab_size:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: expected pad_token_id below vocab_size "
                f"{self.vocab_size}, found {self.pad_token_id}: correct config.json"
            )
        size = config_int(checkpoint, "embedding_size")
        tables = [f"embed_tokens.{j}.weight" for j in range(self.context_size)]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(tables, (self.vocab_size, size))
        shapes["lm_head.weight"] = (self.vocab_size, self.context_size * size)
        shapes["lm_head.bias"] = (self.vocab_size,)
        tensors = require(checkpoint, shapes, config_dtype(checkpoint))
        self._embed_tokens = [tensors[name] for name in tables]
        weight = tensors["lm_head.weight"]
        # fp32 runs as a chain of fused multiply-adds, which has nothing to prepare.
        self._lm_head = weight if weight.dtype == torch.float32 else prepare(weight, contract)
        self._bias = tensors["lm_head.bias"]

    @classmethod
    def from_pretrained(cls, path: str | Path | Checkpoint, *, contract: Contract) -> ContextLM:
        """Load from a model directory or a checkpoint already read; CheckpointError if unfit."""
        return cls(path if isinstance(path, Checkpoint) else load_checkpoint(path), contract)

    def hidden(self, token_ids: Tensor) -> Tensor:  # [T] -> [T, C * E]
        """Return the concatenated embeddings, newest token first; row i sees tokens <= i."""
        padding = token_ids.new_full((self.context_size - 1,), self.pad_token_id)
        padded = torch.cat([padding, token_ids])
        newest = self.context_size - 1
        columns = [
            embedding(padded[newest - j : newest - j + len(token_ids)], table)
            for j, table in enumerate(self._embed_tokens)
        ]
        return torch.cat(columns, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:  # [T, C * E] -> [T, V]
        """Return the logits of hidden rows, in the dtype the contract names."""
        return lm_head(hidden, self._lm_head, self._bias, contract=self.contract)

    def generate(self, prompt_ids: Ids, max_tokens: int) -> Trace:
        """Decode greedily, one token at a time, exactly max_tokens of them (end of text or not).

        Raises ValueError for max_tokens below 1, and SequenceError for an empty prompt, an id
        outside the vocabulary, and NaN among the logits.
        """
        return self.generate_many([prompt_ids], max_tokens)[0]

    def generate_many(
        self,
        prompts: Sequence[Ids],
        max_tokens: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        on_tokens: OnTokens | None = None,
    ) -> list[Trace]:
        """Generate for many prompts, a step of all of them in one product; else as `generate`.

        progress: called with the steps done and the steps there are. on_tokens: called after each
        step with the tokens it chose.
        """
        if max_tokens < 1:
            raise ValueError(f"expected max_tokens of at least 1, found {max_tokens}")
        checked = check_ids(prompts, self.vocab_size)
        if not checked:
            return []
        sequences, steps = checked, []
        for step in range(max_tokens):
            progress(step, max_tokens)
            # Only the last context is looked at: a row depends on nothing older.
            hidden = [self.hidden(ids[-self.context_size :])[-1:] for ids in sequences]
            steps.append(self._choose(torch.cat(hidden), [(i, step) for i in range(len(checked))]))
            chosen = steps[-1][0].long()
            if on_tokens is not None:
                on_tokens(chosen.tolist())
            sequences = [torch.cat(pair) for pair in zip(sequences, chosen.split(1), strict=True)]
        progress(max_tokens, max_tokens)
        columns = [torch.stack(column, dim=1) for column in zip(*steps, strict=True)]
        return [
            Trace(*[*(column[i] for column in columns), _fold_prompt(self.hidden(prompt)[:-1])])
            for i, prompt in enumerate(checked)
        ]

    def replay(self, prompt_ids: Ids, tokens: Ids) -> Trace:
        """Return what the model says at each step when it is fed a recorded sequence.

        The trace's tokens are the choices of the rows: where they equal the recorded ones up to
        a step, everything up to that step is what `generate` gives. Errors as `generate`.
        """
        return self.replay_many([prompt_ids], [tokens])[0]

    def replay_many(
        self,
        prompts: Sequence[Ids],
        tokens: Sequence[Ids] | Tensor,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Trace]:
        """Replay many sequences with all their rows in one product; else as `replay`.

        progress is called before and after, with the prompts done and the prompts there are.
        """
        if len(prompts) != len(tokens):
            raise ValueError(f"{len(prompts)} prompts, but {len(tokens)} recorded sequences")
        if not len(prompts):
            return []
        progress(0, len(prompts))
        checked = check_ids(prompts, self.vocab_size)
        recorded = check_ids(tokens, self.vocab_size, "recorded tokens")
        rows, prompt_folds, steps = [], [], []
        for index, (prompt, sequence) in enumerate(zip(checked, recorded, strict=True)):
            # The last token chooses nothing, so it is not fed.
            hidden = self.hidden(torch.cat([prompt, sequence[:-1]]))
            prompt_folds.append(_fold_prompt(hidden[: len(prompt) - 1]))
            rows.append(hidden[len(prompt) - 1 :])
            steps += [(index, step) for step in range(len(sequence))]
        lengths = [len(sequence) for sequence in recorded]
        columns = [torch.split(column, lengths) for column in self._choose(torch.cat(rows), steps)]
        progress(len(prompts), len(prompts))
        return [Trace(*parts) for parts in zip(*columns, prompt_folds, strict=True)]

    def _choose(self, hidden: Tensor, steps: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Return a trace's fields but the last, one entry a row.

        steps: (prompt, step) of each row, for errors.
        """
        logits = self.logits(hidden)
        fingerprints = torch.stack([fingerprint_rows(hidden), fingerprint_rows(logits)], dim=1)
        return *choose(logits, steps), fingerprints


def _fold_prompt(hidden: Tensor) -> Tensor:  # [P - 1, C * E] -> [2]
    # The lm_head runs only on rows that choose a token: over the prompt it folds no rows.
    return torch.stack([fold(fingerprint_rows(hidden)), fold(hidden.new_zeros(0).long())])
