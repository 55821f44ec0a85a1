"""The model context-lm, batched on the kernels: what a serving engine does, step by step.

Nothing within a step waits for the device: tokens, logits, margins and fingerprints stay there
until the last step, and so does the flag of a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitassay.engine.models.ops import Ops, kernel_ops
from bitassay.engine.models.top_logits import choices
from bitassay.engine.trace import TOP, Trace
from bitassay.engine.validation import Prompts, check_ids
from bitassay.kernels.flags import Flag
from bitassay.reference.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    config_dtype,
    config_int,
    load_checkpoint,
    require,
)
from bitassay.reference.spec.contract import Contract
from bitassay.reference.spec.errors import SequenceError


class ContextLM:
    """A loaded model under one contract, on one device.

    The concatenated embeddings of the last C tokens, newest first, then the lm_head with bias.
    Tables [V, E], lm_head [V, C·E], bias [V].
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        contract: Contract,
        device: str | torch.device,
        ops: Ops | None = None,
    ) -> None:
        config = checkpoint.path / "config.json"
        if checkpoint.config.get("model_type") != "context-lm":
            raise CheckpointError(
                f"{config}: expected model_type 'context-lm', found "
                f"{checkpoint.config.get('model_type')!r}: name another checkpoint"
            )
        self.contract = contract
        self._run = kernel_ops() if ops is None else ops
        self.vocab_size = config_int(checkpoint, "vocab_size", minimum=TOP)
        self.context_size = config_int(checkpoint, "context_size")
        self.embedding_size = config_int(checkpoint, "embedding_size")
        self.pad_token_id = config_int(checkpoint, "pad_token_id", minimum=0)
        if self.pad_token_id >= self.vocab_size:
            raise CheckpointError(
                f"{config}: expected pad_token_id below vocab_size {self.vocab_size}, found "
                f"{self.pad_token_id}: correct config.json"
            )
        width = self.context_size * self.embedding_size
        tables = [f"embed_tokens.{j}.weight" for j in range(self.context_size)]
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(tables, (self.vocab_size, self.embedding_size)),
            "lm_head.weight": (self.vocab_size, width),
            "lm_head.bias": (self.vocab_size,),
        }
        weights = {
            name: tensor.to(device)
            for name, tensor in require(checkpoint, shapes, config_dtype(checkpoint)).items()
        }
        self._tables = [weights[name] for name in tables]
        self._weight, self._bias = weights["lm_head.weight"], weights["lm_head.bias"]
        self.device = self._weight.device
        self._run.check_device(self.device, contract.arch)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Checkpoint,
        *,
        contract: Contract,
        device: str | torch.device = "cuda",
        ops: Ops | None = None,
    ) -> ContextLM:
        """Load from a model directory or a checkpoint already read.

        device: a CUDA device of the contract's architecture, or the CPU in the emulator. ops:
        what it runs on, None for the kernels. Raises CheckpointError for an unfit checkpoint,
        RuntimeError for another device.
        """
        checkpoint = path if isinstance(path, Checkpoint) else load_checkpoint(path)
        return cls(checkpoint, contract, device, ops)

    def generate(
        self,
        prompts: Prompts,
        max_tokens: int,
        *,
        batch_size: int | None = None,
        order: Sequence[int] | None = None,
    ) -> list[Trace]:
        """Decode greedily, exactly max_tokens tokens for each prompt; traces in prompt order.

        batch_size: how many prompts run together, None for all. order: the permutation in which
        they are taken. Neither changes a bit. Raises ValueError for an empty prompt, ids outside
        the vocabulary, max_tokens or batch_size below 1, an order that is no permutation, and NaN
        among the logits.
        """
        check_ids(prompts, self.vocab_size, "prompt")
        order = list(range(len(prompts)) if order is None else order)
        batch_size = max(1, len(prompts)) if batch_size is None else batch_size
        if sorted(order) != list(range(len(prompts))):
            raise ValueError(f"order: expected each of 0 … {len(prompts) - 1} once, found {order}")
        if max_tokens < 1 or batch_size < 1:
            raise ValueError(
                f"expected max_tokens and batch_size of at least 1, found {max_tokens} and "
                f"{batch_size}"
            )
        traces: dict[int, Trace] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            some = [list(prompts[index]) for index in batch]
            traces.update(zip(batch, self._decode(some, max_tokens, batch), strict=True))
        return [traces[index] for index in range(len(prompts))]

    def _decode(self, prompts: Prompts, max_tokens: int, names: list[int]) -> list[Trace]:
        """Run one batch to its end; names: the prompts' own numbers, for errors."""
        folds = self._fold_prompts(prompts)
        contexts = self._on_device([self._contexts(prompt)[-1] for prompt in prompts])
        hidden = self._weight.new_empty(len(prompts), self._weight.shape[1])
        nans, steps = Flag(), []
        for step in range(max_tokens):
            self._hidden(contexts, hidden)
            steps.append(self._step(hidden, nans, step * len(prompts)))
            newest = steps[-1][0].long()[:, None]
            contexts = torch.cat([newest, contexts[:, :-1]], dim=1)
        self._finish(nans, [(s, t) for t in range(max_tokens) for s in names])
        parts = [torch.stack(column, dim=1).cpu() for column in zip(*steps, strict=True)]
        return [Trace(*fields) for fields in zip(*parts, folds.cpu(), strict=True)]

    def _hidden(self, contexts: Tensor, out: Tensor | None = None) -> Tensor:  # [R, C] -> [R, C·E]
        if out is None:
            out = self._weight.new_empty(len(contexts), self._weight.shape[1])
        for j, table in enumerate(self._tables):
            columns = out[:, j * self.embedding_size : (j + 1) * self.embedding_size]
            self._run.embedding(contexts[:, j], table, out=columns)
        return out

    def _step(self, hidden: Tensor, nans: Flag, first_row: int) -> tuple[Tensor, ...]:
        """Return a trace's fields but the last, one entry a row, on the device."""
        logits = self._run.lm_head(hidden, self._weight, self._bias, contract=self.contract)
        chosen = choices(self._run, logits, nans, first_row)
        row_fingerprints = [self._run.fingerprint_rows(rows) for rows in (hidden, logits)]
        return *chosen, torch.stack(row_fingerprints, dim=1)

    def _fold_prompts(self, prompts: Prompts) -> Tensor:  # -> [S, 2]
        """Return each prompt's fold over the rows before the one that chooses the first token.

        The lm_head runs only on rows that choose, so over the prompt it folds no rows.
        """
        rows = [self._contexts(prompt)[:-1] for prompt in prompts]
        contexts = self._on_device([context for some in rows for context in some])
        row_fingerprints = self._run.fingerprint_rows(self._hidden(contexts))
        parts = row_fingerprints.split([len(some) for some in rows])
        nothing = contexts.new_zeros(())
        return torch.stack([torch.stack([self._run.fold(some), nothing]) for some in parts])

    def _contexts(self, ids: Sequence[int]) -> list[list[int]]:
        """Return, for every row of a sequence, the ids it sees, newest first."""
        padded = [self.pad_token_id] * (self.context_size - 1) + list(ids)
        return [padded[row : row + self.context_size][::-1] for row in range(len(ids))]

    def _on_device(self, contexts: list[list[int]]) -> Tensor:  # -> int64 [R, C]
        table = torch.tensor(contexts, dtype=torch.int64).reshape(-1, self.context_size)
        return table.to(self.device)

    def _finish(self, nans: Flag, steps: list[tuple[int, int]]) -> None:
        """Wait for the device and raise for what it flagged; steps: (prompt, step) of each row."""
        first = nans.take()
        if first is not None:
            prompt, step = steps[first[0]]
            raise SequenceError(
                f"expected numbers among the logits, found NaN, first at id {first[1]}: the "
                "weights are too large to be decoded",
                prompt=prompt,
                step=step,
            )
        self._run.check()
