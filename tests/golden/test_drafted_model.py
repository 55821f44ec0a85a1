"""Goldens of a model with a draft head: recorded, replayed, gone on with, and checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitassay.golden.compare.diff import compare
from bitassay.golden.errors import GoldenError
from bitassay.golden.runs import oracle, oracle_tasks
from bitassay.golden.runs.process_pool import Crew
from bitassay.golden.storage import journal
from bitassay.golden.storage.store import Store
from bitassay.reference.eagle import Eagle
from support.tiny_eagle import write_tiny_eagle
from support.tiny_pair import LENGTHS, STEPS, load_pair


def options(folder: Path, store: Path) -> list[str]:
    pair = ["--model", str(folder / "target"), "--draft", str(folder / "head")]
    return [*pair, "--prompts", str(folder / "prompts.jsonl"), "--store", str(store)]


def silent(done: int, total: int) -> None:
    pass


def test_it_is_recorded_replayed_checked_and_shown(pairs, run, tmp_path):
    given = options(pairs["eagle"], tmp_path / "store")
    record = ("record", *given, "--max-tokens", str(STEPS), "--name", "pair", "--arch", "sm_90")
    assert run(*record)[0] == 0
    status, out, _ = run(*record)
    assert status == 0
    assert "pair/sm_90: equal (replayed with the reference): 3 prompts, 36 tokens" in out
    golden = Store(str(tmp_path / "store")).read("pair/sm_90")
    drafted = int((golden.stream.drafts.draft_tokens >= 0).sum())
    assert f" {drafted} drafts, 36 acceptance counts; 0 different" in out
    for way in ((), ("--sequential", "--prompts", "2", "--tokens", "6")):
        status, out, _ = run("check", "pair/sm_90", *given, *way)
        assert status == 0
        assert "acceptance counts; 0 different" in out
    status, out, _ = run("show", "pair/sm_90", *given[-2:])
    assert "draft operations   13: draft.embedding, draft.fc" in out
    length = golden.stream.drafts.acceptance_length(3)
    assert length > 1.5
    assert f"{length:.2f} at K = 3" in out
    assert golden.entry.draft_model == golden.provenance.identity.draft_model != ""
    assert run("list", "--verify", *given[-2:])[0] == 0


@pytest.mark.parametrize(("kind", "arch"), [("eagle", "sm_89"), ("eagle3", "sm_90")])
def test_no_division_changes_a_bit(pairs, monkeypatch, kind, arch):
    inputs = load_pair(pairs[kind], arch)
    job, facts = inputs.job, inputs.facts
    sequential = oracle.generate(job, facts, silent, sequential=True)
    tokens = sequential.tokens.tolist()
    monkeypatch.setattr(oracle_tasks, "REPLAYED_ROWS", 1)
    assert compare(sequential, oracle.replay(job, facts, tokens, silent)).equal
    monkeypatch.setattr(oracle, "BATCH", 2)
    part = oracle.generate(inputs.first(2, 6), facts, silent)
    assert compare(sequential.first(2, 6), part).equal
    sequential.drafts.require_recorded(sequential.tokens)
    if kind == "eagle":
        assert sequential.drafts.accepted.max() >= 3


def test_processes_share_the_work_and_all_of_it_is_counted(pairs, generated):
    inputs, seen = load_pair(pairs["eagle"]), []
    job, facts = inputs.job, inputs.facts
    tokens = generated.tokens.tolist()
    shared = oracle.replay(job, facts, tokens, lambda *step: seen.append(step), crew=Crew(2))
    assert compare(generated, shared).equal
    total = sum(map(job.rows, range(len(LENGTHS))))
    assert total > 2 * sum(length + STEPS - 1 for length in LENGTHS)
    assert seen[-1] == (total, total)


class Killed(BaseException):
    pass


def test_a_recording_cut_at_any_step_goes_on_to_the_same_bits(
    pairs, generated, tmp_path, monkeypatch
):
    inputs = load_pair(pairs["eagle"])
    monkeypatch.setattr(oracle, "JOURNALED", 2)
    append, cuts = journal.Journal.append, 0
    while True:
        left = [4 * (cuts % 2) + 5]

        def counted(self, facts, left=left):
            append(self, facts)
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        monkeypatch.setattr(journal.Journal, "append", counted)
        try:
            with journal.opened(tmp_path, inputs.identity) as notes:
                stream = oracle.generate(inputs.job, inputs.facts, silent, journal=notes)
            break
        except Killed:
            cuts += 1
    assert cuts > 2
    assert compare(generated, stream).equal


def test_a_journal_without_drafts_is_refused(pairs, generated, tmp_path):
    inputs = load_pair(pairs["eagle"])
    arrays = {name: array[0] for name, array in generated.arrays.items() if "prompt_i" not in name}
    del arrays["prompt_offsets"]
    with journal.opened(tmp_path, inputs.identity) as notes:
        notes.finished({0: arrays})
        sizes = (3, STEPS, 128, len(inputs.facts.operations), len(inputs.facts.draft_operations))
        notes.require_fits(*sizes)
        for wrong in (
            {name: array for name, array in arrays.items() if name != "accepted"},
            arrays | {"draft_tokens": arrays["draft_tokens"] + 128},
            arrays | {"draft_tokens": arrays["draft_tokens"][:, :4]},
        ):
            notes.finished({0: wrong})
            with pytest.raises(GoldenError, match="delete this file"):
                notes.require_fits(*sizes)


@pytest.mark.parametrize("fault", ["accepted", "draft", "fingerprint", "fold"])
def test_what_the_loop_says_is_compared_and_not_its_replay_alone(
    pairs, generated, monkeypatch, fault
):
    """The literal loop goes wrong, and the replay does not."""
    inputs = load_pair(pairs["eagle"])
    loop, wrong = Eagle.generate, []

    def generate(self, ids, steps, count):
        trace = loop(self, ids, steps, count)
        drafts = trace.drafts
        steps = (drafts.accepted >= 1).nonzero()[:, 0]
        if len(steps) and not wrong:
            step = int(steps[0])
            wrong.append(step)
            if fault == "accepted":
                drafts.accepted[step] -= 1
            elif fault == "draft":
                drafts.tokens[step, 1] ^= 1
            elif fault == "fingerprint":
                drafts.fingerprints[step, 1, 4] ^= 1
            else:
                drafts.prompt_fingerprints[3] ^= 1
        return trace

    monkeypatch.setattr(Eagle, "generate", generate)
    found = oracle.generate(inputs.first(1, STEPS), inputs.facts, silent, sequential=True)
    (difference,) = compare(generated.first(1), found).differences
    assert wrong
    assert difference.step == (None if fault == "fold" else wrong[0])
    assert difference.draft == (None if fault in ("accepted", "fold") else 1)
    assert (difference.arrays == ("accepted",)) == (fault == "accepted")
    assert oracle_tasks.LITERAL_DRAFTS == 3


def test_another_head_is_not_checked(pairs, run, tmp_path):
    store = tmp_path / "store"
    given = options(pairs["eagle"], store)
    quick = ("--max-tokens", "3", "--name", "pair", "--arch", "sm_90")
    assert run("record", *given, *quick)[0] == 0
    other = write_tiny_eagle(tmp_path / "other", pairs["eagle"] / "target", seed=9)
    given[3] = str(other)
    status, _, err = run("check", "pair/sm_90", *given)
    assert status == 2
    assert "was recorded with another draft model (" in err
    del given[2:4]
    status, _, err = run("check", "pair/sm_90", *given)
    assert status == 2
    assert "another draft model (" in err
    assert "than found here (none)" in err


def test_a_head_needs_a_model_that_it_fits(pairs, run, folder, tmp_path):
    status, _, err = run("check", "tiny/sm_90", "--draft", "x")
    assert (status, "--draft needs --model DIR" in err) == (2, True)
    status, _, err = run("record", "tiny/sm_90", "--draft", "x")
    assert (status, "--draft need --model DIR" in err) == (2, True)
    given = options(pairs["eagle"], tmp_path / "store")
    given[1] = str(folder / "model")  # a context-lm
    status, _, err = run("record", *given, "--max-tokens", "3", "--arch", "sm_90")
    assert status == 2
    assert "expected a target of one of llama, qwen3 for a draft head, found context-lm" in err
