"""The draft head that learns: its chains against a literal loop, its loss, its streams."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from training.eagle_acceptance import acceptance_length, accepted_drafts
from training.eagle_head import EagleHead, embedding_scale
from training.eagle_streams import DRAWN, Streams, continued, make_streams
from training.eagle_training import EagleRecipe, loss, train
from training.llama import Llama, LlamaConfig, rotate
from training.llama_prompts import first_best, greedy_streams

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 32,
}


def tiny(seed: int = 5, std: float = 0.3) -> tuple[Llama, EagleHead]:
    """Weights large enough for attention to prefer some keys to others."""
    torch.manual_seed(seed)
    target = Llama(LlamaConfig(num_hidden_layers=2, **SIZES))
    head = EagleHead(LlamaConfig(num_hidden_layers=1, **SIZES), embedding_scale=2.0)
    for parameter in [*target.parameters(), *head.parameters()]:
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=std)
    return target.eval(), head.eval()


class LiteralHead:
    """The head row by row, with lists of keys and values: as the definition tells it."""

    def __init__(self, target: Llama, head: EagleHead) -> None:
        self.embed = target.model["embed_tokens"].weight
        self.head, self.layer = head, head.layers[0]
        self.keys: list[Tensor] = []  # [N, D] each
        self.values: list[Tensor] = []

    def row(self, token: int, hidden: Tensor, position: int) -> Tensor:
        """Feed one row [H] at a position and return its hidden output [H]."""
        head, attention = self.head, self.layer.self_attn
        x = head.fc(torch.cat([self.embed[token] * head.embedding_scale, hidden]))
        turn = head.cos[position][None, None, None], head.sin[position][None, None, None]
        q, k, v = (
            part(x).view(-1, attention.head_dim)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (rotate(part[None, :, None], *turn)[0, :, 0] for part in (q, k))
        del self.keys[position:], self.values[position:]
        self.keys.append(k)
        self.values.append(v)
        mixed = []
        for i in range(len(q)):
            own = i // attention.group
            keys = torch.stack([key[own] for key in self.keys])
            values = torch.stack([value[own] for value in self.values])
            weights = (keys @ q[i] / math.sqrt(attention.head_dim)).softmax(0)
            mixed.append(weights @ values)
        residual = x + attention.o_proj(torch.cat(mixed))
        out: Tensor = residual + self.layer.mlp(self.layer.post_attention_layernorm(residual))
        return out


@torch.no_grad()
def test_all_chains_at_once_equal_the_literal_loop():
    target, head = tiny()
    ids = torch.randint(64, (1, 14))
    hidden = target.hidden(ids[:, :-1])
    embedded = target.model["embed_tokens"](ids[:, 1:])
    got = head(embedded, hidden, 4)
    for base in range(13):
        literal = LiteralHead(target, head)
        for p in range(base + 1):
            out = literal.row(int(ids[0, p + 1]), hidden[0, p], p)
        for j in range(min(4, 13 - base)):
            torch.testing.assert_close(got[j][0, base + j], out, rtol=1e-4, atol=1e-5)
            if base + j + 1 < 13:
                out = literal.row(int(ids[0, base + j + 2]), out, base + j + 1)


@torch.no_grad()
def test_accepted_drafts_equal_drafting_and_verifying_literally():
    target, head = tiny()
    # A target that often says the same again, and a head that foresees it.
    target.lm_head.weight.copy_(target.model["embed_tokens"].weight)
    for name, parameter in [*target.named_parameters(), *head.named_parameters()]:
        if name.endswith(("o_proj.weight", "down_proj.weight", "fc.weight")):
            parameter.mul_(0.3)
    head.fc.weight[:, :32] += torch.eye(32)
    prompts = [tuple(torch.randint(64, (n,)).tolist()) for n in (1, 5, 9, 3)]
    streams = greedy_streams(target, prompts, 20)
    got = accepted_drafts(target, head, prompts, streams)
    for prompt, stream, counts in zip(prompts, streams, got, strict=True):
        ids = [*prompt, *stream]
        hidden = target.hidden(torch.tensor([ids]))[0]
        for t in range(20):
            base, literal = len(prompt) + t - 1, LiteralHead(target, head)
            for p in range(base + 1):
                out = literal.row(ids[p + 1], hidden[p], p)
            accepted = 0
            for j in range(min(5, max(0, 18 - t))):
                draft = int(first_best(target.lm_head(out)[None]))
                if draft != stream[t + 1 + j]:
                    break
                accepted += 1
                out = literal.row(draft, out, base + j + 1)
            assert counts[t] == accepted
    assert {0, 1, 2, 3} <= {count for counts in got for count in counts}  # some of each


def test_acceptance_is_the_tokens_of_a_round():
    # Rounds of K = 3: at 0 (3 kept, 4 tokens), 4 (1 kept), 6 (no draft left): 7 tokens, 3 rounds.
    assert acceptance_length([[4, 0, 0, 0, 1, 0, 0, 0]], 3) == 7 / 3
    assert acceptance_length([[4, 0, 0, 0, 1, 0, 0, 0], [0, 0]], 1) == 8 / 6


def test_a_head_of_two_layers_is_refused():
    with pytest.raises(ValueError, match="expected a head of 1 layer, found 2"):
        EagleHead(LlamaConfig(num_hidden_layers=2))


@torch.no_grad()
def test_the_checkpoint_holds_the_embedding_scale():
    target, head = tiny()
    head.load_state_dict({name: t.float() for name, t in head.tensors().items()})
    head.fc.weight[:, :32] /= 2  # back in the form that learns, once rounded
    plain = EagleHead(head.config)
    plain.load_state_dict(head.tensors())
    ids = torch.randint(64, (1, 9))
    hidden, embedded = target.hidden(ids[:, :-1]), target.model["embed_tokens"](ids[:, 1:])
    for one, other in zip(head(embedded, hidden, 2), plain(embedded, hidden, 2), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    target.model["norm"].weight.fill_(3.0)
    target.model["embed_tokens"].weight.fill_(0.05)
    assert embedding_scale(target) == 64.0  # 60, to the nearest power of 2


def recipe(**changes: float) -> EagleRecipe:
    values = {"seed": 3, "steps": 60, "batch_size": 4, "learning_rate": 3e-3, "weight_decay": 0.0}
    values |= {"depth": 3, "text_weight": 0.5, "hidden_weight": 0.1, "report": 30}
    return EagleRecipe(**(values | changes))


@torch.no_grad()
def test_a_chain_row_counts_where_the_drafts_before_it_are_right():
    target, head = tiny()
    ids, lengths = torch.randint(64, (2, 12)), torch.tensor([3, 7])
    hidden, embedded = target.hidden(ids), target.model["embed_tokens"](ids[:, 1:])
    outs = head(embedded, hidden[:, :-1], 3)
    # A window that follows the head's own drafts from row 4 on, in the first row.
    ids[0, 6] = target.lm_head(outs[0])[0, 4].argmax()
    hidden, embedded = target.hidden(ids), target.model["embed_tokens"](ids[:, 1:])
    outs = head(embedded, hidden[:, :-1], 3)
    wanted = target.lm_head(hidden).softmax(-1)
    total, weight, right = 0.0, 0.0, [0, 0, 0]
    for b in range(2):
        for base in range(11):
            own = 1.0 if base >= lengths[b] - 1 else 0.5
            weight += own
            for j in range(min(3, 11 - base)):
                p = base + j
                logits = target.lm_head(outs[j][b, p])
                total += own * float(F.cross_entropy(logits[None], wanted[b, p + 1][None]))
                total += own * 0.1 * float(F.smooth_l1_loss(outs[j][b, p], hidden[b, p + 1]))
                if p + 2 == 12 or logits.argmax() != ids[b, p + 2]:
                    break
                if p >= lengths[b] - 1:
                    right[j] += 1
    value, shares = loss(target, head, ids, lengths, recipe())
    assert float(value) == pytest.approx(total / weight, rel=1e-4)
    rows = int((11 - (lengths - 1)).sum())
    assert shares.tolist() == pytest.approx([count / rows for count in right])
    assert right[0] > 0


def test_training_learns_and_repeats_itself_from_a_seed():
    runs = []
    for _ in range(2):
        target, _ = tiny()
        torch.manual_seed(1)
        head = EagleHead(LlamaConfig(num_hidden_layers=1, **SIZES))
        before = {name: t.clone() for name, t in target.named_parameters()}
        made = make_streams(target, torch.arange(900) % 61, longest=40, tokens=20, count=40, seed=1)
        with Progress(disable=True) as progress:
            reports = list(train(target, head, made, recipe(), progress))
        assert [report[:2] for report in reports] == [(30, 60), (60, 60)]
        # More drafts are right, first ones and those after them.
        assert reports[1][3][0] > reports[0][3][0] > 3 / 64
        assert reports[1][3][1] > 0
        assert all(torch.equal(before[name], t) for name, t in target.named_parameters())
        runs.append((reports, head.tensors()["fc.weight"]))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


@torch.no_grad()
def test_windows_are_text_then_drawn_tokens_then_greedy_ones():
    target, _ = tiny()
    text = torch.arange(500) % 64
    ids, lengths = text[None, :60].repeat(4, 1), torch.tensor([5, 20, 20, 1])
    drawn = torch.tensor([0, 0, DRAWN, 0])
    got = continued(target, ids, lengths, drawn, torch.Generator().manual_seed(1))
    for row in (0, 1, 3):
        n = int(lengths[row])
        assert torch.equal(got[row, :n], ids[row, :n])
        assert (
            tuple(got[row, n:].tolist())
            == greedy_streams(target, [tuple(ids[row, :n].tolist())], 60 - n)[0]
        )
    end = 20 + DRAWN
    assert torch.equal(got[2, :20], ids[2, :20])
    assert not torch.equal(got[2, 20:end], got[1, 20:end])
    assert (
        tuple(got[2, end:].tolist())
        == greedy_streams(target, [tuple(got[2, :end].tolist())], 60 - end)[0]
    )


def test_drawn_tokens_follow_the_distribution():
    target, _ = tiny(std=0.15)
    count = 20000
    ids, ones = torch.full((count, 3), 7), torch.ones(count, dtype=torch.int64)
    got = continued(target, ids, ones, ones, torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = target(torch.tensor([[7]]))[0, 0].softmax(-1)
    shares = got[:, 1].bincount(minlength=64) / count
    assert float((shares - wanted).abs().max()) < 0.02
    assert float(wanted.max()) > 0.06


def test_buckets_hold_all_lengths_and_few_loops():
    target, _ = tiny()
    heard: list[int] = []
    buckets = make_streams(
        target,
        torch.arange(900) % 61,
        longest=64,
        tokens=12,
        count=200,
        seed=4,
        batch=150,
        heard=heard.append,
    )
    assert heard == [150, 200, 350, 400]
    assert [bucket.ids.shape[1] for bucket in buckets] == [44, 76]
    for bucket, most in zip(buckets, (32, 64), strict=True):
        assert isinstance(bucket, Streams)
        assert len(bucket.ids) == len(bucket.lengths) <= 200
        assert most - 32 < int(bucket.lengths.min()) < int(bucket.lengths.max()) <= most


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="expected at least 52 tokens to learn, found 40"):
        make_streams(tiny()[0], torch.zeros(40).long(), longest=32, tokens=20, count=2, seed=1)
