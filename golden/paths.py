"""Where bitassay's own models, prompts and goldens lie: beside this file."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODELS, PROMPTS = FOLDER / "models", FOLDER / "prompts"
PACKAGED = FOLDER / "store"


def in_checkout() -> bool:
    """Return whether this file lies in the project's repository, not in an installed package."""
    return (FOLDER.parent / "pyproject.toml").is_file() and FOLDER.name == "golden"
