"""What the engine's options are called on the command line, by the field that each sets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """How a field is given.

    default: in words, where the record's own default says too little. sets: the value that a flag
    without a value stands for.
    """

    names: str
    help: str
    metavar: str | None = None
    minimum: int | None = None
    default: str | None = None
    sets: bool = True


FLAGS = {
    "backend": Flag("--backend", "gpu, interpreter or reference", "NAME"),
    "dp": Flag("--dp", "data-parallel ranks, which share the prompts", "N", 1),
    "num_speculative_tokens": Flag("--k", "draft tokens a round", "K", 0, "3 with a head, else 0"),
    "max_num_seqs": Flag("--max-num-seqs", "requests that run at once, on each rank", "N", 1),
    "max_num_batched_tokens": Flag("--max-num-batched-tokens", "rows a step", "N", 1),
    "num_blocks": Flag(
        "--num-blocks", "blocks of 16 positions in the cache", "N", 1, "enough for all"
    ),
    "enable_prefix_caching": Flag(
        "--no-prefix-caching", "compute every prefix anew", default="kept", sets=False
    ),
    "enforce_eager": Flag(
        "--eager/--graphs",
        "decode without or with CUDA graphs",
        None,
        None,
        "as the GPU is trusted",
    ),
    "shuffle": Flag("--shuffle", "take the prompts in another order", "SEED"),
    "late": Flag("--arrivals", "let prompts come late, at steps drawn with this seed", "SEED"),
    "cancel": Flag("--cancel", "beside every Nth prompt, a copy that is cancelled", "N", 1),
    "warm": Flag("--warm", "run twice and compare the second time", default="once"),
    "timeout": Flag(
        "--timeout", "seconds that ranks wait for each other", "S", None, "60 on GPUs, else 1800"
    ),
}


def spelled(names: list[str]) -> str:
    """Return fields as they are spelled on the command line."""
    return ", ".join(FLAGS[name].names if name in FLAGS else name for name in names)
