"""A slow twin of Llama and Qwen3, in Python integers: one row at a time, nothing packed or batched.

Weights are read under their Hugging Face names and kept apart (q, k, v; gate, up), a row goes from
the embedding to the logits alone, and keys and values are kept as lists, head by head. The rotary
tables come from mpmath. It shares no arithmetic with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from support.naive import operations as op
from support.naive import rotary as twin_rotary
from support.naive import tensor_core as twin
from support.same_bits import patterns

KINDS = {"bfloat16": "bf16", "float16": "fp16"}
Row = list[int]


class TwinModel:
    """A model of given config.json and tensors on one architecture."""

    def __init__(
        self, config: dict[str, Any], tensors: dict[str, Tensor], arch: str, **blocks: int
    ) -> None:
        self.config, self.arch, self.blocks = config, arch, blocks
        self.kind = KINDS[config["torch_dtype"]]
        self.tensors: dict[str, Any] = {
            name: patterns(t) if t.dim() == 1 else [patterns(row) for row in t]
            for name, t in tensors.items()
        }
        tied = config["tie_word_embeddings"]
        self.head = self.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
        size, scaling = config["head_dim"], config["rope_scaling"]
        self.frequencies = [
            twin_rotary.frequency(i, config["rope_theta"], size, scaling) for i in range(size // 2)
        ]

    def row(self, token: int, cache: list[list[tuple[Row, Row]]]) -> dict[str, Row]:
        """Every operation's row, by name, for the next token of a sequence; extends the cache.

        cache: per layer, one (keys, values) per position, each all heads' values in a row.
        """
        seen: dict[str, Row] = {}
        stream = seen["embedding"] = self.tensors["model.embed_tokens.weight"][token]
        for layer in range(self.config["num_hidden_layers"]):
            stream = self._layer(layer, stream, cache[layer], seen)
        seen["norm"] = self._norm(stream, "model.norm")
        return seen

    def logits(self, hidden: Row) -> Row:
        return [twin.linear(hidden, row, None, self.kind, self.arch) for row in self.head]

    def generate(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """What a `Trace` holds, in Python integers; fingerprints by operation in running order."""
        fmt = twin.FORMATS[self.kind]
        cache: list[list[tuple[Row, Row]]] = [[] for _ in range(self.config["num_hidden_layers"])]
        ids, before, out = list(prompt), [], {n: [] for n in ("tokens", "ids", "bits", "margins")}
        prints: list[Row] = []
        for position in range(len(prompt) + max_tokens - 1):
            seen = self.row(ids[position], cache)
            of_row = [twin.fingerprint(row, fmt) for row in seen.values()]
            if position < len(prompt) - 1:
                before.append(of_row)
                continue
            logits = self.logits(seen["norm"])
            best = twin.top_k(logits, 8, fmt)
            out["tokens"].append(best[0])
            out["ids"].append(best)
            out["bits"].append([logits[i] for i in best])
            out["margins"].append(twin.margin(logits, fmt))
            prints.append([*of_row, twin.fingerprint(logits, fmt)])
            ids.append(best[0])
        width = len(prints[0])
        folds = [twin.fold([row[i] for row in before]) for i in range(width - 1)]
        return {**out, "prints": prints, "prompt_prints": [*folds, 0], "names": [*seen, "lm_head"]}

    def _layer(
        self, index: int, stream: Row, cache: list[tuple[Row, Row]], seen: dict[str, Row]
    ) -> Row:
        name = f"layers.{index}."
        size, kind = self.config["head_dim"], self.kind
        x = seen[name + "input_layernorm"] = self._norm(stream, f"model.{name}input_layernorm")
        q, k, v = (self._linear(x, f"model.{name}self_attn.{p}_proj") for p in "qkv")
        seen[name + "qkv_proj"] = [*q, *k, *v]
        if self.config["model_type"] == "qwen3":
            q = self._heads(q, lambda head: self._norm(head, f"model.{name}self_attn.q_norm"))
            k = self._heads(k, lambda head: self._norm(head, f"model.{name}self_attn.k_norm"))
            seen[name + "qk_norm"] = [*q, *k]
        turn = [twin_rotary.cosine_and_sine(len(cache), f) for f in self.frequencies]
        cos, sin = ([pair[i] for pair in turn] for i in (0, 1))
        q, k = (self._heads(y, lambda head: op.rotate(head, cos, sin, kind)) for y in (q, k))
        seen[name + "rotary"] = [*q, *k]
        cache.append((k, v))
        group = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        mixed: Row = []
        for head in range(self.config["num_attention_heads"]):
            mine = slice(head // group * size, (head // group + 1) * size)
            mixed += op.attention(
                q[head * size : (head + 1) * size],
                [keys[mine] for keys, _ in cache],
                [values[mine] for _, values in cache],
                len(cache) - 1,
                kind=kind,
                arch=self.arch,
                **self.blocks,
            )
        seen[name + "attention"] = mixed
        x = seen[name + "o_proj"] = self._linear(mixed, f"model.{name}self_attn.o_proj")
        stream = seen[name + "attention_residual"] = op.add_rows(x, stream, kind)
        after = "post_attention_layernorm"
        x = seen[name + after] = self._norm(stream, f"model.{name}{after}")
        gate, up = (self._linear(x, f"model.{name}mlp.{p}_proj") for p in ("gate", "up"))
        x = seen[name + "gate_up_proj"] = [*gate, *up]
        x = seen[name + "silu_and_mul"] = op.silu_and_mul(x, kind)
        x = seen[name + "down_proj"] = self._linear(x, f"model.{name}mlp.down_proj")
        stream = seen[name + "mlp_residual"] = op.add_rows(x, stream, kind)
        return stream

    def _heads(self, row: Row, function: Any) -> Row:
        size = self.config["head_dim"]
        heads = [row[i : i + size] for i in range(0, len(row), size)]
        return [x for head in heads for x in function(head)]

    def _norm(self, row: Row, name: str) -> Row:
        weight = self.tensors[f"{name}.weight"]
        return op.rms_norm(row, weight, self.config["rms_norm_eps"], self.kind)

    def _linear(self, row: Row, name: str) -> Row:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        return [
            twin.linear(row, weight[n], bias[n] if bias else None, self.kind, self.arch)
            for n in range(len(weight))
        ]
