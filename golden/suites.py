"""The suites: which model is asked what, how far, and for which architectures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitassay.reference.arch import ARCHES

from .errors import GoldenError
from .provenance import ROOM


@dataclass(frozen=True)
class Suite:
    """A model directory, a file of prompts, and how many tokens each prompt is continued by."""

    name: str
    model: Path
    prompts: Path
    tokens: int
    arches: tuple[str, ...]

    @property
    def goldens(self) -> list[str]:
        """The names of its goldens, `<suite>/<arch>`."""
        return [f"{self.name}/{arch}" for arch in self.arches]


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "context-lm",
            model=ROOM / "models" / "context-lm",
            prompts=ROOM / "prompts" / "context-lm.jsonl",
            tokens=64,
            arches=("sm_89", "sm_90"),
        ),
    )
}


def select(names: list[str], everything: bool) -> list[str]:
    """Return golden names for what was typed: `<suite>` means all its architectures.

    Raises GoldenError for an unknown suite or architecture, and when nothing was named.
    """
    if everything == bool(names):
        raise GoldenError(f"name goldens or give --all, one of the two: known are {_known()}")
    if everything:
        names = list(SUITES)
    return list(dict.fromkeys(golden for name in names for golden in _expand(name)))


def find_suite(golden: str) -> tuple[Suite, str]:
    """Return suite and architecture of a golden's name; GoldenError for an unknown one."""
    name, _, arch = golden.partition("/")
    if name not in SUITES:
        raise GoldenError(f"unknown suite {name!r}: known are {', '.join(SUITES)}")
    if arch not in ARCHES:
        raise GoldenError(f"unknown architecture {arch!r}: known are {', '.join(ARCHES)}")
    if arch not in SUITES[name].arches:
        raise GoldenError(f"suite {name} is not recorded for {arch}: known are {_known()}")
    return SUITES[name], arch


def _expand(name: str) -> list[str]:
    if "/" in name:
        find_suite(name)
        return [name]
    if name not in SUITES:
        raise GoldenError(f"unknown suite {name!r}: known are {', '.join(SUITES)}")
    return SUITES[name].goldens


def _known() -> str:
    return ", ".join(golden for suite in SUITES.values() for golden in suite.goldens)
