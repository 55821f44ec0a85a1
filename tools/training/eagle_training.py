"""The training loop of eagle-pico: the target's distribution, foreseen from first pass and chains.

A chain row is fed with the head's own hidden rows, as when drafting, and counts where the drafts
before it were right: where one is wrong, no later one is ever accepted.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from training.eagle_head import EagleHead, shifted
from training.eagle_streams import Streams
from training.llama import Llama
from training.llama_training import GRADIENT_NORM, MEASURED_STEPS, learning_rate


@dataclass(frozen=True)
class EagleRecipe:
    """What decides the weights, beside target, streams and machine.

    depth: first pass and chain rows that are learned. text_weight: what a row within a prompt
    counts beside one of a greedy stream. hidden_weight: of the distance to the target's next
    hidden row, beside the cross-entropy. minutes: as in `llama_training.Recipe`. report: steps
    between two reports.
    """

    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    depth: int
    text_weight: float
    hidden_weight: float
    minutes: float | None = None
    report: int = 1000


def loss(
    target: Llama, head: EagleHead, ids: Tensor, lengths: Tensor, recipe: EagleRecipe
) -> tuple[Tensor, Tensor]:  # [B, L], [B] -> [], [depth]
    """Return the loss of a batch, and for each draft how often it and those before it are right.

    Row p stands for the token p + 2. Its target is the target's whole distribution there.
    """
    with torch.no_grad():
        rows = target.hidden(ids)
        wanted = target.lm_head(rows[:, 1:]).float().softmax(-1)
        embedded = target.model["embed_tokens"](ids[:, 1:])
    T = ids.shape[1] - 1
    place = torch.arange(T, device=ids.device)
    greedy = place >= lengths[:, None] - 1  # rows from the prompt's last token on
    weights = torch.where(greedy, 1.0, recipe.text_weight)
    all_weights = weights.sum()
    total = torch.zeros((), device=ids.device)
    right = []
    for depth, out in enumerate(head(embedded, rows[:, :-1], recipe.depth)):
        weights = torch.where(place >= depth, weights, 0)
        logits = target.lm_head(out).float()
        entropy = F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(0, 1), reduction="none"
        ).view_as(weights)
        distance = F.smooth_l1_loss(out.float(), rows[:, 1:].float(), reduction="none").mean(-1)
        total = total + ((entropy + recipe.hidden_weight * distance) * weights).sum()
        # The last row's token lies beyond the window.
        matches = logits[:, :-1].argmax(-1) == ids[:, 2:]
        weights = torch.where(F.pad(matches, (0, 1)), weights, 0)
        right.append((weights > 0)[greedy].sum() / greedy.sum())
        weights = shifted(weights, 1)
    return total / all_weights, torch.stack(right)


def train(
    target: Llama, head: EagleHead, buckets: list[Streams], recipe: EagleRecipe, progress: Progress
) -> Iterator[tuple[int, int, float, list[float]]]:
    """Train in place; yield now and then step, steps, the loss, and how often drafts are right.

    All lie on one device: fp32 weights, with bf16 products on a GPU. Every batch is drawn from one
    bucket.
    """
    device = buckets[0].ids.device
    draw = torch.Generator().manual_seed(recipe.seed)
    target.requires_grad_(False).eval()
    matrices = [parameter for parameter in head.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in head.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    steps, started = recipe.steps, 0.0
    task = progress.add_task("training", total=steps)
    step = 0
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, recipe.learning_rate)
        bucket = buckets[int(torch.randint(len(buckets), (), generator=draw))]
        chosen = torch.randint(len(bucket.ids), (recipe.batch_size,), generator=draw).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value, right = loss(target, head, bucket.ids[chosen], bucket.lengths[chosen], recipe)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(head.parameters(), GRADIENT_NORM)
        optimizer.step()
        step += 1
        if step in (MEASURED_STEPS, 2 * MEASURED_STEPS):
            float(value.detach())  # waits for the device
            now = time.monotonic()
            if step == 2 * MEASURED_STEPS and recipe.minutes is not None:
                affordable = int(recipe.minutes * 60 * MEASURED_STEPS / (now - started))
                steps = min(steps, max(step, affordable))
                progress.update(task, total=steps)
            started = now
        progress.update(task, completed=step)
        if step % recipe.report == 0 or step == steps:
            yield step, steps, float(value.detach()), right.tolist()
