"""Running the oracle beside a golden: replayed from its tokens, or generated again."""

from __future__ import annotations

from dataclasses import dataclass

from bitassay.golden.inputs.job import Progress
from bitassay.golden.inputs.suite_inputs import Inputs
from bitassay.golden.runs import oracle
from bitassay.golden.runs.process_pool import suitable_crew
from bitassay.golden.runs.runner import Log, Run
from bitassay.golden.streams.token_stream import TokenStream


@dataclass(frozen=True)
class OracleRunner:
    """The reference in plain PyTorch.

    sequential: one prompt and one token at a time, nothing replayed. jobs: processes, None for as
    many as are useful.
    """

    sequential: bool = False
    jobs: int | None = None

    @property
    def on_gpu(self) -> bool:
        """Never: it runs on CPUs."""
        return False

    def describe(self, inputs: Inputs) -> str:
        """Return what is run, in words."""
        return "reference, token by token" if self.sequential else "reference, replayed"

    def run(self, inputs: Inputs, expected: TokenStream, progress: Progress, log: Log) -> Run:
        """Run the prompts and tokens of `expected`."""
        job = inputs.first(len(expected.prompt_names), expected.steps)
        crew = suitable_crew(job, inputs.facts, self.jobs)
        if crew.note:
            log(f"{inputs.identity.name}: {crew.note}")
        if self.sequential:
            found = oracle.generate(job, inputs.facts, progress, crew=crew, sequential=True)
        else:
            tokens = expected.tokens.tolist()
            found = oracle.replay(job, inputs.facts, tokens, progress, crew=crew)
        return Run(expected, found)
