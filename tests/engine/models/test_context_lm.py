"""The engine in the emulator against the sequential truth, and what it refuses."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from bitassay.engine.models.context_lm import ContextLM
from bitassay.engine.trace import TOP, Trace
from bitassay.kernels.linear_pointer import INTERPRETED
from bitassay.reference.checkpoints.checkpoint import Checkpoint, CheckpointError
from bitassay.reference.context_lm import ContextLM as Reference
from bitassay.reference.spec.contract import Contract, default_contract
from bitassay.reference.trace import TOP as REFERENCE_TOP
from bitassay.reference.trace import Trace as ReferenceTrace
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

V, C, E = 50, 4, 16
PROMPTS = [[1], [2, 3], [4, 5, 6, 7, 8], [9, 10, 11], [49, 0, 0, 49]]


def checkpoint(dtype: str = "bfloat16", **changes: object) -> Checkpoint:
    kind = getattr(torch, dtype)
    tensors = {f"embed_tokens.{j}.weight": matrix("normal", V, E, kind, j) for j in range(C)}
    tensors["lm_head.weight"] = matrix("normal", V, C * E, kind, 10)
    tensors["lm_head.bias"] = matrix("normal", 1, V, kind, 11)[0]
    config = {
        "model_type": "context-lm", "vocab_size": V, "context_size": C, "embedding_size": E,
        "pad_token_id": 0, "torch_dtype": dtype, **changes,
    }  # fmt: skip
    return Checkpoint(Path("made-up"), config, tensors, "digest", None)


def engine(contract: Contract, **changes: object) -> ContextLM:
    return ContextLM.from_pretrained(checkpoint(**changes), contract=contract, device="cpu")  # type: ignore[arg-type]


def assert_same_traces(got: list[Trace], want: list[ReferenceTrace]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        for field in fields(other):
            assert_same_bits(getattr(one, field.name), getattr(other, field.name))


def test_a_trace_is_the_references() -> None:
    assert [f.name for f in fields(Trace)] == [f.name for f in fields(ReferenceTrace)]
    assert TOP == REFERENCE_TOP


@interpreted
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("logits_dtype", ["weight", "float32"])
def test_generate_is_the_sequential_truth(
    gpu_emulation: str, logits_dtype: str, dtype: str
) -> None:
    contract = default_contract(gpu_emulation, logits_dtype=logits_dtype)  # type: ignore[arg-type]
    truth = Reference.from_pretrained(checkpoint(dtype), contract=contract)
    want = [truth.generate(prompt, 3) for prompt in PROMPTS]
    got = engine(contract, dtype=dtype).generate(PROMPTS, 3)
    assert_same_traces(got, want)
    assert len({tuple(trace.tokens.tolist()) for trace in got}) > 1


@interpreted
@pytest.mark.parametrize(
    ("batch_size", "order"), [(1, None), (2, [4, 0, 3, 1, 2]), (3, [4, 3, 2, 1, 0]), (9, None)]
)
def test_neither_batch_nor_order_changes_a_bit(
    gpu_emulation: str, batch_size: int, order: list[int] | None
) -> None:
    contract = default_contract(gpu_emulation)
    truth = Reference.from_pretrained(checkpoint(), contract=contract)
    want = [truth.generate(prompt, 2) for prompt in PROMPTS]
    got = engine(contract).generate(PROMPTS, 2, batch_size=batch_size, order=order)
    assert_same_traces(got, want)


@interpreted
def test_no_prompts_no_traces(gpu_emulation: str) -> None:
    model = engine(default_contract(gpu_emulation))
    assert model.generate([], 3) == []


@interpreted
def test_bad_input_is_refused(gpu_emulation: str) -> None:
    model = engine(default_contract(gpu_emulation))
    with pytest.raises(ValueError, match="prompt 1: expected at least one token id"):
        model.generate([[1], []], 2)
    for bad in (-1, V):
        with pytest.raises(ValueError, match=f"prompt 0, position 1: .* 0 … 49 .* found {bad}"):
            model.generate([[1, bad]], 2)
    with pytest.raises(ValueError, match="prompt 0: expected integer ids, found float"):
        model.generate([[1.5]], 2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least 1, found 0 and 1"):
        model.generate([[1]], 0)
    with pytest.raises(ValueError, match="at least 1, found 2 and 0"):
        model.generate([[1]], 2, batch_size=0)
    for order in ([0], [0, 0], [0, 2]):
        with pytest.raises(ValueError, match=r"order: expected each of 0 … 1 once"):
            model.generate([[1], [2]], 2, order=order)


@interpreted
def test_nan_names_prompt_step_and_id(gpu_emulation: str) -> None:
    model = engine(default_contract(gpu_emulation))
    clean = model.generate([[1], [2]], 2)
    chosen = int(clean[1].tokens[0])
    model._tables[0][chosen] = torch.inf  # seen by prompt 1 from step 1 on
    model._weight[30:, 0], model._weight[30:, 1] = 1, -1  # inf - inf from id 30 on
    assert int(clean[0].tokens[0]) != chosen
    with pytest.raises(ValueError, match="prompt 1, step 1: .* NaN, first at id"):
        model.generate([[1], [2]], 2, order=[1, 0])


@interpreted
def test_unfit_checkpoints_are_refused(gpu_emulation: str) -> None:
    contract = default_contract(gpu_emulation)
    with pytest.raises(CheckpointError, match="expected model_type 'context-lm', found 'llama'"):
        engine(contract, model_type="llama")
    with pytest.raises(CheckpointError, match="pad_token_id below vocab_size 50, found 50"):
        engine(contract, pad_token_id=50)
    with pytest.raises(CheckpointError, match="does not fit its config.json"):
        engine(contract, embedding_size=8)


@interpreted
def test_another_architecture_is_refused(gpu_emulation: str) -> None:
    other = {"sm_89": "sm_90", "sm_90": "sm_89"}[gpu_emulation]
    with pytest.raises(RuntimeError, match=f"contract is {other}'s"):
        engine(default_contract(other))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels: run with TRITON_INTERPRET=0")
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_generate_on_a_gpu(cuda: torch.device, batch_size: int | None) -> None:
    from bitassay.kernels.invariant import _contract_of

    contract = _contract_of(torch.device("cuda", torch.cuda.current_device()))
    truth = Reference.from_pretrained(checkpoint(), contract=contract)
    model = ContextLM.from_pretrained(checkpoint(), contract=contract, device=cuda)
    want = [truth.generate(prompt, 8) for prompt in PROMPTS]
    assert_same_traces(model.generate(PROMPTS, 8, batch_size=batch_size), want)
