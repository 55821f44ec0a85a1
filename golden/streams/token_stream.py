"""TokenStream: what a model said for every prompt and step, as arrays of exact bits."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitassay.golden.errors import GoldenError
from bitassay.golden.streams.drafts import DRAFT_ARRAYS, DRAFT_LABELS, DraftStream

TOP = 8  # logits kept per row

# name -> dtype and dimensions: N ids of all prompts, S prompts, T steps, K kept logits,
# O operations. Little-endian, so that the digest is that of the same bytes everywhere.
ARRAYS: dict[str, tuple[str, tuple[str, ...]]] = {
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
_LOGIT_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The streams of S prompts and T steps; raises GoldenError when the arrays do not fit.

    prompt_ids [N] int32 and prompt_offsets [S+1] int64: prompt s is ids[offsets[s]:offsets[s+1]].
    tokens [S, T] int32. top_ids [S, T, 8] int32 and top_bits [S, T, 8] uint32: the highest logits,
    their stored bits zero-extended. margins [S, T] int64: first minus second, in ulps of
    logits_dtype. fingerprints [S, T, O] uint64: one per operation's row;
    prompt_fingerprints [S, O] uint64: the prompt's rows folded. drafts: of suites with a draft
    head.
    """

    prompt_ids: NDArray[np.int32]
    prompt_offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_bits: NDArray[np.uint32]
    margins: NDArray[np.int64]
    fingerprints: NDArray[np.uint64]
    prompt_fingerprints: NDArray[np.uint64]
    operations: tuple[str, ...]
    prompt_names: tuple[str, ...]
    logits_dtype: str
    vocab_size: int
    drafts: DraftStream | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_values(self)
        if self.drafts is not None:
            self.drafts.require_fits(len(self.prompt_names), self.steps, self.vocab_size)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, in the order of ALL_ARRAYS."""
        own = {name: getattr(self, name) for name in ARRAYS}
        return own | (self.drafts.arrays if self.drafts else {})

    @property
    def labels(self) -> dict[str, Any]:
        """What the arrays mean, by name."""
        own = {name: getattr(self, name) for name in LABELS}
        return own | ({"draft_operations": self.drafts.draft_operations} if self.drafts else {})

    @property
    def steps(self) -> int:
        """Tokens generated for each prompt."""
        return int(self.tokens.shape[1])

    @property
    def logit_width(self) -> int:
        """Bits of one logit."""
        return _LOGIT_BITS[self.logits_dtype]

    @property
    def distinct_rows(self) -> int:
        """How many different rows of logits were seen: repeated contexts test nothing new."""
        return int(np.unique(self.fingerprints[:, :, -1]).size)

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
            name: getattr(self, name)[:count, :steps]
            if "T" in dims
            else getattr(self, name)[:count]
            for name, (_, dims) in ARRAYS.items()
        }
        cut["prompt_ids"] = self.prompt_ids[: self.prompt_offsets[count]]
        cut["prompt_offsets"] = self.prompt_offsets[: count + 1]
        drafts = self.drafts.first(count, steps) if self.drafts else None
        return replace(self, **cut, prompt_names=self.prompt_names[:count], drafts=drafts)


def take(stream: TokenStream, chosen: list[int]) -> TokenStream:
    """Return the streams of some prompts, by number, in the order given; it may come twice."""
    values: dict[str, Any] = {
        name: getattr(stream, name)[chosen]
        for name, (_, dimensions) in ARRAYS.items()
        if dimensions[0] == "S"
    }
    values |= ragged([stream.prompt(s) for s in chosen])
    names: list[str] = []
    for name in (stream.prompt_names[s] for s in chosen):
        names.append(f"{name} again" if name in names else name)
    drafts = stream.drafts.take(chosen) if stream.drafts else None
    return replace(stream, **values, prompt_names=tuple(names), drafts=drafts)


def from_parts(arrays: dict[str, NDArray[Any]], labels: dict[str, Any]) -> TokenStream:
    """Return the stream whose `arrays` and `labels` these are, lists in place of tuples or not."""
    named = {key: tuple(x) if isinstance(x, list) else x for key, x in labels.items()}
    own: dict[str, Any] = {name: arrays[name] for name in ARRAYS}
    own |= {name: named[name] for name in LABELS}
    if named.keys().isdisjoint(DRAFT_LABELS):
        return TokenStream(**own)
    drafts: dict[str, Any] = {name: arrays[name] for name in DRAFT_ARRAYS}
    drafts |= {name: named[name] for name in DRAFT_LABELS}
    return TokenStream(**own, drafts=DraftStream(**drafts))


def ragged(prompts: list[list[int]]) -> dict[str, NDArray[Any]]:
    """Return prompt_ids and prompt_offsets of prompts given as lists."""
    offsets = np.cumsum([0, *map(len, prompts)], dtype="<i8")
    ids = np.array([i for prompt in prompts for i in prompt], dtype="<i4")
    return {"prompt_ids": ids, "prompt_offsets": offsets}


def _check_shapes(stream: TokenStream) -> None:
    if stream.tokens.ndim != 2 or stream.tokens.shape[1] < 1:
        _refuse("tokens", "shape [S, T], T at least 1", list(stream.tokens.shape))
    prompts, steps = stream.tokens.shape
    sizes = {"S": prompts, "S+1": prompts + 1, "T": steps, "K": TOP, "O": len(stream.operations)}
    sizes["N"] = stream.prompt_ids.size
    for name, (dtype, dims) in ARRAYS.items():
        array = getattr(stream, name)
        shape = tuple(sizes[d] for d in dims)
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            found = f"{array.dtype} {list(array.shape)}"
            _refuse(name, f"{np.dtype(dtype)} {list(shape)}", found)
    if len(stream.prompt_names) != prompts or len(set(stream.prompt_names)) != prompts:
        _refuse("prompt_names", f"{prompts} different names", len(set(stream.prompt_names)))
    if stream.logits_dtype not in _LOGIT_BITS:
        _refuse("logits_dtype", f"one of {', '.join(_LOGIT_BITS)}", stream.logits_dtype)


def _check_values(stream: TokenStream) -> None:
    offsets = stream.prompt_offsets
    if offsets[0] != 0 or offsets[-1] != stream.prompt_ids.size or (np.diff(offsets) < 1).any():
        _refuse("prompt_offsets", f"rising from 0 to {stream.prompt_ids.size}", offsets.tolist())
    for name in ("prompt_ids", "tokens", "top_ids"):
        ids = getattr(stream, name)
        outside = (ids < 0) | (ids >= stream.vocab_size)
        if outside.any():
            at = [int(i) for i in np.argwhere(outside)[0]]
            _refuse(f"{name}{at}", f"an id within 0 … {stream.vocab_size - 1}", ids[tuple(at)])
    if (stream.top_bits >> np.uint32(stream.logit_width - 1) > 1).any():
        _refuse("top_bits", f"{stream.logit_width}-bit patterns", hex(int(stream.top_bits.max())))
    if (stream.margins < 0).any():
        _refuse("margins", "0 or more ulps", int(stream.margins.min()))


def _refuse(name: str, expected: object, found: object) -> None:
    raise GoldenError(f"token stream, {name}: expected {expected}, found {found}")


# The dataclass and the tables above must not drift apart.
assert (*ARRAYS, *LABELS, "drafts") == tuple(f.name for f in fields(TokenStream))
