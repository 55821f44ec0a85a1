"""What `bitassay check --with engine` takes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitassay.golden.errors import GoldenError
from bitassay.golden.runs.engine_options import EngineOptions, SweepOptions

K = Annotated[
    int | None,
    typer.Option("--k", min=0, metavar="K", help="engine: draft tokens a round; 3, or 0 headless"),
]
Dp = Annotated[int | None, typer.Option("--dp", min=1, metavar="N", help="engine: ranks; 1")]
BackendName = Annotated[
    str | None,
    typer.Option("--backend", metavar="NAME", help="engine: gpu, interpreter or reference; gpu"),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option("--max-num-seqs", min=1, metavar="N", help="engine: requests at once; 64"),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option("--max-num-batched-tokens", min=1, metavar="N", help="engine: rows a step; 2048"),
]
NumBlocks = Annotated[
    int | None,
    typer.Option("--num-blocks", min=1, metavar="N", help="engine: blocks of 16 positions"),
]
NoPrefixCaching = Annotated[
    bool, typer.Option("--no-prefix-caching", help="engine: compute every prompt anew")
]
Arrivals = Annotated[
    bool, typer.Option("--arrivals", help="engine: prompts come late, at steps by --seed")
]
Cancel = Annotated[
    int | None,
    typer.Option(
        "--cancel", min=1, metavar="N", help="engine: beside every Nth prompt a cancelled copy"
    ),
]
Warm = Annotated[bool, typer.Option("--warm", help="engine: run twice, compare the second time")]
Eager = Annotated[
    bool | None, typer.Option("--eager/--graphs", help="engine: without or with CUDA graphs")
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", help="engine: for one step of all ranks"),
]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="engine: some forty configurations in which all pairs meet")
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="engine: of --arrivals and of a sweep's orders; 0")
]


def engine_options(
    *,
    engine: bool,
    sweep: bool,
    seed: int | None,
    arrivals: bool,
    shuffle: int | None,
    anywhere: dict[str, Any],
    alone: dict[str, Any],
) -> tuple[EngineOptions | None, SweepOptions | None]:
    """Return how the engine runs, and the sweep that was asked for, if any.

    anywhere: options by name, None where not given, that a sweep takes too; alone: those that it
    sets by itself. Raises GoldenError for options of the engine without it.
    """
    late = (seed or 0) if arrivals else None
    given = {key: value for key, value in anywhere.items() if value is not None}
    own = {key: value for key, value in (alone | {"late": late}).items() if value is not None}
    if not engine:
        if given or own or sweep or seed is not None:
            raise GoldenError("options of the serving engine (--k to --seed) need --with engine")
        return None, None
    if seed is not None and not (arrivals or sweep):
        raise GoldenError(
            "--seed is of --arrivals and of --sweep: add one of them, or leave it away; --shuffle "
            "takes a seed of its own"
        )
    if sweep:
        if own or shuffle is not None:
            raise GoldenError(
                "--sweep chooses configurations itself: beside it --dp, --backend, --timeout, "
                "--seed, --prompts and --tokens"
            )
        return EngineOptions(**given), SweepOptions(**given, seed=seed or 0)
    return EngineOptions(**given, **own, shuffle=shuffle), None
