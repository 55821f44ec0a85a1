"""Provenance: what a golden was recorded from, and how far hardware has confirmed it."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from bitassay import __version__
from bitassay.golden.paths import FOLDER, in_checkout

SCHEMA = 3  # of the zarr group, its attributes and the manifest lines


@dataclass(frozen=True)
class Confirmation:
    """One machine on which compiled kernels gave these bits, all of them."""

    gpu: str
    driver: str
    triton: str
    torch: str
    date: str


@dataclass(frozen=True)
class Identity:
    """What decides the streams; two goldens are the same when these and the arrays are.

    All digests are sha256 in hex: `contract` that of the order contract, `model` that of
    config.json and the weights, `tokenizer` and `prompts` those of the two files, `rotary_table`
    that of the rotary cosines and sines; "" where a model has none. tokens: how many each prompt
    is continued by. draft_model: as `model`, of the draft head, "" without one.
    """

    suite: str
    arch: str
    contract_version: int
    contract: str
    model: str
    tokenizer: str
    prompts: str
    tokens: int
    rotary_table: str
    draft_model: str = ""

    @property
    def name(self) -> str:
        """The golden's name, `<suite>/<arch>`."""
        return f"{self.suite}/{self.arch}"


def another(key: str) -> str:
    """Return in words that this field of an identity is not the same."""
    words = {"prompts": "other prompts", "tokens": "another number of tokens a prompt"}
    return words.get(key, f"another {key.replace('_', ' ')}")


@dataclass(frozen=True)
class Provenance:
    """Identity, plus when and with what it was recorded, which does not change what it is.

    packages: versions by name. commit: git commit of the checkout, None outside one. dirty: the
    checkout had changes other than in the store. confirmed: the machines whose compiled kernels
    gave the same bits; none means emulated only.
    """

    identity: Identity
    packages: dict[str, str]
    commit: str | None
    dirty: bool
    date: str
    confirmed: tuple[Confirmation, ...] = ()
    schema: int = SCHEMA

    @property
    def attributes(self) -> dict[str, Any]:
        """What the zarr group's attributes hold: all but `confirmed`, which comes later."""
        facts = asdict(self)
        del facts["confirmed"]
        return facts


def provenance_now(identity: Identity) -> Provenance:
    """Return the provenance of a recording made here and now."""
    packages = {name: version(name) for name in ("torch", "numpy", "zarr")}
    packages["bitassay"] = __version__
    commit, dirty = _git_state()
    return Provenance(identity, packages, commit, dirty, now())


def now() -> str:
    """Return the time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _git_state() -> tuple[str | None, bool]:
    """Return commit and dirty flag of the checkout that holds this file, or (None, False)."""
    if not in_checkout():
        return None, False
    try:
        commit = _git("rev-parse", "--verify", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":(exclude)golden/store")
    except (OSError, subprocess.CalledProcessError):
        return None, False  # no git, or no commit yet
    return commit, bool(changes)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(FOLDER.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
