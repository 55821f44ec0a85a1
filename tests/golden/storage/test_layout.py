"""Encoding is lossless, readable by plain zarr, and its digests see what matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import zarr

from bitassay.golden.digests import sha256
from bitassay.golden.errors import CorruptError, OutdatedError, SchemaError
from bitassay.golden.storage import layout
from bitassay.golden.streams.token_stream import ARRAYS, LABELS


def test_what_is_decoded_is_what_was_encoded(make_stream, provenance):
    stream = make_stream()
    again, origin = layout.decode(layout.encode(stream, provenance))
    assert origin == provenance
    for name in ARRAYS:
        array = getattr(again, name)
        assert array.dtype == getattr(stream, name).dtype
        assert np.array_equal(array, getattr(stream, name))
    assert all(getattr(again, name) == getattr(stream, name) for name in LABELS)


def test_plain_zarr_reads_it_from_disk(make_stream, provenance, tmp_path):
    for path, data in layout.encode(make_stream(), provenance).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    group = zarr.open_group(tmp_path, mode="r")
    assert group.metadata.zarr_format == 3
    assert np.array_equal(group["tokens"][...], make_stream().tokens)
    assert group["tokens"].metadata.dimension_names == ("S", "T")
    assert group.attrs["identity"]["arch"] == "sm_90"


def test_zeros_are_written_as_chunks(make_stream, provenance):
    """Zarr's default leaves them out, and then a lost chunk would read as zeros."""
    stream = replace(make_stream(), margins=make_stream().margins * 0)
    assert "margins/c.0.0" in layout.encode(stream, provenance)


@pytest.mark.parametrize("name", ARRAYS)
def test_every_array_changes_the_content_digest(make_stream, provenance, name):
    digest = layout.content_digest(make_stream(), provenance.identity)
    array = getattr(make_stream(), name).copy()
    if name == "prompt_offsets":
        array[1:3] = 2, 4  # still valid
    else:
        array.flat[-1] ^= 1
    changed = replace(make_stream(), **{name: array})
    assert layout.content_digest(changed, provenance.identity) != digest


def test_identity_and_labels_change_the_content_digest_and_nothing_else_does(
    make_stream, provenance
):
    stream, identity = make_stream(), provenance.identity
    digest = layout.content_digest(stream, identity)
    names = ("suite", "arch", "contract", "model", "draft_model", "tokenizer", "prompts")
    for field in (*names, "rotary_table"):
        assert layout.content_digest(stream, replace(identity, **{field: "x"})) != digest
    assert layout.content_digest(stream, replace(identity, tokens=5)) != digest
    assert layout.content_digest(replace(stream, operations=("a", "b")), identity) != digest
    assert layout.content_digest(replace(stream, vocab_size=51), identity) != digest
    later = replace(provenance, date="2026-01-01T00:00:00Z", commit=None, packages={})
    assert layout.content_digest(stream, later.identity) == digest
    assert (
        layout.encode(stream, later)[layout.SUMS] != layout.encode(stream, provenance)[layout.SUMS]
    )


def test_the_content_digest_is_pinned(make_stream, provenance):
    """A digest that changes by itself would rename every golden."""
    digest = layout.content_digest(make_stream(), provenance.identity)
    assert digest == "69703d27a7fd323044ae2b45ab68f4919ea6feba6e04e48b5239b2fcaf1ae3c4"


def test_files_that_nobody_listed_are_not_read(make_stream, provenance):
    files = layout.encode(make_stream(), provenance)
    digest = sha256(files[layout.SUMS])
    assert layout.read_verified({**files, "margins/c.0.1": b"x"}.__getitem__, digest) == files


def test_a_missing_file_is_named(make_stream, provenance, tmp_path):
    files = layout.encode(make_stream(), provenance)
    digest = sha256(files[layout.SUMS])

    def read(path):
        if path == "tokens/c.0.0":
            raise FileNotFoundError
        return files[path]

    with pytest.raises(CorruptError, match="tokens/c.0.0 is missing"):
        layout.read_verified(read, digest)


def test_another_schema_is_refused(make_stream, provenance):
    with pytest.raises(SchemaError, match="schema 4, this build reads up to 3"):
        layout.decode(layout.encode(make_stream(), replace(provenance, schema=4)))
    for old in (1, 2):
        message = f"schema {old}, this build reads schema 3: record it again"
        with pytest.raises(OutdatedError, match=message):
            layout.decode(layout.encode(make_stream(), replace(provenance, schema=old)))
