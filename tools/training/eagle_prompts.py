"""Choose eagle-pico's prompts: groups that share a prefix, and lengths around blocks of 16.

A prefix cache hands on whole blocks of 16 tokens, so prefixes end at the end of a block, within
one, or with the prompt itself. As for llama-pico, those candidates are taken whose greedy streams
do not loop and vary most.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer

from training.corpus import SourceFile
from training.llama import Llama
from training.llama_prompts import OWN_GRAM_WEIGHT, Tokens, grams, greedy_streams, loops
from training.llama_prompts import choose_prompts as choose_apart
from training.prompts import Prompt


@dataclass(frozen=True)
class Group:
    """Prompts of these lengths in tokens that share their first `prefix` tokens, and no more."""

    prefix: int
    lengths: tuple[int, ...]


GROUPS = (
    Group(48, (48, 49, 64, 112)),
    Group(32, (32, 33, 47, 90)),
    Group(64, (66, 80, 81, 128)),
    Group(96, (97, 100, 112, 160)),
    Group(128, (128, 129, 144, 220)),
    Group(40, (41, 45, 56, 72)),
)
# A quick check takes the first 8 prompts: these, then the first group.
FIRST_LENGTHS = (1, 17, 130, 16)
OTHER_LENGTHS = (
    *(2, 3, 4, 6, 8, 10, 12, 14, 15, 15, 16, 17, 18, 20, 24, 28, 31, 32, 33, 36, 47, 48, 50),
    *(63, 64, 66, 72, 79, 96, 100, 111, 127, 150, 176, 192, 200),
)
PREFIXES = 24
TAILS = 200
CANDIDATES_PER_LENGTH = 24
PIECE_LENGTHS = (1, 4, 10, 16, 25, 40, 60, 80, 110, 140, 180, 220)

Hearing = Callable[[list[Tokens]], None]


class Pieces:
    """Pieces of held-out files, cut at starts of lines in an order drawn from a seed."""

    def __init__(self, tokenizer: Tokenizer, files: list[SourceFile], seed: int) -> None:
        self.tokenizer = tokenizer
        self.lines = {file.path: file.text.splitlines(True) for file in files}
        self.draw = random.Random(seed)
        self.places = [
            (path, number) for path, those in self.lines.items() for number in range(len(those))
        ]

    def of(
        self, length: int, count: int, fits: Callable[[Prompt], bool] = lambda _: True
    ) -> list[Prompt]:
        """Return pieces of `length` tokens that fit, with distinct texts.

        Raises ValueError when the files have fewer.
        """
        found: dict[str, Prompt] = {}
        for path, number in self.draw.sample(self.places, len(self.places)):
            lines = self.lines[path][number : number + length]
            if not lines[0].strip():
                continue
            ids = self.encoded("".join(lines))[:length]
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            piece = Prompt(text, f"{path}:{number + 1}", tuple(ids))
            # Cut inside a character or a word, the text may read back as other tokens.
            if len(ids) == length and self.encoded(text) == ids and text.strip() and fits(piece):
                found.setdefault(text, piece)
                if len(found) == count:
                    return list(found.values())
        raise ValueError(
            f"expected {count} pieces of {length} tokens, the held-out files gave {len(found)}: "
            "ask for other lengths or hold out more"
        )

    def encoded(self, text: str) -> list[int]:
        """Return a text's tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def joined(self, prefix: Prompt, tail: Prompt, length: int) -> Prompt | None:
        """Return a prefix and what fits of a tail as one prompt of `length` tokens.

        None where it would read back as other tokens.
        """
        ids = [*prefix.ids, *tail.ids][:length]
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        if len(ids) < length or self.encoded(text) != ids:
            return None
        return Prompt(text, f"{prefix.source} + {tail.source}", tuple(ids))


def begins(piece: Prompt) -> bool:
    """Return whether a piece begins where a line does, without indentation."""
    return not piece.text[0].isspace()


def held_out_pieces(
    tokenizer: Tokenizer, files: list[SourceFile], each: int, seed: int
) -> list[Prompt]:
    """Return `each` pieces of every length of PIECE_LENGTHS, whatever streams they give."""
    pieces = Pieces(tokenizer, files, seed)
    return [piece for length in PIECE_LENGTHS for piece in pieces.of(length, each)]


def choose_prompts(
    target: Llama,
    tokenizer: Tokenizer,
    files: list[SourceFile],
    *,
    max_tokens: int,
    seed: int,
    heard: Hearing = lambda _: None,
) -> list[Prompt]:
    """Return the prompts in the order of the file; `heard` gets the streams of every batch.

    Raises ValueError when the held-out files give too few.
    """
    pieces = Pieces(tokenizer, files, seed)
    seen: set[Tokens] = set()
    groups = [
        choose_group(target, pieces, group, max_tokens=max_tokens, seen=seen, heard=heard)
        for group in GROUPS
    ]
    rest = list(OTHER_LENGTHS)
    pieces.draw.shuffle(rest)
    apart = choose_apart(
        *(target, tokenizer, files, [*FIRST_LENGTHS, *rest]),
        max_tokens=max_tokens,
        seed=seed,
        heard=heard,
    )
    first, others = apart[: len(FIRST_LENGTHS)], apart[len(FIRST_LENGTHS) :]
    others += itertools.chain.from_iterable(groups[1:])
    pieces.draw.shuffle(others)
    return [*first, *groups[0], *others]


def choose_group(
    target: Llama,
    pieces: Pieces,
    group: Group,
    *,
    max_tokens: int,
    seen: set[Tokens],
    heard: Hearing = lambda _: None,
) -> list[Prompt]:
    """Take a prefix, and for each length in turn the prompt whose stream is worth most.

    Worth is that of `llama_prompts.choose_prompts`; seen: the 4-grams of prompts taken before,
    to which these streams' are added. Tails begin with tokens of their own.
    """
    bare = group.prefix in group.lengths
    # After a line's end, a line without indentation reads back as the very same tokens.
    marker = pieces.encoded("x")
    prefixes = pieces.of(
        group.prefix,
        PREFIXES if bare else 1,
        lambda p: p.text.endswith("\n") and pieces.encoded(p.text + "x") == [*p.ids, *marker],
    )
    prefix = prefixes[0]
    if bare:  # the prefix is a prompt itself
        streams = greedy_streams(target, [p.ids for p in prefixes], max_tokens)
        heard(streams)
        prefix = prefixes[_best(streams, seen)]
    tails = pieces.of(max(group.lengths) - group.prefix, TAILS, begins)
    pools = [_candidates(pieces, prefix, tails, length) for length in group.lengths]
    streams = greedy_streams(target, [p.ids for pool in pools for p in pool], max_tokens)
    heard(streams)
    stream_of = dict(zip((p.ids for pool in pools for p in pool), streams, strict=True))
    chosen: list[Prompt] = []
    for pool in pools:
        apart = {p.ids[group.prefix] for p in chosen if len(p.ids) > group.prefix}
        free = [p for p in pool if p is prefix or p.ids[group.prefix] not in apart]
        if not free:
            raise ValueError(
                f"expected a prompt of {len(pool[0].ids)} tokens that leaves the others at token "
                f"{group.prefix}, found none: raise TAILS or hold out more"
            )
        own = [stream_of[p.ids] for p in free]
        i = _best(own, seen)
        chosen.append(free[i])
        seen |= grams(own[i])
    return chosen


def _best(streams: list[Tokens], seen: set[Tokens]) -> int:
    """Return which stream is worth most beside the 4-grams seen: the first one in a tie."""
    worth = [
        (not loops(stream), len(own - seen) + OWN_GRAM_WEIGHT * len(own))
        for stream, own in ((stream, grams(stream)) for stream in streams)
    ]
    return worth.index(max(worth))


def _candidates(pieces: Pieces, prefix: Prompt, tails: list[Prompt], length: int) -> list[Prompt]:
    """Return prompts of this length that begin with the prefix; at least one."""
    if length == len(prefix.ids):
        return [prefix]
    found: dict[Tokens, Prompt] = {}
    for tail in tails:
        prompt = pieces.joined(prefix, tail, length)
        if prompt is not None:
            found.setdefault(prompt.ids, prompt)
        if len(found) == CANDIDATES_PER_LENGTH:
            break
    if not found:
        raise ValueError(
            f"expected a prompt of {length} tokens after a prefix of {len(prefix.ids)}, found no "
            "piece that reads back: ask for other lengths or hold out more"
        )
    return list(found.values())
