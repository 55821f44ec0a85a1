"""The ways to check a golden, as the command names them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from bitassay.golden.errors import GoldenError
from bitassay.golden.runs.engine_options import DRAFTS, EngineOptions

NO_GPU = (
    "no GPU: --backend gpu needs a CUDA device that torch can use, and nothing else was run in its "
    "place; on a CPU use --backend reference or --backend interpreter"
)


class Backend(StrEnum):
    """What an engine's operations run on."""

    GPU = "gpu"
    INTERPRETER = "interpreter"
    REFERENCE = "reference"


class Way(StrEnum):
    """What can be checked against a golden."""

    REFERENCE = "reference"
    INTERPRETER = "interpreter"
    GPU = "gpu"
    ENGINE = "engine"


@dataclass(frozen=True)
class Options:
    """How to check. sequential: the reference generates token by token instead of replaying.

    prompts: only the first so many, None for all; tokens: the first so many of each. batch_size,
    shuffle, chunk_size: see runners.Job. confirm: note in the manifest that this GPU gave these
    bits. jobs: the reference's processes, None for as many as are useful. engine: how the serving
    engine runs; a golden with drafts is checked with it on the GPU and in the interpreter too.
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
    engine: EngineOptions | None = None

    def __post_init__(self) -> None:
        reference = self.way is Way.REFERENCE
        if (self.engine is not None) != (self.way is Way.ENGINE):
            raise GoldenError("options of the serving engine need --with engine")
        if self.engine and (self.batch_size, self.chunk_size) != (None, None):
            raise GoldenError(
                "--batch-size and --chunk-size are --max-num-seqs and --max-num-batched-tokens "
                "with --with engine"
            )
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
    def for_drafts(self) -> EngineOptions | None:
        """How the serving engine checks a golden with drafts; None where the reference does."""
        if self.engine or self.way is Way.REFERENCE:
            return self.engine
        return EngineOptions(
            backend=str(self.way),
            max_num_seqs=self.batch_size or EngineOptions.max_num_seqs,
            max_num_batched_tokens=max(
                self.chunk_size or EngineOptions.max_num_batched_tokens, DRAFTS + 1
            ),
            shuffle=self.shuffle,
        )

    @property
    def description(self) -> str:
        """What is run, in words."""
        if self.engine:
            return self.engine.description
        if self.way is Way.REFERENCE:
            return "reference, token by token" if self.sequential else "reference, replayed"
        extra = [f"batches of {self.batch_size}"] if self.batch_size is not None else []
        extra += [f"shuffled with {self.shuffle}"] if self.shuffle is not None else []
        extra += [f"prompts in chunks of {self.chunk_size}"] if self.chunk_size is not None else []
        where = "interpreter" if self.way is Way.INTERPRETER else "GPU"
        return ", ".join([f"kernels on the {where}", *extra])
