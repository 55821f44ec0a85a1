"""The simplest loop that calls a runner: no scheduler, no prefix cache, every sequence each step.

And the comparison of what comes out with the sequential truth of drafting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitassay.engine.models.kv_cache import slots_of
from bitassay.engine.scheduling.blocks import blocks_for
from bitassay.engine.scheduling.step_plan import Result, Rows
from bitassay.engine.step.outputs import collect
from bitassay.engine.step.runner import Runner
from bitassay.reference.trace import EagleTrace
from support.same_bits import assert_same_bits


@dataclass
class Driven:
    """One prompt on its way."""

    number: int
    prompt: list[int]
    ids: list[int]
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    rounds: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def generated(self) -> int:
        return len(self.ids) - len(self.prompt)


class Drive:
    """Runs prompts for so many tokens each.

    chunks: rows of a prompt that steps take, in turns. starts: the step in which each prompt
    begins. drafts: what to verify after token t of a prompt, in place of the head's own drafts.
    """

    def __init__(
        self,
        runner: Runner,
        prompts: Sequence[list[int]],
        tokens: int,
        *,
        chunks: Sequence[int] = (1000,),
        starts: Sequence[int] | None = None,
        drafts: Callable[[int, int], list[int]] | None = None,
    ) -> None:
        self.runner, self.tokens, self.chunks, self.planted = runner, tokens, chunks, drafts
        self.starts = [0] * len(prompts) if starts is None else starts
        self.sequences = [Driven(i, list(p), list(p)) for i, p in enumerate(prompts)]
        self._free = list(range(runner.num_blocks))
        self._tables: dict[int, list[int]] = {}

    def run(self) -> list[Driven]:
        step = 0
        while any(s.generated < self.tokens for s in self.sequences):
            rows = [
                self.rows(s, step)
                for s in self.sequences
                if s.generated < self.tokens and step >= self.starts[s.number]
            ]
            for result in self.runner.run(rows) if rows else []:
                self.take(self.sequences[result.request], result)
            step += 1
        self.runner.check()
        return self.sequences

    def table(self, sequence: int, positions: int) -> list[int]:
        """Return a sequence's blocks, enough for so many positions."""
        table = self._tables.setdefault(sequence, [])
        while len(table) < blocks_for(positions):
            table.append(self._free.pop())
        return list(table)

    def drafted(self, s: Driven) -> int:
        return max(0, min(self.runner.num_drafts, self.tokens - 1 - s.generated))

    def rows(self, s: Driven, step: int) -> Rows:
        limit = len(s.prompt) + self.tokens - 2
        drafts = s.drafts[: self.drafted(s)] if s.generated else []
        if s.generated and self.planted:
            drafts = self.planted(s.number, s.generated - 1)[: self.drafted(s)]
        chunk = self.chunks[step % len(self.chunks)]
        chooses = len(s.ids) - s.computed <= chunk
        end = len(s.ids) if chooses else s.computed + chunk
        ids = s.ids[s.computed : end] + (drafts if chooses else [])
        last = s.computed + len(ids) - 1
        last = max(last, min(last + self.runner.num_drafts, limit))
        rows = Rows(
            request=s.number,
            table=self.table(s.number, last + 1),
            first=s.computed,
            ids=ids,
            drafts=len(drafts) if chooses else 0,
            chooses=chooses,
            next_id=None if chooses else s.ids[end],
            limit=limit,
        )
        if not chooses:
            s.computed = end
        return rows

    def take(self, s: Driven, result: Result) -> None:
        if s.generated:
            s.rounds.append((s.generated - 1, self.drafted(s), result.accepted))
        s.ids += result.tokens
        s.computed = len(s.ids) - 1
        s.drafts = result.drafts
        s.results.append(result)


def compare(drive: Drive, s: Driven, plain: EagleTrace, full: EagleTrace | None) -> None:
    """Fail unless a driven sequence has the truth's bits.

    plain: the replayed stream, whose drafts end where the target chooses otherwise. full: of a
    loop of the same num_drafts, with all drafts of its rounds; None without drafts.
    """
    runner, first = drive.runner, len(s.prompt)
    assert s.ids[first:] == plain.tokens.tolist()
    got = collect(s.results)
    assert got is not None
    assert runner.row_fingerprints is not None
    assert_same_bits(got.top_ids, plain.top_ids)
    assert_same_bits(got.top_bits, plain.top_bits)
    assert_same_bits(got.margins, plain.margins)
    assert_same_bits(got.lm_head, plain.fingerprints[:, -1])
    slots = torch.tensor(slots_of(drive.table(s.number, 0), range(len(s.ids) - 1)))
    rows = runner.row_fingerprints[slots.to(runner.device)]
    assert_same_bits(rows[first - 1 :, :-1], plain.fingerprints[:, :-1])
    assert_same_bits(fold(runner, rows[: first - 1]), plain.prompt_fingerprints[:-1])
    if full is None:
        return
    assert runner.draft_fingerprints is not None
    assert got.drafts is not None
    rows = runner.draft_fingerprints[slots.to(runner.device)]
    assert_same_bits(fold(runner, rows[: first - 1]), plain.drafts.prompt_fingerprints[:-1])
    seen = drive.tokens - 2  # after so many tokens something may be drafted
    assert_same_bits(rows[first - 1 :][:seen, :-1], plain.drafts.fingerprints[:seen, 0, :-1])
    t = -1
    for n, result in enumerate(s.results):
        t += len(result.tokens)
        most = max(0, min(runner.num_drafts, drive.tokens - 2 - t))
        for truth in (plain, full):
            drafted = [d for d in truth.drafts.tokens[t, :most].tolist() if d >= 0]
            assert result.drafts[: len(drafted)] == drafted
            want = truth.drafts.fingerprints[t, : len(drafted)]
            assert_same_bits(got.drafts[n, : len(drafted)], want)


def fold(runner: Runner, rows: Tensor) -> Tensor:  # [R, O] -> [O - 1]
    """Fold each operation's rows; the last is the lm_head, which runs on none of them."""
    return torch.stack([runner.model.ops.fold(column) for column in rows[:, :-1].t()])
