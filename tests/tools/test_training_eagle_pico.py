"""The committed eagle-pico: its directory, its prompts, and the script that writes such ones."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from typer.testing import CliRunner

from training import eagle_pico, eagle_prompts
from training.corpus import SourceFile
from training.eagle_acceptance import acceptance_length, accepted_drafts
from training.eagle_card import model_card
from training.eagle_prompts import GROUPS, Group, Pieces, choose_group
from training.llama import Llama
from training.llama_prompts import grams, greedy_streams, loops

GOLDEN = eagle_pico.GOLDEN
TARGET = GOLDEN / "models" / "llama-pico"
MODEL = GOLDEN / "models" / "eagle-pico"
PROMPTS = GOLDEN / "prompts" / "eagle-pico.jsonl"
# The published layout: nothing of the target's, no norm before attention, none at the end.
LAYOUT = {
    "fc.weight": [256, 512],
    "layers.0.self_attn.q_proj.weight": [256, 256],
    "layers.0.self_attn.k_proj.weight": [128, 256],
    "layers.0.self_attn.v_proj.weight": [128, 256],
    "layers.0.self_attn.o_proj.weight": [256, 256],
    "layers.0.mlp.gate_proj.weight": [704, 256],
    "layers.0.mlp.up_proj.weight": [704, 256],
    "layers.0.mlp.down_proj.weight": [256, 704],
    "layers.0.post_attention_layernorm.weight": [256],
}


def layout(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TARGET / "tokenizer.json"))


@pytest.fixture(scope="module")
def encoded(prompts, tokenizer) -> list[tuple[int, ...]]:
    return [tuple(tokenizer.encode(p["text"], add_special_tokens=False).ids) for p in prompts]


@pytest.fixture(scope="module")
def target() -> Llama:
    return eagle_pico.load_target(TARGET)[0]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    return found


def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    )


def test_the_checkpoint_has_the_published_layout():
    assert layout(MODEL) == LAYOUT
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    of_target = json.loads((TARGET / "config.json").read_text(encoding="utf-8"))
    assert config == of_target | {"num_hidden_layers": 1}
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 4_000_000


def test_the_card_tells_the_figures(figures):
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for key in ("target", "corpus", "device", "torch", "steps", "windows", "learning_rate"):
        assert str(figures[key]) in card
    for kind in ("suite_acceptance", "held_out_acceptance", "held_out_acceptance_without_loop"):
        row = " | ".join(f"{figures[kind][k]:.3f}" for k in ("1", "3", "5"))
        assert row in card
    assert figures["target"] == eagle_pico.sha256_of(TARGET / "model.safetensors")
    of_target = json.loads((TARGET / "training.json").read_text(encoding="utf-8"))
    assert figures["corpus"] == of_target["corpus"]  # so the same files are held out


def test_a_card_without_a_figure_is_refused():
    with pytest.raises(KeyError, match="suite_acceptance"):
        model_card({})


def test_the_prompts_have_their_lengths_and_read_back(prompts, encoded, tokenizer):
    assert [prompt["id"] for prompt in prompts] == [f"eagle-pico-{i:02d}" for i in range(64)]
    lengths = [len(ids) for ids in encoded]
    wanted = [length for group in GROUPS for length in group.lengths]
    wanted += [*eagle_prompts.FIRST_LENGTHS, *eagle_prompts.OTHER_LENGTHS]
    assert sorted(lengths) == sorted(wanted)
    assert {1, 15, 16, 17, 32, 33, 48, 64} <= set(lengths)
    assert 65 < statistics.mean(lengths) < 80
    assert max(lengths) <= 224
    assert [tokenizer.decode(list(ids), skip_special_tokens=False) for ids in encoded] == [
        prompt["text"] for prompt in prompts
    ]
    places = [place for p in prompts for place in p["source"].split(" + ")]
    assert all(SourceFile(place.rpartition(":")[0], "").held_out for place in places)


def test_groups_share_their_prefix_and_no_more(encoded):
    found = []
    for ids in set(encoded):
        near = [other for other in encoded if shared(ids, other) >= 32]
        if len(near) > 1 and near not in found:
            found.append(near)
    groups = []
    for group in found:
        assert len({shared(a, b) for a, b in itertools.combinations(group, 2)}) == 1
        groups.append(Group(shared(*group[:2]), tuple(sorted(map(len, group)))))
    assert sorted(groups, key=repr) == sorted(GROUPS, key=repr)
    assert all(32 <= group.prefix <= 128 for group in groups)
    # Some prompts are the whole prefix of others; some prefixes end within a block.
    assert sum(group.prefix in group.lengths for group in groups) == 3
    assert any(group.prefix % 16 for group in groups)
    first = {shared(a, b) for a, b in itertools.combinations(encoded[:8], 2)}
    assert 48 in first  # a quick check meets a cached prefix too


def test_the_streams_differ_do_not_loop_and_are_drafted_well(encoded, target, figures):
    streams = greedy_streams(target, encoded[:8], 96)
    assert len(set(streams)) == 8
    assert not any(loops(stream) for stream in streams)
    accepted = accepted_drafts(target, eagle_pico.load_head(MODEL), encoded[:8], streams)
    assert acceptance_length(accepted, 3) > 2.3
    assert {0, 1, 2, 3} <= {min(count, 3) for counts in accepted for count in counts}
    assert figures["suite_acceptance"]["3"] > 2.3
    assert figures["loops"] == 0


def held_out_names(count: int) -> list[str]:
    names = (f"m{i}.py" for i in itertools.count())
    return list(itertools.islice((n for n in names if SourceFile(n, "").held_out), count))


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    folder = tmp_path / "stdlib"
    folder.mkdir()
    lines = [f"def f{i}(x):\n    return x + {i * i}\n" for i in range(60)]
    (folder / "learned.py").write_text("".join(lines))
    for name in held_out_names(2):
        (folder / name).write_text("".join(lines[::2]) + f"import {name[:-3]}\n" * 9)
    assert not SourceFile("learned.py", "").held_out
    return folder


@pytest.fixture
def own_target(tmp_path: Path, stdlib: Path) -> Path:
    """The committed target, as if it had learned the small library."""
    folder = tmp_path / "target"
    folder.mkdir()
    for path in TARGET.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    figures = json.loads((folder / "training.json").read_text())
    files = eagle_pico.read_corpus(stdlib)
    figures |= {"corpus": eagle_pico.corpus_digest(files), "stdlib_version": "3.0"}
    (folder / "training.json").write_text(json.dumps(figures))
    return folder


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(eagle_pico.app, [str(argument) for argument in arguments])
    words = result.output.replace("│", " ").split()  # a box around an error breaks its lines
    return result.exit_code, " ".join([*words, repr(result.exception)])


def test_the_script_trains_writes_and_chooses(stdlib, own_target, tmp_path, monkeypatch):
    folder, file = tmp_path / "model", tmp_path / "prompts.jsonl"
    monkeypatch.setattr(eagle_pico, "LONGEST_PROMPT", 32)
    monkeypatch.setattr(eagle_pico, "LEARNED_TOKENS", 8)
    monkeypatch.setattr(eagle_pico, "STREAM_TOKENS", 6)
    monkeypatch.setattr(eagle_prompts, "PIECE_LENGTHS", (1, 5))
    options = ("--stdlib", stdlib, "--threads", torch.get_num_threads(), "--held-out-each", 2)
    options += ("--target-folder", own_target, "--model-folder", folder)
    small = ("--streams", 6, "--steps", 3, "--batch-size", 2, "--depth", 2, "--seed", 4)
    status, output = invoke("train", *options, *small)
    assert (status, "step 3 of 3: loss" in output) == (0, True), output
    assert layout(folder) == LAYOUT
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (MODEL / "config.json").read_text()
    )
    figures = json.loads((folder / "training.json").read_text())
    assert (figures["stdlib_version"], figures["device"]) == ("3.0", "a CPU")
    assert all(1 <= length <= 2 for length in figures["acceptance_fp32"].values())
    eagle_pico.load_head(folder)

    monkeypatch.setattr(eagle_prompts, "GROUPS", (Group(9, (9, 10, 12)), Group(9, (11, 14))))
    monkeypatch.setattr(eagle_prompts, "FIRST_LENGTHS", (1,))
    monkeypatch.setattr(eagle_prompts, "OTHER_LENGTHS", (5, 4))
    monkeypatch.setattr(eagle_prompts, "PREFIXES", 1)
    monkeypatch.setattr(eagle_prompts, "TAILS", 8)
    status, output = invoke("prompts", *options, "--prompts-file", file)
    assert status == 0, output
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"eagle-pico-{i:02d}" for i in range(8)]
    assert {path.name for path in folder.iterdir()} == {path.name for path in MODEL.iterdir()}
    assert "8 pieces of held-out files, 1 to 14 tokens" in " ".join(
        (folder / "README.md").read_text().split()
    )

    weights = own_target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\0\0")
    status, output = invoke("prompts", *options)
    assert status == 2
    assert "was trained for weights of sha256" in output
    (stdlib / "learned.py").write_text("x = 1\n")
    status, output = invoke("train", *options, *small)
    assert status == 2
    assert "was trained on the standard library of Python 3.0" in output


def test_a_folder_of_other_sizes_is_refused(tmp_path):
    config = json.loads((MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(eagle_pico.typer.BadParameter, match="not of a head that this script"):
        eagle_pico.load_head(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    (tmp_path / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match="size mismatch"):
        eagle_pico.load_head(tmp_path)


def test_streams_that_loop_come_last_in_a_group(tokenizer, target, stdlib, monkeypatch):
    """Streams are made up: three of four loop, and vary more before they do than the others."""
    numbers = itertools.count()
    told: dict[tuple[int, ...], tuple[int, ...]] = {}

    def made_up(model, prompts, max_tokens):
        for ids, n in zip(prompts, numbers, strict=False):
            looped = (*range(n, n + max_tokens - 3), 7, 7, 7)
            told[ids] = looped if n % 4 else tuple(range(n, n + max_tokens // 2)) * 2
        return [told[ids] for ids in prompts]

    monkeypatch.setattr(eagle_prompts, "greedy_streams", made_up)
    monkeypatch.setattr(eagle_prompts, "PREFIXES", 2)
    files = [file for file in eagle_pico.read_corpus(stdlib) if file.held_out]
    pieces = Pieces(tokenizer, files, 3)
    monkeypatch.setattr(eagle_prompts, "TAILS", 10)
    seen: set[tuple[int, ...]] = set()
    chosen = choose_group(target, pieces, Group(9, (11, 13)), max_tokens=10, seen=seen)
    assert [len(prompt.ids) for prompt in chosen] == [11, 13]
    assert not any(loops(told[prompt.ids]) for prompt in chosen)
    assert any(loops(stream) for stream in told.values())
    assert shared(*(prompt.ids for prompt in chosen)) == 9
    assert seen == {gram for prompt in chosen for gram in grams(told[prompt.ids])}


def test_pieces_that_do_not_exist_are_refused(tokenizer):
    pieces = Pieces(tokenizer, [SourceFile("a.py", "x = 1\n" * 5)], 1)
    with pytest.raises(ValueError, match="expected 2 pieces of 30 tokens"):
        pieces.of(30, 2)
