"""What a draft head learns from: greedy streams of its target after pieces of learned text.

Drafts are verified against what the target itself writes, so that is what must be foreseen. Half
of the prompts end in tokens drawn at random from the target: text that it has never read before,
as held-out prompts are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.llama import Llama
from training.llama_prompts import first_best, loops

BUCKET = 32  # prompts of up to so many lengths share a window
DRAWN = 16  # tokens drawn at random at the end of every other prompt
LOOPS_KEPT = 4  # one in so many of the streams that end in a loop is kept


@dataclass(frozen=True)
class Streams:
    """Windows of one length: a prompt, then greedy tokens up to the end.

    ids: [N, L]; lengths: [N], of the prompts.
    """

    ids: Tensor
    lengths: Tensor


@torch.no_grad()
def continued(
    target: Llama, ids: Tensor, lengths: Tensor, drawn: Tensor, draw: torch.Generator
) -> Tensor:  # [N, L], [N], [N] -> [N, L]
    """Continue each row from its length to the end of the window, greedily.

    The first `drawn` tokens of a row's continuation are drawn from the target's distribution.
    """
    target.eval()
    rows = torch.arange(len(ids), device=ids.device)
    ids, window, last = ids.clone(), ids.shape[1], lengths - 1
    cache = target.empty_cache(len(ids), window)
    # What is written beyond a row's length is overwritten before it is read.
    hidden = target.hidden(ids[:, : int(lengths.max())], cache=cache)[rows, last]
    for step in range(window - int(lengths.min())):
        logits = target.lm_head(hidden)
        token = first_best(logits)
        if step < DRAWN:
            noise = torch.rand(logits.shape, generator=draw, device=draw.device)
            random = (logits.softmax(-1) / -noise.log()).argmax(-1)  # drawn: Gumbel's trick
            token = torch.where(step < drawn, random, token)
        # A row that has reached the end writes its last token again.
        last = (last + 1).clamp(max=window - 1)
        fits = step < window - lengths
        ids[rows, last] = torch.where(fits, token, ids[rows, last])
        hidden = target.hidden(ids[rows, last][:, None], last[:, None], cache)[:, 0]
    return ids


def make_streams(
    target: Llama,
    text: Tensor,
    *,
    longest: int,
    tokens: int,
    count: int,
    seed: int,
    batch: int = 8192,
    heard: Callable[[int], None] = lambda _: None,
) -> list[Streams]:
    """Return windows for prompts of 1 to `longest` tokens, in buckets of BUCKET lengths.

    text: [N], the learned files in one row. Each window has at least `tokens` greedy ones after
    its prompt; `count` windows a bucket are made, and most of those that end in a loop left out.
    `heard` gets the number of windows made so far, batch by batch.
    """
    draw = torch.Generator(text.device).manual_seed(seed)
    buckets, made = [], 0
    for most in range(BUCKET, longest + BUCKET, BUCKET):
        parts = []
        for start in range(0, count, batch):
            size = (min(batch, count - start),)
            window = most + tokens
            if len(text) < window:
                raise ValueError(
                    f"expected at least {window} tokens to learn, found {len(text)}: name more text"
                )
            whole = torch.randint(
                most - BUCKET + 1, most + 1, size, generator=draw, device=text.device
            )
            odd = torch.arange(size[0], device=text.device) % 2
            drawn = torch.minimum(odd * DRAWN, whole - 1)
            places = torch.randint(len(text) - window + 1, size, generator=draw, device=text.device)
            ids = text[places[:, None] + torch.arange(window, device=text.device)]
            ids = continued(target, ids, whole - drawn, drawn, draw)
            ends = ids[:, -tokens:].tolist()
            loop = [loops(tuple(end)) for end in ends]
            kept = [not looped or i % LOOPS_KEPT == 0 for i, looped in enumerate(loop)]
            chosen = torch.tensor(kept, device=text.device)
            parts.append((ids[chosen], whole[chosen]))
            made += size[0]
            heard(made)
        buckets.append(Streams(*(torch.cat(part) for part in zip(*parts, strict=True))))
    return buckets
