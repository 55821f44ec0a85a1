"""The ways to check a golden, as the command names them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .errors import GoldenError


class Way(StrEnum):
    """What can be checked against a golden."""

    REFERENCE = "reference"
    INTERPRETER = "interpreter"
    GPU = "gpu"


@dataclass(frozen=True)
class Options:
    """How to check. sequential: the reference generates token by token instead of replaying.

    prompts: only the first so many, None for all. batch_size, shuffle: see runners.Job.
    confirm: note in the manifest that this GPU gave these bits.
    """

    way: Way = Way.REFERENCE
    sequential: bool = False
    prompts: int | None = None
    batch_size: int | None = None
    shuffle: int | None = None
    confirm: bool = False

    def __post_init__(self) -> None:
        engine = self.batch_size is not None or self.shuffle is not None
        if engine and self.way is Way.REFERENCE:
            raise GoldenError("--batch-size and --shuffle need --with interpreter or --with gpu")
        if self.sequential and self.way is not Way.REFERENCE:
            raise GoldenError("--sequential is for --with reference: kernels always generate")
        if self.confirm and (self.way is not Way.GPU or self.prompts is not None):
            raise GoldenError("--confirm needs --with gpu and all prompts")

    @property
    def description(self) -> str:
        """What is run, in words."""
        if self.way is Way.REFERENCE:
            return "reference, token by token" if self.sequential else "reference, replayed"
        extra = [f"batches of {self.batch_size}"] if self.batch_size is not None else []
        extra += [f"shuffled with {self.shuffle}"] if self.shuffle is not None else []
        where = "interpreter" if self.way is Way.INTERPRETER else "GPU"
        return ", ".join([f"kernels on the {where}", *extra])
