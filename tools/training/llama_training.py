"""The training loop of llama-pico: windows of one long stream of tokens, AdamW, a cosine."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import Progress
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import SourceFile
from training.llama import Llama

WARMUP_STEPS = 200
MEASURED_STEPS = 100  # what the time of a step is measured on, after as many to warm up
LAST_RATE = 0.02  # of the highest
GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside text, tokenizer and machine.

    minutes: where the epochs asked for would take longer, the schedule is shortened to fit;
    None asks for all of them.
    """

    seed: int
    epochs: int
    batch_size: int
    window: int
    learning_rate: float
    weight_decay: float
    dropout: float
    minutes: float | None = None


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch: steps so far, of how many, and the held-out perplexity."""

    number: int
    step: int
    steps: int
    loss: float
    perplexity: float


def token_stream(tokenizer: Tokenizer, files: list[SourceFile], end: int) -> Tensor:  # -> [N]
    """Return the files' tokens in one row, each file between two ends of text."""
    ids = [end]
    for encoding in tokenizer.encode_batch([file.text for file in files]):
        ids += [*encoding.ids, end]
    return torch.tensor(ids)


@torch.no_grad()
def perplexity(model: Llama, stream: Tensor, window: int) -> float:
    """Return exp of the mean negative log-likelihood of all but the first token of a stream [N].

    The stream is cut into windows; each token is predicted once, from those before it in its
    window. Everything is computed in fp32, without dropout.
    """
    model.eval()
    total = 0.0
    whole = (len(stream) - 1) // window * window
    inputs, targets = stream[:-1], stream[1:]
    batches = list(
        zip(
            inputs[:whole].view(-1, window).split(16),
            targets[:whole].view(-1, window).split(16),
            strict=True,
        )
    )
    if whole < len(inputs):
        batches.append((inputs[None, whole:], targets[None, whole:]))
    for ids, wanted in batches:
        loss = F.cross_entropy(model(ids).flatten(0, 1), wanted.flatten(), reduction="sum")
        total += float(loss)
    return math.exp(total / len(targets))


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Return the rate of a step: a linear rise, then a cosine down to LAST_RATE of the highest."""
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return highest * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return highest * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2)


def train(
    model: Llama, stream: Tensor, held_out: Tensor, recipe: Recipe, progress: Progress
) -> Iterator[Epoch]:
    """Train in place and yield after every epoch; streams and model lie on one device.

    fp32 weights, with bf16 products on a GPU. Every epoch cuts the stream at another offset and
    takes the windows in another order.
    """
    device = stream.device
    draw = torch.Generator().manual_seed(recipe.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    reach = torch.arange(recipe.window + 1, device=device)
    per_epoch = (len(stream) - 1) // recipe.window // recipe.batch_size
    if per_epoch == 0:
        raise ValueError(
            f"expected at least {recipe.batch_size * recipe.window + 1} tokens to learn, found "
            f"{len(stream)}: lower --batch-size or --window, or name more text"
        )
    step, steps, started = 0, recipe.epochs * per_epoch, 0.0
    task = progress.add_task("training", total=steps)
    for number in range(1, recipe.epochs + 1):
        model.train()
        loss = torch.zeros(())
        offset = int(torch.randint(recipe.window, (), generator=draw))
        starts = torch.arange(offset, len(stream) - recipe.window, recipe.window)
        starts = starts[torch.randperm(len(starts), generator=draw)].to(device)
        for batch in starts.split(recipe.batch_size)[:per_epoch]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, recipe.learning_rate)
            windows = stream[batch[:, None] + reach]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(windows[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimizer.step()
            step += 1
            if step in (MEASURED_STEPS, 2 * MEASURED_STEPS):
                float(loss.detach())  # waits for the device
                now = time.monotonic()
                if step == 2 * MEASURED_STEPS and recipe.minutes is not None:
                    affordable = int(recipe.minutes * 60 * MEASURED_STEPS / (now - started))
                    steps = min(steps, max(step, affordable))
                    progress.update(task, total=steps)
                started = now
            progress.update(task, completed=step)
            if step >= steps:
                break
        unseen = perplexity(model, held_out, recipe.window)
        yield Epoch(number, step, steps, float(loss.detach()), unseen)
        if step >= steps:
            return
