"""Processes that this one starts: the same bitassay and no GPU, and they end when this one does."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bitassay


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, with this bitassay first on the path, and `more`."""
    here = str(Path(bitassay.__file__).parents[1])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        **more,
    }


@contextmanager
def lifeline() -> Iterator[int]:
    """Give a descriptor to pass to children: its pipe ends when this process does, however."""
    passed, held = os.pipe()  # held: never written, and no child has it
    try:
        yield passed
    finally:
        os.close(passed)
        os.close(held)


def end_with_parent(lifeline: int) -> None:
    """In a child: end this process as soon as the parent that holds the lifeline is gone."""

    def wait() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
