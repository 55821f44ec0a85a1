"""Files in and out: read from a directory or a URL, written so that a kill harms nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from bitassay.golden.errors import StoreError

SCRATCH = ".tmp-"  # names of what is being written; leftovers of a kill begin with it
LOCK_SECONDS = 60.0


def read_file(root: str, path: str) -> bytes:
    """Return one file's bytes; FileNotFoundError when absent. root: a directory or a URL."""
    if "://" not in root:
        return (Path(root) / path).read_bytes()
    filesystem, base = _remote(root)
    data: bytes = filesystem.cat_file(f"{base}/{path}")
    return data


def told(error: OSError) -> str:
    """Return what went wrong, and with which file where that is known."""
    return ": ".join(str(part) for part in (error.strerror, error.filename) if part) or str(error)


def advice(error: OSError) -> str:
    """Return what to do about a store that cannot be written."""
    another = "name another directory"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"free space there, or {another}" if full else another


def write_tree(root: Path, path: str, files: dict[str, bytes]) -> None:
    """Make directory root/path appear with these files, whole and on disk, or not at all.

    Written under a scratch name and renamed. A directory already there is moved aside first, so
    call this over an existing one only to mend it.
    """
    with _scratch(root) as scratch:
        for name, data in files.items():
            file = scratch / name
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_synced(file, data)
        for directory in [scratch, *(d for d in scratch.rglob("*") if d.is_dir())]:
            _sync_directory(directory)
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(root / f"{SCRATCH}{uuid4().hex}")
        scratch.rename(target)
    _sync_directory(target.parent)


def replace_file(root: Path, name: str, data: bytes) -> None:
    """Replace a file in one step: readers see the old bytes or the new ones."""
    with _scratch(root) as scratch:
        _write_synced(scratch, data)
        os.replace(scratch, root / name)
    _sync_directory(root)


def sweep(root: Path) -> None:
    """Remove what killed writers left behind; call it under the lock, when nobody else writes."""
    for leftover in root.glob(f"{SCRATCH}*"):
        _clear(leftover)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the store for writing; waits up to a minute for another writer, then StoreError.

    The lock is on the directory itself, and the kernel lets go of it when its holder dies.
    """
    descriptor = os.open(root, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise StoreError(f"store {root}: another process has been writing for a minute")
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A name to write under, cleared away when that fails: on a full disk its space is needed."""
    scratch = root / f"{SCRATCH}{uuid4().hex}"
    try:
        yield scratch
    except BaseException:
        with suppress(OSError):
            _clear(scratch)
        raise


def _clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_synced(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remote(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise StoreError(f"store {url}: reading a URL needs fsspec: pip install fsspec") from None
    try:
        filesystem, base = url_to_fs(url)
    except ImportError as error:  # fsspec names the package of this kind of URL
        raise StoreError(f"store {url}: {error}") from None
    return filesystem, base.rstrip("/")
