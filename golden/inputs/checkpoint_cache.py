"""Checkpoints as this process has read them: each is read and hashed once, whoever asks.

What is kept of a model is dropped when its files change. Weights are kept of a model and its draft
head alone, and until `release_weights`; of others, and then of all, only what they are: their
names, shapes and dtypes, on torch's device "meta", the configuration and the digests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitassay.golden.errors import GoldenError
from bitassay.reference.checkpoints.checkpoint import Checkpoint, load_checkpoint

_WITH_WEIGHTS = 2  # a model and its draft head

_Signature = tuple[tuple[str, int, int, int], ...]


@dataclass
class _Read:
    signature: _Signature
    checkpoint: Checkpoint
    whole: bool


_read: dict[Path, _Read] = {}  # the last used last


def read_checkpoint(path: Path, digest: str = "") -> Checkpoint:
    """Return the checkpoint of a directory, with its weights in CPU memory.

    digest: what it must be, "" for whatever it is. Raises GoldenError where it is another one, and
    CheckpointError as `load_checkpoint`.
    """
    found = _current(path)
    if found is None or not found.whole:
        found = _Read(_signature(path), load_checkpoint(path), whole=True)
    _keep(path, found)
    if digest and found.checkpoint.digest != digest:
        raise GoldenError(f"model {path} was changed meanwhile: run this again")
    return found.checkpoint


def describe_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint of a directory, whose weights may be on the device "meta"."""
    found = _current(path)
    return read_checkpoint(path) if found is None else found.checkpoint


def release_weights() -> None:
    """Give the memory of all weights back, for processes that read them themselves."""
    for read in _read.values():
        _release(read)


def _current(path: Path) -> _Read | None:
    found = _read.get(path.resolve())
    return found if found is not None and found.signature == _signature(path) else None


def _keep(path: Path, found: _Read) -> None:
    _read.pop(path.resolve(), None)
    _read[path.resolve()] = found
    for old in list(_read.values())[:-_WITH_WEIGHTS]:
        _release(old)


def _release(read: _Read) -> None:
    if read.whole:
        shapes = {
            name: torch.empty_like(tensor, device="meta")
            for name, tensor in read.checkpoint.tensors.items()
        }
        read.checkpoint, read.whole = replace(read.checkpoint, tensors=shapes), False


def _signature(path: Path) -> _Signature:
    """Return what tells that a file was changed; nothing of what is no directory."""
    if not path.is_dir():
        return ()
    stats = ((file.name, file.stat()) for file in sorted(path.iterdir()) if file.is_file())
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)
