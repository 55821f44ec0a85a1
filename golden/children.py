"""The environment of processes that this one starts: the same bitassay, and no GPU."""

from __future__ import annotations

import os
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
