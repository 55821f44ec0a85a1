"""Choose llama-pico's prompts: lengths where kernels change their ways, streams that vary.

Keys are processed in blocks of 64 and cached in blocks of 16, so lengths crowd around such
multiples. Of many pieces of held-out files of the wanted length, those are taken whose greedy
streams do not loop and add the most 4-grams of tokens not yet seen in the suite.
"""

import random
from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import SourceFile
from training.llama import Llama
from training.prompts import Prompt

# A quick check takes the first 8 prompts, so every kind of length is among them.
FIRST_LENGTHS = (1, 65, 16, 130, 7, 33, 64, 17)
OTHER_LENGTHS = (
    *(1, 2, 3, 4, 5, 6, 8, 9, 10, 13),
    *(15, 15, 16, 16, 17, 18, 20, 24, 28, 31, 32, 36, 40, 47, 48, 49, 52, 56),
    *(63, 63, 64, 64, 65, 65, 66, 66, 72, 80, 81, 96, 100, 112),
    *(127, 128, 128, 129, 129, 160, 192, 193, 200, 255, 256, 257, 258, 300),
)
CANDIDATES_PER_PROMPT = 32
# What each distinct 4-gram of a stream is worth beside one that is new to the suite.
OWN_GRAM_WEIGHT = 2
GRAM = 4
LOOP_REPEATS = 3
BATCH = 64

Tokens = tuple[int, ...]


def prompt_lengths(seed: int) -> list[int]:
    """Return the length in tokens of every prompt, in the order of the file."""
    rest = list(OTHER_LENGTHS)
    random.Random(seed).shuffle(rest)
    return [*FIRST_LENGTHS, *rest]


def candidates(
    tokenizer: Tokenizer, files: list[SourceFile], lengths: list[int], seed: int
) -> dict[int, list[Prompt]]:
    """Cut pieces of each length from starts of lines; all texts are distinct.

    Only a text that reads back as the very same tokens is taken: cut inside a word or a character,
    it may not.
    """
    draw = random.Random(seed)
    lines = {file.path: file.text.splitlines(True) for file in files}
    places = [(path, number) for path, those in lines.items() for number in range(len(those))]
    taken: set[str] = set()
    pools: dict[int, list[Prompt]] = {}
    for length in sorted(set(lengths)):
        pool = pools.setdefault(length, [])
        for path, number in draw.sample(places, len(places)):
            if len(pool) == CANDIDATES_PER_PROMPT * lengths.count(length):
                break
            piece = lines[path][number : number + length]
            if not piece[0].strip():
                continue
            ids = tokenizer.encode("".join(piece), add_special_tokens=False).ids[:length]
            text = tokenizer.decode(ids, skip_special_tokens=False)
            again = tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) == length and again == ids and text.strip() and text not in taken:
                taken.add(text)
                pool.append(Prompt(text, f"{path}:{number + 1}", tuple(ids)))
    return pools


def first_best(logits: Tensor) -> Tensor:  # [B, V] -> [B]
    """Return the lowest id among the highest logits once rounded to bf16."""
    rounded = logits.to(torch.bfloat16).float()
    best = rounded == rounded.amax(1, keepdim=True)
    return best.int().argmax(1)  # all ties are 1; argmax names the first of them


@torch.no_grad()
def greedy_streams(model: Llama, prompts: list[Tokens], max_tokens: int) -> list[Tokens]:
    """Continue every prompt greedily, in fp32 with logits rounded to bf16.

    Prompts of any lengths share a batch. Good enough to choose prompts; the bits that count come
    from the reference.
    """
    model.eval()
    longest = max(len(ids) for ids in prompts)
    device = model.lm_head.weight.device
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=device)
    # Padding on the right is written to slots that real tokens overwrite before they are read.
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in prompts]
    ids = torch.tensor(padded, device=device)
    cache = model.empty_cache(len(prompts), longest + max_tokens)
    rows = model.hidden(ids, cache=cache)[torch.arange(len(prompts), device=device), last]
    chosen = []
    for _ in range(max_tokens):
        token = first_best(model.lm_head(rows))
        chosen.append(token)
        last = last + 1
        rows = model.hidden(token[:, None], last[:, None], cache)[:, 0]
    return [tuple(stream) for stream in torch.stack(chosen, 1).tolist()]


def loops(stream: Tokens) -> bool:
    """Return whether a stream ends in the same tokens LOOP_REPEATS times or more."""
    for period in range(1, len(stream) // LOOP_REPEATS + 1):
        tail = stream[-LOOP_REPEATS * period :]
        if tail[period:] == tail[:-period]:
            return True
    return False


def grams(stream: Tokens) -> set[Tokens]:
    """Return the distinct runs of GRAM tokens in a stream."""
    return {stream[i : i + GRAM] for i in range(len(stream) - GRAM + 1)}


def choose_prompts(
    model: Llama,
    tokenizer: Tokenizer,
    files: list[SourceFile],
    lengths: list[int],
    *,
    max_tokens: int,
    seed: int,
    heard: Callable[[list[Tokens]], None] = lambda _: None,
) -> list[Prompt]:
    """Take for each length in turn the candidate whose stream is worth most.

    A stream is worth its 4-grams that are new to the suite plus OWN_GRAM_WEIGHT times all its
    distinct ones; one that loops comes after all that do not; the first candidate wins a tie.
    `heard` gets the streams of every batch. Raises ValueError when there are too few.
    """
    pools: dict[int, list[tuple[Prompt, bool, set[Tokens]]]] = {}
    for length, found in candidates(tokenizer, files, lengths, seed).items():
        pools[length] = []
        for start in range(0, len(found), BATCH):
            part = found[start : start + BATCH]
            streams = greedy_streams(model, [prompt.ids for prompt in part], max_tokens)
            pools[length] += [
                (prompt, not loops(stream), grams(stream))
                for prompt, stream in zip(part, streams, strict=True)
            ]
            heard(streams)
    seen: set[Tokens] = set()
    chosen = []
    for length in lengths:
        pool = pools[length]
        if not pool:
            raise ValueError(
                f"expected {lengths.count(length)} prompts of {length} tokens, the held-out files "
                "gave fewer: ask for other lengths or hold out more"
            )
        worth = [(goes, len(own - seen) + OWN_GRAM_WEIGHT * len(own)) for _, goes, own in pool]
        prompt, _, own = pool.pop(worth.index(max(worth)))
        seen |= own
        chosen.append(prompt)
    return chosen
