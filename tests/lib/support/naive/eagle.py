"""A slow twin of drafting: one row at a time, every chain with a copy of the keys it may see.

Written from the definition of the data flow, not from the reference's. It shares the operations
themselves, which have twins of their own, and nothing that decides what is fed where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitassay.reference import rotary
from bitassay.reference.activation import silu_and_mul
from bitassay.reference.attention import attention
from bitassay.reference.fingerprint import fingerprint_rows, fold
from bitassay.reference.linear import linear, lm_head
from bitassay.reference.model import CausalLM
from bitassay.reference.norm import rms_norm
from bitassay.reference.spec.rotary_table import RotaryTable

Seen = dict[str, Tensor]
Cache = list[tuple[Tensor, Tensor]]


class TwinEagle:
    """A head of given config.json and tensors (published names), beside a reference target."""

    def __init__(
        self, config: dict[str, Any], tensors: dict[str, Tensor], target: CausalLM
    ) -> None:
        self.config, self.target, self.contract = config, target, target.contract
        self.third = "d2t" in tensors
        self.prefix = "midlayer." if self.third else "layers.0."
        dtype = target.config.dtype
        self.tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        self.table = RotaryTable(config["rope_theta"], config["head_dim"], 200)

    def target_rows(self, ids: list[int]) -> list[Tensor]:
        """What the head is fed of the target, one [1, W] for each position of ids."""
        seen: Seen = {}
        self.target.hidden(ids, observe=seen.__setitem__)
        if not self.third:
            return list(seen["norm"].split(1))
        layers = self.target.config.num_layers
        before = [2, layers // 2, layers - 3]
        names = ["embedding" if i == 0 else f"layers.{i - 1}.mlp_residual" for i in before]
        return list(torch.cat([seen[name] for name in names], dim=1).split(1))

    def drafts(self, prompt: list[int], tokens: list[int], depth: int) -> dict[str, Any]:
        """All that a golden records: per token its drafts, how many are right, and prints."""
        ids = prompt + tokens
        rows = self.target_rows(ids[:-1])
        before: list[Seen] = []
        out: dict[str, list[Any]] = {"tokens": [], "accepted": [], "prints": []}
        cache: Cache = []
        count = len(prompt)
        for p in range(count - 1):
            before.append(self.row(ids[p + 1], self.taken(rows[p]), p, cache))
        for t in range(len(tokens)):
            most = max(0, min(depth, len(tokens) - 2 - t))
            drafted: list[int] = []
            row_fingerprints: list[list[int]] = []
            right = 0
            base = count + t - 1
            if most:
                seen = self.row(ids[base + 1], self.taken(rows[base]), base, cache)
            chain = list(cache)  # what a chain adds is gone after it
            while len(drafted) < most:
                if drafted:
                    position = base + len(drafted)
                    seen = self.row(drafted[-1], seen["draft.hidden"], position, chain)
                token, logits = self.choice(seen)
                row_fingerprints.append(
                    [int(fingerprint_rows(x.flatten(1))) for x in (*seen.values(), logits)]
                )
                drafted.append(token)
                if token != tokens[t + len(drafted)]:
                    break
                right += 1
            out["tokens"].append(drafted)
            out["accepted"].append(right)
            out["prints"].append(row_fingerprints)
        folds = [
            int(fold(torch.cat([fingerprint_rows(seen[name].flatten(1)) for seen in before])))
            for name in (before[0] if before else ())
        ]
        return out | {"prompt": [*folds, 0]}

    def taken(self, row: Tensor) -> Tensor:
        return self.linear(row, "fc") if self.third else row

    def row(self, token: int, hidden: Tensor, position: int, cache: Cache) -> Seen:
        """One row; its key and value go to the end of the cache."""
        assert len(cache) == position
        table = self.tensors.get("embed_tokens.weight", self.target.embed_tokens)
        seen: Seen = {"draft.embedding": table[token][None]}
        if self.third:
            seen["draft.fc"] = residual = hidden
            seen["draft.input_layernorm"] = self.norm(seen["draft.embedding"], "input_layernorm")
            seen["draft.hidden_norm"] = self.norm(hidden, "hidden_norm")
            x = torch.cat([seen["draft.input_layernorm"], seen["draft.hidden_norm"]], dim=1)
        else:
            x = self.linear(torch.cat([seen["draft.embedding"], hidden], dim=1), "fc")
            seen["draft.fc"] = residual = x
        q, k, v = (self.linear(x, f"{self.prefix}self_attn.{n}_proj") for n in "qkv")
        seen["draft.qkv_proj"] = torch.cat([q, k, v], dim=1)
        size = self.config["head_dim"]
        at = torch.tensor([position])
        q, k = (x.view(1, -1, size) for x in (q, k))
        q, k = rotary.apply(q, k, at, self.table.cos, self.table.sin)
        seen["draft.rotary"] = torch.cat([q, k], dim=1)
        cache.append((k, v.view(1, -1, size)))
        keys, values = (torch.cat(x) for x in zip(*cache, strict=True))
        x = seen["draft.attention"] = attention(q, keys, values, contract=self.contract)
        x = seen["draft.o_proj"] = self.linear(x.flatten(1), f"{self.prefix}self_attn.o_proj")
        residual = seen["draft.attention_residual"] = self.sum(x, residual)
        x = seen["draft.post_attention_layernorm"] = self.norm(residual, "post_attention_layernorm")
        gate, up = (self.linear(x, f"{self.prefix}mlp.{n}_proj") for n in ("gate", "up"))
        x = seen["draft.gate_up_proj"] = torch.cat([gate, up], dim=1)
        x = seen["draft.silu_and_mul"] = silu_and_mul(x)
        x = seen["draft.down_proj"] = self.linear(x, f"{self.prefix}mlp.down_proj")
        seen["draft.hidden"] = self.sum(x, residual)
        if self.third:
            seen["draft.norm"] = rms_norm(
                seen["draft.hidden"], self.tensors["norm.weight"], eps=self.config["rms_norm_eps"]
            )
        return seen

    def choice(self, seen: Seen) -> tuple[int, Tensor]:
        """The token of the target's vocabulary that a row drafts, and its logits."""
        if not self.third:
            logits = self.target.logits(seen["draft.hidden"])
        else:
            head = self.tensors["lm_head.weight"]
            logits = lm_head(seen["draft.norm"], head, contract=self.contract)
        values = logits[0].tolist()
        best = values.index(max(values))  # the first, so the lowest, of equal ones
        return best + (int(self.tensors["d2t"][best]) if self.third else 0), logits

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.tensors.get(f"{name}.bias")
        return linear(x, self.tensors[f"{name}.weight"], bias, contract=self.contract)

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.tensors[f"{self.prefix}{name}.weight"]
        return rms_norm(x, weight, eps=self.config["rms_norm_eps"])

    def sum(self, x: Tensor, residual: Tensor) -> Tensor:
        return (x.float() + residual.float()).to(x.dtype)


def literal_rounds(
    drafts: Callable[[int, int], list[int]], tokens: list[int], most: int
) -> list[tuple[int, int, int]]:
    """Run the loop over a finished stream; drafts(t, n) are those after token t."""
    found, known = [], 1
    while known < len(tokens):
        drafted = drafts(known - 1, min(most, len(tokens) - known - 1))
        right = 0
        while right < len(drafted) and drafted[right] == tokens[known + right]:
            right += 1
        found.append((known - 1, len(drafted), right))
        known += right + 1
    return found
