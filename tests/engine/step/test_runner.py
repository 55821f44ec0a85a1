"""Steps written by hand on the reference's operations, against the sequential truth of drafting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bitassay.engine.config import EngineConfig
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.eagle import EagleHead
from bitassay.engine.models.kv_cache import blocks_for
from bitassay.engine.step.runner import Rows, Runner
from bitassay.golden.runs.reference_ops import reference_ops
from bitassay.reference.checkpoints.checkpoint import Checkpoint, load_checkpoint
from bitassay.reference.eagle import Eagle
from bitassay.reference.spec.contract import default_contract
from support.runner_driver import Drive, compare
from support.tiny_eagle import write_tiny_eagle

CONTRACT = default_contract("sm_90", key_block=16, key_split=32)
V = 128  # tiny_llama's vocabulary
# One row, more than a block of the cache, and more than the small contract's split of keys.
PROMPTS = [[5], [(7 * i * i + 3) % V for i in range(19)], [(5 * i + 1) % V for i in range(35)]]
TOKENS = 9
BLOCKS = sum(blocks_for(len(p) + TOKENS - 1) for p in PROMPTS)  # each of them will be in use
KINDS = ("eagle", "eagle3")
PADDED = {"enforce_eager": False, "force_graphs": True}


class Case:
    """A target of three layers with a head of random weights, in both rooms."""

    def __init__(self, target: Checkpoint, head: Checkpoint) -> None:
        self.target_checkpoint, self.head_checkpoint = target, head
        self.truth = Eagle.from_pretrained(target, head, contract=CONTRACT)
        self.model = CausalLM.from_pretrained(
            target, contract=CONTRACT, device="cpu", ops=reference_ops()
        )
        self.head = EagleHead.from_pretrained(head, self.model)
        self.plain = self.truth.generate_many(PROMPTS, TOKENS)
        self.full = cache(lambda k: [self.truth.generate(prompt, TOKENS, k) for prompt in PROMPTS])

    def runner(self, num_drafts: int, **options: Any) -> Runner:
        config = EngineConfig(num_speculative_tokens=num_drafts, max_num_seqs=4, **options)
        runner = Runner(self.model, self.head if num_drafts else None, config, num_blocks=BLOCKS)
        # What was never written may be anything: nothing may read it.
        for kept in runner.caches:
            for x in (*kept.k, *kept.v):
                x.fill_(torch.nan)
        return runner

    def check(self, drive: Drive) -> list[list[tuple[int, int, int]]]:
        """Run, compare everything with the truth, and return the rounds."""
        count = drive.runner.num_drafts
        full = self.full(count) if count else [None] * len(PROMPTS)
        ended = drive.run()
        for s, plain, other in zip(ended, self.plain, full, strict=True):
            compare(drive, s, plain, other)
        return [s.rounds for s in ended]

    def planted(self, number: int, t: int) -> list[int]:
        """Drafts of which (t + number) % 4 are right; all of five, where that is 3."""
        right = (t + number) % 4
        drafts = self.plain[number].tokens[t + 1 : t + 6].tolist()
        return [d if i < right or right == 3 else (d + 1) % V for i, d in enumerate(drafts)]


@pytest.fixture(scope="module")
def case(
    tiny: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    @cache
    def of(kind: str) -> Case:
        target = tiny(num_hidden_layers=3, max_position_embeddings=64)
        folder: Path = tmp_path_factory.mktemp(kind)
        head = write_tiny_eagle(folder / "head", target.path, kind=kind, seed=7)
        return Case(target, load_checkpoint(head))

    return of


@pytest.mark.parametrize(
    ("kind", "num_drafts", "options"),
    [("eagle", 0, {}), ("eagle", 0, PADDED), ("eagle", 3, {}), ("eagle3", 3, PADDED)],
)
def test_own_drafts(case: Any, kind: str, num_drafts: int, options: dict[str, Any]) -> None:
    one = case(kind)
    one.check(Drive(one.runner(num_drafts, **options), PROMPTS, TOKENS))


@pytest.mark.parametrize("options", [{}, PADDED], ids=["as it is", "padded"])
@pytest.mark.parametrize(
    ("kind", "num_drafts"), [("eagle", 1), ("eagle3", 3), ("eagle", 5), ("eagle3", 5)]
)
def test_drafts_accepted_partly(
    case: Any, kind: str, num_drafts: int, options: dict[str, Any]
) -> None:
    one = case(kind)
    drive = Drive(one.runner(num_drafts, **options), PROMPTS, TOKENS, drafts=one.planted)
    rounds = one.check(drive)
    for number, mine in enumerate(rounds):
        for t, drafted, accepted in mine:
            right = (t + number) % 4
            assert accepted == min(drafted, 5 if right == 3 else right)
    accepted = {a for mine in rounds for _, drafted, a in mine if drafted == num_drafts}
    assert {0, num_drafts} <= accepted


@pytest.mark.parametrize("options", [{}, PADDED], ids=["as it is", "padded"])
@pytest.mark.parametrize(
    ("kind", "chunks", "starts"),
    [("eagle", (16,), (0, 0, 0)), ("eagle3", (3, 1000, 17), (4, 0, 1))],
)
def test_prompts_in_chunks_beside_decoding(
    case: Any, kind: str, chunks: tuple[int, ...], starts: tuple[int, ...], options: dict[str, Any]
) -> None:
    one = case(kind)
    runner = one.runner(3, **options)
    one.check(Drive(runner, PROMPTS, TOKENS, chunks=chunks, starts=starts, drafts=one.planted))


def test_decoding_alone_is_padded(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case("eagle")
    runner, seen = one.runner(3, **PADDED), []
    run = runner._graphs.run

    def noted(sizes: Any, packed: Any) -> Any:
        seen.append(sizes)
        return run(sizes, packed)

    monkeypatch.setattr(runner._graphs, "run", noted)
    one.check(Drive(runner, PROMPTS, TOKENS, starts=(0, 0, 1), drafts=one.planted))
    shapes = {(s.rows, s.sequences, s.tails, s.max_query_len) for s in seen}
    assert shapes == {(16, 4, 4, 4), (8, 2, 2, 4)}  # of three sequences and of two
    assert all(s.padded for s in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_without_capture_only_tokens_come_out(case: Any, kind: str) -> None:
    one = case(kind)
    runner = one.runner(3, capture=False)
    assert runner.row_fingerprints is None
    assert runner.draft_fingerprints is None
    drive = Drive(runner, PROMPTS, TOKENS, drafts=one.planted)
    with_capture = Drive(one.runner(3), PROMPTS, TOKENS, drafts=one.planted)
    for s, other in zip(drive.run(), with_capture.run(), strict=True):
        assert (s.ids, s.rounds, s.drafts) == (other.ids, other.rounds, other.drafts)
        assert all(result.handle is None for result in s.results)


def test_nan_names_request_and_position(case: Any) -> None:
    """The padding beside it reads the same broken row and must not be told of."""
    one = case("eagle")
    tensors = dict(one.target_checkpoint.tensors)
    table = tensors["model.embed_tokens.weight"].clone()
    table[9] = torch.nan
    broken = replace(one.target_checkpoint, tensors=tensors | {"model.embed_tokens.weight": table})
    model = CausalLM.from_pretrained(broken, contract=CONTRACT, device="cpu", ops=reference_ops())
    runner = Runner(model, None, EngineConfig(), num_blocks=4)
    good = Rows(3, [0], 0, [1, 2], 0, True, None, 8)
    bad = Rows(8, [1], 0, [1, 9], 0, True, None, 8)
    with pytest.raises(ValueError, match="request 8, position 2: .* NaN, first at id 0"):
        runner.run([good, bad])
    assert len(runner.run([good])) == 1
    # Nothing is left of it where it was: another row of the next step.
    assert len(runner.run([good, replace(good, request=9, table=[1])])) == 2


def test_nan_of_the_head_names_request_and_draft(case: Any) -> None:
    one = case("eagle3")
    head = EagleHead.from_pretrained(one.head_checkpoint, one.model)
    head._lm_head[4] = torch.nan  # a checkpoint with it would be refused
    runner = Runner(one.model, head, EngineConfig(num_speculative_tokens=3), num_blocks=2)
    with pytest.raises(ValueError, match="request 5, draft 0: .* NaN, first at id 4"):
        runner.run([Rows(5, [0], 0, [1, 2], 0, True, None, 8)])
    head._lm_head.copy_(case("eagle3").head._lm_head)
    assert len(runner.run([Rows(6, [0], 0, [1, 2], 0, True, None, 8)])) == 1  # none is left of it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", [2, 3])
def test_nan_that_comes_late_in_the_chain(case: Any, kind: str, draft: int) -> None:
    """A chain is fed its own drafts: what it says after one whose embedding is broken is NaN."""
    one = case(kind)
    head = EagleHead.from_pretrained(one.head_checkpoint, one.model)
    head._embed_tokens = head._embed_tokens.clone()  # the target's without NaN
    runner = Runner(one.model, head, EngineConfig(num_speculative_tokens=3), num_blocks=2)
    for first in range(V):
        good = Rows(4, [0], 0, [first, 2], 0, True, None, 12)
        (result,) = runner.run([good])
        fed = [2, *result.tokens, *result.drafts[: draft - 2]]
        if (broken := result.drafts[draft - 2]) not in fed:
            break
    else:
        pytest.fail("no prompt after which the drafts differ")
    head._embed_tokens[broken] = torch.nan
    with pytest.raises(ValueError, match=f"request 4, draft {draft - 1}: .* NaN, first at id 0"):
        runner.run([good])


def test_drafts_without_a_head_are_refused(case: Any) -> None:
    with pytest.raises(ValueError, match="expected 0 without a draft head, found 2"):
        Runner(case("eagle").model, None, EngineConfig(num_speculative_tokens=2))
