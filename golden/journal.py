"""The journal of a recording that takes long: what has been generated, kept against a kill.

`<store>/.work/<digest of the identity>/journal`, one checked line a step or task, each on disk
before the next is taken. It is no part of the store's content, and is removed once the golden is
published. One process at a time, by a lock that the kernel releases when its holder dies.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .errors import StoreError
from .layout import canonical, sha256
from .provenance import Identity
from .runners import Arrays

WORK = ".work"


class Journal:
    """An open journal: tokens known of each prompt, whole traces, and what to append them with."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self.tokens: dict[int, list[int]] = {}
        self.traces: dict[int, Arrays] = {}
        self._read()
        whole, partly = len(self.traces), len(self.tokens.keys() - self.traces.keys())
        self._begun = f"{whole} prompts finished, {partly} begun" if whole or partly else ""

    @property
    def begun(self) -> str:
        """What it held when it was opened, in words; empty for a new one."""
        return self._begun

    def chosen(self, tokens: dict[int, int]) -> None:
        """Note what prompts chose in one step."""
        self._append({"tokens": list(tokens.items())})

    def finished(self, traces: dict[int, Arrays]) -> None:
        """Note whole traces."""
        self._append({"traces": [[p, _packed(arrays)] for p, arrays in traces.items()]})

    def remove(self) -> None:
        """Remove the journal and the folders that it leaves empty."""
        self._path.unlink(missing_ok=True)
        for folder in (self._path.parent, self._path.parent.parent):
            try:
                folder.rmdir()
            except OSError:
                return  # others are at work there

    def _append(self, facts: dict[str, Any]) -> None:
        text = canonical(facts)
        line = sha256(text)[:16].encode() + b" " + text + b"\n"
        try:
            written = os.write(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error.strerror}") from None
        if written != len(line):
            raise StoreError(f"{self._path} cannot be written: the disk is full")
        self._take(facts)

    def _read(self) -> None:
        """Take all lines up to the first that is torn or damaged, and cut the file there."""
        whole = 0
        with self._path.open("rb") as lines:
            for line in lines:
                checksum, _, text = line.rstrip(b"\n").partition(b" ")
                if not line.endswith(b"\n") or checksum != sha256(text)[:16].encode():
                    break
                self._take(json.loads(text))
                whole += len(line)
        os.ftruncate(self._descriptor, whole)

    def _take(self, facts: dict[str, Any]) -> None:
        for prompt, token in facts.get("tokens", []):
            self.tokens.setdefault(prompt, []).append(token)
        for prompt, packed in facts.get("traces", []):
            self.traces[prompt] = _unpacked(packed)


def discard(root: Path, identity: Identity) -> None:
    """Remove the journal of a golden that has been published, where a kill has left it."""
    if _path(root, identity).exists():
        with opened(root, identity) as journal:
            journal.remove()


@contextmanager
def opened(root: Path, identity: Identity) -> Iterator[Journal]:
    """Open the journal of a recording in the store at root, and hold its lock.

    Raises StoreError when another process holds it, or the store cannot be written.
    """
    path = _path(root, identity)
    try:
        descriptor = _locked(path)
    except BlockingIOError:
        raise StoreError(
            f"{identity.name} is being recorded by another process in store {root} (it holds "
            f"{path}): wait for it, or end it first"
        ) from None
    except OSError as error:
        raise StoreError(
            f"store {root} cannot be written ({error.strerror}: {error.filename}): name another "
            "with --store DIR"
        ) from None
    try:
        notes = Journal(path, descriptor)
        try:
            yield notes
        finally:
            if not os.fstat(descriptor).st_size:
                notes.remove()
    finally:
        os.close(descriptor)


def _path(root: Path, identity: Identity) -> Path:
    return root / WORK / sha256(canonical(asdict(identity))) / "journal"


def _locked(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed it between the two calls.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _packed(arrays: Arrays) -> dict[str, Any]:
    return {
        name: [
            array.dtype.str,
            array.shape,
            base64.b64encode(zlib.compress(array.tobytes())).decode(),
        ]
        for name, array in arrays.items()
    }


def _unpacked(packed: dict[str, Any]) -> Arrays:
    return {
        name: np.frombuffer(zlib.decompress(base64.b64decode(data)), dtype).reshape(shape)
        for name, (dtype, shape, data) in packed.items()
    }
