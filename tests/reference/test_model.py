"""Whole models against a twin in Python integers, and what loads and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitassay.reference.checkpoints.checkpoint import CheckpointError, load_checkpoint
from bitassay.reference.generation import KVCache
from bitassay.reference.model import LlamaForCausalLM, Qwen3ForCausalLM, load_model
from bitassay.reference.spec.contract import default_contract, operations
from bitassay.reference.trace import Trace
from support.naive.model import TwinModel
from support.tiny_llama import write_tiny_llama

MASK = (1 << 64) - 1
# Small enough for Python integers, and every part is there: two layers, grouped queries.
SMALL: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
CASES = {
    "llama-sm_89": ("sm_89", {"seed": 1}),
    "llama-sm_90-llama3-tied": ("sm_90", {"seed": 2, "llama3": True, "tied": True}),
    "llama-sm_90-fp16": ("sm_90", {"seed": 3, "dtype": torch.float16}),
    "qwen3-sm_89-llama3": ("sm_89", {"seed": 4, "model_type": "qwen3", "llama3": True}),
    "qwen3-sm_90-two-heads": (
        "sm_90",
        {"seed": 5, "model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}


def unsigned(x: torch.Tensor) -> Any:
    return [unsigned(row) for row in x] if x.dim() else int(x) & MASK


def assert_equals_twin(trace: Trace, want: dict[str, Any], names: tuple[str, ...]) -> None:
    """Names the first operation that differs, of the earliest row."""
    assert tuple(want["names"]) == names
    rows = [want["prompt_prints"], *want["prints"]]
    for number, row in enumerate([trace.prompt_fingerprints, *trace.fingerprints]):
        differ = [n for n, a, b in zip(names, unsigned(row), rows[number], strict=True) if a != b]
        assert not differ, f"{'prompt' if number == 0 else f'step {number - 1}'}: {differ}"
    assert trace.tokens.tolist() == want["tokens"]
    assert trace.top_ids.tolist() == want["ids"]
    assert trace.top_bits.tolist() == want["bits"]
    assert trace.margins.tolist() == want["margins"]


@pytest.mark.parametrize("case", list(CASES))
def test_every_operation_of_every_layer_equals_the_twin(tmp_path: Path, case: str) -> None:
    arch, options = CASES[case]
    path = write_tiny_llama(tmp_path, **(SMALL | options))
    blocks = {"key_block": 16, "key_split": 16}
    model = load_model(path, contract=default_contract(arch, **blocks))
    config = json.loads((path / "config.json").read_text())
    twin = TwinModel(config, load_file(path / "model.safetensors"), arch, **blocks)
    prompt = [5, 1, 23]
    trace = model.generate(prompt, 2)
    assert_equals_twin(trace, twin.generate(prompt, 2), model.operations)


def test_biases_equal_the_twin(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path, **SMALL, attention_bias=True, mlp_bias=True)
    tensors = load_file(path / "model.safetensors")
    g = torch.Generator().manual_seed(6)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        bias = torch.randn(len(tensors[name]), generator=g)
        tensors[name.replace("weight", "bias")] = bias.bfloat16()
    save_file(tensors, path / "model.safetensors")
    model = load_model(path, contract=default_contract("sm_90"))
    twin = TwinModel(json.loads((path / "config.json").read_text()), tensors, "sm_90")
    assert_equals_twin(model.generate([3, 9], 2), twin.generate([3, 9], 2), model.operations)


def test_later_positions_equal_the_twin(tmp_path: Path) -> None:
    """One layer and 35 rows: three key blocks, two splits, prompt rows folded."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 12}
    path = write_tiny_llama(tmp_path, **(SMALL | sizes | {"seed": 7}))
    blocks = {"key_block": 16, "key_split": 32}
    model = load_model(path, contract=default_contract("sm_90", **blocks))
    config = json.loads((path / "config.json").read_text())
    twin = TwinModel(config, load_file(path / "model.safetensors"), "sm_90", **blocks)
    prompt = [(7 * i * i + i) % 12 for i in range(34)]
    assert_equals_twin(model.generate(prompt, 2), twin.generate(prompt, 2), model.operations)


def test_the_stream_starts_as_the_embedding_row(tmp_path: Path) -> None:
    model = load_model(write_tiny_llama(tmp_path), contract=default_contract("sm_90"))
    seen: dict[str, torch.Tensor] = {}
    model.hidden([65, 66], observe=seen.__setitem__)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(seen["embedding"], tensors["model.embed_tokens.weight"][[65, 66]])


@pytest.mark.parametrize(
    ("model_type", "model", "other"),
    [
        ("llama", LlamaForCausalLM, Qwen3ForCausalLM),
        ("qwen3", Qwen3ForCausalLM, LlamaForCausalLM),
    ],
)
def test_loading(tmp_path: Path, model_type: str, model: Any, other: Any) -> None:
    path = write_tiny_llama(tmp_path, model_type=model_type, **SMALL)
    contract = default_contract("sm_90")
    loaded = load_model(path, contract=contract)
    assert type(loaded) is model
    assert loaded.operations == operations(model_type, 2)
    assert loaded.contract == contract
    want = loaded.generate([1, 2], 2)
    for source in (path, str(path), load_checkpoint(path)):
        assert type(load_model(source, contract=contract)) is model
        assert model.from_pretrained(source, contract=contract).generate([1, 2], 2).same_bits(want)
    with pytest.raises(CheckpointError, match=rf"found '{model_type}': .*load_model"):
        other.from_pretrained(path, contract=contract)


def test_a_model_that_is_neither(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path, **SMALL, architectures=["GPT2LMHeadModel"])
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel"):
        load_model(path, contract=default_contract("sm_90"))
    with pytest.raises(CheckpointError, match="expected a directory"):
        load_model(tmp_path / "absent", contract=default_contract("sm_90"))


def test_weights_are_not_changed_by_running(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_tiny_llama(tmp_path, **SMALL))
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    model = load_model(checkpoint, contract=default_contract("sm_90"))
    first = model.generate([1, 2, 3], 3)
    assert model.generate([1, 2, 3], 3).same_bits(first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.tensors.items())


def test_a_cache_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = load_model(write_tiny_llama(tmp_path, **SMALL), contract=default_contract("sm_89"))
    cache = KVCache()
    assert cache.length == 0
    parts = [model.hidden(ids, cache) for ids in ([1, 2, 3], [4], [5, 6])]
    assert cache.length == 6
    assert [x.shape for x in cache.keys] == [(6, 1, 64)] * 2
    assert torch.equal(torch.cat(parts), model.hidden([1, 2, 3, 4, 5, 6]))


def test_logits_can_stay_in_fp32(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path, **SMALL)
    wide = load_model(path, contract=default_contract("sm_90", logits_dtype="float32"))
    narrow = load_model(path, contract=default_contract("sm_90"))
    hidden = narrow.hidden([5, 6])
    assert torch.equal(wide.hidden([5, 6]), hidden)
    assert wide.logits(hidden).dtype == torch.float32
    assert torch.equal(wide.logits(hidden).bfloat16(), narrow.logits(hidden))
    assert (wide.generate([5, 6], 2).top_bits & 0xFFFF != 0).any()  # more bits than a bf16 has
