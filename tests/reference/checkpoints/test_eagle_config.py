"""Draft heads as directories: both published layouts, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitassay.reference.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from bitassay.reference.checkpoints.eagle_config import EagleConfig
from bitassay.reference.checkpoints.model_config import ModelConfig
from bitassay.reference.spec.contract import draft_operations
from bitassay.reference.spec.rotary_table import Llama3Scaling, rotary_table
from support.same_bits import assert_same_bits
from support.tiny_eagle import head_weights, write_tiny_eagle
from support.tiny_llama import CONFIG, LLAMA3_SCALING, write_tiny_llama

SMALL: dict[str, Any] = CONFIG | {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 8,
}
TARGET = ModelConfig(
    model_type="llama",
    vocab_size=24,
    hidden_size=32,
    num_layers=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=40,
    rms_norm_eps=1e-5,
    theta=500000.0,
    scaling=None,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    dtype=torch.bfloat16,
)
LINEARS = {
    f"layer.{name}_proj.weight"
    for name in ("self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down".split())
}
EAGLE = LINEARS | {"fc.weight", "layer.post_attention_layernorm.weight"}
EAGLE3 = EAGLE | {
    "layer.input_layernorm.weight",
    "layer.hidden_norm.weight",
    "norm.weight",
    "lm_head.weight",
    "d2t",
}


def head(folder: Path, **options: Any) -> Checkpoint:
    return load_checkpoint(write_tiny_eagle(folder, SMALL, **options))


def read(folder: Path, **options: Any) -> tuple[EagleConfig, dict[str, Tensor]]:
    checkpoint = head(folder, **options)
    config = EagleConfig.from_checkpoint(checkpoint, TARGET)
    return config, config.weights(checkpoint)


def test_an_eagle_head(tmp_path: Path) -> None:
    config, weights = read(tmp_path, rope_theta=20000.0, max_position_embeddings=64)
    assert config.kind == "eagle"
    assert config.hidden_operations == ("norm",)
    assert config.operations == draft_operations("eagle")
    assert (config.vocab_size, config.draft_vocab_size, config.num_layers) == (24, 24, 1)
    assert not config.fc_bias
    assert not config.own_embedding
    assert not config.attention_bias
    assert set(weights) == EAGLE
    assert {name: tuple(x.shape) for name, x in weights.items()} == config.shapes()
    assert weights["fc.weight"].shape == (32, 64)
    assert weights["layer.self_attn.q_proj.weight"].shape == (128, 32)
    # Its own base, and as many positions as the target has.
    assert config.rotary_table == rotary_table(20000.0, 64, 4096, None)


def test_an_eagle3_head(tmp_path: Path) -> None:
    config, weights = read(tmp_path, kind="eagle3", rope_scaling=LLAMA3_SCALING)
    assert config.kind == "eagle3"
    streams = tuple(f"layers.{i}.mlp_residual" for i in (1, 3, 4))
    assert config.hidden_operations == streams  # what enters layers 2, 4 and 5 of 8
    assert config.operations == draft_operations("eagle3")
    assert (config.vocab_size, config.draft_vocab_size) == (24, 18)
    assert config.scaling == Llama3Scaling(8.0, 1.0, 4.0, 512)
    assert set(weights) == EAGLE3
    assert weights["fc.weight"].shape == (32, 96)
    assert weights["layer.self_attn.k_proj.weight"].shape == (64, 64)
    assert weights["lm_head.weight"].shape == (18, 32)
    assert weights["d2t"].dtype == torch.int64


@pytest.mark.parametrize(
    ("layers", "before"),
    [(3, (2, 1, 0)), (4, (2, 2, 1)), (6, (2, 3, 3)), (16, (2, 8, 13)), (32, (2, 16, 29))],
)
def test_the_layers_an_eagle3_head_looks_at(
    tmp_path: Path, layers: int, before: tuple[int, ...]
) -> None:
    checkpoint = head(tmp_path, kind="eagle3")
    config = EagleConfig.from_checkpoint(checkpoint, replace(TARGET, num_layers=layers))
    names = [f"layers.{i - 1}.mlp_residual" if i else "embedding" for i in before]
    assert config.hidden_operations == tuple(names)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_options_add_tensors(tmp_path: Path, kind: str) -> None:
    config, weights = read(
        tmp_path, kind=kind, fc_bias=True, own_embedding=True, attention_bias=True
    )
    assert config.fc_bias
    assert config.own_embedding
    assert config.attention_bias
    more = {f"layer.self_attn.{name}_proj.bias" for name in "qkvo"}
    more |= {"fc.bias", "embed_tokens.weight"}
    assert set(weights) == more | (EAGLE if kind == "eagle" else EAGLE3)
    assert weights["embed_tokens.weight"].shape == (24, 32)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_rounded_once_to_the_target_s_type(
    tmp_path: Path, kind: str, stored: torch.dtype
) -> None:
    _, weights = read(tmp_path, kind=kind, dtype=stored)
    raw = load_file(tmp_path / "model.safetensors")
    layer = "layers.0." if kind == "eagle" else "midlayer."
    for name, tensor in weights.items():
        if name != "d2t":
            published = raw[name.replace("layer.", layer)]
            assert published.dtype == stored
            # By hand: to nearest, ties to even, 16 bits off an fp32.
            pattern = published.float().view(torch.int32).long() & 0xFFFFFFFF
            odd = pattern >> 16 & 1
            want = (pattern + 0x7FFF + odd >> 16).to(torch.int32).to(torch.int16)
            assert_same_bits(tensor, want.view(torch.bfloat16))


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_forms_of_one_head_have_one_set_of_weights(tmp_path: Path, kind: str) -> None:
    """A pickled file, names with a prefix, the layer under the other name."""
    config, want = read(tmp_path / "plain", kind=kind)
    others = {"bin": {"bin": True}, "prefix": {"prefix": "model."}}
    for name, options in others.items():
        assert_weights(read(tmp_path / name, kind=kind, **options), config, want)
    renamed = {
        name.replace("layers.0.", "MID")
        .replace("midlayer.", "layers.0.")
        .replace("MID", "midlayer."): tensor
        for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items()
    }
    save_file(renamed, tmp_path / "plain" / "model.safetensors")
    checkpoint = load_checkpoint(tmp_path / "plain")
    again = EagleConfig.from_checkpoint(checkpoint, TARGET)
    assert_weights((again, again.weights(checkpoint)), config, want)
    pickled, plain = (load_checkpoint(tmp_path / name).digest for name in ("bin", "prefix"))
    assert pickled != plain  # other names
    assert pickled == head(tmp_path / "again", kind=kind).digest


def assert_weights(
    got: tuple[EagleConfig, dict[str, Tensor]], config: EagleConfig, want: dict[str, Tensor]
) -> None:
    assert got[0] == config
    assert list(got[1]) == list(want)
    for name, tensor in want.items():
        assert_same_bits(got[1][name], tensor)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("eagle", "LlamaForCausalLM"),
        ("eagle", "LlamaForCausalLMEagle"),
        ("eagle", "EagleLlamaForCausalLM"),
        ("eagle3", "LlamaForCausalLM"),
        ("eagle3", "LlamaForCausalLMEagle3"),
        ("eagle3", "Eagle3LlamaForCausalLM"),
    ],
)
def test_names_that_heads_are_published_under(tmp_path: Path, kind: str, architecture: str) -> None:
    assert read(tmp_path, kind=kind, architectures=[architecture])[0].kind == kind


def test_an_eagle3_head_of_the_whole_vocabulary_needs_no_map(tmp_path: Path) -> None:
    write_tiny_eagle(tmp_path, SMALL, kind="eagle3", draft_vocab_size=24)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["d2t"], tensors["t2d"]
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for size in (24, None):
        (tmp_path / "config.json").write_text(json.dumps(config | {"draft_vocab_size": size}))
        checkpoint = load_checkpoint(tmp_path)
        weights = EagleConfig.from_checkpoint(checkpoint, TARGET).weights(checkpoint)
        assert torch.equal(weights["d2t"], torch.zeros(24, dtype=torch.int64))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("eagle", {"hidden_size": 64}, "hidden_size 32, as the target has; found 64"),
        ("eagle", {"vocab_size": 25}, "vocab_size 24, as the target has; found 25"),
        ("eagle3", {"target_hidden_size": 64}, "target_hidden_size 32, as the target has"),
        ("eagle", {"num_hidden_layers": 2}, "num_hidden_layers 1, as a draft head has; found 2"),
        ("eagle", {"model_type": "qwen3"}, "model_type 'llama' and one of LlamaForCausalLM, "),
        ("eagle", {"architectures": ["LlamaForCausalLMEagle3"]}, "tensors of 'eagle'"),
        ("eagle3", {"architectures": ["LlamaForCausalLMEagle"]}, "tensors of 'eagle3'"),
        ("eagle", {"architectures": ["MedusaModel"]}, r"found 'llama', \['MedusaModel'\]"),
        ("eagle", {"architectures": "LlamaForCausalLM"}, "found 'llama', 'LlamaForCausalLM'"),
        ("eagle", {"add_para_norm": True}, "add_para_norm False, the one supported; found True"),
        ("eagle", {"mlp_bias": True}, "mlp_bias False"),
        ("eagle", {"hidden_act": "gelu"}, "hidden_act 'silu'"),
        ("eagle", {"head_dim": 32}, "head_dim 64 or 128"),
        ("eagle", {"quantization_config": {"bits": 4}}, "quantization_config None"),
        ("eagle3", {"norm_before_residual": True}, "norm_before_residual False"),
        ("eagle3", {"norm_before_fc": True}, "norm_before_fc False"),
        ("eagle3", {"parallel_drafting": True}, "parallel_drafting False"),
        ("eagle3", {"logit_scale": 0.5}, "logit_scale 1.0"),
        ("eagle3", {"eagle_config": {"use_aux_hidden_state": False}}, "eagle_config None"),
        ("eagle3", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'default' or 'llama3'"),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        EagleConfig.from_checkpoint(head(tmp_path, kind=kind, **options), TARGET)


def test_an_eagle3_head_needs_three_layers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a target of at least 3 layers .* found 2"):
        EagleConfig.from_checkpoint(head(tmp_path, kind="eagle3"), replace(TARGET, num_layers=2))


def test_a_model_is_not_a_head(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path, num_hidden_layers=1)
    with pytest.raises(
        CheckpointError, match="a draft head, which has fc.weight, found 12 tensors"
    ):
        EagleConfig.from_checkpoint(load_checkpoint(path), TARGET)


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


def shift(ids: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors["d2t"].add_(ids)


def cross(tensors: dict[str, Tensor]) -> None:
    """Let two draft ids stand for one target id."""
    tensors["d2t"].copy_(-torch.arange(18))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("eagle", drop("layers.0.mlp.up_proj.weight"), r"layer\.mlp\.up_proj\.weight: missing"),
        ("eagle3", drop("norm.weight"), r"norm\.weight: missing"),
        ("eagle", put("lm_head.weight", torch.ones(24, 32)), "not a tensor of this model"),
        ("eagle", put("layers.1.x", torch.ones(2)), r"layers\.1\.x: not a tensor of this model"),
        ("eagle", put("fc.weight", torch.ones(32, 32)), r"\[32, 64\], found .* \[32, 32\]"),
        ("eagle3", put("fc.weight", torch.ones(32, 64)), r"\[32, 96\], found .* \[32, 64\]"),
        ("eagle", put("fc.weight", torch.ones(32, 64).double()), "found torch.float64"),
        ("eagle", put("fc.weight", torch.ones(32, 64).int()), "found torch.int32"),
        ("eagle", put("model.fc.weight", torch.ones(32, 64)), "one tensor for fc.weight, found"),
        ("eagle", put("d2t", torch.zeros(24).long()), "no d2t beside the tensors of an EAGLE-1"),
        ("eagle3", drop("d2t"), r"d2t of torch.int64 \[18\] .* found none"),
        ("eagle3", put("d2t", torch.zeros(18).int()), r"found torch.int32 \[18\]"),
        ("eagle3", put("d2t", torch.zeros(17).long()), r"found torch.int64 \[17\]"),
        ("eagle3", shift(100), "an id within 0 … 23 .* found 1.. …"),
        ("eagle3", shift(-100), "an id within 0 … 23 .* found -"),
        ("eagle3", cross, "ascending, found 0 … 0"),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, kind: str, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    write_tiny_eagle(tmp_path, SMALL, kind=kind)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        EagleConfig.from_checkpoint(checkpoint, TARGET).weights(checkpoint)


def test_weights_beyond_the_target_s_type_are_refused(tmp_path: Path) -> None:
    write_tiny_eagle(tmp_path, SMALL, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["fc.weight"][3, 4] = 70000.0
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = load_checkpoint(tmp_path)
    target = replace(TARGET, dtype=torch.float16)
    with pytest.raises(
        CheckpointError, match=r"within torch.float16, .* found 70144.0 in fc.weight"
    ):
        EagleConfig.from_checkpoint(checkpoint, target).weights(checkpoint)


def test_heads_written_for_tests_are_in_the_published_layouts() -> None:
    """The names and types that the published files hold."""
    config = SMALL | {"draft_vocab_size": 18}
    linears = [name.removeprefix("layer.") for name in LINEARS]
    eagle = {"fc.weight", *(f"layers.0.{name}" for name in linears)}
    eagle.add("layers.0.post_attention_layernorm.weight")
    assert set(head_weights(config, kind="eagle")) == eagle
    third = head_weights(config, kind="eagle3")
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    assert set(third) == {
        *("fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"),
        *(f"midlayer.{name}" for name in linears),
        *(f"midlayer.{name}.weight" for name in norms),
    }
    assert (third["d2t"].dtype, third["t2d"].dtype) == (torch.int64, torch.bool)
    ids = third["d2t"] + torch.arange(18)
    assert third["t2d"].nonzero()[:, 0].tolist() == ids.tolist()
