"""What `bitassay run` prints: streams as they come, and what was counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields

from rich.table import Table
from rich.text import Text

from bitassay.cli.console import say
from bitassay.engine.scheduling.stats import Stats
from bitassay.golden.inputs.job import Job
from bitassay.golden.runs.engine_job import EngineRun

_UNFINISHED = "�"  # of a character whose last bytes are in a later token


class Streams:
    """Prints each stream when it ends; with `pieces`, each step's text at once, on its own line."""

    def __init__(
        self,
        job: Job,
        decode: Callable[[list[int]], str],
        *,
        pieces: bool,
    ) -> None:
        self._prompts, self._names, self._decode = job.prompts, job.prompt_names, decode
        self._pieces = pieces
        self._tokens: dict[int, list[int]] = {}
        self._printed: dict[int, int] = {}  # prompt -> characters of its text, pieces alone
        self._ended: set[int] = set()

    def take(self, prompt: int, tokens: list[int], reason: str | None) -> None:
        """Take a prompt's new tokens, and the reason for its end, if it has ended."""
        own = self._tokens.setdefault(prompt, [])
        own += tokens
        if self._pieces:
            self._piece(prompt, ended=reason is not None)
        elif reason is not None:
            self._whole(prompt, own)
        if reason is not None:
            self._ended.add(prompt)

    def rest(self, run: EngineRun) -> None:
        """Print the streams that did not come step by step."""
        for prompt, arrays in enumerate(run.traces):
            if arrays is not None and prompt not in self._ended:
                self._whole(prompt, arrays["tokens"].tolist())

    def _whole(self, prompt: int, tokens: list[int]) -> None:
        say(Text(f"\n── {self._names[prompt]}", style="bold"))
        text, said = self._split(prompt, tokens)
        say(Text(text, style="dim").append(Text(said, style="not dim green")))
        sys.stdout.flush()

    def _piece(self, prompt: int, *, ended: bool) -> None:
        _, said = self._split(prompt, self._tokens[prompt])
        before = self._printed.get(prompt, 0)
        if said.endswith(_UNFINISHED) and not ended:
            return
        self._printed[prompt] = len(said)
        say(Text(f"{self._names[prompt]}: {said[before:]!r}"))
        sys.stdout.flush()

    def _split(self, prompt: int, tokens: list[int]) -> tuple[str, str]:
        """Return the prompt's text and what was generated after it."""
        ids = list(self._prompts[prompt])
        text, whole = self._decode(ids), self._decode(ids + tokens)
        # What stands between the two, a blank between ids, belongs to neither alone.
        said = whole.removeprefix(text) if whole.startswith(text) else self._decode(tokens)
        return text, said


def counted(run: EngineRun) -> Table:
    """Return a table of what each rank counted, and all together."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    names = [field.name for field in fields(Stats)]
    for header in ("rank", *(name.replace("_", " ") for name in names), "tokens a round"):
        table.add_column(header, justify="right")
    table.add_column("tokens/s", justify="right")
    rows = [(str(rank), stats, "") for rank, stats in enumerate(run.stats)]
    rows.append(("all", run.total, f"{run.total.tokens / run.seconds:,.1f}"))
    for rank, stats, rate in rows[-1:] if len(run.stats) == 1 else rows:
        numbers = [f"{getattr(stats, name):,}" for name in names]
        table.add_row(rank, *numbers, f"{stats.acceptance_length:.2f}", rate)
    return table
