"""manifest.jsonl: one line of text a golden, sorted by name: what a reviewer reads in a diff."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from bitassay.golden.digests import canonical, sha256
from bitassay.golden.errors import CorruptError
from bitassay.golden.provenance import SCHEMA, Confirmation, Provenance
from bitassay.golden.storage.layout import SUMS, require_schema
from bitassay.golden.streams.token_stream import TokenStream

MANIFEST = "manifest.jsonl"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9_]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One golden as its manifest line states it.

    digest: of the content, and the directory's name. files: sha256 of its SHA256SUMS. bytes: size
    of all its files. distinct_rows: different rows of logits seen. draft_model: as in Identity.
    confirmed: as in Provenance.
    """

    name: str
    digest: str
    prompts: int
    tokens: int
    distinct_rows: int
    bytes: int
    contract_version: int
    contract: str
    model: str
    files: str
    draft_model: str = ""
    confirmed: tuple[Confirmation, ...] = ()
    schema: int = SCHEMA

    @property
    def directory(self) -> str:
        """Where the golden lies, relative to the store."""
        return f"{self.name}/{self.digest}"

    @property
    def line(self) -> str:
        """The manifest line, ending in a checksum of the rest."""
        facts = asdict(self)
        facts["confirmed"] = facts["confirmed"] or "emulated"
        for name in facts.keys() - _names(self.schema):
            del facts[name]
        return json.dumps(facts | {"checksum": sha256(canonical(facts))})


_INTEGERS = ("prompts", "tokens", "distinct_rows", "bytes", "contract_version", "schema")
_SINCE = {"draft_model": 3}  # fields that lines of earlier schemas lack
# What JSON gives for each field but `confirmed`; a bool is no int here.
_KINDS = {
    field.name: int if field.name in _INTEGERS else str
    for field in fields(Entry)
    if field.name != "confirmed"
}


def describe(
    stream: TokenStream, provenance: Provenance, digest: str, files: dict[str, bytes]
) -> Entry:
    """Return the manifest entry of a golden that has been encoded into `files`."""
    identity = provenance.identity
    return Entry(
        name=identity.name,
        digest=digest,
        prompts=len(stream.prompt_names),
        tokens=stream.tokens.size,
        distinct_rows=stream.distinct_rows,
        bytes=sum(map(len, files.values())),
        contract_version=identity.contract_version,
        contract=identity.contract,
        model=identity.model,
        files=sha256(files[SUMS]),
        draft_model=identity.draft_model,
        confirmed=provenance.confirmed,
    )


def render(entries: dict[str, Entry]) -> bytes:
    """Return the manifest's bytes."""
    return "".join(entries[name].line + "\n" for name in sorted(entries)).encode()


def parse(data: bytes) -> dict[str, Entry]:
    """Return the entries by name; CorruptError unless every byte is as `render` wrote it."""
    entries: dict[str, Entry] = {}
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        entry = _parse_line(line, number)
        entries[entry.name] = entry
    if render(entries) != data:
        raise CorruptError(
            "it is cut short, out of order or names a golden twice: restore it from git"
        )
    return entries


def _parse_line(line: bytes, number: int) -> Entry:
    try:
        facts = json.loads(line)
        checksum = facts.pop("checksum", None)
        schema = facts["schema"] if isinstance(facts.get("schema"), int) else SCHEMA
        text = canonical(facts)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise _damaged(number, str(error)) from None
    require_schema(schema)  # first: a newer schema may have another checksum
    if checksum != sha256(text):
        raise _damaged(number, "its checksum does not fit")
    if facts.keys() != _names(schema):
        raise _damaged(number, "its fields are not those of this schema")
    known = [(name, kind) for name, kind in _KINDS.items() if name in facts]
    if wrong := [name for name, kind in known if type(facts[name]) is not kind]:
        raise _damaged(number, f"{wrong[0]} is {facts[wrong[0]]!r}")
    if not _NAME.fullmatch(facts["name"]) or not _DIGEST.fullmatch(facts["digest"]):
        raise _damaged(number, f"it names {facts['name']!r} and directory {facts['digest']!r}")
    return Entry(**facts | {"confirmed": _machines(facts["confirmed"], number)})


def _names(schema: int) -> set[str]:
    """The fields of a line of that schema."""
    return {field.name for field in fields(Entry) if _SINCE.get(field.name, 1) <= schema}


def _machines(confirmed: Any, number: int) -> tuple[Confirmation, ...]:
    if confirmed == "emulated":
        return ()
    known = {field.name for field in fields(Confirmation)}
    if not isinstance(confirmed, list) or not confirmed:
        raise _damaged(number, f"confirmed is {confirmed!r}")
    for machine in confirmed:
        if not isinstance(machine, dict) or machine.keys() != known:
            raise _damaged(number, f"it is confirmed by {machine!r}")
        if not all(isinstance(value, str) for value in machine.values()):
            raise _damaged(number, f"it is confirmed by {machine!r}")
    return tuple(Confirmation(**machine) for machine in confirmed)


def _damaged(number: int, why: str) -> CorruptError:
    return CorruptError(f"line {number} is damaged ({why}): restore it from git")
