"""The committed llama-pico: its directory, its prompts, and the script that writes such ones."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from training import llama_pico
from training.corpus import SourceFile
from training.llama import Llama, LlamaConfig
from training.llama_card import model_card
from training.llama_prompts import greedy_streams, loops, prompt_lengths

GOLDEN = llama_pico.GOLDEN
MODEL = GOLDEN / "models" / "llama-pico"
PROMPTS = GOLDEN / "prompts" / "llama-pico.jsonl"


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_the_weights_are_bf16_and_fit_the_configuration():
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config == LlamaConfig().to_json()
    tensors = load_file(MODEL / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    Llama(LlamaConfig()).load_state_dict(tensors)  # refuses other names and shapes
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 12_000_000


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_the_tokenizer_is_that_of_context_lm(name):
    other = GOLDEN / "models" / "context-lm" / name
    assert (MODEL / name).read_bytes() == other.read_bytes()


def test_the_card_tells_the_figures_of_the_training():
    figures = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for key in ("corpus", "device", "torch", "steps", "best_epoch"):
        assert str(figures[key]) in card
    assert f"{figures['perplexity_bf16']:.3f}" in card
    # The same text as the other model's, so the same files are held out.
    other = (GOLDEN / "models" / "context-lm" / "README.md").read_text(encoding="utf-8")
    assert figures["corpus"] in other


def test_a_card_without_a_figure_is_refused():
    with pytest.raises(KeyError, match="parameters"):
        model_card({})


def test_the_prompts_have_their_lengths_and_read_back(prompts, tokenizer):
    assert [prompt["id"] for prompt in prompts] == [f"llama-pico-{i:02d}" for i in range(64)]
    encoded = [tokenizer.encode(p["text"], add_special_tokens=False).ids for p in prompts]
    lengths = [len(ids) for ids in encoded]
    assert lengths == prompt_lengths(20260)
    assert 60 < statistics.mean(lengths) < 100
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in encoded] == [
        prompt["text"] for prompt in prompts
    ]
    assert len({prompt["text"] for prompt in prompts}) == 64
    assert all(SourceFile(p["source"].rpartition(":")[0], "").held_out for p in prompts)


def test_the_first_streams_differ_and_do_not_loop(prompts, tokenizer):
    model = Llama(LlamaConfig())
    model.load_state_dict(load_file(MODEL / "model.safetensors"))
    ids = [tuple(tokenizer.encode(prompt["text"]).ids) for prompt in prompts[:8]]
    streams = greedy_streams(model, ids, 64)
    assert len(set(streams)) == 8
    assert not any(loops(stream) for stream in streams)


def held_out_name() -> str:
    names = (f"m{i}.py" for i in range(1000))
    return next(name for name in names if SourceFile(name, "").held_out)


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    folder = tmp_path / "stdlib"
    folder.mkdir()
    lines = [f"def f{i}(x):\n    return x + {i * i}\n" for i in range(30)]
    (folder / "learned.py").write_text("".join(lines))
    (folder / held_out_name()).write_text("".join(lines[::2]))
    assert not SourceFile("learned.py", "").held_out
    return folder


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(llama_pico.app, [str(argument) for argument in arguments])
    words = result.output.replace("│", " ").split()  # a box around an error breaks its lines
    return result.exit_code, " ".join(words)


def test_the_script_trains_writes_and_chooses(stdlib, tmp_path, monkeypatch):
    folder, file = tmp_path / "model", tmp_path / "prompts.jsonl"
    options = ("--stdlib", stdlib, "--threads", torch.get_num_threads())
    small = ("--epochs", 2, "--batch-size", 2, "--window", 32, "--seed", 4)
    status, output = invoke(
        "train", *options, *small, "--stdlib-version", "3.0", "--model-folder", folder
    )
    assert (status, "epoch 2, step" in output) == (0, True), output
    written = {path.name for path in folder.iterdir()}
    assert written | {"README.md"} == {path.name for path in MODEL.iterdir()}
    figures = json.loads((folder / "training.json").read_text())
    assert (figures["stdlib_version"], figures["device"]) == ("3.0", "a CPU")
    assert figures["perplexity_bf16"] == pytest.approx(figures["perplexity_fp32"], rel=0.01)
    assert figures["perplexity_fp32"] < 2000  # of 4096, were nothing learned

    monkeypatch.setattr(llama_pico, "prompt_lengths", lambda seed: [1, 5, 9])
    status, output = invoke(
        *("prompts", *options, "--model-folder", folder),
        *("--prompts-file", file, "--max-tokens", 6),
    )
    assert status == 0, output
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [set(line) for line in lines] == [{"id", "text", "source"}] * 3
    assert all(line["source"].startswith(f"{held_out_name()}:") for line in lines)
    assert "3 pieces of held-out files, 1 to 9 tokens" in (folder / "README.md").read_text()

    (stdlib / "learned.py").write_text("x = 1\n")
    status, output = invoke("prompts", *options, "--model-folder", folder)
    assert status == 2
    assert "was trained on the standard library of Python 3.0" in output


def test_a_library_without_its_version_is_refused(stdlib):
    status, output = invoke("train", "--stdlib", stdlib)
    assert status == 2
    assert "--stdlib needs --stdlib-version" in output
