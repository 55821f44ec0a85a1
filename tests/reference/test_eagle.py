"""Drafting changes no token and no bit, and what is drafted is what the definition says."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitassay.reference import eagle_replay, generation
from bitassay.reference.checkpoints.checkpoint import load_checkpoint
from bitassay.reference.eagle import Eagle
from bitassay.reference.spec.contract import DRAFT_DEPTH, default_contract, draft_operations
from bitassay.reference.spec.rounds import rounds
from bitassay.reference.trace import EagleTrace
from support.naive.eagle import TwinEagle
from support.tiny_eagle import make_agreeable, write_tiny_eagle
from support.tiny_llama import write_tiny_llama

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
BLOCKS = {"key_block": 16, "key_split": 32}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "eagle-sm_89": ("sm_89", {}, {"kind": "eagle", "fc_bias": True}),
    "eagle-sm_90-qwen3": ("sm_90", {"model_type": "qwen3"}, {"kind": "eagle", "bin": True}),
    "eagle3-sm_89": ("sm_89", {"num_hidden_layers": 4}, {"kind": "eagle3"}),
    "eagle3-sm_90-fp16": (
        "sm_90",
        {"num_hidden_layers": 3, "dtype": torch.float16},
        {"kind": "eagle3", "dtype": torch.bfloat16, "attention_bias": True},
    ),
}
PROMPTS = [[7], [3, 9, 27, 5, 40, 11, 2, 2, 30, 31, 8, 1, 19, 44]]
TOKENS = 10


def load(folder: Path, name: str = "eagle-sm_89", **more: Any) -> Eagle:
    arch, of_target, of_head = CASES[name]
    path = write_tiny_llama(folder / "target", **(SMALL | {"seed": 1} | of_target))
    make_agreeable(path, quiet=0.25)
    head = write_tiny_eagle(folder / "head", path, agreeable=True, seed=1, **(of_head | more))
    return Eagle.from_pretrained(path, head, contract=default_contract(arch, **BLOCKS))


class Case:
    """A pair that no test changes, and what it says of PROMPTS."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.eagle = load(folder, name)

    @cached_property
    def golden(self) -> list[EagleTrace]:
        return self.eagle.generate_many(PROMPTS, TOKENS)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cache(lambda name: Case(tmp_path_factory.mktemp(name), name))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, case_of: Callable[[str], Case]) -> Case:
    return case_of(request.param)


@pytest.fixture
def eagle(case_of: Callable[[str], Case]) -> Eagle:
    return case_of("eagle-sm_89").eagle


def assert_same(got: list[EagleTrace], want: list[EagleTrace]) -> None:
    assert len(got) == len(want)
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        parts = ((one.target, other.target), (one.drafts, other.drafts))
        for mine, its in parts:
            for field, value in vars(its).items():
                assert torch.equal(getattr(mine, field), value), f"sequence {number}: {field}"
        assert one.same_bits(other)


def test_rounds_of_any_length_give_the_plain_stream(case: Case) -> None:
    """Tokens, logits and prints are those of plain greedy decoding; drafts those of the replay."""
    eagle = case.eagle
    for prompt, want in zip(PROMPTS, case.golden, strict=True):
        plain = eagle.target.generate(prompt, TOKENS)
        assert want.target.same_bits(plain)
        for most in (1, 2, 5) if len(prompt) > 1 else (0, 3):
            got = eagle.generate(prompt, TOKENS, most)
            assert got.target.same_bits(plain)
            assert_is_part_of(got, want, most)


def assert_is_part_of(got: EagleTrace, want: EagleTrace, most: int) -> None:
    """A run of rounds holds those cells of a golden that it computed, and nothing else."""
    drafts, golden = got.drafts, want.drafts
    expected = rounds(golden.accepted.tolist(), most)
    counts = torch.full_like(golden.accepted, -1)
    last = max((t for t, drafted, _ in expected if drafted), default=-1)
    for t, drafted, accepted in expected:
        counts[t] = accepted
        recorded = min(drafted, int((golden.tokens[t] >= 0).sum()))
        assert torch.equal(drafts.tokens[t, :recorded], golden.tokens[t, :recorded])
        assert torch.equal(drafts.fingerprints[t, :recorded], golden.fingerprints[t, :recorded])
        assert (drafts.tokens[t, :drafted] >= 0).all()
        assert (drafts.fingerprints[t, :drafted] != 0).all()
        assert (drafts.tokens[t, drafted:] == -1).all()
        assert (drafts.fingerprints[t, max(1, drafted) :] == 0).all()
    assert torch.equal(drafts.accepted, counts)
    for t in set(range(TOKENS)) - {t for t, drafted, _ in expected if drafted}:
        first = drafts.fingerprints[t, 0]
        wanted = golden.fingerprints[t, 0, :-1] if t <= last else torch.zeros_like(first[:-1])
        assert torch.equal(first[:-1], wanted)
        assert first[-1] == 0
        assert (drafts.tokens[t] == -1).all()
        assert (drafts.fingerprints[t, 1:] == 0).all()
    folded = (
        golden.prompt_fingerprints if last >= 0 else torch.zeros_like(drafts.prompt_fingerprints)
    )
    assert torch.equal(drafts.prompt_fingerprints, folded)


def test_every_draft_and_print_equals_the_twin(case: Case) -> None:
    eagle = case.eagle
    head = load_checkpoint(case.folder / "head")
    twin = TwinEagle(head.config, head.tensors, eagle.target)
    for prompt, trace in zip(PROMPTS, case.golden, strict=True):
        want = twin.drafts(prompt, trace.tokens.tolist(), DRAFT_DEPTH)
        drafts = trace.drafts
        assert [[x for x in row if x >= 0] for row in drafts.tokens.tolist()] == want["tokens"]
        assert drafts.accepted.tolist() == want["accepted"]
        width = len(eagle.draft_operations)
        for t, prints in enumerate(want["prints"]):
            for depth in range(DRAFT_DEPTH):
                row = prints[depth] if depth < len(prints) else [0] * width
                got = drafts.fingerprints[t, depth].tolist()
                names = zip(eagle.draft_operations, got, row, strict=True)
                assert not [name for name, a, b in names if a != b], f"token {t}, draft {depth}"
        expected = want["prompt"] if len(prompt) > 1 else [0] * width
        assert drafts.prompt_fingerprints.tolist() == expected


def test_some_drafts_are_right_and_some_wrong(case: Case) -> None:
    """Otherwise the other tests would prove little."""
    accepted = [r for trace in case.golden for r in rounds(trace.drafts.accepted.tolist(), 3)]
    rate = sum(a for _, _, a in accepted) / sum(drafted for _, drafted, _ in accepted)
    assert 0.2 <= rate <= 0.8


def test_batching_cannot_change_a_draft(
    case_of: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of other lengths beside one, other batches, another order: the same traces."""
    eagle = case_of("eagle3-sm_90-fp16").eagle
    prompts = [[5, 6], [7], [1] * 20, [9, 8, 7]]
    tokens = [eagle.target.generate(p, 3 + 4 * i).tokens for i, p in enumerate(prompts)]
    alone = [eagle.replay_many([p], [t])[0] for p, t in zip(prompts, tokens, strict=True)]
    assert_same(eagle.replay_many(prompts, tokens), alone)
    order = [2, 0, 3, 1]
    shuffled = eagle.replay_many([prompts[i] for i in order], [tokens[i] for i in order])
    assert_same(shuffled, [alone[i] for i in order])
    monkeypatch.setattr(generation, "BATCH_ROWS", 8)
    assert_same(eagle.replay_many(prompts, tokens), alone)


def test_drafts_do_not_depend_on_what_follows(eagle: Eagle) -> None:
    """Longer streams draft the same; only near the end of the shorter one are there fewer."""
    (long,), (short,) = (eagle.generate_many(PROMPTS[1:], n) for n in (13, 9))
    for t in range(9):
        most = max(0, min(DRAFT_DEPTH, 9 - 2 - t))
        assert torch.equal(short.drafts.tokens[t, :most], long.drafts.tokens[t, :most])
        assert (short.drafts.tokens[t, most:] == -1).all()
        same = long.drafts.fingerprints[t, :most]
        assert torch.equal(short.drafts.fingerprints[t, :most], same)
        assert short.drafts.accepted[t] == min(most, int(long.drafts.accepted[t]))


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_streams_too_short_for_many_drafts(eagle: Eagle, prompt: list[int], tokens: int) -> None:
    (golden,) = eagle.generate_many([prompt], tokens)
    assert (golden.drafts.tokens >= 0).sum() == max(0, tokens - 2)
    assert (golden.drafts.prompt_fingerprints[:-1] != 0).all() == (len(prompt) > 1)
    got = eagle.generate(prompt, tokens, 5)
    assert got.target.same_bits(golden.target)
    counts = [-1] * tokens
    for t, _, accepted in rounds(golden.drafts.accepted.tolist(), 5):
        counts[t] = accepted
    assert got.drafts.accepted.tolist() == counts


def test_types_of_drafts(eagle: Eagle) -> None:
    width = len(draft_operations("eagle"))
    for trace in (*eagle.generate_many([[1, 2]], 5), eagle.generate([1, 2], 5, 3)):
        assert {name: (x.dtype, tuple(x.shape)) for name, x in vars(trace.drafts).items()} == {
            "tokens": (torch.int32, (5, DRAFT_DEPTH)),
            "accepted": (torch.int32, (5,)),
            "fingerprints": (torch.int64, (5, DRAFT_DEPTH, width)),
            "prompt_fingerprints": (torch.int64, (width,)),
        }
        assert not trace.same_bits(trace.target)
        assert trace.same_bits(trace)


def test_ties_go_to_the_lowest_id(tmp_path: Path) -> None:
    """A head whose logits are all equal drafts draft id 0, whatever the target."""
    load(tmp_path, "eagle3-sm_89")
    file = tmp_path / "head" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"].zero_()
    save_file(tensors, file)
    target, head = (tmp_path / name for name in ("target", "head"))
    eagle = Eagle.from_pretrained(target, head, contract=default_contract("sm_90"))
    lowest = int(tensors["d2t"][0])
    assert eagle.generate([1, 2], 8, 3).drafts.tokens[0].tolist() == [lowest] * 3 + [-1] * 2
    assert eagle.generate_many([[1, 2]], 8)[0].drafts.tokens[0, 0] == lowest


def test_forms_of_one_head_draft_the_same(tmp_path: Path) -> None:
    """Both kinds of file, names with a prefix; an own table equal to the target's."""
    want = load(tmp_path / "one").generate_many(PROMPTS, 6)
    for number, option in enumerate(({"bin": True}, {"prefix": "model."})):
        assert_same(load(tmp_path / str(number), **option).generate_many(PROMPTS, 6), want)
    path = tmp_path / "one"
    tensors = load_file(path / "head" / "model.safetensors")
    table = load_file(path / "target" / "model.safetensors")["model.embed_tokens.weight"]
    for scale, same in ((1, True), (2, False)):
        save_file(tensors | {"embed_tokens.weight": table * scale}, path / "head/model.safetensors")
        contract = default_contract("sm_89", **BLOCKS)
        eagle = Eagle.from_pretrained(path / "target", path / "head", contract=contract)
        got = eagle.generate_many(PROMPTS, 6)
        equal = [one.drafts.same_bits(other.drafts) for one, other in zip(got, want, strict=True)]
        assert equal == [same, same]


def test_progress_counts_rows_of_both_and_goes_on_within_a_pass(
    eagle: Eagle, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    prompts = [[3, 5, 7], [1] * 20]
    tokens = [eagle.target.generate(p, 6).tokens for p in prompts]
    for size in (1024, 1):
        monkeypatch.setattr(generation, "BATCH_ROWS", size)
        seen.clear()
        eagle.replay_many(prompts, tokens, lambda *at: seen.append(at))
        assert (seen[0], seen[-1]) == ((0, 66), (66, 66))
        assert sorted(seen) == seen
        assert len({done for done, _ in seen}) > 20
    seen.clear()
    eagle.generate_many(prompts, 6, lambda *at: seen.append(at))
    assert (seen[0], seen[-1]) == ((0, 99), (99, 99))
    assert sorted(seen) == seen
    assert eagle.generate_many([], 3) == []
    assert eagle.replay_many([], []) == []


def test_tokens_of_each_step_are_told(eagle: Eagle) -> None:
    """A recorder notes tokens as they are chosen."""
    chosen: list[list[int]] = []
    traces = eagle.generate_many([[1, 2], [9]], 5, on_tokens=chosen.append)
    assert chosen == [list(step) for step in zip(*(t.tokens.tolist() for t in traces), strict=True)]


def test_a_forged_token_ends_the_drafts_that_lead_to_it(
    case_of: Callable[[str], Case],
) -> None:
    case = case_of("eagle-sm_89")
    eagle, truth = case.eagle, case.golden[1]
    forged = truth.tokens.clone()
    forged[5] = (forged[5] + 1) % eagle.vocab_size
    (found,) = eagle.replay_many(PROMPTS[1:], [forged])
    assert torch.equal(found.tokens[:6], truth.tokens[:6])
    for t in range(5):
        before = 5 - t - 1  # drafts of tokens before the forged one
        got, want = found.drafts, truth.drafts
        assert torch.equal(got.tokens[t, : before + 1], want.tokens[t, : before + 1])
        assert min(int(got.accepted[t]), before) == min(int(want.accepted[t]), before)
    differ = found.drafts.fingerprints[5:8, 0] != truth.drafts.fingerprints[5:8, 0]
    assert differ.any(dim=1).all()


def test_what_is_refused(eagle: Eagle) -> None:
    for most in (-1, DRAFT_DEPTH + 1):
        with pytest.raises(ValueError, match=f"num_draft_tokens within 0 … 5, found {most}"):
            eagle.generate([1], 4, most)
    for run in (lambda p, n: eagle.generate(p, n, 3), lambda p, n: eagle.generate_many([p], n)):
        with pytest.raises(ValueError, match="max_tokens of at least 1, found 0"):
            run([1], 0)
        with pytest.raises(ValueError, match="prompt 0, position 0: .* found 48"):
            run([48], 2)
        with pytest.raises(ValueError, match="at most 128 positions .* found 130"):
            run([1] * 128, 3)
    with pytest.raises(ValueError, match="1 prompts, but 2 recorded"):
        eagle.replay_many([[1]], [[1], [2]])


def test_nan_among_a_draft_s_logits_names_prompt_and_step(tmp_path: Path) -> None:
    eagle = load(tmp_path)
    # The head's rows of id 6 meet a NaN, the target's do not; a file with one would not load.
    eagle.head._embed_tokens = eagle.head._embed_tokens.clone()
    eagle.head._embed_tokens[6, 1] = torch.nan
    message = r"prompt {}, step {}: expected numbers among the draft's logits, found NaN"
    with pytest.raises(ValueError, match=message.format(1, "[012]")):
        eagle.replay_many([[1], [1]], [[4, 4, 4, 4], [4, 4, 6, 4, 4]])
    with pytest.raises(ValueError, match=message.format(0, 0)):
        eagle.generate([1, 6], 5, 2)


def test_progress_of_a_batch_ends_with_its_last_pass() -> None:
    told: list[int] = []
    for stage in range(1 + DRAFT_DEPTH):
        advance = eagle_replay._stage(stage, 7, 60, told.append)
        for part in (1, 7):
            advance(part)
    assert told == sorted(told)
    assert told[1::2] == [10, 20, 30, 40, 50, 60]
