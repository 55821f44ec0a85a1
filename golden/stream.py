"""TokenStream: what a model said for every prompt and step, as arrays of exact bits."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import GoldenError

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
_LOGIT_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The streams of S prompts and T steps; raises GoldenError when the arrays do not fit.

    prompt_ids [N] int32 and prompt_offsets [S+1] int64: prompt s is ids[offsets[s]:offsets[s+1]].
    tokens [S, T] int32. top_ids [S, T, 8] int32 and top_bits [S, T, 8] uint32: the highest logits,
    their stored bits zero-extended. margins [S, T] int64: first minus second, in ulps of
    logits_dtype. fingerprints [S, T, O] uint64: one per operation's row;
    prompt_fingerprints [S, O] uint64: the prompt's rows folded.
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

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_values(self)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, in the order of ARRAYS."""
        return {name: getattr(self, name) for name in ARRAYS}

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
        return replace(self, **cut, prompt_names=self.prompt_names[:count])


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
    for name, array in stream.arrays.items():
        dtype, dims = ARRAYS[name]
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
assert (*ARRAYS, *LABELS) == tuple(f.name for f in fields(TokenStream))
