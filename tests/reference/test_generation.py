"""Decoding step by step, replayed, batched, chunked: the same bits however rows are fed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitassay.reference import generation
from bitassay.reference.checkpoints.checkpoint import load_checkpoint
from bitassay.reference.generation import KVCache, batches
from bitassay.reference.model import CausalLM, load_model
from bitassay.reference.spec.contract import default_contract
from bitassay.reference.spec.errors import SequenceError
from bitassay.reference.trace import Trace
from support.tiny_llama import write_tiny_llama

SMALL: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40}
BLOCKS = {"key_block": 16, "key_split": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("sm_89", {}),
    "llama-llama3-tied": ("sm_90", {"llama3": True, "tied": True}),
    "llama-fp16-sharded": ("sm_90", {"dtype": torch.float16, "sharded": True}),
    "llama-llama3-fp16": ("sm_89", {"llama3": True, "dtype": torch.float16}),
    "qwen3": ("sm_90", {"model_type": "qwen3", "sharded": True}),
    "qwen3-llama3-tied-fp16": (
        "sm_89",
        {"model_type": "qwen3", "llama3": True, "tied": True, "dtype": torch.float16},
    ),
    "qwen3-grouped": (
        "sm_90",
        {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}


def load(folder: Path, name: str = "llama") -> CausalLM:
    arch, options = MODELS[name]
    path = write_tiny_llama(folder, **(SMALL | {"seed": len(name)} | options))
    return load_model(path, contract=default_contract(arch, **BLOCKS))


def some_prompts(vocab_size: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def assert_same_traces(got: list[Trace], want: list[Trace]) -> None:
    assert len(got) == len(want)
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        for field, value in vars(other).items():
            assert torch.equal(getattr(one, field), value), f"sequence {number}: {field}"


@pytest.mark.parametrize("name", list(MODELS))
def test_batching_cannot_change_a_bit(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goldens stand on: replaying recorded tokens in one batch is generating step by step.

    A sequence generated alone, among others, replayed alone, among others in one batch or in
    several, in another order: one trace, in every token, logit, margin and fingerprint.
    """
    model = load(tmp_path, name)
    prompts = some_prompts(model.vocab_size, [1, 15, 16, 17, 40])
    tokens = 3
    alone = [model.generate(prompt, tokens) for prompt in prompts]
    recorded = [trace.tokens for trace in alone]
    assert_same_traces(model.generate_many(prompts, tokens), alone)
    assert_same_traces(model.replay_many(prompts, recorded), alone)
    pairs = zip(prompts, recorded, strict=True)
    assert_same_traces([model.replay(*pair) for pair in pairs], alone)
    order = [3, 0, 4, 2, 1]
    shuffled = model.replay_many([prompts[i] for i in order], [recorded[i] for i in order])
    assert_same_traces(shuffled, [alone[i] for i in order])
    monkeypatch.setattr(generation, "BATCH_ROWS", 30)
    assert_same_traces(model.replay_many(prompts, recorded), alone)
    # The traces are not all one: the test would see rows that are swapped.
    prints = {int(x) for trace in alone for x in trace.fingerprints.flatten()}
    assert len(prints) > 0.9 * alone[0].fingerprints.numel() * len(prompts)


def test_sequences_of_different_lengths_are_replayed_together(tmp_path: Path) -> None:
    model = load(tmp_path)
    prompts = some_prompts(model.vocab_size, [3, 9, 1])
    want = [model.generate(prompt, 4 + 3 * i) for i, prompt in enumerate(prompts)]
    assert_same_traces(model.replay_many(prompts, [trace.tokens for trace in want]), want)


def test_fewer_tokens_are_the_first_of_more(tmp_path: Path) -> None:
    model = load(tmp_path, "qwen3")
    (prompt,) = some_prompts(model.vocab_size, [12])
    more, fewer = model.generate(prompt, 8), model.generate(prompt, 3)
    for field in ("tokens", "top_ids", "top_bits", "margins", "fingerprints"):
        assert torch.equal(getattr(fewer, field), getattr(more, field)[:3])
    assert torch.equal(fewer.prompt_fingerprints, more.prompt_fingerprints)


def all_rows(model: CausalLM, ids: list[int], sizes: list[int]) -> dict[str, Tensor]:
    """Every operation's rows of a sequence that is fed in chunks of given sizes."""
    seen: dict[str, list[Tensor]] = {}
    cache, rows = KVCache(), []
    for chunk in torch.tensor(ids).split(sizes):
        hidden = model.hidden(chunk, cache, lambda n, x: seen.setdefault(n, []).append(x))
        rows.append(hidden)
        assert cache.length == sum(map(len, rows))
    return {name: torch.cat(parts) for name, parts in seen.items()} | {"hidden": torch.cat(rows)}


@pytest.mark.parametrize("name", ["llama-llama3-tied", "qwen3-llama3-tied-fp16"])
def test_any_chunking_of_a_prompt_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    model = load(tmp_path, name)
    (ids,) = some_prompts(model.vocab_size, [50])
    whole = all_rows(model, ids, [50])
    assert tuple(whole) == (*model.operations[:-1], "hidden")
    for sizes in ([1] * 50, [16, 16, 16, 2], [7] * 7 + [1], [49, 1], [1, 49], [31, 2, 17]):
        for name, rows in all_rows(model, ids, sizes).items():
            assert torch.equal(rows.view(torch.int16), whole[name].view(torch.int16)), name
    assert torch.equal(model.hidden(ids), whole["hidden"])


def test_rows_do_not_see_later_tokens(tmp_path: Path) -> None:
    model = load(tmp_path)
    (ids,) = some_prompts(model.vocab_size, [40])
    before = all_rows(model, ids, [40])
    for changed in (20, 32, 39):
        other = [*ids]
        other[changed] = (other[changed] + 1) % model.vocab_size
        for name, rows in all_rows(model, other, [40]).items():
            assert torch.equal(rows[:changed], before[name][:changed])
            assert not torch.equal(rows[changed:], before[name][changed:])


def test_observed_rows_have_the_contract_s_widths(tmp_path: Path) -> None:
    model = load(tmp_path, "qwen3-grouped")
    widths = {
        name.split(".")[-1]: rows.flatten(1).shape[1]
        for name, rows in all_rows(model, [1, 2, 3], [3]).items()
    }
    assert widths == {
        "embedding": 32,
        "input_layernorm": 32,
        "qkv_proj": (4 + 2 + 2) * 64,
        "qk_norm": (4 + 2) * 64,
        "rotary": (4 + 2) * 64,
        "attention": 4 * 64,
        "o_proj": 32,
        "attention_residual": 32,
        "post_attention_layernorm": 32,
        "gate_up_proj": 2 * 40,
        "silu_and_mul": 40,
        "down_proj": 32,
        "mlp_residual": 32,
        "norm": 32,
        "hidden": 32,
    }


def test_sharding_and_a_tied_table_stored_twice_change_nothing(tmp_path: Path) -> None:
    contract = default_contract("sm_90")
    options = SMALL | {"seed": 3}
    one = load_model(write_tiny_llama(tmp_path / "one", **options), contract=contract)
    path = write_tiny_llama(tmp_path / "two", **options, sharded=True)
    two = load_model(load_checkpoint(path), contract=contract)
    assert_same_traces([two.generate([1, 2, 3], 4)], [one.generate([1, 2, 3], 4)])


def test_prepared_weights_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitassay.reference import decoder_layer as module

    path = write_tiny_llama(tmp_path, **SMALL)
    contract = default_contract("sm_89")
    prepared = load_model(path, contract=contract).generate([5, 6], 4)
    monkeypatch.setattr(module, "PREPARED_ELEMENTS", 0)
    assert_same_traces([load_model(path, contract=contract).generate([5, 6], 4)], [prepared])


def test_replay_shows_a_forged_token(tmp_path: Path) -> None:
    model = load(tmp_path)
    truth = model.generate([4, 8], 12)
    forged = truth.tokens.clone()
    forged[5] = (forged[5] + 1) % model.vocab_size
    replayed = model.replay([4, 8], forged)
    assert torch.equal(replayed.tokens[:6], truth.tokens[:6])  # row 5 still chooses the truth
    assert replayed.tokens[5] != forged[5]
    assert torch.equal(replayed.fingerprints[:6], truth.fingerprints[:6])
    assert (replayed.fingerprints[6:] != truth.fingerprints[6:]).any(dim=1).all()
    assert torch.equal(replayed.prompt_fingerprints, truth.prompt_fingerprints)


def test_types_of_a_trace(tmp_path: Path) -> None:
    model = load(tmp_path)
    trace = model.generate([1, 2], 5)
    width = len(model.operations)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in vars(trace).items()} == {
        "tokens": (torch.int32, (5,)),
        "top_ids": (torch.int32, (5, 8)),
        "top_bits": (torch.int64, (5, 8)),
        "margins": (torch.int64, (5,)),
        "fingerprints": (torch.int64, (5, width)),
        "prompt_fingerprints": (torch.int64, (width,)),
    }
    assert trace.prompt_fingerprints[-1] == 0  # the lm_head runs on no prompt row
    assert (trace.prompt_fingerprints[:-1] != 0).all()
    assert (model.generate([1], 2).prompt_fingerprints == 0).all()


def test_progress_counts_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    prompts, seen = some_prompts(model.vocab_size, [3, 5]), []
    traces = model.generate_many(prompts, 3, lambda *count: seen.append(count))
    assert [at for at in seen if at[0] in (0, 8, 10, 12)] == [(0, 12), (8, 12), (10, 12), (12, 12)]
    assert sorted(seen) == seen  # and in between, as operations are done
    monkeypatch.setattr(generation, "BATCH_ROWS", 1)
    seen.clear()
    tokens = [trace.tokens for trace in traces]
    model.replay_many(prompts, tokens, lambda *count: seen.append(count))
    assert [at for at in seen if at[0] in (0, 5, 12)] == [(0, 12), (5, 12), (12, 12)]
    assert sorted(seen) == seen
    assert model.generate_many([], 3) == []
    assert model.replay_many([], []) == []


def test_tokens_of_each_step_are_told(tmp_path: Path) -> None:
    model = load(tmp_path)
    prompts, seen = some_prompts(model.vocab_size, [3, 5]), []
    traces = model.generate_many(prompts, 4, on_tokens=seen.append)
    assert seen == [list(step) for step in zip(*(t.tokens.tolist() for t in traces), strict=True)]
    assert model.generate_many([], 3, on_tokens=seen.append) == []
    assert len(seen) == 4


def test_batches_hold_whole_sequences_in_order() -> None:
    assert batches([]) == []
    assert batches([5]) == [[0]]
    assert batches([1023, 1, 1]) == [[0, 1], [2]]
    assert batches([5000, 1, 1]) == [[0], [1, 2]]
    assert batches([100] * 23) == [list(range(11)), list(range(11, 22)), [22]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "expected at least one token id"),
        ([1, 48], r"position 1: .* 0 … 47 \(vocabulary of 48\), found 48"),
        ([-1], "position 0: .* found -1"),
        ([1.0], "expected integer ids"),
    ],
)
def test_prompts_that_are_refused(tmp_path: Path, prompt: list[int], message: str) -> None:
    model = load(tmp_path)
    for run in (lambda: model.generate(prompt, 2), lambda: model.replay(prompt, [1, 2])):
        with pytest.raises(SequenceError, match=f"^prompt 0(: |, ){message}"):
            run()
    with pytest.raises(SequenceError, match=f"^{message}"):
        model.hidden(prompt)


def test_what_else_is_refused(tmp_path: Path) -> None:
    model = load(tmp_path)
    with pytest.raises(ValueError, match="max_tokens of at least 1, found 0"):
        model.generate([1], 0)
    with pytest.raises(ValueError, match="2 prompts, but 1 recorded"):
        model.replay_many([[1], [2]], [[1]])
    with pytest.raises(ValueError, match=r"recorded tokens of prompt 1, position 0: .* found 99"):
        model.replay_many([[1], [2]], [[1], [99]])


def test_sequences_longer_than_the_model_s_positions(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path, **SMALL, max_position_embeddings=10)
    model = load_model(path, contract=default_contract("sm_90"))
    assert len(model.generate([1] * 8, 3).tokens) == 3  # the last token is not fed
    message = r"prompt 1: expected at most 10 positions .* found 11 .* shorten"
    with pytest.raises(SequenceError, match=message):
        model.generate_many([[1], [1] * 9], 3)
    with pytest.raises(ValueError, match=message):
        model.replay_many([[1], [1] * 9], [[1], [1, 2, 3]])
    cache = KVCache()
    model.hidden([1] * 10, cache)
    with pytest.raises(ValueError, match="position 10 is outside the tables' 0 … 9"):
        model.hidden([1], cache)


def test_nan_logits_name_prompt_and_step(tmp_path: Path) -> None:
    read = load_checkpoint(write_tiny_llama(tmp_path, **SMALL))
    # Rows whose token is 6 meet a NaN; a directory with one would not even load.
    read.tensors["model.embed_tokens.weight"][6, 1] = torch.nan
    model = load_model(read, contract=default_contract("sm_89"))
    message = "prompt {}, step {}: expected numbers.* NaN, first at id 0"
    seen: list[list[int]] = []
    with pytest.raises(SequenceError, match=message.format(1, 0)):
        model.generate_many([[1], [2, 6]], 2, on_tokens=seen.append)
    assert seen == []  # a step that went wrong chose nothing
    # Whoever feeds several rows at once may name an earlier step than `generate` would: masked
    # keys weigh 0, and 0 * NaN is NaN for the rows of the same block. It is an error either way.
    with pytest.raises(ValueError, match=message.format(1, "[01]")):
        model.replay_many([[1], [2, 3]], [[1, 2, 3], [6, 4, 1]])


@pytest.mark.parametrize("way", ["generate", "replay"])
def test_progress_goes_on_within_a_step(tmp_path: Path, way: str) -> None:
    """A long prompt through a large model is one step that may take hours."""
    model = load_model(write_tiny_llama(tmp_path / "model"), contract=default_contract("sm_90"))
    seen: list[tuple[int, int]] = []
    prompts = [list(range(40)), list(range(7))]
    if way == "generate":
        model.generate_many(prompts, 3, lambda *at: seen.append(at))
    else:
        model.replay_many(prompts, [[1, 2, 3], [4, 5, 6]], lambda *at: seen.append(at))
    assert {total for _, total in seen} == {51}
    done = [rows for rows, _ in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 51)
    assert len({rows for rows in done if rows < 40}) > 10
