"""The manifest: one checked line a golden."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bitassay.golden.digests import canonical, sha256
from bitassay.golden.errors import CorruptError, GoldenError, SchemaError
from bitassay.golden.provenance import Confirmation
from bitassay.golden.storage import layout, manifest


@pytest.fixture
def entries(make_stream, provenance):
    stream = make_stream()
    files = layout.encode(stream, provenance)
    digest = layout.content_digest(stream, provenance.identity)
    one = manifest.describe(stream, provenance, digest, files)
    machine = Confirmation("NVIDIA H100", "570", "3.6.0", "2.11.0", "2025-01-01T00:00:00Z")
    two = replace(one, name="another/sm_90", confirmed=(machine,))
    return {entry.name: entry for entry in (one, two)}


def test_lines_are_sorted_and_come_back(entries):
    data = manifest.render(entries)
    assert [json.loads(line)["name"] for line in data.splitlines()] == sorted(entries)
    assert manifest.parse(data) == entries


def test_a_line_says_how_far_it_was_confirmed(entries):
    another, made_up = map(json.loads, manifest.render(entries).splitlines())
    assert made_up["confirmed"] == "emulated"
    assert another["confirmed"][0]["gpu"] == "NVIDIA H100"


def test_any_flipped_bit_anywhere_is_refused(entries):
    data = manifest.render(entries)
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(GoldenError):
                manifest.parse(bytes(damaged))


def test_any_cut_but_between_lines_is_refused(entries):
    data = manifest.render(entries)
    whole = {0, data.index(b"\n") + 1, len(data)}
    for length in range(len(data)):
        if length not in whole:
            with pytest.raises(CorruptError):
                manifest.parse(data[:length])


def test_deep_nesting_is_damage():
    with pytest.raises(CorruptError, match="line 1 is damaged .*recursion"):
        manifest.parse(b"[" * 100_000 + b"\n")
    for depth in range(900, 1001):  # writing again takes a level more than reading
        with pytest.raises(CorruptError, match="line 1 is damaged"):
            manifest.parse(b'{"a":' * depth + b"1" + b"}" * depth + b"\n")


def test_disorder_and_repetition_are_refused(entries):
    first, second = manifest.render(entries).splitlines(keepends=True)
    for lines in (second + first, first + first + second):
        with pytest.raises(CorruptError, match="out of order or names a golden twice"):
            manifest.parse(lines)


def test_a_newer_schema_is_called_newer_and_not_damaged(entries):
    facts = json.loads(manifest.render(entries).splitlines()[0])
    line = json.dumps(facts | {"schema": 4, "checksum": "of another kind", "more": 1})
    with pytest.raises(SchemaError, match="schema 4, this build reads up to 3: install a newer"):
        manifest.parse(line.encode() + b"\n")


@pytest.mark.parametrize("schema", [1, 2])
def test_lines_of_an_earlier_schema_are_read_and_kept(entries, schema):
    """So that such a store can be listed, and goldens of both can lie beside each other."""
    entries["another/sm_90"] = replace(entries["another/sm_90"], schema=schema)
    data = manifest.render(entries)
    assert ["draft_model" in json.loads(line) for line in data.splitlines()] == [False, True]
    assert manifest.parse(data) == entries
    assert manifest.render(manifest.parse(data)) == data


MACHINE = {"gpu": "g", "driver": "d", "triton": "3", "torch": "2", "date": "now"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 7),
        ("name", "no-architecture"),
        ("name", "../../etc/sm_90"),
        ("name", ".work/sm_90"),
        ("digest", "../../.."),
        ("digest", "A" * 64),
        ("prompts", "64"),
        ("prompts", True),
        ("tokens", 1.5),
        ("bytes", None),
        ("contract_version", [1]),
        ("files", {}),
        ("schema", "2"),
        ("schema", 2),
        ("draft_model", 1),
        ("draft_model", None),
        ("schema", True),
        ("confirmed", "yes"),
        ("confirmed", []),
        ("confirmed", 3),
        ("confirmed", ["a machine"]),
        ("confirmed", [MACHINE | {"date": 7}]),
        ("confirmed", [MACHINE | {"place": "here"}]),
        ("confirmed", [{"gpu": "g"}]),
    ],
)
def test_fields_of_another_kind_are_refused_though_the_checksum_fits(entries, field, value):
    facts = json.loads(manifest.render(entries).splitlines()[0]) | {field: value}
    del facts["checksum"]
    line = json.dumps(facts | {"checksum": sha256(canonical(facts))})
    with pytest.raises(CorruptError, match="line 1 is damaged"):
        manifest.parse(line.encode() + b"\n")
