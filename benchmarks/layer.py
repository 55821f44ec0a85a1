"""How long does a decoder layer take beside the same layer in plain PyTorch?

One layer of Llama-3.1-8B's shapes with random weights, both norms included: `engine.layer` over its
paged cache against cuBLAS, scaled_dot_product_attention and torch's own operations over a
contiguous cache, with the same packed weights. Eager, as both are written, and as a CUDA graph,
which leaves out what launching costs. A cold cache before every run, median of many.

nox -s bench -- layer [--decode 1,8,64] [--context 1024] [--prefill 512,2048,8192] [--profile]
TRITON_INTERPRET=1 BITASSAY_ARCH=sm_90 python benchmarks/layer.py --tiny
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from timing import milliseconds
from torch import Tensor
from torch.nn import functional as F

import bitassay.emulator  # noqa: F401  (--tiny: BITASSAY_ARCH switches it on)
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.decoder_layer import DecoderLayer
from bitassay.kernels.norm import add_rms_norm
from bitassay.reference.checkpoints.checkpoint import Checkpoint
from bitassay.reference.spec.contract import default_contract
from support.batches import Segment, make_batch

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "vocab_size": 8,
    "num_hidden_layers": 1, "max_position_embeddings": 16384,
}  # fmt: skip
TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "intermediate_size": 96, "max_position_embeddings": 256}  # fmt: skip

Work = Callable[[], tuple[Tensor, Tensor]]


def random_model(config: dict[str, Any], arch: str, device: str) -> CausalLM:
    """Return a model of one layer with random weights."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = (config[f"num_{name}_heads"] * head for name in ("attention", "key_value"))
    vocabulary, layer = config["vocab_size"], "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden),
        f"{layer}self_attn.q_proj": (q, hidden), f"{layer}self_attn.k_proj": (kv, hidden),
        f"{layer}self_attn.v_proj": (kv, hidden), f"{layer}self_attn.o_proj": (hidden, q),
        f"{layer}mlp.gate_proj": (inner, hidden), f"{layer}mlp.up_proj": (inner, hidden),
        f"{layer}mlp.down_proj": (hidden, inner), "model.norm": (hidden,),
        f"{layer}input_layernorm": (hidden,), f"{layer}post_attention_layernorm": (hidden,),
    }  # fmt: skip
    g = torch.Generator(device).manual_seed(0)
    tensors = {
        f"{name}.weight": (
            torch.randn(shape, device=device, generator=g) * (shape[-1] ** -0.5 if shape[1:] else 1)
        ).bfloat16()
        for name, shape in shapes.items()
    }
    checkpoint = Checkpoint(Path("random"), config, tensors, "random", None)
    return CausalLM.from_pretrained(checkpoint, contract=default_contract(arch), device=device)


class Case:
    """R sequences of `count` rows each behind `first` cached ones, the same for both layers.

    A prompt is one sequence of many rows and nothing cached, decoding many of one row.
    """

    def __init__(self, model: CausalLM, sequences: int, first: int, count: int) -> None:
        self.layer, config = model.layers[0], model.config
        self.sequences, self.first, self.count = sequences, first, count
        rows = [Segment(s, first, count) for s in range(sequences)]
        ids = torch.arange(first, first + count).repeat(sequences)
        self.batch = make_batch(model, rows, ids)
        cache = self.batch.cache
        g = torch.Generator(model.device).manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=model.device, generator=g).bfloat16()

        self.update = random(sequences * count, config.hidden_size)
        self.stream = random(sequences * count, config.hidden_size)
        # The contiguous cache of plain PyTorch, and the same keys and values in blocks.
        shape = (sequences, config.num_kv_heads, first + count, config.head_dim)
        self.k, self.v = random(*shape), random(*shape)
        keys = torch.arange(first, device=model.device)
        for contiguous, paged in ((self.k, cache.k[0]), (self.v, cache.v[0])):
            blocks = self.batch.block_tables.long()[:, keys // 16]
            paged[blocks, keys % 16] = contiguous[:, :, :first].transpose(1, 2)

    def ours(self) -> tuple[Tensor, Tensor]:
        """Run the layer on kernels; returns what `DecoderLayer.forward` does."""
        layer, eps = self.layer, self.layer.shared.config.rms_norm_eps
        normed, residual = add_rms_norm(self.update, self.stream, layer.input_layernorm, eps=eps)
        return layer.forward(normed, residual, self.batch, 0, _nothing)

    def plain(self) -> Work:
        """Return the layer in torch's own operations; tables of cos and sin are made before."""
        positions = self.batch.positions.view(self.sequences, self.count)
        cos, sin = (
            torch.cat([t, t], -1)[positions][:, None].bfloat16()
            for t in (self.layer.shared.cos, self.layer.shared.sin)
        )
        return lambda: _plain(self, self.layer, cos, sin)


def _plain(case: Case, layer: DecoderLayer, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    config = layer.shared.config
    heads, kv_heads = config.num_heads, config.num_kv_heads
    hidden, eps = (config.hidden_size,), config.rms_norm_eps
    residual = case.stream + case.update
    normed = F.rms_norm(residual, hidden, layer.input_layernorm, eps)
    qkv = F.linear(normed, layer.qkv_proj.weight)
    qkv = qkv.view(case.sequences, case.count, -1, config.head_dim).transpose(1, 2)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
    case.k[:, :, case.first :] = k
    case.v[:, :, case.first :] = v
    # One row sees all keys; a prompt's rows see those before them.
    attended = F.scaled_dot_product_attention(
        q, case.k, case.v, is_causal=case.first == 0, enable_gqa=True
    )
    update = F.linear(attended.transpose(1, 2).reshape(len(residual), -1), layer.o_proj.weight)
    residual = residual + update
    normed = F.rms_norm(residual, hidden, layer.post_attention_layernorm, eps)
    gate, up = F.linear(normed, layer.gate_up_proj.weight).chunk(2, dim=1)
    return F.linear(F.silu(gate) * up, layer.down_proj.weight), residual


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _nothing(name: str, rows: Tensor) -> None:
    """Observe nothing."""


def disagreement(ours: Work, plain: Work) -> float:
    """Return how far apart two layers' results are, relative to their size: rounding, or a bug."""
    pairs = zip(ours(), plain(), strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def eager(work: Work) -> float:
    """Return the median time of one call as it is, launches included; the cache is cold."""
    return float(triton.testing.do_bench(work, warmup=10, rep=60, return_mode="median"))


def profile(name: str, work: Work) -> None:
    """Print where the GPU's time goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(10):
            work()
        torch.cuda.synchronize()
    print(f"{name}, ten runs:")
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=14))


def cases(args: argparse.Namespace, model: CausalLM) -> Iterator[tuple[str, Case]]:
    """Yield the cases by name, each made when its turn comes."""
    for batch in filter(None, args.decode.split(",")):
        name = f"decode, batch {batch}, context {args.context}"
        yield name, Case(model, int(batch), args.context - 1, 1)
    for tokens in filter(None, args.prefill.split(",")):
        yield f"prefill, {tokens} tokens", Case(model, 1, 0, int(tokens))


def main() -> None:
    """Print one row per case; ratios above 1 are faster than PyTorch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decode", default="1,8,64", help="batch sizes")
    parser.add_argument("--context", type=int, default=1024, help="keys of a decoding row")
    parser.add_argument("--prefill", default="512,2048,8192", help="prompt lengths")
    parser.add_argument("--profile", action="store_true", help="also print each kernel's time")
    parser.add_argument("--tiny", action="store_true", help="only check agreement, in the emulator")
    args = parser.parse_args()
    if args.tiny:
        args.decode, args.context, args.prefill = "1,3", 40, "5,33"
        arch = os.environ.get("BITASSAY_ARCH", "sm_90")
        model = random_model(LLAMA_8B | TINY, arch, "cpu")
    elif torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        model = random_model(LLAMA_8B, f"sm_{major}{minor}", "cuda")
    else:
        sys.exit("benchmarks/layer.py needs a CUDA device: none was found (--tiny runs without)")
    where = "emulator" if args.tiny else torch.cuda.get_device_name()
    table = Table(
        title=f"{where}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{datetime.date.today()}; bf16, ratio = PyTorch time / bitassay time"
    )
    for name in ("one layer", "PyTorch", "bitassay", "ratio", "PyTorch graph", "bitassay graph",
                 "ratio", "apart by"):  # fmt: skip
        table.add_column(name, justify="left" if name == "one layer" else "right")
    for name, case in cases(args, model):
        works = case.plain(), case.ours
        apart = disagreement(case.ours, works[0])
        if not apart < 0.02:
            sys.exit(f"{name}: the layers are {apart:.1%} apart, rounding explains 2% at most")
        times: list[float] = []
        if not args.tiny:
            times = [time(work) for time in (eager, milliseconds) for work in works]
        pairs = zip(times[::2], times[1::2], strict=True)
        cells = [c for p, o in pairs for c in (f"{p:.3f} ms", f"{o:.3f} ms", f"{p / o:.2f}")]
        table.add_row(name, *(cells or ["-"] * 6), f"{apart:.2%}")
        if args.profile and not args.tiny:
            profile(f"{name}, PyTorch", works[0])
            profile(f"{name}, bitassay", works[1])
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
