"""TokenStream: the tokens of every prompt, and the exact bits they follow from, as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitassay.golden.errors import GoldenError
from bitassay.golden.streams.arrays import (
    Table,
    present,
    refuse,
    require_names,
    require_shapes,
    require_within,
)
from bitassay.golden.streams.drafts import DRAFT_ARRAYS, DraftStream, drafts_from_parts
from bitassay.golden.streams.token_lists import prompt_lists, token_lists

TOP = 8  # logits kept per row

# N ids of all prompts, S prompts, T steps, K kept logits, O operations.
ARRAYS: Table = {
    "prompt_ids": ("<i4", ("N",)),
    "prompt_offsets": ("<i8", ("S+1",)),
    "tokens": ("<i4", ("S", "T")),
    "top_ids": ("<i4", ("S", "T", "K")),
    "top_bits": ("<u4", ("S", "T", "K")),
    "margins": ("<i8", ("S", "T")),
    "fingerprints": ("<u8", ("S", "T", "O")),
    "prompt_fingerprints": ("<u8", ("S", "O")),
}
# What the arrays mean: names of operations and prompts, dtype of the logits, vocabulary.
LABELS = ("operations", "prompt_names", "logits_dtype", "vocab_size")
# Also of what streams with drafts have.
ALL_ARRAYS = ARRAYS | DRAFT_ARRAYS
# As in reference.spec.dtypes, which imports torch; a store is listed and shown without it.
_LOGIT_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
_STREAM = "token stream"


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenStream:
    """The streams of S prompts and T steps; raises GoldenError when the arrays do not fit.

    prompt_ids [N] int32 and prompt_offsets [S+1] int64: prompt s is ids[offsets[s]:offsets[s+1]].
    tokens [S, T] int32. top_ids [S, T, 8] int32 and top_bits [S, T, 8] uint32: the highest logits,
    their stored bits zero-extended. margins [S, T] int64: first minus second, in ulps of
    logits_dtype. fingerprints [S, T, O] uint64: one per operation's row;
    prompt_fingerprints [S, O] uint64: the prompt's rows folded. drafts: of suites with a draft
    head.

    None is what is absent: a golden has every array, another engine's run perhaps its tokens alone
    (`of_tokens`). operations: those that there are fingerprints of, in running order; some of the
    model's, or all. They and logits_dtype are needed only where an array depends on them.
    """

    prompt_ids: NDArray[np.int32]
    prompt_offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    top_ids: NDArray[np.int32] | None = None
    top_bits: NDArray[np.uint32] | None = None
    margins: NDArray[np.int64] | None = None
    fingerprints: NDArray[np.uint64] | None = None
    prompt_fingerprints: NDArray[np.uint64] | None = None
    operations: tuple[str, ...] | None = None
    prompt_names: tuple[str, ...]
    logits_dtype: str | None = None
    vocab_size: int
    drafts: DraftStream | None = None

    @classmethod
    def of_tokens(
        cls,
        prompts: Iterable[Iterable[int]],
        tokens: Iterable[Iterable[int]],
        *,
        vocab_size: int,
        names: Sequence[str] | None = None,
    ) -> TokenStream:
        """Return the stream of an engine that gives tokens and nothing else.

        prompts: the token ids of each prompt, at least one. tokens: the ids generated after each,
        equally many for all. vocab_size: number of the model's ids. names: of the prompts, no two
        the same; "prompt 0" and so on unless given. Lists or arrays of integers. Other arrays can
        be added with dataclasses.replace. Raises GoldenError naming the prompt that does not fit.
        """
        ids, names = prompt_lists(prompts, names, vocab_size)
        arrays: dict[str, Any] = ragged(ids)
        arrays["tokens"] = np.array(token_lists(tokens, names, vocab_size), dtype="<i4")
        return cls(**arrays, prompt_names=names, vocab_size=vocab_size)

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_values(self)
        if self.drafts is not None:
            self.drafts.require_fits(len(self.prompt_names), self.steps, self.vocab_size)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that are there by name, in the order of ALL_ARRAYS."""
        return present(self, ARRAYS) | (self.drafts.arrays if self.drafts else {})

    @property
    def labels(self) -> dict[str, Any]:
        """What the arrays mean, by name; without what is not known."""
        return present(self, LABELS) | (self.drafts.labels if self.drafts else {})

    def required(self, name: str) -> NDArray[Any]:
        """Return the array of that name, drafts aside; GoldenError when it is absent."""
        array: NDArray[Any] | None = getattr(self, name)
        if array is None:
            refuse(_STREAM, name, "the array", "none")
        return array

    def require_whole(self) -> None:
        """Raise GoldenError unless every array is there, as in a golden; drafts may be none."""
        for name in ARRAYS:
            self.required(name)
        if self.drafts is not None:
            self.drafts.require_whole()

    @property
    def steps(self) -> int:
        """Tokens generated for each prompt."""
        return int(self.tokens.shape[1])

    @property
    def logit_width(self) -> int:
        """Bits of one logit; GoldenError where their dtype is not known."""
        if self.logits_dtype not in _LOGIT_BITS:
            refuse(_STREAM, "logits_dtype", f"one of {', '.join(_LOGIT_BITS)}", self.logits_dtype)
        return _LOGIT_BITS[self.logits_dtype]

    @property
    def distinct_rows(self) -> int:
        """How many different rows of logits there are: repeated contexts test nothing new."""
        return int(np.unique(self.required("fingerprints")[:, :, -1]).size)

    def prompt(self, s: int) -> list[int]:
        """Return the token ids of prompt s."""
        start, end = self.prompt_offsets[s : s + 2]
        return [int(i) for i in self.prompt_ids[start:end]]

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of every prompt."""
        return [self.prompt(s) for s in range(len(self.prompt_names))]

    def first(self, count: int | None = None, steps: int | None = None) -> TokenStream:
        """Return the first `count` streams, and of each the first `steps` tokens; None is all."""
        count = len(self.prompt_names) if count is None else count
        steps = self.steps if steps is None else steps
        for asked, whole, what in (
            (count, len(self.prompt_names), "prompts"),
            (steps, self.steps, "tokens"),
        ):
            if not 1 <= asked <= whole:
                raise GoldenError(f"asked for {asked} {what}: expected 1 to {whole}, which is all")
        cut = {
            name: array[:count, :steps] if "T" in ARRAYS[name][1] else array[:count]
            for name, array in present(self, ARRAYS).items()
        }
        cut["prompt_ids"] = self.prompt_ids[: self.prompt_offsets[count]]
        cut["prompt_offsets"] = self.prompt_offsets[: count + 1]
        drafts = self.drafts.first(count, steps) if self.drafts else None
        return replace(self, **cut, prompt_names=self.prompt_names[:count], drafts=drafts)


def take(stream: TokenStream, chosen: list[int]) -> TokenStream:
    """Return the streams of some prompts, by number, in the order given; it may come twice."""
    values: dict[str, Any] = {
        name: array[chosen]
        for name, array in present(stream, ARRAYS).items()
        if ARRAYS[name][1][0] == "S"
    }
    values |= ragged([stream.prompt(s) for s in chosen])
    names: list[str] = []
    for name in (stream.prompt_names[s] for s in chosen):
        names.append(f"{name} again" if name in names else name)
    drafts = stream.drafts.take(chosen) if stream.drafts else None
    return replace(stream, **values, prompt_names=tuple(names), drafts=drafts)


def from_parts(arrays: dict[str, NDArray[Any]], labels: dict[str, Any]) -> TokenStream:
    """Return the stream whose `arrays` and `labels` these are, lists in place of tuples or not.

    What is absent in them is absent in the stream; GoldenError where it may not be.
    """
    named = {key: tuple(x) if isinstance(x, list) else x for key, x in labels.items()}
    parts: dict[str, Any] = arrays | named
    own = {name: parts[name] for name in (*ARRAYS, *LABELS) if parts.get(name) is not None}
    for name in ("prompt_ids", "prompt_offsets", "tokens", "prompt_names", "vocab_size"):
        if name not in own:
            refuse(_STREAM, name, "one in every stream", "none")
    return TokenStream(**own, drafts=drafts_from_parts(parts))


def ragged(prompts: list[list[int]]) -> dict[str, NDArray[Any]]:
    """Return prompt_ids and prompt_offsets of prompts given as lists."""
    offsets = np.cumsum([0, *map(len, prompts)], dtype="<i8")
    ids = np.array([i for prompt in prompts for i in prompt], dtype="<i4")
    return {"prompt_ids": ids, "prompt_offsets": offsets}


def _check_shapes(stream: TokenStream) -> None:
    if stream.tokens.ndim != 2 or stream.tokens.shape[1] < 1:
        refuse(_STREAM, "tokens", "shape [S, T], T at least 1", list(stream.tokens.shape))
    prompts, steps = stream.tokens.shape
    operations: tuple[str, ...] = ()
    if stream.fingerprints is not None or stream.prompt_fingerprints is not None:
        operations = require_names(_STREAM, "operations", stream.operations)
    sizes = {"S": prompts, "S+1": prompts + 1, "T": steps, "K": TOP, "O": len(operations)}
    sizes["N"] = stream.prompt_ids.size
    require_shapes(_STREAM, present(stream, ARRAYS), ARRAYS, sizes)
    names = len(set(stream.prompt_names))
    if len(stream.prompt_names) != prompts or names != prompts:
        refuse(_STREAM, "prompt_names", f"{prompts} different names", names)


def _check_values(stream: TokenStream) -> None:
    offsets, ids = stream.prompt_offsets, stream.prompt_ids.size
    if offsets[0] != 0 or offsets[-1] != ids or (np.diff(offsets) < 1).any():
        refuse(_STREAM, "prompt_offsets", f"rising from 0 to {ids}", offsets.tolist())
    for name, array in present(stream, ("prompt_ids", "tokens", "top_ids")).items():
        require_within(_STREAM, name, array, 0, stream.vocab_size - 1, "an id within ")
    bits, margins = stream.top_bits, stream.margins
    if stream.logits_dtype is None and bits is None and margins is None:
        return  # nothing depends on it
    width = stream.logit_width
    if bits is not None and (bits >> np.uint32(width - 1) > 1).any():
        refuse(_STREAM, "top_bits", f"{width}-bit patterns", hex(int(bits.max())))
    if margins is not None and (margins < 0).any():
        refuse(_STREAM, "margins", "0 or more ulps", int(margins.min()))


# The dataclass and the tables above must not drift apart.
assert (*ARRAYS, *LABELS, "drafts") == tuple(f.name for f in fields(TokenStream))
