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

    prompts: only the first so many, None for all; tokens: the first so many of each. batch_size,
    shuffle, chunk_size: see runners.Job. confirm: note in the manifest that this GPU gave these
    bits. jobs: the reference's processes, None for as many as are useful.
    """

    way: Way = Way.REFERENCE
    sequential: bool = False
    prompts: int | None = None
    tokens: int | None = None
    batch_size: int | None = None
    shuffle: int | None = None
    chunk_size: int | None = None
    confirm: bool = False
    jobs: int | None = None

    def __post_init__(self) -> None:
        reference = self.way is Way.REFERENCE
        if reference and (self.batch_size, self.shuffle, self.chunk_size) != (None, None, None):
            raise GoldenError(
                "--batch-size, --shuffle and --chunk-size need --with interpreter or --with gpu"
            )
        if self.jobs is not None and not reference:
            raise GoldenError("--jobs is for --with reference: kernels run in one process")
        if self.sequential and not reference:
            raise GoldenError("--sequential is for --with reference: kernels always generate")
        partly = self.prompts is not None or self.tokens is not None
        if self.confirm and (self.way is not Way.GPU or partly):
            raise GoldenError("--confirm needs --with gpu, all prompts and all tokens")

    @property
    def description(self) -> str:
        """What is run, in words."""
        if self.way is Way.REFERENCE:
            return "reference, token by token" if self.sequential else "reference, replayed"
        extra = [f"batches of {self.batch_size}"] if self.batch_size is not None else []
        extra += [f"shuffled with {self.shuffle}"] if self.shuffle is not None else []
        extra += [f"prompts in chunks of {self.chunk_size}"] if self.chunk_size is not None else []
        where = "interpreter" if self.way is Way.INTERPRETER else "GPU"
        return ", ".join([f"kernels on the {where}", *extra])
