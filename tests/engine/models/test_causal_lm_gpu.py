"""Compiled whole models on this machine's GPU: every operation of every row of a suite."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from random import Random
from typing import Any, NamedTuple

import pytest
import torch

from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.run import Run
from bitassay.engine.trace import Trace
from bitassay.golden.inputs.prompts import encode_prompts, load_prompts
from bitassay.kernels.linear_pointer import INTERPRETED
from bitassay.reference.checkpoints.checkpoint import load_checkpoint, load_tokenizer
from bitassay.reference.model import load_model
from bitassay.reference.spec.contract import default_contract
from support.paths import GOLDEN
from support.same_bits import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels: TRITON_INTERPRET=0"),
]

PICO, PROMPTS = GOLDEN / "models" / "llama-pico", GOLDEN / "prompts" / "llama-pico.jsonl"
TOKENS = 64


class Suite(NamedTuple):
    """A model on the GPU, its prompts, and what the reference says of them."""

    model: CausalLM
    prompts: list[list[int]]
    truth: Sequence[Any]


@pytest.fixture(scope="module")
def suite(cuda: torch.device) -> Suite:
    """The suite under the device's contract.

    The truth replays what the engine generated: as long as every row chooses the next token of it,
    that is what the reference generates.
    """
    major, minor = torch.cuda.get_device_capability(cuda)
    contract = default_contract(f"sm_{major}{minor}")
    checkpoint = load_checkpoint(PICO)
    model = CausalLM.from_pretrained(checkpoint, contract=contract, device=cuda)
    vocabulary = model.config.vocab_size
    prompts = encode_prompts(load_prompts(PROMPTS)[0], load_tokenizer(PICO), vocabulary)
    tokens = [trace.tokens.tolist() for trace in model.generate(prompts, TOKENS)]
    truth = load_model(checkpoint, contract=contract).replay_many(prompts, tokens)
    assert [trace.tokens.tolist() for trace in truth] == tokens
    return Suite(model, prompts, truth)


def assert_same_traces(got: Sequence[Trace], want: Sequence[Any]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        for field in fields(other):
            assert_same_bits(getattr(one, field.name), getattr(other, field.name))


@contextmanager
def forbidden_to_wait() -> Iterator[None]:
    """Let torch raise for anything that waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch_size", [1, 2, 7, 32, 64])
def test_batch_sizes(suite: Suite, batch_size: int) -> None:
    got = suite.model.generate(suite.prompts, TOKENS, batch_size=batch_size)
    assert_same_traces(got, suite.truth)


@pytest.mark.parametrize("chunk_size", [16, 100, 256])
def test_chunks_of_prompts_shuffled(suite: Suite, chunk_size: int) -> None:
    order = Random(chunk_size).sample(range(len(suite.prompts)), len(suite.prompts))
    got = suite.model.generate(
        suite.prompts, TOKENS, batch_size=7, order=order, chunk_size=chunk_size
    )
    assert_same_traces(got, suite.truth)


def test_replay(suite: Suite) -> None:
    tokens = [trace.tokens.tolist() for trace in suite.truth]
    assert_same_traces(suite.model.replay(suite.prompts, tokens), suite.truth)


def test_no_step_waits_for_the_device(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    run, steps = Run._run, []

    def guarded(self: Run, *arguments: Any) -> Any:
        with forbidden_to_wait():
            steps.append(self)
            return run(self, *arguments)

    monkeypatch.setattr(Run, "_run", guarded)
    suite.model.generate(suite.prompts[:3], 4, batch_size=2, chunk_size=16)
    assert len(steps) > 4
