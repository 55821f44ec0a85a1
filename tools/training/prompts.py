"""Choose prompts from held-out files so that the greedy streams visit many contexts.

A greedy model that sees four tokens falls into a loop as soon as four tokens come back. So every
candidate is run, and the prompts are taken whose streams go longest without a loop and add the most
contexts not yet visited.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import SourceFile

# Prompt lengths in tokens: shorter than the context, about as long, and much longer.
LENGTH_CLASSES = (range(1, 4), range(4, 9), range(9, 21), range(21, 41))
CANDIDATES_PER_CLASS = 2500
# What each distinct context of a stream is worth beside one not yet visited. More gives fewer loops
# and more streams that run into each other.
OWN_CONTEXT_WEIGHT = 2
CONTEXT_SIZE = 4

Context = tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A piece of a held-out file, its tokens, and where it stands (path:line)."""

    text: str
    source: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Stream:
    """Greedy tokens and, for each, the context that chose it (newest token first)."""

    tokens: tuple[int, ...]
    contexts: tuple[Context, ...]


def candidates(tokenizer: Tokenizer, files: list[SourceFile], seed: int) -> list[list[Prompt]]:
    """Cut prompts at the starts of lines, for each class of lengths; all texts are distinct."""
    draw = random.Random(seed)
    places = [(file, number) for file in files for number in range(len(file.text.splitlines(True)))]
    classes = []
    taken: set[str] = set()
    for lengths in LENGTH_CLASSES:
        found: list[Prompt] = []
        for file, number in draw.sample(places, len(places)):
            if len(found) == CANDIDATES_PER_CLASS:
                break
            lines = file.text.splitlines(True)[number : number + max(lengths)]
            if not lines[0].strip():
                continue
            ids = tokenizer.encode("".join(lines)).ids[: draw.choice(lengths)]
            text = tokenizer.decode(ids, skip_special_tokens=False)
            # Cut inside a character or a word, the text may read back as other tokens.
            if text.strip() and text not in taken and tokenizer.encode(text).ids == ids:
                taken.add(text)
                found.append(Prompt(text, f"{file.path}:{number + 1}", tuple(ids)))
        classes.append(found)
    return classes


@torch.no_grad()
def greedy_streams(
    model: Callable[[Tensor], Tensor], prompts: list[tuple[int, ...]], max_tokens: int, *, pad: int
) -> list[Stream]:
    """Continue every prompt greedily in plain torch, with logits rounded to bf16.

    Good enough to choose prompts; the bits that count come from the reference.
    """
    rows = [([pad] * CONTEXT_SIZE + list(ids))[-CONTEXT_SIZE:][::-1] for ids in prompts]
    contexts = torch.tensor(rows)
    seen, chosen = [], []
    for _ in range(max_tokens):
        logits = model(contexts).to(torch.bfloat16).float()
        best = logits == logits.amax(1, keepdim=True)
        token = best.int().argmax(1)  # all ties are 1; the lowest id is the first of them
        seen.append(contexts)
        chosen.append(token)
        contexts = torch.cat([token[:, None], contexts[:, :-1]], dim=1)
    return [
        Stream(tuple(tokens), tuple(tuple(context) for context in visited))
        for tokens, visited in zip(
            torch.stack(chosen, 1).tolist(), torch.stack(seen, 1).tolist(), strict=True
        )
    ]


def loop_count(streams: list[Stream]) -> int:
    """Return how many streams meet a context twice, and so repeat themselves for ever."""
    return sum(len(set(stream.contexts)) < len(stream.contexts) for stream in streams)


def choose_prompts(
    model: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    files: list[SourceFile],
    *,
    count: int,
    max_tokens: int,
    seed: int,
    pad: int = 0,
) -> list[Prompt]:
    """Take, from each class of lengths in turn, the prompt whose stream is worth most.

    A stream is worth its contexts not yet visited plus OWN_CONTEXT_WEIGHT times all its distinct
    contexts; the first candidate wins a tie. Raises ValueError when the candidates run out.
    """
    pools = []
    for found in candidates(tokenizer, files, seed):
        streams = greedy_streams(model, [prompt.ids for prompt in found], max_tokens, pad=pad)
        pools.append(
            [(prompt, set(stream.contexts)) for prompt, stream in zip(found, streams, strict=True)]
        )
    visited: set[Context] = set()
    chosen: list[Prompt] = []
    while len(chosen) < count:
        pool = pools[len(chosen) % len(pools)]
        if not pool:
            raise ValueError(
                f"expected {count} prompts, the held-out files gave {len(chosen)}: "
                "ask for fewer or hold out more"
            )
        worth = [len(own - visited) + OWN_CONTEXT_WEIGHT * len(own) for _, own in pool]
        best = pool[worth.index(max(worth))]
        pool.remove(best)
        visited |= best[1]
        chosen.append(best[0])
    return chosen


def write_prompts(path: Path, suite: str, prompts: list[Prompt]) -> None:
    """Write one JSON object a line: id (the suite's name and a number), text, source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": f"{suite}-{i:02d}", "text": prompt.text, "source": prompt.source})
        for i, prompt in enumerate(prompts)
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
