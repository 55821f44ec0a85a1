"""Checks of a stream's arrays against the table of their dtypes and dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from bitassay.golden.errors import GoldenError

# name -> dtype and dimensions. Little-endian, so that equal bits have equal digests everywhere.
Table = dict[str, tuple[str, tuple[str, ...]]]


def present(record: object, names: Iterable[str]) -> dict[str, Any]:
    """Return the attributes of those names, but for absent ones, which are None."""
    values = {name: getattr(record, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def require_shapes(
    stream: str, arrays: Mapping[str, NDArray[Any]], table: Table, sizes: Mapping[str, int]
) -> None:
    """Raise GoldenError unless every array has the dtype and shape of its line in the table.

    stream: which kind of stream it is, for the message. sizes: those of the table's dimensions.
    """
    for name, array in arrays.items():
        dtype, dims = table[name]
        shape = tuple(sizes[d] for d in dims)
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            found = f"{array.dtype} {list(array.shape)}"
            refuse(stream, name, f"{np.dtype(dtype)} {list(shape)}", found)


def require_within(
    stream: str, name: str, array: NDArray[Any], least: int, most: int, what: str = ""
) -> None:
    """Raise GoldenError unless all values are `least` to `most`; what: they are, in the message."""
    outside = (array < least) | (array > most)
    if outside.any():
        at = [int(i) for i in np.argwhere(outside)[0]]
        refuse(stream, f"{name}{at}", f"{what}{least} … {most}", array[tuple(at)])


def require_names(stream: str, label: str, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of operations; GoldenError when there are none, or one comes twice."""
    if not names:
        refuse(stream, label, "the names of the operations that fingerprints are of", "none")
    if len(set(names)) != len(names):
        refuse(stream, label, f"{len(names)} different names", len(set(names)))
    return names


def refuse(stream: str, name: str, expected: object, found: object) -> NoReturn:
    """Raise the GoldenError of an array or label that is not as expected."""
    raise GoldenError(f"{stream}, {name}: expected {expected}, found {found}")
