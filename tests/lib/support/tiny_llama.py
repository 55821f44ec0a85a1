"""A tiny Llama or Qwen3 of random weights, as a Hugging Face model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

CONFIG = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def write_tiny_llama(
    folder: Path,
    *,
    model_type: str = "llama",
    seed: int = 0,
    llama3: bool = False,
    tied: bool = False,
    sharded: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    **overrides: Any,
) -> Path:
    """Write a model of the sizes in CONFIG, or of those given by name, and return its folder.

    llama3: with Llama-3's scaling of frequencies. tied: embeddings and lm_head are one tensor.
    sharded: two files of weights and an index. Its tokens are the 128 bytes of ASCII, so a prompt
    of ASCII text of n characters has n tokens, and id 65 is "A".
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        **CONFIG,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if model_type == "llama":
        config["mlp_bias"] = False
    if llama3:
        config["rope_scaling"] = LLAMA3_SCALING
    config |= overrides
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = random_weights(config, seed=seed, dtype=dtype)
    if sharded:
        _write_sharded(folder, tensors)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _ascii_tokenizer(int(config["vocab_size"])).save(str(folder / "tokenizer.json"))
    return folder


def random_weights(
    config: dict[str, Any], *, seed: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Return random tensors under their Hugging Face names, in the shapes that a config asks for.

    Large enough that rows attend to few others and the next token depends on them.
    """
    random = torch.Generator().manual_seed(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = config["head_dim"]
    queries, keys = (config[name] * head for name in ("num_attention_heads", "num_key_value_heads"))

    def weight(rows: int, columns: int, scale: float = 1.5) -> Tensor:
        drawn = torch.randn(rows, columns, generator=random)
        return (drawn * scale * columns**-0.5).to(dtype)

    def norm(size: int) -> Tensor:
        return (1 + 0.25 * torch.randn(size, generator=random)).to(dtype)

    tensors = {"model.embed_tokens.weight": weight(config["vocab_size"], hidden, hidden**0.5)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": norm(hidden),
            f"{layer}.self_attn.q_proj.weight": weight(queries, hidden),
            f"{layer}.self_attn.k_proj.weight": weight(keys, hidden),
            f"{layer}.self_attn.v_proj.weight": weight(keys, hidden),
            f"{layer}.self_attn.o_proj.weight": weight(hidden, queries),
            f"{layer}.post_attention_layernorm.weight": norm(hidden),
            f"{layer}.mlp.gate_proj.weight": weight(ffn, hidden),
            f"{layer}.mlp.up_proj.weight": weight(ffn, hidden),
            f"{layer}.mlp.down_proj.weight": weight(hidden, ffn),
        }
        if config["model_type"] == "qwen3":
            tensors[f"{layer}.self_attn.q_norm.weight"] = norm(head)
            tensors[f"{layer}.self_attn.k_norm.weight"] = norm(head)
    tensors["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = weight(config["vocab_size"], hidden)
    return tensors


def _write_sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    names = list(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, some in enumerate((names[:half], names[half:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(some, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _ascii_tokenizer(vocab_size: int) -> Tokenizer:
    # ByteLevel spells the bytes that do not print as characters from 256 on, in their order.
    printed = range(33, 127)
    others = [byte for byte in range(128) if byte not in printed]
    spelled = {byte: chr(byte) for byte in printed}
    spelled |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocabulary = {spelled[byte]: byte for byte in range(min(128, vocab_size))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
