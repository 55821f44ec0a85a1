"""An engine under trial: a model whose operations can be exchanged, and the golden it must give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitassay.engine.distributed.group import Group
from bitassay.engine.distributed.parallel import run_parallel
from bitassay.engine.distributed.rendezvous import RankInfo
from bitassay.engine.engine import Engine
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.eagle import EagleHead
from bitassay.engine.models.ops import Ops
from bitassay.golden.compare.diff import Comparison, Difference, compare
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import ModelFacts, model_facts
from bitassay.golden.runs.collect import collect
from bitassay.golden.runs.engine_job import EngineRun
from bitassay.golden.runs.engine_options import EngineOptions
from bitassay.golden.runs.engine_requests import as_run, engine_job, lay_out
from bitassay.golden.streams.token_stream import TokenStream
from bitassay.golden.streams.traces import trace_arrays
from bitassay.reference.checkpoints.checkpoint import load_checkpoint
from bitassay.reference.eagle import Eagle
from bitassay.reference.spec.contract import Contract
from support.planted_faults import Switch


@dataclass(frozen=True)
class Trial:
    """A model with its head, loaded on a switch, and prompts to be continued.

    What a run gives is judged as by `bitassay check`, but the engine runs in this process, where
    its operations and functions can be exchanged.
    """

    job: Job
    facts: ModelFacts
    switch: Switch
    model: CausalLM
    head: EagleHead

    @classmethod
    def load(cls, job: Job, contract: Contract, ops: Ops, device: str | torch.device) -> Trial:
        """Load a job's model and head on a switch over a ops."""
        assert job.draft is not None
        checkpoint, draft = load_checkpoint(job.model), load_checkpoint(job.draft)
        switch = Switch(ops, device)
        model = CausalLM.from_pretrained(
            checkpoint, contract=contract, device=device, ops=switch.ops
        )
        head = EagleHead.from_pretrained(draft, model)
        return cls(job, model_facts(checkpoint, contract, draft), switch, model, head)

    def tokens(self) -> list[list[int]]:
        """Return what the engine alone says, without drafts."""
        traces = Engine(self.model).generate(self.job.prompts, self.job.steps)
        return [trace.tokens.tolist() for trace in traces if trace is not None]

    def run(self, golden: TokenStream, **options: Any) -> Comparison:
        """Run a fresh engine with fields of EngineOptions; compare all that it says."""
        asked = EngineOptions(**options)
        requests = lay_out(len(self.job.prompts), asked)
        ready = engine_job(self.job, asked, requests)
        engine = Engine(self.model, self.head, ready.config)
        with Group(RankInfo(0, 1), self.model.device, ready.seconds) as group:
            gathered = run_parallel(engine, ready.requests, group)
        assert gathered is not None
        gave = EngineRun.of(gathered)
        run = as_run(gave, self.job, self.facts, golden, asked, requests)
        return compare(run.expected, run.found)


def job_of(folder: Path, arch: str, prompts: list[list[int]], tokens: int) -> Job:
    """Return prompts for the model and head that `write_wide` made in a folder."""
    names = tuple(f"p{i}" for i in range(len(prompts)))
    ids = tuple(map(tuple, prompts))
    return Job(folder / "model", "", arch, names, ids, tokens, draft=folder / "head")


def oracle(trial: Trial, tokens: list[list[int]] | None = None) -> TokenStream:
    """Return the oracle's stream of a trial's prompts.

    tokens: streams to be replayed, which must be what the oracle chooses; None to generate them.
    """
    job, contract = trial.job, trial.model.contract
    assert job.draft is not None
    eagle = Eagle.from_pretrained(job.model, job.draft, contract=contract)
    if tokens is None:
        traces = eagle.generate_many(job.prompts, job.steps)
    else:
        traces = eagle.replay_many(job.prompts, tokens)
        chosen = [trace.tokens.tolist() for trace in traces]
        assert chosen == tokens, "the engine's streams are not the oracle's"
    return collect([trace_arrays(trace) for trace in traces], job, trial.facts)


def first_check(comparison: Comparison) -> str:
    """Say what the first difference of the first differing stream is, "" where all are equal."""
    return _told(comparison.differences[0]) if comparison.differences else ""


def _told(difference: Difference) -> str:
    """Say where a difference is, and the first operation whose rows differ."""
    if "accepted" in difference.arrays and not difference.operations:
        return "accepted drafts"
    where = "generated row" if difference.draft is None else "draft"
    where = "prompt" if difference.step is None else where
    if not difference.operations:
        return f"{where}: choice"
    return f"{where}: {difference.operations[0]}"
