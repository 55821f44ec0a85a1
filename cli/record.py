"""`bitassay record`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from bitassay.cli.comparison_output import say_comparison
from bitassay.cli.console import DIFFERENT, EQUAL, each, progress, say
from bitassay.cli.options import (
    DraftOption,
    Everything,
    JobsOption,
    ModelOption,
    Names,
    PromptsOption,
    SequentialOption,
    StoreOption,
    prompts_options,
)
from bitassay.golden.errors import GoldenError
from bitassay.golden.paths import PACKAGED
from bitassay.golden.provenance import another
from bitassay.golden.suites import DEFAULT_ARCHES, Suite, find_suite, own_suite, select

if TYPE_CHECKING:
    from bitassay.golden.record import Recording
    from bitassay.golden.storage.store import Store


def record(
    names: Names = None,
    everything: Everything = False,
    accept: Annotated[
        bool, typer.Option("--accept", help="write what is new or different (never under CI)")
    ] = False,
    sequential: SequentialOption = False,
    prompts: PromptsOption = None,
    jobs: JobsOption = None,
    model: ModelOption = None,
    draft: DraftOption = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "--arch",
            metavar="ARCH",
            help="with --model: sm_90; repeatable; sm_89 and sm_90 if unset",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="with --model: tokens for each prompt")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="with --model: the golden's; else the directory's")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Regenerate goldens with the reference and compare them with the store.

    Recorded tokens are replayed: where each is chosen again, the golden is
    what would be generated. Where they are not, or the golden is of another
    model or contract, it is generated step by step.

    Without --accept nothing is written: equal is 0, different is 1, missing is
    2. Only a new golden of a model of your own is written at once. It may be
    interrupted, and goes on where it ended.

    Example: bitassay record context-lm/sm_89 --accept

    Example: bitassay record --model ./my-llama --prompts my.jsonl --max-tokens 64 --store ./goldens
    """
    count, file = prompts_options(prompts, model)
    from bitassay.golden.storage.store import find_store

    target = find_store(store)
    if model is None:
        if arch or max_tokens is not None or name is not None or draft is not None:
            raise GoldenError("--arch, --max-tokens, --name and --draft need --model DIR")
        chosen = {golden: find_suite(golden) for golden in select(names or [], everything)}
    else:
        if names or everything:
            raise GoldenError("--model records goldens of its own: name no others, and not --all")
        if max_tokens is None or file is None:
            raise GoldenError("--model needs --max-tokens N: how many each prompt is continued by")
        _require_own_store(target)
        arches = tuple(arch or DEFAULT_ARCHES)
        suite = own_suite(model, file, max_tokens, name=name, arches=arches, draft=draft)
        chosen = {f"{suite.name}/{one}": (suite, one) for one in suite.arches}

    from bitassay.golden.record import Request  # torch takes seconds to import, --help should not
    from bitassay.golden.record import record as run

    request = Request(accept, sequential, count, jobs)

    def one(golden: str) -> int:
        suite, arch = chosen[golden]
        with progress(golden, "the reference") as meter:
            recording = run(target, suite, arch, request, progress=meter, log=meter.log)
        return _report(golden, recording, suite)

    raise typer.Exit(each(list(chosen), one))


def _require_own_store(store: Store) -> None:
    if Path(store.root).resolve() == PACKAGED.resolve():
        raise GoldenError(
            "bitassay's own store is for its suites: name one for your models with --store DIR"
        )


def _report(name: str, recording: Recording, suite: Suite) -> int:
    if recording.comparison:
        say_comparison(name, recording.how, recording.comparison, suite.model)
    if recording.incomparable:
        say(Text(f"{name}: different: {recording.incomparable}", style="bold red"))
    for key in recording.changed:
        say(Text(f"{name}: recorded with {another(key)}"))
    if recording.published:
        new = "" if recording.comparison or recording.incomparable else f"{recording.how}; "
        say(Text(f"{name}: {new}written, digest {recording.published.digest}"))
    elif not recording.equal:
        again = (
            "the same command with --accept" if suite.own else f"bitassay record {name} --accept"
        )
        kept = " (what was generated is kept until then)" if recording.kept else ""
        say(Text(f"{name}: nothing was written; to replace it: {again}{kept}"))
    return EQUAL if recording.equal or recording.published else DIFFERENT
