"""Every output of every operation of a decoder layer on this GPU against the oracle.

One layer with Llama-3.1-8B's shapes and one with Qwen3-1.7B's, random weights, batches of 1 to 2048
rows that mix prompts, chunks of prompts and decoding over cached contexts; slots of the cache that
nobody wrote hold NaN. The oracle runs on the GPU (its attention on the machine's cores) as a chain
from the embedding to the logits. Where a kernel was given other inputs than the chain has, the
operation is computed a second time from the kernel's own, so that an operation is only blamed for
what it did itself. Exit status: 0 all equal, 1 a difference.

python tools/hardware/model_sweep.py [--quick]
TRITON_INTERPRET=1 BITASSAY_ARCH=sm_90 python tools/hardware/model_sweep.py --tiny
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitassay.engine.models.batch import Batch
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.kv_cache import PagedCache
from bitassay.reference import activation, linear, norm, rotary
from bitassay.reference.checkpoints.checkpoint import Checkpoint
from bitassay.reference.spec.contract import Contract, default_contract

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "lib"))
from support.batches import Segment, make_batch, tables_of
from support.oracle_pool import OraclePool

BATCHES = (1, 2, 7, 16, 33, 64, 128, 256, 512, 1024, 2048)
CONTEXTS = (1100, 40, 700, 17, 1023, 2100)  # positions cached before a decoding row
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
        "rope_theta": 500000.0, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-5,
    },
    "Qwen3-1.7B": {
        "model_type": "qwen3", "hidden_size": 2048, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 64, "intermediate_size": 96}  # fmt: skip

Rows = dict[str, Tensor]  # an operation's outputs by its name, without the layer's prefix
Operation = Callable[..., Tensor]


def bits(x: Tensor) -> Tensor:
    """Return the stored bits; NaN is never expected."""
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


@dataclass
class Tally:
    """Outputs compared and different per operation, and a line for every comparison that differs.

    apart: differing from the chain. own: differing from the oracle given the kernel's own inputs.
    """

    compared: dict[str, int] = field(default_factory=dict)
    apart: dict[str, int] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)

    def add(self, case: str, name: str, got: Tensor, chain: Tensor, own: Tensor) -> None:
        """Compare a kernel's output with both of the oracle's."""
        got = got.flatten(1)
        self.compared[name] = self.compared.get(name, 0) + got.numel()
        for counts, want in ((self.apart, chain.flatten(1)), (self.own, own.flatten(1))):
            different = bits(got) != bits(want)
            count = int(different.sum())
            counts[name] = counts.get(name, 0) + count
            if count and counts is self.own:
                at = different.nonzero()[0].tolist()
                print(
                    f"DIFFERENT {case}, {name}: {count} of {got.numel()}, first at {at}: got "
                    f"{got[tuple(at)].item():.9g}, want {want[tuple(at)].item():.9g}"
                )

    def table(self, title: str) -> Table:
        """Return the counts as a table."""
        table = Table(title=title)
        for name in ("operation", "outputs compared", "different", "different in the chain"):
            table.add_column(name, justify="left" if name == "operation" else "right")
        for name, count in self.compared.items():
            table.add_row(name, f"{count:,}", f"{self.own[name]:,}", f"{self.apart[name]:,}")
        totals = (sum(c.values()) for c in (self.compared, self.own, self.apart))
        table.add_section()
        table.add_row("all", *(f"{total:,}" for total in totals))
        return table


def random_model(shape: dict[str, Any], rows: int, device: str) -> Checkpoint:
    """Return a checkpoint of one layer; its vocabulary is the rows of input, none twice."""
    config: dict[str, Any] = {
        **shape, "vocab_size": rows, "num_hidden_layers": 1, "torch_dtype": "bfloat16",
        "max_position_embeddings": max(CONTEXTS) + rows + 1,
    }  # fmt: skip
    g = torch.Generator(device).manual_seed(config["hidden_size"])
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config["head_dim"]
    q, kv = (config[f"num_{name}_heads"] * head for name in ("attention", "key_value"))

    def weight(n: int, k: int, scale: float = 1.0) -> Tensor:
        drawn: Tensor = torch.randn(n, k, device=device, generator=g) * scale * k**-0.5
        return drawn.bfloat16()

    def scales(n: int) -> Tensor:
        return (1 + 0.25 * torch.randn(n, device=device, generator=g)).bfloat16()

    layer = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": weight(rows, hidden, hidden**0.5),
        f"{layer}input_layernorm.weight": scales(hidden),
        # Larger, so that rows attend to few others.
        f"{layer}self_attn.q_proj.weight": weight(q, hidden, 2.0),
        f"{layer}self_attn.k_proj.weight": weight(kv, hidden, 2.0),
        f"{layer}self_attn.v_proj.weight": weight(kv, hidden),
        f"{layer}self_attn.o_proj.weight": weight(hidden, q),
        f"{layer}post_attention_layernorm.weight": scales(hidden),
        f"{layer}mlp.gate_proj.weight": weight(inner, hidden),
        f"{layer}mlp.up_proj.weight": weight(inner, hidden),
        f"{layer}mlp.down_proj.weight": weight(hidden, inner),
        "model.norm.weight": scales(hidden),
        "lm_head.weight": weight(rows, hidden),
    }
    if config["model_type"] == "qwen3":
        tensors |= {f"{layer}self_attn.{x}_norm.weight": scales(head) for x in "qk"}
    return Checkpoint(Path("random"), config, tensors, "random", None)


def segments(rows: int, scale: int) -> list[Segment]:
    """Return so many rows: a few decoding, a chunk behind a cached context, a new prompt.

    scale: what contexts are divided by.
    """
    decoding = min(max(1, rows // 3), len(CONTEXTS))
    left = rows - decoding
    parts = [(context // scale, 1) for context in CONTEXTS[:decoding]]
    parts.insert(1, (300 // scale, left // 3))
    parts.insert(0, (0, left - left // 3))
    return [Segment(s, *part) for s, part in enumerate(p for p in parts if p[1])]


class Oracle:
    """The reference's operations over one layer's weights, and what they took.

    products: multiply-adds of the linear layers, done in product_seconds. seconds: of everything.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: CausalLM, contract: Contract, pool: OraclePool
    ) -> None:
        self._contract, self._config, self._pool = contract, model.config, pool
        self._weights = {
            name.removeprefix("model.layers.0."): t.to(model.device)
            for name, t in checkpoint.tensors.items()
        }
        self._shared = model.layers[0].shared
        self._prepared: dict[str, Any] = {}
        self.products = self.seconds = self.product_seconds = 0.0

    def operations(self, batch: Batch) -> dict[str, tuple[tuple[str, ...], Operation]]:
        """Return, by each operation's name, the operations it reads and what computes it."""
        eps, rotated = self._config.rms_norm_eps, "qkv_proj"
        weights = self._weights

        def rms(name: str) -> Callable[[Tensor], Tensor]:
            return lambda x: norm.rms_norm(x, weights[f"{name}.weight"], eps=eps)

        def residual(x: Tensor, stream: Tensor) -> Tensor:
            weight = weights["post_attention_layernorm.weight"]
            return norm.add_rms_norm(x, stream, weight, eps=eps)[1]

        made: dict[str, tuple[tuple[str, ...], Operation]] = {
            "embedding": ((), lambda: weights["model.embed_tokens.weight"][batch.ids]),
            "input_layernorm": (("embedding",), rms("input_layernorm")),
            "qkv_proj": (
                ("input_layernorm",), self._product(*(f"self_attn.{x}_proj" for x in "qkv")),
            ),
        }  # fmt: skip
        if self._config.model_type == "qwen3":
            made["qk_norm"], rotated = (("qkv_proj",), self._qk_norm), "qk_norm"
        made |= {
            "rotary": ((rotated,), lambda x: self._rotary(x, batch)),
            "attention": (("rotary", "qkv_proj"), lambda x, qkv: self._attention(x, qkv, batch)),
            "o_proj": (("attention",), self._product("self_attn.o_proj")),
            "attention_residual": (("o_proj", "embedding"), residual),
            "post_attention_layernorm": (
                ("attention_residual",), rms("post_attention_layernorm"),
            ),
            "gate_up_proj": (
                ("post_attention_layernorm",), self._product("mlp.gate_proj", "mlp.up_proj"),
            ),
            "silu_and_mul": (("gate_up_proj",), activation.silu_and_mul),
            "down_proj": (("silu_and_mul",), self._product("mlp.down_proj")),
            "mlp_residual": (("down_proj", "attention_residual"), residual),
            "norm": (("mlp_residual",), rms("model.norm")),
            "lm_head": (("norm",), self._product("lm_head")),
        }  # fmt: skip
        return made

    def _product(self, *names: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            outputs, start = [], _now(x)
            for name in names:
                if name not in self._prepared:
                    weight = self._weights[f"{name}.weight"]
                    self._prepared[name] = linear.prepare(weight, self._contract)
                prepared = self._prepared[name]
                outputs.append(linear.linear(x, prepared, contract=self._contract))
                self.products += len(x) * prepared.shape[0] * prepared.shape[1]
            result = torch.cat(outputs, dim=1)
            self.product_seconds += _now(result) - start
            return result

        return run

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:  # [T, heads * D] -> q, k and what is left
        counts = [self._config.num_heads, self._config.num_kv_heads]
        heads = x.unflatten(1, (-1, self._config.head_dim))
        parts: tuple[Tensor, ...] = heads.split([*counts, heads.shape[1] - sum(counts)], dim=1)
        return parts

    def _qk_norm(self, qkv: Tensor) -> Tensor:
        q, k, _ = self._heads(qkv)
        parts = [
            norm.rms_norm(x, self._weights[name], eps=self._config.rms_norm_eps)
            for x, name in ((q, "self_attn.q_norm.weight"), (k, "self_attn.k_norm.weight"))
        ]
        return torch.cat(parts, dim=1).flatten(1)

    def _rotary(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, _ = self._heads(x)
        turned = rotary.apply(q, k, batch.positions, self._shared.cos, self._shared.sin)
        return torch.cat(turned, dim=1).flatten(1)

    def _attention(self, turned: Tensor, qkv: Tensor, batch: Batch) -> Tensor:
        """Write keys and values where the batch has them, in a copy of its cache, and attend."""
        (q, k, _), (_, _, v) = self._heads(turned), self._heads(qkv)
        caches = [batch.cache.k[0].clone(), batch.cache.v[0].clone()]
        for cache, rows in zip(caches, (k, v), strict=True):
            cache.flatten(0, 1)[batch.slots] = rows
        return self._pool.attend_paged(
            q, caches[0], caches[1], batch.block_tables, batch.query_start, batch.seq_lens,
            self._contract,
        ).flatten(1)  # fmt: skip

    def timed(self, operation: Operation, inputs: list[Tensor]) -> Tensor:
        """Run an operation and add its time."""
        start = time.perf_counter()
        result = operation(*inputs)
        self.seconds += _now(result) - start
        return result


def _now(x: Tensor) -> float:
    """Return the time, once the device of x has done its work."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def random_batch(model: CausalLM, rows: list[Segment]) -> Batch:
    """Return a batch over a cache with random contexts; what they leave free is NaN."""
    config = model.config
    g = torch.Generator(model.device).manual_seed(len(rows))
    tables = tables_of([s.end for s in rows])
    cache = model.new_cache(sum(map(len, tables)) + 3)
    for x in (cache.k[0], cache.v[0]):
        x.fill_(torch.nan)
        for segment, table in zip(rows, tables, strict=True):
            shape = (segment.first, config.num_kv_heads, config.head_dim)
            blocks = torch.tensor(table, device=model.device)
            positions = torch.arange(segment.first, device=model.device)
            drawn = torch.randn(shape, device=model.device, generator=g).to(config.dtype)
            x[blocks[positions // 16], positions % 16] = drawn
    ids = torch.randperm(config.vocab_size, device=model.device, generator=g)
    return make_batch(model, rows, ids[: sum(s.count for s in rows)], cache=cache, tables=tables)


def compare(model: CausalLM, oracle: Oracle, batch: Batch, case: str, tally: Tally) -> None:
    """Run one batch on kernels and the oracle, and compare all operations' outputs."""
    got: Rows = {}

    def keep(name: str, rows: Tensor) -> None:
        got[name.removeprefix("layers.0.")] = rows.clone()

    chain: Rows = {}
    # The oracle starts from the cache as it was.
    before = PagedCache(*(tuple(t.clone() for t in x) for x in (batch.cache.k, batch.cache.v)))
    hidden = model.forward(batch, keep)
    keep("lm_head", model.logits(hidden))
    model.check()
    for name, (inputs, operation) in oracle.operations(replace(batch, cache=before)).items():
        theirs = [chain[i] for i in inputs]
        ours = [got[i] for i in inputs]
        chain[name] = own = oracle.timed(operation, theirs)
        if not all(torch.equal(bits(a), bits(b)) for a, b in zip(theirs, ours, strict=True)):
            own = oracle.timed(operation, ours)
        tally.add(case, name, got[name], chain[name], own)
    unseen = got.keys() ^ chain.keys()
    if unseen:
        sys.exit(f"operations that only one of kernels and oracle has: {', '.join(unseen)}")


def sweep(
    name: str, args: argparse.Namespace, contract: Contract, pool: OraclePool, console: Console
) -> int:
    """Compare one model's layer at every batch size; return how many outputs differ."""
    device = "cpu" if args.tiny else "cuda"
    batches = [m for m in BATCHES if m <= (16 if args.tiny else 64 if args.quick else max(BATCHES))]
    shape = SHAPES[name] | (TINY if args.tiny else {})
    checkpoint = random_model(shape, max(batches), device)
    model = CausalLM.from_pretrained(checkpoint, contract=contract, device=device)
    oracle, tally = Oracle(checkpoint, model, contract, pool), Tally()
    for m in batches:
        rows = segments(m, 40 if args.tiny else 1)
        parts = ", ".join(f"{s.count} after {s.first}" for s in rows)
        start, seconds = time.perf_counter(), oracle.seconds
        compare(model, oracle, random_batch(model, rows), f"{name} M={m}", tally)
        console.print(
            f"{name} M={m}: {time.perf_counter() - start:.1f} s, of which the oracle "
            f"{oracle.seconds - seconds:.1f} s; rows {parts}",
            soft_wrap=True,
        )
    speed = f"{oracle.products / oracle.product_seconds / 1e9:.1f} G multiply-adds/s"
    attending = oracle.seconds - oracle.product_seconds
    console.print(tally.table(f"{name}, one layer, {contract.arch}, M = {batches}"))
    console.print(
        f"the oracle's linear layers: {oracle.product_seconds:.1f} s at {speed}; attention and the "
        f"rest: {attending:.1f} s"
    )
    return sum(tally.own.values()) + sum(tally.apart.values())


def main() -> int:
    """Run the sweep and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="up to 64 rows")
    parser.add_argument("--tiny", action="store_true", help="small shapes, in the emulator")
    args = parser.parse_args()
    console = Console(width=120, highlight=False)
    if args.tiny:
        contract = default_contract(os.environ.get("BITASSAY_ARCH", "sm_90"))
    elif not torch.cuda.is_available():
        sys.exit("model_sweep.py needs a CUDA device: none was found (--tiny runs without)")
    else:
        major, minor = torch.cuda.get_device_capability()
        contract = default_contract(f"sm_{major}{minor}")
        console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with OraclePool() as pool:
        different = sum(sweep(name, args, contract, pool, console) for name in SHAPES)
    console.print(f"different: {different}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
