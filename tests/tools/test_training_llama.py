"""The Llama that learns: rotary frequencies, cache, loss, schedule, and the choice of prompts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from training.corpus import SourceFile
from training.llama import Llama, LlamaConfig, inverse_frequencies, rotate
from training.llama_prompts import (
    candidates,
    choose_prompts,
    first_best,
    grams,
    greedy_streams,
    loops,
    prompt_lengths,
)
from training.llama_training import Recipe, learning_rate, perplexity, token_stream, train

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=128,
    original_max_position_embeddings=32,
)
TEXT = "".join(f"def f{i}(x):\n    return x + {i * i}\n\n\n" for i in range(60))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tiny_model(std: float = 0.3) -> Llama:
    """Weights large enough for attention to prefer some keys to others."""
    torch.manual_seed(5)
    model = Llama(TINY)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def scaled_by_wavelength(config: LlamaConfig) -> tuple[list[float], set[str]]:
    """The scaling by its definition, three cases by the length of the wave, and those met."""
    frequencies, cases = [], set()
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        turns = config.original_max_position_embeddings * frequency / (2 * math.pi)
        slow = frequency / config.rope_factor
        if turns < low:
            frequencies.append(slow)
            cases.add("slowed")
        elif turns > high:
            frequencies.append(frequency)
            cases.add("kept")
        else:
            blend = (turns - low) / (high - low)
            frequencies.append((1 - blend) * slow + blend * frequency)
            cases.add("blended")
    return frequencies, cases


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        LlamaConfig(
            head_dim=128,
            rope_theta=500000.0,
            rope_factor=8.0,
            original_max_position_embeddings=8192,
        ),
    ],
    ids=["llama-pico", "Llama 3.1"],
)
def test_frequencies_follow_the_three_cases(config):
    frequencies, cases = scaled_by_wavelength(config)
    assert cases == {"kept", "blended", "slowed"}
    want = torch.tensor(frequencies, dtype=torch.float64)
    torch.testing.assert_close(inverse_frequencies(config), want, rtol=1e-13, atol=0)


def test_rotation_turns_halves_as_complex_numbers():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64).float()
    angle = torch.rand(2, 1, 5, 4) * 6
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    want = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_later_tokens_do_not_reach_back():
    model, ids = tiny_model(), torch.randint(256, (1, 20))
    other = ids.clone()
    other[0, 12] = (ids[0, 12] + 1) % 256
    before, after = model(ids), model(other)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-5)
    # Its own row, and those that attend to it.
    assert ((before[:, 12:] - after[:, 12:]).abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_streams_of_a_ragged_batch_equal_recomputing_each_from_the_start():
    model = tiny_model()
    prompts = [tuple(torch.randint(256, (n,)).tolist()) for n in (1, 17, 5, 30)]
    streams = greedy_streams(model, prompts, 12)
    for prompt, stream in zip(prompts, streams, strict=True):
        ids = list(prompt)
        for token in stream:
            logits = model(torch.tensor([ids]))[0, -1]
            # Another order of sums may choose otherwise between logits this close.
            assert logits[token] >= logits.max() - 2**-6 * logits.abs().max()
            ids.append(token)
    assert len(set(streams)) == len(prompts)


@torch.no_grad()
def test_cached_rows_equal_those_of_one_pass():
    model, ids = tiny_model(), torch.randint(256, (2, 24))
    whole, cache = model.hidden(ids), model.empty_cache(2, 40)
    parts, start = [], 0
    for size in (7, 1, 16):
        positions = torch.arange(start, start + size).expand(2, size)
        parts.append(model.hidden(ids[:, start : start + size], positions, cache))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_lowest_id_after_rounding():
    # 1 + 2^-9 and 1 are one bf16 number.
    logits = torch.tensor([[0.0, 1.0, 1 + 2**-9, 0.5], [3.0, -1.0, 3.0, 2.0]])
    assert first_best(logits).tolist() == [1, 0]


@torch.no_grad()
def test_perplexity_predicts_each_token_once_from_its_window():
    model, stream = tiny_model(), torch.randint(256, (75,))
    total = 0.0
    for start in range(0, 74, 10):
        window = stream[start : min(start + 10, 74) + 1]
        for j in range(1, len(window)):
            total += float(F.cross_entropy(model(window[None, :j])[0, -1:], window[j : j + 1]))
    assert perplexity(model, stream, 10) == pytest.approx(math.exp(total / 74), rel=1e-4)


def test_the_rate_rises_falls_and_ends_low():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    peak = rates.index(max(rates))
    assert max(rates) == 2.0
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.04, rel=0.01)


def recipe(**changes: float) -> Recipe:
    values = {"seed": 1, "epochs": 6, "batch_size": 4, "window": 32, "learning_rate": 3e-3}
    return Recipe(**(values | {"weight_decay": 0.1, "dropout": 0.1} | changes))


def test_training_learns_and_repeats_itself_from_a_seed(tokenizer):
    stream = token_stream(tokenizer, [SourceFile("a.py", TEXT), SourceFile("b.py", TEXT)], 0)
    assert len(stream) == 2 * len(TEXT) + 3
    assert stream[[0, len(TEXT) + 1, -1]].tolist() == [0, 0, 0]
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = Llama(TINY, dropout=0.1)
        before = perplexity(model, stream[:500], 32)
        with Progress(disable=True) as progress:
            epochs = list(train(model, stream, stream[:500], recipe(), progress))
        assert epochs[-1].perplexity < before / 10
        runs.append((epochs, model.lm_head.weight.detach().clone()))
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1].step <= epochs[-1].steps
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_a_short_time_shortens_the_schedule(tokenizer):
    stream = token_stream(tokenizer, [SourceFile("a.py", TEXT)], 0)
    with Progress(disable=True) as progress:
        hurried = recipe(epochs=100, batch_size=1, window=8, minutes=1e-6)
        epochs = list(train(Llama(TINY), stream, stream[:50], hurried, progress))
    assert epochs[-1].step == epochs[-1].steps == 200  # where the measuring ends


def test_too_little_text_is_refused():
    with (
        pytest.raises(ValueError, match="expected at least 129 tokens to learn, found 100"),
        Progress(disable=True) as progress,
    ):
        list(train(Llama(TINY), torch.zeros(100).long(), torch.zeros(9).long(), recipe(), progress))


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ((1, 2, 3, 4, 5, 6), False),
        ((1, 2, 3, 7, 7, 7), True),
        ((1, 2, 3, 4, 7, 7), False),
        ((9, 1, 2, 1, 2, 1, 2), True),
        ((1, 2, 1, 2, 1, 2, 9), False),
        ((1, 1, 2, 1, 1, 2, 1, 1, 2), True),
    ],
)
def test_a_loop_is_three_times_the_same_at_the_end(stream, expected):
    assert loops(stream) is expected


def test_grams_are_the_distinct_runs_of_four():
    assert grams((1, 2, 3, 4, 1, 2, 3, 4)) == {
        (1, 2, 3, 4),
        (2, 3, 4, 1),
        (3, 4, 1, 2),
        (4, 1, 2, 3),
    }


def test_lengths_lie_around_the_blocks_and_the_first_eight_are_mixed():
    lengths = prompt_lengths(7)
    assert len(lengths) == 64
    assert (min(lengths), max(lengths)) == (1, 300)
    for around in ((15, 16, 17), (63, 64, 65, 66), (127, 128, 129, 130), (255, 256, 257, 258)):
        assert set(around) <= set(lengths)
    assert {1, 65, 130} <= set(lengths[:8])
    assert lengths != prompt_lengths(8)
    assert sorted(lengths) == sorted(prompt_lengths(8))


def test_candidates_have_their_lengths_and_are_distinct(tokenizer):
    files = [SourceFile("a.py", TEXT), SourceFile("b.py", "é = 'ü'\n" * 40)]
    pools = candidates(tokenizer, files, [1, 9, 9], seed=2)
    found = [(length, prompt) for length, pool in pools.items() for prompt in pool]
    assert len({prompt.text for _, prompt in found}) == len(found) > 30
    for length, prompt in found:
        assert len(prompt.ids) == length
        assert tuple(tokenizer.encode(prompt.text).ids) == prompt.ids
        path, _, line = prompt.source.rpartition(":")
        text = {file.path: file.text for file in files}[path]
        assert "".join(text.splitlines(True)[int(line) - 1 :]).startswith(prompt.text)


def test_prompts_that_loop_come_last(tokenizer, monkeypatch):
    """Streams are made up: three of four loop, and vary more before they do than the others."""
    numbers = itertools.count()

    def made_up(model, prompts, max_tokens):
        streams = []
        for _ in prompts:
            number = next(numbers)
            looped = (*range(number, number + max_tokens - 3), 7, 7, 7)
            twice = tuple(range(number, number + max_tokens // 2)) * 2
            streams.append(twice if number % 4 == 3 else looped)
        told.extend(zip(prompts, streams, strict=True))
        return streams

    told: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    monkeypatch.setattr("training.llama_prompts.greedy_streams", made_up)
    heard: list[tuple[int, ...]] = []
    prompts = choose_prompts(
        tiny_model(),
        tokenizer,
        [SourceFile("a.py", TEXT)],
        [12, 20, 12],
        max_tokens=10,
        seed=1,
        heard=heard.extend,
    )
    assert [len(prompt.ids) for prompt in prompts] == [12, 20, 12]
    stream_of = dict(told)
    assert not any(loops(stream_of[prompt.ids]) for prompt in prompts)
    assert heard == [stream for _, stream in told]
    assert any(loops(stream) for stream in heard)


def test_too_few_pieces_are_refused(tokenizer):
    with pytest.raises(ValueError, match="expected 2 prompts of 30 tokens"):
        choose_prompts(
            tiny_model(),
            tokenizer,
            [SourceFile("a.py", "x = 1\n" * 5)],
            [30, 30],
            max_tokens=4,
            seed=1,
        )
