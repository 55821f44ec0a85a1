"""Refuse to build without the rooms; all else about the package stands in pyproject.toml.

src/bitassay holds symbolic links to the rooms at the root. Where they are lost, setuptools would
build a wheel without code and say nothing.
"""

from __future__ import annotations

from pathlib import Path

ROOMS = ("cli", "integrations", "golden", "engine", "kernels", "emulator", "reference")


def check_rooms(package: Path) -> None:
    """Raise SystemExit, with one sentence, unless every room is a folder of the package."""
    lost = [room for room in ROOMS if not (package / room / "__init__.py").is_file()]
    if lost:
        raise SystemExit(
            f"bitassay: expected symbolic links to {', '.join(lost)} in src/bitassay, found no "
            "folders there: a zip of the repository and a checkout on Windows lose the links; "
            "clone it with `git clone -c core.symlinks=true`, or install a wheel"
        )


if __name__ == "__main__":  # as setuptools runs it, whatever is built
    check_rooms(Path(__file__).resolve().parent / "src" / "bitassay")

    from setuptools import setup

    setup()
