"""The suite `wide`: weights so wide that cuBLAS splits K, random, and drafts that are often right.

Made from a seed in a folder at test time, never committed: a Llama of one layer with the sizes of
an 8B model's (hidden 4096, inner 14336) and a vocabulary of 4096, and an EAGLE-1 head for it.

Random weights collapse into loops, choose by wide margins and never agree with a draft head. These
do not: what a layer adds is small beside the token's embedding, so the head, which reads the
embedding and adds another layer's small share, often foresees the next token; and rows of the
lm_head come in pairs that hardly differ, so every choice is between neighbours a few ulps apart and
one bit elsewhere changes the stream.

Its golden is what the oracle says of what the engine generated: a row sees only what came before
it, so where every row chooses the token that follows, the stream is the oracle's, by induction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitassay.reference import linear
from bitassay.reference.spec.contract import Contract
from bitassay.reference.tensor_core import PreparedWeight

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
# The same in small, for CPUs: what makes it sensitive does not depend on the sizes.
NARROW: dict[str, Any] = {
    **SIZES,
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
UPDATE = 0.2  # what a layer's projections add, beside an embedding of size 1
HEAD_UPDATE = 0.1  # the same of the head's
APART = 0.03  # how far the rows of a pair of the lm_head are from each other, beside 1

Prompts = list[list[int]]


def write_wide(folder: Path, *, sizes: dict[str, Any] | None = None, seed: int = 0) -> None:
    """Write the model to folder/model and its head to folder/head; sizes: SIZES if not given."""
    sizes = SIZES if sizes is None else sizes
    random = torch.Generator().manual_seed(seed)
    target = _target(sizes, random)
    _save(folder / "model", sizes, target)
    head = _head(sizes, target["model.norm.weight"], random)
    _save(folder / "head", {**sizes, "num_hidden_layers": 1}, head)


def wide_prompts(vocab_size: int, count: int = 12, longest: int = 66, seed: int = 0) -> Prompts:
    """Return prompts of 3 to `longest` ids, at least 60, each longer than the one before.

    One in the middle has the last one's ids in its second block, after other ids, and another has
    them in its first block: a prefix cache must miss the one and may hit the other.
    """
    random = torch.Generator().manual_seed(seed)
    lengths = [3 + (longest - 3) * i // (count - 1) for i in range(count)]
    prompts = [torch.randint(vocab_size, (n,), generator=random).tolist() for n in lengths]
    # With the id after the block, which a draft head's row there was made with.
    for at, ids in ((count // 2, slice(16, 33)), (count // 2 + 1, slice(17))):
        prompts[at][ids] = prompts[-1][ids]
    return prompts


@contextmanager
def products_on(device: str | torch.device) -> Iterator[None]:
    """Let the oracle's linear layers compute on a device, everything else where it was.

    The oracle is the same on every device; a GPU walks K in all outputs at once. Weights stay
    there, prepared, until the context ends.
    """
    accumulate = linear._accumulate
    moved: dict[int, tuple[object, PreparedWeight]] = {}

    def there(x: Tensor, weight: linear.Weight, bias: Tensor | None, contract: Contract) -> Tensor:
        if id(weight) not in moved:
            plain = weight.weight.t() if isinstance(weight, PreparedWeight) else weight
            # The weight itself is kept as well, so that no other is ever found under its id.
            moved[id(weight)] = weight, linear.prepare(plain.to(device), contract)
        bias = None if bias is None else bias.to(device)
        return accumulate(x.to(device), moved[id(weight)][1], bias, contract).to(x.device)

    linear._accumulate = there
    try:
        yield
    finally:
        linear._accumulate = accumulate


def _target(sizes: dict[str, Any], random: torch.Generator) -> dict[str, Tensor]:
    hidden, vocab = sizes["hidden_size"], sizes["vocab_size"]
    half = _weight(vocab // 2, hidden, random)
    other = (half.float() + _weight(vocab // 2, hidden, random, APART).float()).bfloat16()
    tensors = {
        "model.embed_tokens.weight": _weight(vocab, hidden, random, hidden**0.5),
        "model.norm.weight": _norm(hidden, random),
        "lm_head.weight": torch.stack([half, other], dim=1).flatten(0, 1).contiguous(),
    }
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        tensors[f"{layer}input_layernorm.weight"] = _norm(hidden, random)
        tensors |= {f"{layer}{x}": t for x, t in _layer(sizes, random, UPDATE).items()}
    return tensors


def _head(sizes: dict[str, Any], norm: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """A head that guesses the target's row after the final norm from the token's embedding."""
    hidden = sizes["hidden_size"]
    embedding = torch.eye(hidden) + _weight(hidden, hidden, random, 0.1).float()
    before = _weight(hidden, hidden, random, 0.3)
    fc = torch.cat([(norm.float()[:, None] * embedding).bfloat16(), before], dim=1)
    layer = _layer(sizes, random, HEAD_UPDATE)
    return {"fc.weight": fc, **{f"layers.0.{x}": t for x, t in layer.items()}}


def _layer(sizes: dict[str, Any], random: torch.Generator, update: float) -> dict[str, Tensor]:
    """A decoder layer's tensors but its input norm, by their names within the layer."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    q, kv = (sizes[f"num_{x}_heads"] * sizes["head_dim"] for x in ("attention", "key_value"))
    return {
        "post_attention_layernorm.weight": _norm(hidden, random),
        # Larger, so that rows attend to few others.
        "self_attn.q_proj.weight": _weight(q, hidden, random, 2.0),
        "self_attn.k_proj.weight": _weight(kv, hidden, random, 2.0),
        "self_attn.v_proj.weight": _weight(kv, hidden, random),
        "self_attn.o_proj.weight": _weight(hidden, q, random, update),
        "mlp.gate_proj.weight": _weight(inner, hidden, random),
        "mlp.up_proj.weight": _weight(inner, hidden, random),
        "mlp.down_proj.weight": _weight(hidden, inner, random, 2 * update),
    }


def _weight(rows: int, columns: int, random: torch.Generator, scale: float = 1.0) -> Tensor:
    drawn = torch.randn(rows, columns, generator=random)
    return drawn.mul_(scale * columns**-0.5).bfloat16()


def _norm(size: int, random: torch.Generator) -> Tensor:
    return (1 + 0.25 * torch.randn(size, generator=random)).bfloat16()


def _save(folder: Path, sizes: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
