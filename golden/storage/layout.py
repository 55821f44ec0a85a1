"""A golden as the files of a zarr v3 group, in memory: encode, decode, and the two digests.

The content digest names the golden's directory: it covers arrays and identity, and not how zarr
or a compressor laid them out, nor date and versions. SHA256SUMS covers every byte of every file,
those included; its own digest stands in the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from bitassay.golden.digests import canonical, sha256
from bitassay.golden.errors import CorruptError, OutdatedError, SchemaError
from bitassay.golden.provenance import SCHEMA, Identity, Provenance
from bitassay.golden.streams.drafts import DRAFT_LABELS
from bitassay.golden.streams.token_stream import ALL_ARRAYS, ARRAYS, LABELS, TokenStream, from_parts

SUMS = "SHA256SUMS"  # in the format of the sha256sum command


def content_digest(stream: TokenStream, identity: Identity) -> str:
    """Return the sha256 (hex) of arrays and identity; GoldenError where an array is absent."""
    stream.require_whole()
    content = {
        "schema": SCHEMA,
        "identity": asdict(identity),
        "labels": stream.labels,
        "arrays": {
            name: [ALL_ARRAYS[name][0], array.shape, sha256(np.ascontiguousarray(array).tobytes())]
            for name, array in stream.arrays.items()
        },
    }
    return sha256(canonical(content))


def encode(stream: TokenStream, provenance: Provenance) -> dict[str, bytes]:
    """Return the golden's files by relative path: a zarr v3 group and SHA256SUMS.

    Raises GoldenError for drafts that the tokens contradict, and where an array is absent.
    """
    stream.require_whole()
    if stream.drafts:
        stream.drafts.require_recorded(stream.tokens)
    written: dict[str, Buffer] = {}
    attributes = {**provenance.attributes, **stream.labels}
    group = zarr.create_group(MemoryStore(written), attributes=json.loads(canonical(attributes)))
    for name, array in stream.arrays.items():
        group.create_array(
            name,
            data=array,
            chunks=array.shape,  # small: one chunk an array
            compressors=BloscCodec(
                cname="zstd", clevel=9, shuffle="shuffle", typesize=array.itemsize
            ),
            chunk_key_encoding={"name": "default", "separator": "."},  # fewer directories
            dimension_names=ALL_ARRAYS[name][1],
            config={"write_empty_chunks": True},  # an absent chunk would read as zeros
        )
    files = {path: buffer.to_bytes() for path, buffer in written.items()}
    files[SUMS] = "".join(f"{sha256(files[path])}  {path}\n" for path in sorted(files)).encode()
    return files


def read_verified(read: Callable[[str], bytes], sums_digest: str) -> dict[str, bytes]:
    """Return a golden's files, every byte verified; `read` returns one file by relative path.

    Only files that SHA256SUMS lists are read. Raises CorruptError when one is missing or other
    than listed, or when SHA256SUMS has another digest than `sums_digest`.
    """
    sums = _read(read, SUMS)
    _require_digest(SUMS, sums, sums_digest, "the manifest")
    files = {SUMS: sums}
    for line in sums.decode().splitlines():
        digest, path = line.split("  ", 1)
        files[path] = _read(read, path)
        _require_digest(path, files[path], digest, SUMS)
    return files


def _read(read: Callable[[str], bytes], path: str) -> bytes:
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CorruptError(f"{path} is missing") from None


def _require_digest(path: str, data: bytes, expected: str, authority: str) -> None:
    if (found := sha256(data)) != expected:
        raise CorruptError(
            f"{path} is damaged: sha256 {found[:12]}…, {authority} says {expected[:12]}…"
        )


def decode(files: dict[str, bytes]) -> tuple[TokenStream, Provenance]:
    """Return what `encode` was given, from verified files; SchemaError for another layout."""
    group = zarr.open_group(_memory(files), mode="r")
    attributes: dict[str, Any] = dict(group.attrs)
    require_schema(attributes["schema"], oldest=SCHEMA)
    drafted = any(name in attributes for name in DRAFT_LABELS)
    names = (LABELS + DRAFT_LABELS, ALL_ARRAYS) if drafted else (LABELS, ARRAYS)
    labels = {name: attributes.pop(name) for name in names[0]}
    arrays = {name: np.asarray(group[name][...]) for name in names[1]}  # type: ignore[index]
    identity = Identity(**attributes.pop("identity"))
    stream = from_parts(arrays, labels)
    if stream.drafts:
        stream.drafts.require_recorded(stream.tokens)
    return stream, Provenance(identity, **attributes)


def require_schema(schema: int, oldest: int = 1) -> None:
    """Raise SchemaError for a schema that is later than this build's or earlier than `oldest`."""
    if schema < oldest:
        raise OutdatedError(
            f"recorded with schema {schema}, this build reads schema {SCHEMA}: record it again"
        )
    if schema > SCHEMA:
        raise SchemaError(
            f"written with schema {schema}, this build reads up to {SCHEMA}: install a newer "
            "bitassay, or choose another store"
        )


def _memory(files: dict[str, bytes]) -> Store:
    """A zarr store over the very bytes that were verified, so nothing can change in between."""
    buffer = default_buffer_prototype().buffer
    return MemoryStore({path: buffer.from_bytes(data) for path, data in files.items()})
