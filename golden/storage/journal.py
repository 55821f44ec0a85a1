"""The journal of a recording that takes long: what has been generated, kept against a kill.

`<store>/.work/<digest of the identity>/journal`: a line that names the identity, then one a step or
task, each checked and on disk before the next is taken. It is no part of the store's content, and
is removed once the golden is published. One process at a time, by a lock that the kernel releases
when its holder dies.
"""

from __future__ import annotations

import base64
import errno
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

from bitassay.golden.digests import canonical, sha256
from bitassay.golden.errors import StoreError
from bitassay.golden.provenance import Identity
from bitassay.golden.storage.files import advice, told
from bitassay.golden.streams.drafts import draft_sizes
from bitassay.golden.streams.token_stream import ALL_ARRAYS, ARRAYS, TOP
from bitassay.golden.streams.traces import Arrays

WORK = ".work"
_ATTEMPTS = 1000


def _traced(arrays: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, Any]]:
    """What a trace holds of one prompt: all of a stream but the prompts themselves."""
    return {
        name: (dtype, dimensions[1:])
        for name, (dtype, dimensions) in arrays.items()
        if dimensions[0] == "S"
    }


class Journal:
    """An open journal: tokens known of each prompt, whole traces, and what to append them with.

    Raises StoreError when it was written for another identity, or holds what nobody noted.
    """

    def __init__(self, path: Path, descriptor: int, identity: str) -> None:
        self._path, self._descriptor, self._identity = path, descriptor, identity
        self.tokens: dict[int, list[int]] = {}
        self.traces: dict[int, Arrays] = {}
        self._read()
        whole, partly = len(self.traces), len(self.tokens.keys() - self.traces.keys())
        self._begun = f"{whole} prompts finished, {partly} begun" if whole or partly else ""

    @property
    def begun(self) -> str:
        """What it held when it was opened, in words; empty for a new one."""
        return self._begun

    @property
    def empty(self) -> bool:
        """Whether nothing is kept in it, so far."""
        return not self.tokens and not self.traces

    def require_fits(
        self, prompts: int, steps: int, vocab_size: int, operations: int, drafting: int = 0
    ) -> None:
        """Raise StoreError unless what it held may be of that many prompts, steps and so on.

        drafting: how many operations the draft head has, 0 without one.
        """
        for prompt, tokens in self.tokens.items():
            if not 0 <= prompt < prompts or len(tokens) > steps:
                raise self._unfit(f"{len(tokens)} tokens of prompt {prompt}")
            if outside := [token for token in tokens if not 0 <= token < vocab_size]:
                raise self._unfit(f"token {outside[0]}")
        sizes = {"K": TOP, "O": operations, **draft_sizes(prompts, steps, drafting)}
        traced = _traced(ALL_ARRAYS if drafting else ARRAYS)
        for prompt, arrays in self.traces.items():
            if not 0 <= prompt < prompts or arrays.keys() != traced.keys():
                raise self._unfit(f"a trace of prompt {prompt} with {', '.join(arrays)}")
            for name, (dtype, dimensions) in traced.items():
                shape = tuple(sizes[d] for d in dimensions)
                if (arrays[name].dtype.str, arrays[name].shape) != (dtype, shape):
                    raise self._unfit(f"{arrays[name].dtype} {list(arrays[name].shape)} as {name}")
            for name in ("tokens", "top_ids"):
                if ((arrays[name] < 0) | (arrays[name] >= vocab_size)).any():
                    raise self._unfit(f"ids outside the vocabulary as {name}")
            ids = arrays["draft_tokens"] if drafting else arrays["tokens"]
            if ((ids < -1) | (ids >= vocab_size)).any():
                raise self._unfit("ids outside the vocabulary as draft_tokens")

    def chosen(self, tokens: dict[int, int]) -> None:
        """Note what prompts chose in one step."""
        self.append({"tokens": list(tokens.items())})

    def finished(self, traces: dict[int, Arrays]) -> None:
        """Note whole traces."""
        self.append({"traces": [[p, _packed(arrays)] for p, arrays in traces.items()]})

    def remove(self) -> None:
        """Remove the journal and the folders that it leaves empty."""
        _remove(self._path)

    def append(self, facts: dict[str, Any]) -> None:
        """Write one line of facts and flush it: what follows a kill goes on from there."""
        lines = _line(facts)
        if self.empty:
            lines = _line({"identity": self._identity}) + lines
        try:
            written = os.write(self._descriptor, lines)
            os.fsync(self._descriptor)
            if written != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StoreError(
                f"journal {self._path} cannot be written ({told(error)}): {advice(error)}, and the "
                "same command goes on from here"
            ) from None
        self._take(facts)

    def _read(self) -> None:
        """Take all lines up to the first that is torn or damaged, and cut the file there.

        A line whose checksum fits was not damaged by chance: what it should not say is refused.
        """
        whole = 0
        with self._path.open("rb") as lines:
            for line in lines:
                checksum, _, text = line.rstrip(b"\n").partition(b" ")
                if not line.endswith(b"\n") or checksum != sha256(text)[:16].encode():
                    break
                try:
                    facts = json.loads(text)
                    if not whole:
                        self._require_identity(facts)
                    else:
                        self._take(facts)
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    raise self._unfit(f"a line that nobody noted ({error!r})") from None
                except (zlib.error, RecursionError) as error:
                    raise self._unfit(f"a line that nobody noted ({error!r})") from None
                whole += len(line)
        if self.empty:
            whole = 0  # its first note names the identity again
        os.ftruncate(self._descriptor, whole)

    def _require_identity(self, facts: dict[str, Any]) -> None:
        if facts != {"identity": self._identity}:
            other = f"another identity, {str(facts.get('identity'))[:12]}…,"
            found = other if "identity" in facts else "no identity"
            raise self._unfit(f"{found} in its first line")

    def _take(self, facts: dict[str, Any]) -> None:
        ((kind, notes),) = facts.items()
        if kind not in ("tokens", "traces"):
            raise ValueError(f"{kind} is neither tokens nor traces")
        for prompt, noted in notes:
            if type(prompt) is not int or (kind == "tokens" and type(noted) is not int):
                raise TypeError(f"prompt {prompt!r}: {noted!r}")
            if kind == "tokens":
                self.tokens.setdefault(prompt, []).append(noted)
            else:
                self.traces[prompt] = _unpacked(noted)

    def _unfit(self, found: str) -> StoreError:
        return StoreError(
            f"journal {self._path}: expected what a recording of identity {self._identity[:12]}… "
            f"noted, found {found}: delete this file, and the same command begins anew"
        )


def discard(root: Path, identity: Identity) -> None:
    """Remove the journal of a golden that has been published, where a kill has left it."""
    if _path(root, identity).exists():
        with _held(root, identity) as (path, _):
            _remove(path)


@contextmanager
def opened(root: Path, identity: Identity) -> Iterator[Journal]:
    """Open the journal of a recording in the store at root, and hold its lock.

    Raises StoreError when another process holds it, the store cannot be written, or the file is not
    the journal of this recording.
    """
    with _held(root, identity) as (path, descriptor):
        notes = Journal(path, descriptor, path.parent.name)
        try:
            yield notes
        finally:
            if notes.empty:
                notes.remove()


@contextmanager
def _held(root: Path, identity: Identity) -> Iterator[tuple[Path, int]]:
    """The journal's path and descriptor, open and locked."""
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
            f"store {root} cannot be written ({told(error)}): {advice(error)}"
        ) from None
    try:
        yield path, descriptor
    finally:
        os.close(descriptor)


def _path(root: Path, identity: Identity) -> Path:
    return root / WORK / sha256(canonical(asdict(identity))) / "journal"


def _locked(path: Path) -> int:
    """Open and lock it; another process may remove it or its folders between any two calls."""
    for attempt in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except (FileNotFoundError, FileExistsError):
            if attempt == _ATTEMPTS - 1:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise BlockingIOError


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    for folder in (path.parent, path.parent.parent):
        try:
            folder.rmdir()
        except OSError:
            return  # others are at work there


def _line(facts: dict[str, Any]) -> bytes:
    text = canonical(facts)
    return sha256(text)[:16].encode() + b" " + text + b"\n"


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
