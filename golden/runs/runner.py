"""What can be checked against a golden: a runner takes a suite's prompts and returns a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from bitassay.engine.scheduling.stats import Stats
from bitassay.golden.inputs.job import Progress
from bitassay.golden.inputs.suite_inputs import Inputs
from bitassay.golden.streams.token_stream import TokenStream

Log = Callable[[str], None]  # called with what the user should know before the work begins


@dataclass(frozen=True)
class Run:
    """What a run gave, and what of the golden it is to be compared with.

    expected: the golden's streams of the prompts that were run, drafts as far as the run's rounds
    come to them. missing: what the run was made for and did not come to. stats: what an engine's
    ranks counted together, None of the oracle.
    """

    expected: TokenStream
    found: TokenStream
    missing: tuple[str, ...] = ()
    stats: Stats | None = None


class Runner(Protocol):
    """Something that runs a suite's prompts and nothing else in its place."""

    @property
    def on_gpu(self) -> bool:
        """Whether what it gives is what a GPU computed."""

    def describe(self, inputs: Inputs) -> str:
        """Return what is run, in words."""

    def run(self, inputs: Inputs, expected: TokenStream, progress: Progress, log: Log) -> Run:
        """Run the prompts and tokens of `expected`, the golden's or the first of them.

        Raises GoldenError when it cannot: nothing else is run in its place.
        """
