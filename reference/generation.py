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

from bitassay.reference.decoding import Ids, check_ids, choose
from bitassay.reference.fingerprint import fingerprint_rows, fold
from bitassay.reference.spec.errors import SequenceError
from bitassay.reference.trace import Trace

Observe = Callable[[str, Tensor], None]  # called with an operation's name and its rows [R, ...]
Progress = Callable[[int, int], None]  # called with rows done and rows in all
OnTokens = Callable[[list[int]], None]  # called with what all prompts chose in a step, in order

# Rows that one replayed batch feeds at least, as far as there are any: enough for full speed.
BATCH_ROWS = 1024


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

    def keep(self, length: int) -> None:
        """Drop the positions from `length` on."""
        self.keys = [k[:length] for k in self.keys]
        self.values = [v[:length] for v in self.values]


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

        Raises ValueError for max_tokens below 1, and SequenceError for an empty prompt, an id
        outside the vocabulary, a sequence longer than the model's positions, and NaN among the
        logits.
        """
        return self.generate_many([prompt_ids], max_tokens)[0]

    def generate_many(
        self,
        prompts: Sequence[Ids],
        max_tokens: int,
        progress: Progress = lambda done, total: None,
        on_tokens: OnTokens | None = None,
    ) -> list[Trace]:
        """Generate for many prompts, a step of all of them in one batch; else as `generate`.

        on_tokens: called after each step with the tokens it chose.
        """
        if max_tokens < 1:
            raise ValueError(f"expected max_tokens of at least 1, found {max_tokens}")
        checked = check_ids(prompts, self.vocab_size)
        if not checked:
            return []
        self.check_lengths([len(ids) + max_tokens - 1 for ids in checked])
        total = sum(len(ids) + max_tokens - 1 for ids in checked)
        records = [Record(self.operations) for _ in checked]
        caches = [KVCache() for _ in checked]
        done, fed = 0, checked
        for step in range(max_tokens):
            progress(done, total)
            steps = [(i, [step]) for i in range(len(checked))]
            tokens = self._step(fed, caches, records, steps, _from(done, total, progress))
            if on_tokens is not None:
                on_tokens(tokens.tolist())
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
        fed, recorded = self.check_recorded(prompts, tokens)
        lengths = [len(ids) for ids in fed]
        traces, done, total = [], 0, sum(lengths)
        for batch in batches(lengths):
            progress(done, total)
            traces += self.replay_batch(batch, fed, recorded, advance=_from(done, total, progress))
            done += sum(lengths[i] for i in batch)
        progress(done, total)
        return traces

    def check_recorded(
        self, prompts: Sequence[Ids], tokens: Sequence[Ids]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the ids that replaying feeds, and those recorded; errors as `replay`."""
        if len(prompts) != len(tokens):
            raise ValueError(f"{len(prompts)} prompts, but {len(tokens)} recorded sequences")
        checked = check_ids(prompts, self.vocab_size)
        recorded = check_ids(tokens, self.vocab_size, "recorded tokens")
        # The last token chooses nothing, so it is not fed.
        fed = [torch.cat([p, t[:-1]]) for p, t in zip(checked, recorded, strict=True)]
        self.check_lengths([len(ids) for ids in fed])
        return fed, recorded

    def replay_batch(
        self,
        batch: Sequence[int],
        fed: list[Tensor],
        recorded: list[Tensor],
        *,
        advance: Callable[[int], None],
        observe: Observe | None = None,
    ) -> list[Trace]:
        """Replay some sequences of `check_recorded`, by number, all their rows in one pass.

        advance: called with the rows done so far. observe: sees every operation's rows but the
        lm_head's, sequence after sequence.
        """
        records = [Record(self.operations) for _ in batch]
        steps = [(i, list(range(len(recorded[i])))) for i in batch]
        caches = [KVCache() for _ in batch]
        self._step([fed[i] for i in batch], caches, records, steps, advance, observe)
        return [record.trace() for record in records]

    def _step(
        self,
        fed: list[Tensor],
        caches: list[KVCache],
        records: list[Record],
        steps: list[tuple[int, list[int]]],
        advance: Callable[[int], None],
        observe: Observe | None = None,
    ) -> Tensor:
        """Feed each sequence its next ids and let its last rows choose; return the chosen tokens.

        steps: the number of each sequence, for errors, and the steps its last rows choose. advance:
        called with the rows done so far, operations done counting as a share of all rows.
        """
        lengths = [len(ids) for ids in fed]
        prints = Prints(self.operations, advance, observe)
        hidden = self.forward(fed, caches, prints.note)
        choosing = [
            rows[-len(own) :] for rows, (_, own) in zip(hidden.split(lengths), steps, strict=True)
        ]
        logits = self.logits(torch.cat(choosing))
        columns = choose(logits, [(i, step) for i, own in steps for step in own])
        counts = [len(own) for _, own in steps]
        parts = zip(*(x.split(counts) for x in (*columns, fingerprint_rows(logits))), strict=True)
        for record, rows, part in zip(records, prints.table().split(lengths), parts, strict=True):
            record.add(rows, *part)
        return columns[0].long()

    def check_lengths(self, lengths: list[int]) -> None:
        """Raise SequenceError for the prompt of which more positions are fed than there are."""
        most = self._max_positions
        for index, length in enumerate(lengths):
            if length > most:
                raise SequenceError(
                    f"expected at most {most} positions (max_position_embeddings), found {length} "
                    "with the tokens to come: shorten it, or ask for fewer tokens",
                    prompt=index,
                )


class Prints:
    """Collects the fingerprints of every row of a pass, operation by operation.

    operations: as `Generator`'s. advance: told the rows done so far, operations done counting as a
    share of all rows. also: sees the rows too.
    """

    def __init__(
        self,
        operations: tuple[str, ...],
        advance: Callable[[int], None] = lambda rows: None,
        also: Observe | None = None,
    ) -> None:
        self._operations, self._advance, self._also = operations, advance, also
        self._prints: dict[str, Tensor] = {}

    def note(self, name: str, rows: Tensor) -> None:
        """Take an operation's rows [R, ...]."""
        before = len(rows) * len(self._prints) // len(self._operations)
        self._prints[name] = fingerprint_rows(rows)
        after = len(rows) * len(self._prints) // len(self._operations)
        if self._also is not None:
            self._also(name, rows)
        if after > before:
            self._advance(after)

    def table(self) -> Tensor:  # -> [R, O - 1]
        """Return the prints of all operations but the lm_head, which few rows come to."""
        return torch.stack([self._prints[name] for name in self._operations[:-1]], dim=1)


class Record:
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


def batches(lengths: list[int]) -> list[list[int]]:
    """Return the numbers of sequences in order, grouped until a group has rows enough."""
    groups: list[list[int]] = [[]]
    for index in range(len(lengths)):
        if sum(lengths[i] for i in groups[-1]) >= BATCH_ROWS:
            groups.append([])
        groups[-1].append(index)
    return [group for group in groups if group]
