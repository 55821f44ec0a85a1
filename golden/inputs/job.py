"""What is to be run: prompts to continue, under an architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitassay.reference.spec.contract import DRAFT_DEPTH, Contract, default_contract

Progress = Callable[[int, int], None]  # called with what is done and what there is in all


@dataclass(frozen=True)
class Job:
    """What to continue: prompts by name, for `steps` tokens each, under an architecture.

    model_digest: what the model must be when it is read, "" for whatever it is. draft: the draft
    head, if any; draft_digest: as model_digest.
    """

    model: Path
    model_digest: str
    arch: str
    prompt_names: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    steps: int
    draft: Path | None = None
    draft_digest: str = ""

    @property
    def contract(self) -> Contract:
        """The contract of this build for the architecture."""
        return default_contract(self.arch)

    def rows(self, prompt: int) -> int:
        """How many rows a prompt and its continuation have; the last token is never fed.

        With a draft head its rows count as well: those of its first pass, and of the chains, of
        which only a run tells the number, half of the longest.
        """
        fed = len(self.prompts[prompt]) + self.steps - 1
        return fed if self.draft is None else 2 * fed + self.steps * DRAFT_DEPTH // 2
