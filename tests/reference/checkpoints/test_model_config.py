"""What config.json may say, and every refusal by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitassay.reference.checkpoints.checkpoint import CheckpointError, load_checkpoint
from bitassay.reference.checkpoints.model_config import ModelConfig
from bitassay.reference.spec.rotary_table import Llama3Scaling
from support.tiny_llama import LLAMA3_SCALING, write_tiny_llama

TINY: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8}
NEWER = {"rope_theta": 500000.0, **LLAMA3_SCALING}
SCALING = Llama3Scaling(8.0, 1.0, 4.0, 512)


def write(
    folder: Path,
    change: Callable[[dict[str, Any]], object] = lambda config: None,
    tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    **options: Any,
) -> Path:
    """A tiny model whose config.json and tensors are changed after it was written."""
    path = write_tiny_llama(folder, **(TINY | options))
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(path / "model.safetensors")
    tensors(weights)
    save_file(weights, path / "model.safetensors")
    return path


def read(path: Path) -> ModelConfig:
    return ModelConfig.from_checkpoint(load_checkpoint(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    checkpoint = load_checkpoint(path)
    return ModelConfig.from_checkpoint(checkpoint).weights(checkpoint)


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        for name in names:
            del entries[name]

    return change


def with_(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(entries)


def test_every_field(tmp_path: Path) -> None:
    path = write_tiny_llama(
        tmp_path,
        vocab_size=16,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=500000,
        max_position_embeddings=99,
        llama3=True,
        dtype=torch.float16,
    )
    assert read(path) == ModelConfig(
        model_type="llama",
        vocab_size=16,
        hidden_size=24,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=40,
        rms_norm_eps=1e-6,
        theta=500000.0,
        scaling=SCALING,
        max_position_embeddings=99,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        dtype=torch.float16,
    )
    table = read(path).rotary_table
    assert (table.theta, table.head_dim, table.positions, table.scaling) == (5e5, 128, 99, SCALING)


def test_defaults(tmp_path: Path) -> None:
    """What transformers takes where config.json is silent."""
    absent = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling")
    absent += ("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "architectures")
    config = read(write(tmp_path, without(*absent), hidden_size=128, num_key_value_heads=2))
    assert (config.num_kv_heads, config.head_dim, config.theta) == (2, 64, 10000.0)
    assert (config.rms_norm_eps, config.scaling) == (1e-6, None)
    assert {config.tie_word_embeddings, config.attention_bias, config.mlp_bias} == {False}
    nulls = with_(head_dim=None, num_key_value_heads=None, layer_types=None, sliding_window=None)
    again = read(write(tmp_path / "nulls", nulls, hidden_size=128, num_key_value_heads=2))
    assert (again.num_kv_heads, again.head_dim) == (2, 64)


@pytest.mark.parametrize(
    ("change", "theta", "scaling"),
    [
        (with_(rope_theta=77), 77.0, None),
        (with_(rope_scaling={"rope_type": "default"}), 10000.0, None),
        (with_(rope_scaling={"type": "llama3", **LLAMA3_SCALING}), 10000.0, SCALING),
        (with_(rope_scaling=LLAMA3_SCALING, rope_theta=5e5), 500000.0, SCALING),
        # Newer configurations keep everything in rope_parameters.
        (with_(rope_parameters=NEWER), 500000.0, SCALING),
        (with_(rope_parameters={"rope_theta": 3.0, "rope_type": "default"}), 3.0, None),
        (with_(rope_parameters=LLAMA3_SCALING), 10000.0, SCALING),
        (with_(rope_parameters=None), 10000.0, None),
    ],
)
def test_rotary_settings(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], theta: float, scaling: object
) -> None:
    config = read(write(tmp_path, change))
    assert (config.theta, config.scaling) == (theta, scaling)


def test_newer_configurations_load(tmp_path: Path) -> None:
    """dtype in place of torch_dtype, rope_parameters, layer_types: as transformers 5 writes."""

    def newer(config: dict[str, Any]) -> None:
        config["dtype"] = config.pop("torch_dtype")
        config["rope_parameters"] = {**LLAMA3_SCALING, "rope_theta": config.pop("rope_theta")}
        config["layer_types"] = ["full_attention"] * 2
        del config["rope_scaling"]

    old = write(tmp_path / "old", model_type="qwen3", llama3=True)
    new = write(tmp_path / "new", newer, model_type="qwen3", llama3=True)
    assert read(new) == read(old)


def test_a_sliding_window_on_the_shelf_is_none(tmp_path: Path) -> None:
    """Qwen3's configurations name a window and switch it off."""
    change = with_(use_sliding_window=False, sliding_window=4096, max_window_layers=28)
    assert read(write(tmp_path, change, model_type="qwen3")).model_type == "qwen3"


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another architecture": (
        with_(model_type="mistral", architectures=["MistralForCausalLM"]),
        r"LlamaForCausalLM \(llama\), Qwen3ForCausalLM \(qwen3\); found model_type 'mistral'",
    ),
    "no model_type": (without("model_type"), "found model_type None"),
    "a head for classes": (
        with_(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification",
    ),
    "two names that differ": (with_(architectures=["Qwen3ForCausalLM"]), "Qwen3ForCausalLM"),
    "sliding window": (with_(use_sliding_window=True), "use_sliding_window False.*found True"),
    "a window without a switch": (with_(sliding_window=4096), "sliding_window None.*found 4096"),
    "layer types": (
        with_(layer_types=["full_attention", "sliding_attention"]),
        "layer_types of full_attention alone; found .*sliding_attention",
    ),
    "gelu": (with_(hidden_act="gelu"), "hidden_act 'silu'.*found 'gelu'"),
    "tensor parallel pretraining": (with_(pretraining_tp=2), "pretraining_tp 1.*found 2"),
    "partial rotary": (with_(partial_rotary_factor=0.5), "partial_rotary_factor 1.0.*0.5"),
    "quantised": (
        with_(quantization_config={"quant_method": "fp8"}),
        "quantization_config None.*quant_method",
    ),
    "soft caps": (with_(final_logit_softcapping=30.0), "final_logit_softcapping None.*30.0"),
    "attention soft caps": (with_(attn_logit_softcapping=50.0), "attn_logit_softcapping.*50.0"),
    "scaled logits": (with_(logits_scaling=8.0), "logits_scaling 1.0.*8.0"),
    "scaled residuals": (with_(residual_multiplier=0.2), "residual_multiplier 1.0.*0.2"),
    "layers without rotary": (with_(no_rope_layers=[1, 0]), "no_rope_layers None"),
    "yarn": (with_(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "'llama3'; found 'yarn'"),
    "linear": (with_(rope_scaling={"type": "linear", "factor": 2.0}), "found 'linear'"),
    "dynamic": (with_(rope_parameters={"rope_type": "dynamic"}), "found 'dynamic'"),
    "rope that is no object": (with_(rope_scaling="llama3"), "rope_scaling as an object.*'llama3'"),
    "llama3 without factor": (
        with_(rope_scaling={k: v for k, v in LLAMA3_SCALING.items() if k != "factor"}),
        "factor to be a positive number; found None",
    ),
    "llama3 without context": (
        with_(rope_scaling={**LLAMA3_SCALING, "original_max_position_embeddings": None}),
        "original_max_position_embeddings as an integer",
    ),
    "llama3 upside down": (
        with_(rope_scaling={**LLAMA3_SCALING, "high_freq_factor": 1.0}),
        "high_freq_factor above low_freq_factor; found 512, 1.0 and 1.0",
    ),
    "theta 0": (with_(rope_theta=0), "rope_theta to be a positive number; found 0"),
    "theta beyond floats": (with_(rope_theta=10**400), "rope_theta to be a positive number"),
    "theta as text": (with_(rope_theta="10000"), "rope_theta .*found '10000'"),
    "eps 0": (with_(rms_norm_eps=0.0), "rms_norm_eps to be a positive number; found 0.0"),
    "eps true": (with_(rms_norm_eps=True), "rms_norm_eps .*found True"),
    "head size 80": (with_(head_dim=80), "head_dim 64 or 128; found 80"),
    "head size by default": (without("head_dim"), "head_dim 64 or 128; found 4"),
    "fp32": (with_(torch_dtype="float32"), "torch_dtype bfloat16 or float16; found float32"),
    "int8": (with_(torch_dtype="int8"), "'torch_dtype' to be one of"),
    "heads": (
        with_(num_attention_heads=3, num_key_value_heads=2),
        "multiple of num_key_value_heads; found 3 and 2",
    ),
    "more key heads than queries": (with_(num_key_value_heads=4), "found 2 and 4"),
    "no heads": (with_(num_attention_heads=0), "'num_attention_heads'.*at least 1, found 0"),
    "no layers": (with_(num_hidden_layers=0), "'num_hidden_layers'.*at least 1, found 0"),
    "no vocabulary": (with_(vocab_size=7), "'vocab_size'.*at least 8, found 7"),
    "no length": (without("max_position_embeddings"), "'max_position_embeddings'.*found nothing"),
    "size as text": (with_(hidden_size="8"), "'hidden_size'.*found '8'"),
    "tied as text": (
        with_(tie_word_embeddings="no"),
        "tie_word_embeddings to be true or false; found 'no'",
    ),
    "bias as number": (with_(attention_bias=1), "attention_bias to be true or false; found 1"),
    "mlp bias null": (with_(mlp_bias=None), "mlp_bias to be true or false; found None"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_by_name(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    path = write(tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert str(path / "config.json") in str(caught.value)


# Each would be misread in silence or end in a bare error of Python.
MUST_BE_REFUSED: dict[str, Callable[[dict[str, Any]], None]] = {
    # transformers 5 keeps the factor here; half the head would have to stay unturned.
    "partial rotary in rope_parameters": with_(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    # Per kind of layer: read as one object it would mean no scaling and theta 10000.
    "rope_parameters by layer type": with_(rope_parameters={"full_attention": NEWER}),
    # Which of two that differ counts depends on the version of transformers.
    "rope_parameters beside another rope_scaling": with_(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_scaling=LLAMA3_SCALING
    ),
    "model_type as a list": with_(model_type=["llama"]),
    "layer_types as a number": with_(layer_types=5),
    "layer_types of lists": with_(layer_types=[["full_attention"]]),
    "more positions than fp32 counts": with_(max_position_embeddings=(1 << 24) + 1),
}


@pytest.mark.parametrize("case", list(MUST_BE_REFUSED))
def test_refused_before_it_is_misread(tmp_path: Path, case: str) -> None:
    path = write(tmp_path, MUST_BE_REFUSED[case])
    with pytest.raises(CheckpointError, match="expected"):
        read(path)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_weights_are_those_of_the_file(tmp_path: Path, model_type: str) -> None:
    path = write(tmp_path, model_type=model_type)
    weights = read_weights(path)
    stored = load_file(path / "model.safetensors")
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    assert ("model.layers.1.self_attn.q_norm.weight" in weights) == (model_type == "qwen3")


def test_tied_tables(tmp_path: Path) -> None:
    weights = read_weights(write(tmp_path / "once", tied=True))
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]

    def twice(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    weights = read_weights(write(tmp_path / "twice", tensors=twice, tied=True))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_tied_tables_that_differ(tmp_path: Path) -> None:
    def another(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][3, 4] += 1

    path = write(tmp_path, tensors=another, tied=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight to be the embedding table"):
        read_weights(path)


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def narrower(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()


def shorter(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:8].clone()


@pytest.mark.parametrize("change", [renamed, narrower, shorter])
def test_a_tied_lm_head_that_does_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None]
) -> None:
    """Only the lm_head stored, or in another dtype or shape: an error that names a tensor."""
    path = write(tmp_path, tensors=change, tied=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight|embed_tokens.weight"):
        read_weights(path)


LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("options", "tensors", "message"),
    [
        ({}, without("lm_head.weight"), r"lm_head.weight: missing"),
        ({}, without(f"{LAYER}mlp.up_proj.weight"), r"layers.1.mlp.up_proj.weight: missing"),
        ({}, without("model.norm.weight"), r"model.norm.weight: missing"),
        ({"attention_bias": True}, without(), r"layers.0.self_attn.o_proj.bias: missing"),
        ({"mlp_bias": True}, without(), r"layers.0.mlp.down_proj.bias: missing"),
        (
            {},
            lambda t: t.update({f"{LAYER}self_attn.q_proj.bias": torch.ones(128).bfloat16()}),
            r"layers.1.self_attn.q_proj.bias: not a tensor of this model",
        ),
        (
            {},
            lambda t: t.update({f"{LAYER}self_attn.q_norm.weight": torch.ones(64).bfloat16()}),
            r"q_norm.weight: not a tensor of this model",
        ),
        (
            {"model_type": "qwen3"},
            without(f"{LAYER}self_attn.k_norm.weight"),
            r"layers.1.self_attn.k_norm.weight: missing",
        ),
        ({"num_hidden_layers": 3}, without(), r"layers.2.input_layernorm.weight: missing"),
        ({"num_hidden_layers": 1}, without(), r"layers.1.input_layernorm.weight: not a tensor"),
        (
            {"num_key_value_heads": 2},
            without(),
            r"k_proj.weight: expected torch.bfloat16 \[128, 8\], found torch.bfloat16 \[64, 8\]",
        ),
        (
            {},
            lambda t: t.update({"model.norm.weight": torch.ones(8)}),
            r"model.norm.weight: expected torch.bfloat16 \[8\], found torch.float32",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path,
    options: dict[str, Any],
    tensors: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    model_type = options.pop("model_type", "llama")
    path = write(tmp_path, with_(**options), tensors, model_type=model_type)
    with pytest.raises(CheckpointError, match=message):
        read_weights(path)


def test_every_unfit_tensor_is_named_at_once(tmp_path: Path) -> None:
    names = "lm_head.weight", "model.norm.weight"
    path = write(tmp_path, tensors=without(*names))
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert all(f"{name}: missing" in str(caught.value) for name in names)
