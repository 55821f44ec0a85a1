"""A tiny EAGLE or EAGLE-3 head of random weights, in the layouts that heads are published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_LAYER = {"eagle": "layers.0.", "eagle3": "midlayer."}
_STEP = 17
QUIET = 0.33
_ARCHITECTURE = {"eagle": "LlamaForCausalLM", "eagle3": "LlamaForCausalLMEagle3"}


def write_tiny_eagle(
    folder: Path,
    target: Path | dict[str, Any],
    *,
    kind: str = "eagle",
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    bin: bool = False,
    draft_vocab_size: int | None = None,
    own_embedding: bool = False,
    fc_bias: bool = False,
    prefix: str = "",
    agreeable: bool = False,
    **overrides: Any,
) -> Path:
    """Write a head for a target, given as its folder or its config.json, and return its folder.

    bin: weights as pytorch_model.bin. draft_vocab_size: of kind "eagle3", three quarters of the
    target's vocabulary unless given. prefix: "model." where every name begins so. overrides: of
    config.json. agreeable: the head drafts what a target of `make_agreeable` (its folder) chooses
    about every other time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    of_target = target if isinstance(target, dict) else _read(target)
    config = {
        "architectures": [_ARCHITECTURE[kind]],
        "model_type": "llama",
        "num_hidden_layers": 1,
        **{
            key: of_target[key]
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "hidden_act",
                "rms_norm_eps",
                "rope_theta",
                "max_position_embeddings",
            )
        },
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "eagle3":
        config["draft_vocab_size"] = draft_vocab_size or int(config["vocab_size"]) * 3 // 4
    config |= overrides
    tensors = head_weights(
        config, kind=kind, seed=seed, dtype=dtype, own_embedding=own_embedding, fc_bias=fc_bias
    )
    if agreeable:
        assert isinstance(target, Path)
        _agree(tensors, load_file(target / "model.safetensors"), config, kind)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def head_weights(
    config: dict[str, Any],
    *,
    kind: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    own_embedding: bool = False,
    fc_bias: bool = False,
) -> dict[str, Tensor]:
    """Return random tensors under their published names, in the shapes that a config asks for."""
    random = torch.Generator().manual_seed(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head, third = config["head_dim"], kind == "eagle3"
    queries, keys = (config[name] * head for name in ("num_attention_heads", "num_key_value_heads"))

    def weight(rows: int, columns: int, scale: float = 1.5) -> Tensor:
        drawn = torch.randn(rows, columns, generator=random)
        return (drawn * scale * columns**-0.5).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.25 * torch.randn(hidden, generator=random)).to(dtype)

    layer, width = _LAYER[kind], (2 if third else 1) * hidden
    tensors = {
        "fc.weight": weight(hidden, (3 if third else 2) * hidden),
        f"{layer}self_attn.q_proj.weight": weight(queries, width),
        f"{layer}self_attn.k_proj.weight": weight(keys, width),
        f"{layer}self_attn.v_proj.weight": weight(keys, width),
        f"{layer}self_attn.o_proj.weight": weight(hidden, queries),
        f"{layer}post_attention_layernorm.weight": norm(),
        f"{layer}mlp.gate_proj.weight": weight(ffn, hidden),
        f"{layer}mlp.up_proj.weight": weight(ffn, hidden),
        f"{layer}mlp.down_proj.weight": weight(hidden, ffn),
    }
    if config["attention_bias"]:
        for name in [name for name in tensors if "self_attn" in name]:
            bias = torch.randn(len(tensors[name]), generator=random).to(dtype)
            tensors[name.replace("weight", "bias")] = bias
    if third:
        some = torch.randperm(config["vocab_size"], generator=random)[: config["draft_vocab_size"]]
        ids = some.sort().values
        tensors |= {
            f"{layer}input_layernorm.weight": norm(),
            f"{layer}hidden_norm.weight": norm(),
            "norm.weight": norm(),
            "lm_head.weight": weight(config["draft_vocab_size"], hidden),
            "d2t": ids - torch.arange(len(ids)),
            "t2d": torch.zeros(config["vocab_size"], dtype=torch.bool).index_fill(0, ids, True),
        }
    if own_embedding:
        tensors["embed_tokens.weight"] = weight(config["vocab_size"], hidden, hidden**0.5)
    if fc_bias:
        tensors["fc.bias"] = torch.randn(hidden, generator=random).to(dtype)
    return tensors


def make_agreeable(target: Path, *, quiet: float = QUIET) -> Path:
    """Rewrite an untied target so that its next token is mostly a function of the last one.

    Its layers add little to the embedding, by the factor `quiet`, and its lm_head reads off the
    id that comes _STEP after.
    """
    tensors = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(quiet)
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.roll(_STEP, 0).contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _agree(
    tensors: dict[str, Tensor], target: dict[str, Tensor], config: dict[str, Any], kind: str
) -> None:
    """Make a head's hidden output the embedding of its id, but for what its own layer adds."""
    layer, hidden = _LAYER[kind], config["hidden_size"]
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        tensors[layer + name].mul_(QUIET)
    eye = torch.eye(hidden)
    if kind == "eagle":
        tensors["fc.weight"].mul_(QUIET)[:, :hidden] += eye
        return
    # The layer has no other way to the embedding than attention: every row attends to those with
    # its own id, takes their embedding, and takes off what came in as hidden.
    assert hidden <= config["head_dim"]
    for name, scale in (("q", 3.0), ("k", 3.0), ("v", 1.0)):
        weight = tensors[f"{layer}self_attn.{name}_proj.weight"].mul_(QUIET)
        for first in range(0, len(weight), config["head_dim"]):
            weight[first : first + hidden, :hidden] += scale * eye
            if name == "v":
                weight[first : first + hidden, hidden:] -= eye
    tensors[f"{layer}self_attn.o_proj.weight"][:, :hidden] += eye
    ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    tensors["lm_head.weight"].copy_(target["lm_head.weight"][ids])


def _read(target: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    return config
