"""The store: goldens written once, verified on every read, and never replaced by accident."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bitassay.golden.errors import (
    CorruptError,
    GoldenError,
    MissingError,
    OutdatedError,
    RecordAgain,
    StoreError,
)
from bitassay.golden.paths import PACKAGED, in_checkout
from bitassay.golden.provenance import SCHEMA, Confirmation, Provenance
from bitassay.golden.storage import files, layout, manifest
from bitassay.golden.storage.manifest import MANIFEST, Entry
from bitassay.golden.streams.token_stream import TokenStream


@dataclass(frozen=True)
class Golden:
    """A golden as read: its manifest entry, its streams, and where they come from."""

    entry: Entry
    stream: TokenStream
    provenance: Provenance


def find_store(option: str | None = None) -> Store:
    """Return the store to use: `option`, else BITASSAY_STORE, else the checkout's or packaged one.

    A packaged store and one given as a URL can be read only.
    """
    chosen = option or os.environ.get("BITASSAY_STORE")
    if chosen:
        return Store(chosen, writable="://" not in chosen)
    return Store(str(PACKAGED), writable=in_checkout())


@dataclass(frozen=True)
class Store:
    """Goldens at <root>/<suite>/<arch>/<digest>/ and their manifest; root: directory or URL."""

    root: str
    writable: bool = True

    def entries(self, wanted: str = "") -> dict[str, Entry]:
        """Return what the manifest says, by name; MissingError when there is no store.

        wanted: the golden looked for, if any; the error says how to record it.
        """
        try:
            data = files.read_file(self.root, MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingError(
                f"no store at {self.root} (no {MANIFEST}): name another, also with "
                "BITASSAY_STORE, or record one",
                advice=self.recording(wanted, new=True),
            ) from None
        except OSError as error:
            raise StoreError(f"store {self.root} cannot be read: {error}") from None
        with self._naming(MANIFEST):
            return manifest.parse(data)

    def entry(self, name: str) -> Entry:
        """Return what the manifest says of a golden; MissingError when it has none."""
        entries = self.entries(name)
        if name not in entries:
            known = ", ".join(entries) or "none"
            raise MissingError(
                f"no golden {name} in store {self.root} (it has {known}): record it",
                advice=self.recording(name, new=True),
            )
        return entries[name]

    def read(self, name: str) -> Golden:
        """Return a golden, after verifying every byte of it.

        Raises MissingError, CorruptError or SchemaError. A golden replaced while it was being
        read is read again.
        """
        entry = self.entry(name)
        while True:
            try:
                with self._naming(name):
                    return self._load(entry)
            except StoreError:
                latest = self.entry(name)
                if latest == entry:
                    raise
                entry = latest

    def require_writable(self, accept: bool) -> None:
        """Raise StoreError unless writing was accepted, outside CI, to a store open for writing."""
        if not accept:
            raise StoreError(f"store {self.root} is written only where that is accepted")
        if refusal := self.refusal():
            raise StoreError(refusal)

    def refusal(self) -> str:
        """Return why nothing may be written here, and what to do; empty where it may be."""
        if os.environ.get("CI"):
            return (
                "CI is set in the environment, and a store is never written there: review the "
                "difference and accept it elsewhere"
            )
        root = Path(self.root).absolute()
        there = next(path for path in (root, *root.parents) if path.exists())
        if self.writable and not there.is_dir():
            return f"store {self.root}: {there} is no directory: name another directory"
        if not self.writable or not os.access(there, os.W_OK | os.X_OK):
            return f"store {self.root} is read-only: name another directory"
        return ""

    def require_whole_manifest(self) -> None:
        """Raise StoreError when there is a manifest that publishing could not add to."""
        if (Path(self.root) / MANIFEST).exists():
            self.entries()

    def publish(self, stream: TokenStream, provenance: Provenance, *, accept: bool) -> Entry:
        """Write a golden and return its entry; what is already there and whole stays as it is.

        Raises StoreError without `accept`, when CI is set, and for a store that cannot be written.
        Killed at any point, this leaves the old golden whole; the next write clears the rest.
        """
        self.require_writable(accept)
        root, name = Path(self.root), provenance.identity.name
        digest = layout.content_digest(stream, provenance.identity)
        encoded = layout.encode(stream, provenance)
        entry = manifest.describe(stream, provenance, digest, encoded)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with files.locked(root):
                files.sweep(root)
                entries = self.entries() if (root / MANIFEST).exists() else {}
                old = entries.get(name)
                if old and old.digest == digest and self._whole(old):
                    self._prune(old)
                    return old
                files.write_tree(root, entry.directory, encoded)
                self._replace_manifest(entries | {name: entry})
                self._prune(entry)
                files.sweep(root)
        except OSError as error:
            raise self._unwritable(error) from None
        return entry

    def confirm(self, golden: Golden, machine: Confirmation) -> Entry:
        """Note in the manifest that a machine gave this golden's bits; returns the new entry."""
        self.require_writable(accept=True)
        try:
            with files.locked(Path(self.root)):
                entries = self.entries()
                entry = entries.get(golden.entry.name)
                if entry is None or entry.digest != golden.entry.digest:
                    raise StoreError(f"{golden.entry.name} was replaced meanwhile: check it again")
                machines = {(c.gpu, c.driver, c.triton, c.torch): c for c in entry.confirmed}
                machines[machine.gpu, machine.driver, machine.triton, machine.torch] = machine
                entry = replace(entry, confirmed=tuple(machines[key] for key in sorted(machines)))
                self._replace_manifest(entries | {entry.name: entry})
        except OSError as error:
            raise self._unwritable(error) from None
        return entry

    def _load(self, entry: Entry) -> Golden:
        if entry.schema < SCHEMA:
            raise OutdatedError(
                f"recorded with schema {entry.schema}, this build reads schema {SCHEMA}: record it "
                "again",
                advice=self.recording(entry.name),
            )

        def read(path: str) -> bytes:
            return files.read_file(self.root, f"{entry.directory}/{path}")

        try:
            content = layout.read_verified(read, entry.files)
            stream, provenance = layout.decode(content)
        except OSError as error:
            raise StoreError(f"cannot be read: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"not a golden of its schema ({error!r})") from None
        digest = layout.content_digest(stream, provenance.identity)
        described = manifest.describe(stream, provenance, digest, content)
        if (described := replace(described, confirmed=entry.confirmed)) != entry:
            raise CorruptError(f"its manifest line says {entry}, its content {described}")
        return Golden(entry, stream, replace(provenance, confirmed=entry.confirmed))

    def recording(
        self,
        name: str,
        *,
        accept: bool = True,
        tokens: int | None = None,
        drafts: bool = False,
        new: bool = False,
    ) -> RecordAgain:
        """Return the advice to record a golden in this store; arguments as RecordAgain's."""
        usual = self.root == str(PACKAGED)
        return RecordAgain(name, "" if usual else self.root, accept, tokens, drafts, new)

    def _whole(self, entry: Entry) -> bool:
        try:
            self._load(entry)
        except GoldenError:
            return False
        return True

    def _prune(self, entry: Entry) -> None:
        """Remove this golden's earlier directories, once the manifest no longer names them."""
        current = Path(self.root) / entry.directory
        for directory in current.parent.iterdir():
            if directory.is_dir() and len(directory.name) == 64 and directory != current:
                shutil.rmtree(directory)

    def _replace_manifest(self, entries: dict[str, Entry]) -> None:
        files.replace_file(Path(self.root), MANIFEST, manifest.render(entries))

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(
            f"store {self.root} cannot be written ({files.told(error)}): {files.advice(error)}"
        )

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Say in every error which store and golden it is about."""
        try:
            yield
        except GoldenError as error:
            raise type(error)(f"store {self.root}: {what}: {error}", advice=error.advice) from None
