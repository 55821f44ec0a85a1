"""The suites: which model is asked what, how far, and for which architectures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bitassay.golden.errors import GoldenError
from bitassay.golden.paths import MODELS, PROMPTS
from bitassay.reference.spec.arch import ARCHES


@dataclass(frozen=True)
class Suite:
    """A model directory, a file of prompts, and how many tokens each prompt is continued by.

    draft: the directory of a draft head for the model, None without one. own: the user's, known by
    what the command line says, and in no table.
    """

    name: str
    model: Path
    prompts: Path
    tokens: int
    arches: tuple[str, ...]
    own: bool = False
    draft: Path | None = None

    @property
    def goldens(self) -> list[str]:
        """The names of its goldens, `<suite>/<arch>`."""
        return [f"{self.name}/{arch}" for arch in self.arches]


MOST_TOKENS = 1 << 24  # for each prompt: as many positions as any model here may have
DEFAULT_ARCHES = ("sm_89", "sm_90")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "context-lm",
            model=MODELS / "context-lm",
            prompts=PROMPTS / "context-lm.jsonl",
            tokens=64,
            arches=DEFAULT_ARCHES,
        ),
        Suite(
            "llama-pico",
            model=MODELS / "llama-pico",
            prompts=PROMPTS / "llama-pico.jsonl",
            tokens=64,
            arches=DEFAULT_ARCHES,
        ),
        Suite(
            "eagle-pico",
            model=MODELS / "llama-pico",
            draft=MODELS / "eagle-pico",
            prompts=PROMPTS / "eagle-pico.jsonl",
            tokens=96,
            arches=DEFAULT_ARCHES,
        ),
    )
}


def own_suite(
    model: Path,
    prompts: Path,
    tokens: int,
    *,
    name: str | None = None,
    arches: tuple[str, ...],
    draft: Path | None = None,
) -> Suite:
    """Return the suite of a user's own model; its name is the directory's unless one is given.

    draft: the directory of a draft head for it.

    Raises GoldenError for a name that is not fit for a folder or is a built-in suite's, for an
    unknown architecture, and for more tokens than anyone will wait for.
    """
    if tokens > MOST_TOKENS:
        raise GoldenError(f"--max-tokens: expected at most {MOST_TOKENS:,}, found {tokens:,}")
    name = model.resolve().name if name is None else name
    if not _NAME.fullmatch(name) or name.endswith(".jsonl"):
        raise GoldenError(
            f"{name!r} does not name a golden: expected up to 64 letters, digits, '.', '_' and "
            "'-', the first a letter or digit; name it with --name"
        )
    if name in SUITES:
        raise GoldenError(f"{name} is a suite of bitassay itself: choose another --name")
    for arch in arches:
        _require_arch(arch)
    arches = tuple(dict.fromkeys(arches))
    return Suite(name, model, prompts, tokens, arches, own=True, draft=draft)


def select(names: list[str], everything: bool) -> list[str]:
    """Return golden names for what was typed: `<suite>` means all its architectures.

    Raises GoldenError for an unknown suite or architecture, and when nothing was named.
    """
    if everything == bool(names):
        raise GoldenError(
            f"expected names of goldens, or --all, one of the two: known are {_known()}"
        )
    if everything:
        names = list(SUITES)
    return list(dict.fromkeys(golden for name in names for golden in _expand(name)))


def find_suite(golden: str) -> tuple[Suite, str]:
    """Return suite and architecture of a golden's name; GoldenError for an unknown one."""
    name, _, arch = golden.partition("/")
    if name not in SUITES:
        raise _unknown(name)
    _require_arch(arch)
    if arch not in SUITES[name].arches:
        raise GoldenError(f"suite {name} is not recorded for {arch}: known are {_known()}")
    return SUITES[name], arch


def _expand(name: str) -> list[str]:
    if "/" in name:
        find_suite(name)
        return [name]
    if name not in SUITES:
        raise _unknown(name)
    return SUITES[name].goldens


def _unknown(name: str) -> GoldenError:
    return GoldenError(
        f"unknown suite {name!r}: known are {', '.join(SUITES)}; a golden of a model of your own "
        "needs --model DIR and --prompts FILE"
    )


def _require_arch(arch: str) -> None:
    if arch not in ARCHES:
        raise GoldenError(f"unknown architecture {arch!r}: known are {', '.join(ARCHES)}")


def _known() -> str:
    return ", ".join(golden for suite in SUITES.values() for golden in suite.goldens)
