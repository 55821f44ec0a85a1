"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitassay.golden.errors import GoldenError

OWN_MODEL, OUTPUT = "A model of your own", "Store and output"

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[GOLDEN]...", help="<suite> or <suite>/<arch>: context-lm/sm_89"),
]
Everything = Annotated[bool, typer.Option("--all", help="every golden of bitassay's own suites")]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR|URL",
        help="default: BITASSAY_STORE, else the checkout's golden/store, else the packaged one",
        rich_help_panel=OUTPUT,
    ),
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="DIR",
        help="a Hugging Face model directory; needs --prompts FILE",
        rich_help_panel=OWN_MODEL,
    ),
]
DraftOption = Annotated[
    Path | None,
    typer.Option(
        "--draft", metavar="DIR", help="an EAGLE draft head for it", rich_help_panel=OWN_MODEL
    ),
]
PromptsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--prompts",
        metavar="N|FILE",
        help="the first N prompts alone; with --model, the file of prompts; may be given for both",
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="processes (default: as CPUs, work and memory allow)"),
]
SequentialOption = Annotated[
    bool,
    typer.Option(
        "--sequential", help="generate one prompt and one token at a time, in place of a replay"
    ),
]


def prompts_options(values: list[str] | None, model: Path | None) -> tuple[int | None, Path | None]:
    """Return how many prompts, and which file of them, what was given for --prompts means.

    Digits are a number, and anything else is a file. Raises GoldenError unless there is a file
    exactly where there is a model of the user's own.
    """
    numbers = [value for value in values or [] if value.isdecimal()]
    files = [value for value in values or [] if not value.isdecimal()]
    if len(numbers) > 1 or len(files) > 1:
        raise GoldenError("--prompts: expected at most one number and one file")
    if numbers and int(numbers[0]) < 1:
        raise GoldenError("--prompts: expected at least 1 prompt, found 0")
    if model is None and files:
        raise GoldenError(
            f"--prompts {files[0]}: expected a number of prompts; a file of them needs --model DIR"
        )
    if model is not None and not files:
        raise GoldenError("--model needs --prompts FILE")
    return (int(numbers[0]) if numbers else None), (Path(files[0]) if files else None)
