"""Speculative decoding with an EAGLE head: drafts in a chain, verified greedily by the target.

The sequential truth of drafting. `generate` is the loop itself: draft, verify, drop what was
rejected. Its tokens are those of plain greedy decoding, because every token is the target's own
choice. `replay_many` computes what any such loop may draft along a finished sequence.

Li et al., "EAGLE" (arXiv 2401.15077) and "EAGLE-3" (arXiv 2503.01840).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitassay.reference.checkpoints.checkpoint import Checkpoint, load_checkpoint
from bitassay.reference.decoding import Ids, check_ids, choose, refuse_nan
from bitassay.reference.eagle_head import EagleHead
from bitassay.reference.eagle_replay import Replayed, blank_drafts, fold_prompt, replay_drafts
from bitassay.reference.fingerprint import fingerprint_rows
from bitassay.reference.generation import (
    KVCache,
    OnTokens,
    Prints,
    Progress,
    Record,
    batches,
)
from bitassay.reference.model import CausalLM, attend_each, load_model
from bitassay.reference.sample import greedy
from bitassay.reference.spec.contract import DRAFT_DEPTH, Contract
from bitassay.reference.spec.rounds import draft_count
from bitassay.reference.trace import Drafts, EagleTrace, Trace


class Eagle:
    """A target model and its draft head under one contract.

    operations, draft_operations: names of the fingerprinted operations of the two, in order.
    Raises CheckpointError for a head that does not fit the target.
    """

    def __init__(self, target: CausalLM, head: Checkpoint) -> None:
        self.target, self.head = target, EagleHead(head, target)
        self.contract, self.vocab_size = target.contract, target.vocab_size
        self.operations, self.draft_operations = target.operations, self.head.operations

    @classmethod
    def from_pretrained(
        cls, target: str | Path | Checkpoint, head: str | Path | Checkpoint, *, contract: Contract
    ) -> Eagle:
        """Load both from model directories or checkpoints already read; CheckpointError if unfit.

        The target: see `model.load_model`. The head: see `eagle_config`.
        """
        checkpoint = head if isinstance(head, Checkpoint) else load_checkpoint(head)
        return cls(load_model(target, contract=contract), checkpoint)

    def generate(self, prompt_ids: Ids, max_tokens: int, num_draft_tokens: int) -> EagleTrace:
        """Decode one sequence in rounds that draft up to num_draft_tokens, exactly max_tokens.

        The trace's drafts hold what the rounds computed (see `EagleTrace`). Errors as
        `Generator.generate`, and ValueError unless num_draft_tokens is within 0 … DRAFT_DEPTH.
        """
        if not 0 <= num_draft_tokens <= DRAFT_DEPTH:
            raise ValueError(
                f"expected num_draft_tokens within 0 … {DRAFT_DEPTH}, found {num_draft_tokens}"
            )
        if max_tokens < 1:
            raise ValueError(f"expected max_tokens of at least 1, found {max_tokens}")
        (ids,) = check_ids([prompt_ids], self.vocab_size)
        self.target.check_lengths([len(ids) + max_tokens - 1])
        loop = _Loop(self, ids, max_tokens)
        while loop.step < max_tokens - 1:
            loop.round(draft_count(loop.step, max_tokens, num_draft_tokens))
        return loop.trace()

    def generate_many(
        self,
        prompts: Sequence[Ids],
        max_tokens: int,
        progress: Progress = lambda done, total: None,
        on_tokens: OnTokens | None = None,
    ) -> list[EagleTrace]:
        """Decode greedily without drafts, then replay the drafts along the streams.

        Equal to `replay_many` of the tokens that `CausalLM.generate_many` chooses; arguments and
        errors as there.
        """
        rows = sum(len(ids) + max_tokens - 1 for ids in check_ids(prompts, self.vocab_size))
        traces = self.target.generate_many(
            prompts, max_tokens, lambda done, total: progress(done, 3 * rows), on_tokens
        )
        tokens = [trace.tokens for trace in traces]
        found = self.replay_many(
            prompts, tokens, lambda done, total: progress(rows + done, 3 * rows)
        )
        for one, other in zip(traces, found, strict=True):
            if not one.same_bits(other.target):
                raise RuntimeError("a replayed stream differs from its step-by-step generation")
        return found

    def replay_many(
        self,
        prompts: Sequence[Ids],
        tokens: Sequence[Ids],
        progress: Progress = lambda done, total: None,
    ) -> list[EagleTrace]:
        """Return what target and head say at every step of recorded sequences.

        Drafts go on until the first that is not the recorded token, DRAFT_DEPTH at most. progress:
        called with rows done and rows in all, the target's and as many for the head. Errors as
        `Generator.replay_many`; NaN among a draft's logits is one too.
        """
        fed, recorded = self.target.check_recorded(prompts, tokens)
        lengths = [len(ids) for ids in fed]
        traces: list[EagleTrace] = []
        done, total = 0, 2 * sum(lengths)

        def advance(rows: int) -> None:
            progress(done + rows, total)

        for batch in batches(lengths):
            advance(0)
            taken = _Taken(self.head.config.hidden_operations)
            plain = self.target.replay_batch(
                batch, fed, recorded, advance=advance, observe=taken.note
            )
            own = [lengths[i] for i in batch]
            done += sum(own)
            advance(0)
            replayed = [
                Replayed(
                    i, torch.cat([fed[i], recorded[i][-1:]]), len(fed[i]) + 1 - len(recorded[i]), h
                )
                for i, h in zip(batch, taken.rows().split(own), strict=True)
            ]
            drafts = replay_drafts(self.head, replayed, advance)
            traces += [_with(*pair) for pair in zip(plain, drafts, strict=True)]
            done += sum(own)
        progress(done, total)
        return traces


class _Loop:
    """One sequence on its way: the ids known, and what target and head have computed of them."""

    def __init__(self, eagle: Eagle, prompt: Tensor, max_tokens: int) -> None:
        self._target, self._head = eagle.target, eagle.head
        self._ids, self._prompt = prompt, len(prompt)
        self._cache, self._draft_cache = KVCache(), KVCache()
        self._hidden: list[Tensor] = []  # the target's rows that hold, as the head takes them
        self._record = Record(eagle.operations)
        self._drafts = blank_drafts(max_tokens, len(eagle.draft_operations))
        self._drafts.accepted.fill_(-1)
        self._verify(prompt, [])

    @property
    def step(self) -> int:
        """The number of the last token known."""
        return len(self._ids) - self._prompt - 1

    def round(self, count: int) -> None:
        """Draft so many tokens after the last one known, and verify them."""
        step = self.step
        drafted = self._draft(count) if count else []
        self._drafts.accepted[step] = self._verify(self._ids[-1:], drafted)

    def trace(self) -> EagleTrace:
        return _with(self._record.trace(), self._drafts)

    def _verify(self, known: Tensor, drafted: list[int]) -> int:
        """Feed ids and drafts to the target, keep what it chooses; return how many are accepted."""
        fed = torch.cat([known, torch.tensor(drafted, dtype=torch.int64)])
        taken = _Taken(self._head.config.hidden_operations)
        prints = Prints(self._target.operations, also=taken.note)
        hidden = self._target.forward([fed], [self._cache], prints.note)
        logits = self._target.logits(hidden[-1 - len(drafted) :])
        chosen = choose(logits, [(0, self.step + 1 + row) for row in range(len(logits))])
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == int(chosen[0][accepted]):
            accepted += 1
        rejected = len(drafted) - accepted
        held = len(fed) - rejected
        self._cache.keep(self._cache.length - rejected)
        self._hidden.append(taken.rows()[:held])
        columns = (*chosen, fingerprint_rows(logits))
        self._record.add(prints.table()[:held], *(x[: accepted + 1] for x in columns))
        self._ids = torch.cat([self._ids, chosen[0][: accepted + 1].long()])
        return accepted

    def _draft(self, count: int) -> list[int]:
        """Return a chain of drafts after the last token known."""
        first, end, step = self._draft_cache.length, len(self._ids) - 1, self.step
        # Positions whose target row holds and which the head has not seen yet; ids shifted by one.
        rows = torch.cat(self._hidden)[first:]
        prints, hidden, scored = self._feed(self._ids[first + 1 :], self._head.taken(rows), first)
        base = max(0, self._prompt - 1 - first)  # rows of the prompt before its last
        if base or first == 0:
            self._drafts.prompt_fingerprints.copy_(fold_prompt(prints[:base]))
        steps = slice(first + base - self._prompt + 1, step + 1)
        self._drafts.fingerprints[steps, 0, :-1] = prints[base:]
        drafted: list[int] = []
        for depth in range(count):
            logits = self._head.logits(scored[-1:])
            refuse_nan(logits, [(0, step)], "draft's logits")
            token = int(self._head.target_ids(greedy(logits)))
            drafted.append(token)
            self._drafts.tokens[step, depth] = token
            self._drafts.fingerprints[step, depth, :-1] = prints[-1]
            self._drafts.fingerprints[step, depth, -1] = fingerprint_rows(logits)[0]
            if depth + 1 < count:
                ids = torch.tensor([token])
                prints, hidden, scored = self._feed(ids, hidden[-1:], end + depth)
        self._draft_cache.keep(end)  # the chain's rows are never seen again
        return drafted

    def _feed(self, ids: Tensor, hidden: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Feed the head rows from a position on; return prints, hidden and scored."""
        prints = Prints(self._head.operations)
        attend = attend_each([self._draft_cache], 0, [len(ids)], self._head.contract)
        positions = torch.arange(first, first + len(ids))
        rows = self._head.rows(ids, hidden, positions, attend, prints.note)
        return prints.table(), *rows


class _Taken:
    """Catches the target's rows that the head is fed."""

    def __init__(self, operations: tuple[str, ...]) -> None:
        self._operations = operations
        self._rows: dict[str, Tensor] = {}

    def note(self, name: str, rows: Tensor) -> None:
        if name in self._operations:
            self._rows[name] = rows

    def rows(self) -> Tensor:  # -> [R, W]
        return torch.cat([self._rows[name] for name in self._operations], dim=1)


def _with(trace: Trace, drafts: Drafts) -> EagleTrace:
    return EagleTrace(**vars(trace), drafts=drafts)
