"""What a draft head says along finished sequences: every draft of every token, few passes in all.

Drafts after a token depend on the tokens up to it alone. So one pass computes the first-pass rows
of whole sequences, and one more for each depth the chain rows that are still right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitassay.reference.chain_attention import chain_attention
from bitassay.reference.decoding import refuse_nan
from bitassay.reference.eagle_head import EagleHead
from bitassay.reference.fingerprint import fingerprint_rows, fold
from bitassay.reference.generation import KVCache, Prints
from bitassay.reference.model import attend_each
from bitassay.reference.sample import greedy
from bitassay.reference.spec.contract import DRAFT_DEPTH, Contract
from bitassay.reference.spec.rounds import draft_count
from bitassay.reference.trace import Drafts


@dataclass(frozen=True)
class Replayed:
    """A sequence whose drafts are wanted: prompt and tokens in one piece, and its number."""

    number: int
    ids: Tensor  # [P + T]
    prompt: int  # P
    hidden: Tensor  # [P + T - 1, W], the target's rows

    @property
    def tokens(self) -> int:
        """T, how many tokens were generated."""
        return len(self.ids) - self.prompt

    @property
    def fed(self) -> int:
        """How many first-pass rows there are: the prompt's, and those that draft."""
        return self.prompt - 1 + max(0, self.tokens - 2)


@dataclass
class _Rows:
    """R rows that draft the next token, in the order of sequences and of the tokens after which."""

    sequence: Tensor  # [R], which of the batch
    step: Tensor  # [R], t
    most: Tensor  # [R], how many are drafted after t
    hidden: Tensor  # [R, H], their own output
    scored: Tensor  # [R, H]
    prints: Tensor  # [R, D - 1]

    def where(self, on: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return sequence, step, most and hidden of some."""
        return self.sequence[on], self.step[on], self.most[on], self.hidden[on]


def replay_drafts(
    head: EagleHead, batch: Sequence[Replayed], advance: Callable[[int], None]
) -> list[Drafts]:
    """Return the drafts along finished sequences.

    A draft counts as accepted where it is the sequence's own token. advance: called with how many
    of the target's rows, as a measure, are done. Raises SequenceError with the sequence's number
    and the step whose logits hold NaN.
    """
    found = [blank_drafts(one.tokens, len(head.operations)) for one in batch]
    if not any(one.fed for one in batch):
        return found
    size = sum(len(one.hidden) for one in batch)
    caches = [KVCache() for _ in batch]
    prints = Prints(head.operations, _stage(0, sum(one.fed for one in batch), size, advance))
    rows = _first_pass(head, batch, caches, prints, found)
    chains = _Chains([one.prompt for one in batch], caches, head.contract)
    for depth in range(DRAFT_DEPTH):
        if len(rows.step) == 0:
            break
        logits = head.logits(rows.scored)
        at = list(zip(rows.sequence.tolist(), rows.step.tolist(), strict=True))
        refuse_nan(logits, [(batch[s].number, step) for s, step in at], "draft's logits")
        drafted = head.target_ids(greedy(logits))
        table = torch.cat([rows.prints, fingerprint_rows(logits)[:, None]], dim=1)
        right = torch.zeros(len(at), dtype=torch.bool)
        for row, (s, step) in enumerate(at):
            right[row] = drafted[row] == batch[s].ids[batch[s].prompt + step + 1 + depth]
            found[s].tokens[step, depth] = drafted[row]
            found[s].fingerprints[step, depth] = table[row]
            found[s].accepted[step] += int(right[row])
        on = right & (depth + 1 < rows.most)
        sequence, step, most, hidden = rows.where(on)
        if len(step) == 0:
            break
        chains.go_on(on, sequence, step)
        prints = Prints(head.operations, _stage(1 + depth, len(step), size, advance))
        outputs = head.rows(drafted[on], hidden, chains.shared + depth, chains.attend, prints.note)
        rows = _Rows(sequence, step, most, *outputs, prints.table())
    return found


def blank_drafts(tokens: int, operations: int) -> Drafts:
    """Return the drafts of T tokens after which none is drafted, to be filled in."""
    return Drafts(
        torch.full((tokens, DRAFT_DEPTH), -1, dtype=torch.int32),
        torch.zeros(tokens, dtype=torch.int32),
        torch.zeros(tokens, DRAFT_DEPTH, operations, dtype=torch.int64),
        torch.zeros(operations, dtype=torch.int64),
    )


def fold_prompt(rows: Tensor) -> Tensor:  # [P - 1, D - 1] -> [D]
    """Return the folded prints of a prompt's first-pass rows; the lm_head runs on none."""
    return torch.stack([*(fold(column) for column in rows.unbind(1)), fold(rows.new_zeros(0))])


def _first_pass(
    head: EagleHead,
    batch: Sequence[Replayed],
    caches: list[KVCache],
    prints: Prints,
    found: list[Drafts],
) -> _Rows:
    """Run the first pass of all sequences; return those of its rows that draft a first token."""
    lengths = [one.fed for one in batch]
    hidden, scored = head.rows(
        torch.cat([one.ids[1 : 1 + one.fed] for one in batch]),  # shifted left by one
        head.taken(torch.cat([one.hidden[: one.fed] for one in batch])),
        torch.cat([torch.arange(one.fed) for one in batch]),  # not shifted
        attend_each(caches, 0, lengths, head.contract),
        prints.note,
    )
    table, drafting, start = prints.table(), [], 0
    for one, drafts in zip(batch, found, strict=True):
        base = start + one.prompt - 1
        drafts.prompt_fingerprints.copy_(fold_prompt(table[start:base]))
        drafting.append(torch.arange(base, start + one.fed))
        start += one.fed
    counts, rows = torch.tensor([len(own) for own in drafting]), torch.cat(drafting)
    most = [draft_count(t, one.tokens, DRAFT_DEPTH) for one in batch for t in range(one.tokens)]
    return _Rows(
        torch.arange(len(batch)).repeat_interleave(counts),
        torch.cat([torch.arange(len(own)) for own in drafting]),
        torch.tensor([count for count in most if count], dtype=torch.int64),
        hidden[rows],
        scored[rows],
        table[rows],
    )


class _Chains:
    """The keys and values of chains: the first pass's up to the base row, then each one's own."""

    def __init__(self, prompts: list[int], caches: list[KVCache], contract: Contract) -> None:
        self._prompts, self._caches, self._contract = torch.tensor(prompts), caches, contract
        self._own: tuple[Tensor, Tensor] | None = None  # [R, J, Hkv, D] each
        self.shared = self._sequence = torch.empty(0, dtype=torch.int64)

    def go_on(self, on: Tensor, sequence: Tensor, step: Tensor) -> None:
        """Keep the chains that go on (of the rows so far), now of these sequences and steps."""
        if self._own is not None:
            self._own = self._own[0][on], self._own[1][on]
        self._sequence = sequence
        self.shared = self._prompts[sequence] + step  # positions 0 … P + t - 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add the rows to their chains and return what they attend to."""
        new = k[:, None], v[:, None]
        if self._own is not None:
            new = torch.cat([self._own[0], new[0]], 1), torch.cat([self._own[1], new[1]], 1)
        self._own, parts, first = new, [], 0
        sequences, counts = self._sequence.unique_consecutive(return_counts=True)
        for sequence, count in zip(sequences.tolist(), counts.tolist(), strict=True):
            rows, cache = slice(first, first + count), self._caches[sequence]
            first += count
            mixed = chain_attention(
                q[rows],
                cache.keys[0],
                cache.values[0],
                self.shared[rows],
                new[0][rows],
                new[1][rows],
                contract=self._contract,
            )
            parts.append(mixed)
        return torch.cat(parts)


def _stage(
    done: int, rows: int, size: int, advance: Callable[[int], None]
) -> Callable[[int], None]:
    """Return what tells the progress of one pass after `done` of them, as a share of `size`."""
    return lambda part: advance((done * rows + part) * size // (rows * (1 + DRAFT_DEPTH)))
