"""What is to be run: prompts to continue, under an architecture."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitassay.reference.spec.contract import DRAFT_DEPTH, Contract, default_contract

Progress = Callable[[int, int], None]  # called with what is done and what there is in all


@dataclass(frozen=True)
class Job:
    """What to continue: prompts by name, for `steps` tokens each, under an architecture.

    model_digest: what the model must be when it is read. batch_size: sequences at once, None for
    all; shuffle: seed of the order in which an engine takes the prompts, None for as given;
    chunk_size: prompt tokens an engine takes a step, None for all. None of these may change a bit.
    draft: the draft head, if any; draft_digest: what it must be when it is read.
    """

    model: Path
    model_digest: str
    arch: str
    prompt_names: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    steps: int
    batch_size: int | None = None
    shuffle: int | None = None
    chunk_size: int | None = None
    draft: Path | None = None
    draft_digest: str = ""

    @property
    def contract(self) -> Contract:
        """The contract of this build for the architecture."""
        return default_contract(self.arch)

    @property
    def order(self) -> list[int] | None:
        """The prompts' order for an engine; None as given."""
        if self.shuffle is None:
            return None
        return random.Random(self.shuffle).sample(range(len(self.prompts)), len(self.prompts))

    def rows(self, prompt: int) -> int:
        """How many rows a prompt and its continuation have; the last token is never fed.

        With a draft head its rows count as well: those of its first pass, and of the chains, of
        which only a run tells the number, half of the longest.
        """
        fed = len(self.prompts[prompt]) + self.steps - 1
        return fed if self.draft is None else 2 * fed + self.steps * DRAFT_DEPTH // 2
