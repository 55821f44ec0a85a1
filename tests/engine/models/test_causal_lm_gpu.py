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

from bitassay.engine.config import EngineConfig
from bitassay.engine.engine import Engine
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.step.device_step import DeviceStep
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


def generate(
    model: CausalLM,
    prompts: list[list[int]],
    tokens: int,
    *,
    order: list[int] | None = None,
    **config: Any,
) -> list[Any]:
    """Serve prompts without drafts; config: fields of EngineConfig."""
    return Engine(model, config=EngineConfig(**config)).generate(prompts, tokens, order=order)


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
    tokens = [trace.tokens.tolist() for trace in generate(model, prompts, TOKENS)]
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


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 7, 32, 64])
def test_requests_at_once(suite: Suite, max_num_seqs: int, graphs: bool) -> None:
    how = {"max_num_seqs": max_num_seqs, "enforce_eager": None if graphs else True}
    assert_same_traces(generate(suite.model, suite.prompts, TOKENS, **how), suite.truth)


@pytest.mark.parametrize("rows", [16, 100, 256])
def test_chunks_of_prompts_shuffled(suite: Suite, rows: int) -> None:
    order = Random(rows).sample(range(len(suite.prompts)), len(suite.prompts))
    got = generate(
        suite.model, suite.prompts, TOKENS, order=order, max_num_seqs=7, max_num_batched_tokens=rows
    )
    assert_same_traces(got, suite.truth)


def test_nothing_on_the_device_waits(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for a step's answer alone, and not within the step."""
    step, steps = DeviceStep.__call__, []

    def guarded(self: DeviceStep, *arguments: Any) -> Any:
        with forbidden_to_wait():
            steps.append(self)
            return step(self, *arguments)

    monkeypatch.setattr(DeviceStep, "__call__", guarded)
    generate(
        suite.model, suite.prompts[:3], 4,
        max_num_seqs=2, max_num_batched_tokens=16, enforce_eager=True,
    )  # fmt: skip
    assert len(steps) > 4
