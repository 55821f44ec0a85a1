"""Greedy decoding of any model with a cache: step by step, or a finished sequence in one pass.

The sequential truth: `generate` feeds the prompt and then one token at a time. `replay` feeds a
finished sequence at once: a row sees only the tokens before it, so if each row chooses the token
recorded after it, the record is what `generate` gives, by induction over the steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .decoding import Ids, check_ids, choose
from .fingerprint import fingerprint_rows, fold
from .trace import Trace

Observe = Callable[[str, Tensor], None]  # called with an operation's name and its rows [R, ...]
Progress = Callable[[int, int], None]  # called with rows done and rows in all

# Rows that one replayed batch feeds at least, as far as there are any: enough for full speed.
_BATCH_ROWS = 1024


@dataclass
class KVCache:
    """The keys and values of one sequence so far: per layer [S, Hkv, D]."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        """How many positions are cached."""
        return len(self.keys[0]) if self.keys else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the next positions of one layer, in order of layers; return all of them."""
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], k])
            self.values[layer] = torch.cat([self.values[layer], v])
        return self.keys[layer], self.values[layer]


class Generator(ABC):
    """What decodes greedily: a model with a forward pass over several sequences at once.

    operations: names of what `forward` lets an observer see, in running order, the lm_head last.
    """

    def __init__(self, operations: tuple[str, ...], vocab_size: int, max_positions: int) -> None:
        self.operations, self.vocab_size = operations, vocab_size
        self._max_positions = max_positions

    @abstractmethod
    def forward(
        self, fed: list[Tensor], caches: list[KVCache], observe: Observe | None = None
    ) -> Tensor:  # -> [R, H]
        """Feed each sequence its next ids, extending its cache; return rows for `logits`."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:  # [T, H] -> [T, V]
        """Return the logits of rows of `forward`."""

    def generate(self, prompt_ids: Ids, max_tokens: int) -> Trace:
        """Decode greedily, one token at a time, exactly max_tokens of them (end of text or not).

        Raises ValueError for an empty prompt, an id outside the vocabulary, max_tokens below 1, a
        sequence longer than the model's positions, and NaN among the logits.
        """
        return self.generate_many([prompt_ids], max_tokens)[0]

    def generate_many(
        self,
        prompts: Sequence[Ids],
        max_tokens: int,
        progress: Progress = lambda done, total: None,
    ) -> list[Trace]:
        """Generate for many prompts, a step of all of them in one batch; else as `generate`."""
        if max_tokens < 1:
            raise ValueError(f"expected max_tokens of at least 1, found {max_tokens}")
        checked = check_ids(prompts, self.vocab_size)
        if not checked:
            return []
        self._check_lengths([len(ids) + max_tokens - 1 for ids in checked])
        total = sum(len(ids) + max_tokens - 1 for ids in checked)
        records = [_Record(self.operations) for _ in checked]
        caches = [KVCache() for _ in checked]
        done, fed = 0, checked
        for step in range(max_tokens):
            progress(done, total)
            steps = [(i, [step]) for i in range(len(checked))]
            tokens = self._step(fed, caches, records, steps, _from(done, total, progress))
            done, fed = done + sum(map(len, fed)), list(tokens.split(1))
        progress(done, total)
        return [record.trace() for record in records]

    def replay(self, prompt_ids: Ids, tokens: Ids) -> Trace:
        """Return what the model says at every step of a recorded sequence, all rows in one pass.

        The trace's tokens are the rows' choices: where they equal the recorded ones, `generate`
        gives the same. Errors as `generate`.
        """
        return self.replay_many([prompt_ids], [tokens])[0]

    def replay_many(
        self,
        prompts: Sequence[Ids],
        tokens: Sequence[Ids],
        progress: Progress = lambda done, total: None,
    ) -> list[Trace]:
        """Replay many sequences, in batches of whole sequences; else as `replay`."""
        if len(prompts) != len(tokens):
            raise ValueError(f"{len(prompts)} prompts, but {len(tokens)} recorded sequences")
        checked = check_ids(prompts, self.vocab_size)
        recorded = check_ids(tokens, self.vocab_size, "recorded tokens of prompt")
        # The last token chooses nothing, so it is not fed.
        fed = [torch.cat([p, t[:-1]]) for p, t in zip(checked, recorded, strict=True)]
        self._check_lengths([len(ids) for ids in fed])
        records = [_Record(self.operations) for _ in checked]
        done, total = 0, sum(map(len, fed))
        for batch in _batches([len(ids) for ids in fed]):
            progress(done, total)
            steps = [(i, list(range(len(recorded[i])))) for i in batch]
            self._step(
                [fed[i] for i in batch],
                [KVCache() for _ in batch],
                [records[i] for i in batch],
                steps,
                _from(done, total, progress),
            )
            done += sum(len(fed[i]) for i in batch)
        progress(done, total)
        return [record.trace() for record in records]

    def _step(
        self,
        fed: list[Tensor],
        caches: list[KVCache],
        records: list[_Record],
        steps: list[tuple[int, list[int]]],
        advance: Callable[[int], None],
    ) -> Tensor:
        """Feed each sequence its next ids and let its last rows choose; return the chosen tokens.

        steps: the number of each sequence, for errors, and the steps its last rows choose. advance:
        called with the rows done so far, operations done counting as a share of all rows.
        """
        lengths = [len(ids) for ids in fed]
        prints: dict[str, Tensor] = {}

        def observe(name: str, rows: Tensor) -> None:
            before = len(rows) * len(prints) // len(self.operations)
            prints[name] = fingerprint_rows(rows.flatten(1))
            after = len(rows) * len(prints) // len(self.operations)
            if after > before:
                advance(after)

        hidden = self.forward(fed, caches, observe)
        choosing = [
            rows[-len(own) :] for rows, (_, own) in zip(hidden.split(lengths), steps, strict=True)
        ]
        logits = self.logits(torch.cat(choosing))
        columns = choose(logits, [(i, step) for i, own in steps for step in own])
        table = torch.stack([prints[name] for name in self.operations[:-1]], dim=1)
        counts = [len(own) for _, own in steps]
        parts = zip(*(x.split(counts) for x in (*columns, fingerprint_rows(logits))), strict=True)
        for record, rows, part in zip(records, table.split(lengths), parts, strict=True):
            record.add(rows, *part)
        return columns[0].long()

    def _check_lengths(self, lengths: list[int]) -> None:
        most = self._max_positions
        for index, length in enumerate(lengths):
            if length > most:
                raise ValueError(
                    f"prompt {index}: expected at most {most} positions (max_position_embeddings), "
                    f"found {length} with the tokens to come: shorten it, or ask for fewer tokens"
                )


class _Record:
    """Collects one sequence's trace: the rows that choose, and the prints of all rows."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._rows: list[Tensor] = []
        self._chosen: list[tuple[Tensor, ...]] = []

    def add(self, rows: Tensor, *chosen: Tensor) -> None:
        """Add rows' prints [R, O - 1], and what the last of them chose."""
        self._rows.append(rows)
        self._chosen.append(chosen)

    def trace(self) -> Trace:
        """Return the trace: prints of rows that chose nothing are folded."""
        tokens, ids, bits, margins, head = (torch.cat(x) for x in zip(*self._chosen, strict=True))
        rows = torch.cat(self._rows)
        before, after = rows[: -len(tokens)], rows[-len(tokens) :]
        # The lm_head runs only on rows that choose a token: over the prompt it folds no rows.
        folds = [fold(column) for column in before.unbind(1)] + [fold(before.new_zeros(0))]
        prints = torch.cat([after, head[:, None]], dim=1)
        return Trace(tokens, ids, bits, margins, prints, torch.stack(folds))


def _from(done: int, total: int, progress: Progress) -> Callable[[int], None]:
    """Return what tells the progress of a step that begins with `done` rows behind it."""
    return lambda rows: progress(done + rows, total)


def _batches(lengths: list[int]) -> list[list[int]]:
    """Return the numbers of sequences in order, grouped until a group has rows enough."""
    groups: list[list[int]] = [[]]
    for index in range(len(lengths)):
        if sum(lengths[i] for i in groups[-1]) >= _BATCH_ROWS:
            groups.append([])
        groups[-1].append(index)
    return [group for group in groups if group]
