"""The engine's tests interpret kernels: one mode per process, chosen before triton is imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.tiny_llama import write_tiny_llama

os.environ.setdefault("TRITON_INTERPRET", "1")  # "0" is a run on a GPU: interpreted tests skip

from bitassay.reference.checkpoints.checkpoint import Checkpoint, load_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """Return tiny models by `write_tiny_llama`'s arguments, each made once."""

    @cache
    def make(**arguments: Any) -> Checkpoint:
        folder: Path = write_tiny_llama(tmp_path_factory.mktemp("model") / "model", **arguments)
        return load_checkpoint(folder)

    return make
