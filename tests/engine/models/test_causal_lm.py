"""Whole models, batched and paged in the emulator, against the reference's sequential truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitassay.engine.config import EngineConfig
from bitassay.engine.engine import Engine
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.ops import kernel_ops
from bitassay.engine.step import device_step
from bitassay.engine.trace import Trace
from bitassay.kernels.attention import paged_attention
from bitassay.kernels.linear_pointer import INTERPRETED
from bitassay.reference.checkpoints.checkpoint import Checkpoint, CheckpointError
from bitassay.reference.model import load_model
from bitassay.reference.spec.contract import Contract, default_contract
from bitassay.reference.spec.errors import SequenceError
from bitassay.reference.trace import Trace as ReferenceTrace
from support.batches import Segment, make_batch
from support.same_bits import assert_same_bits

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
Tiny = Callable[..., Checkpoint]

V = 128  # tiny_llama's vocabulary
# One row, more than a block of the cache, and more than the small contract's split of keys.
PROMPTS = [[5], [(7 * i * i + 3) % V for i in range(19)], [(5 * i + 1) % V for i in range(35)]]
TOKENS = 3
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"llama3": True},  # of two layers
    "one layer": {"num_hidden_layers": 1},
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 1, "tied": True},
}


def small(arch: str) -> Contract:
    """A contract under which 35 keys are three blocks and two splits."""
    return default_contract(arch, key_block=16, key_split=32)


@pytest.fixture(scope="module")
def truth(tiny: Tiny) -> Callable[[str, str], list[ReferenceTrace]]:
    """Return the reference's traces of PROMPTS, made once for each model and architecture."""
    made: dict[tuple[str, str], list[ReferenceTrace]] = {}

    def of(model: str, arch: str) -> list[ReferenceTrace]:
        if (model, arch) not in made:
            reference = load_model(tiny(**MODELS[model]), contract=small(arch))
            made[model, arch] = reference.generate_many(PROMPTS, TOKENS)
        return made[model, arch]

    return of


def assert_same_traces(got: Sequence[Trace], want: Sequence[Trace | ReferenceTrace]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        for field in fields(other):
            assert_same_bits(getattr(one, field.name), getattr(other, field.name))


def load(checkpoint: Checkpoint, contract: Contract) -> CausalLM:
    return CausalLM.from_pretrained(checkpoint, contract=contract, device="cpu")


def generate(
    model: CausalLM,
    prompts: list[list[int]],
    tokens: int,
    *,
    order: list[int] | None = None,
    **config: Any,
) -> list[Trace]:
    """Serve prompts without drafts; config: fields of EngineConfig."""
    traces = Engine(model, config=EngineConfig(**config)).generate(prompts, tokens, order=order)
    assert None not in traces
    return traces  # type: ignore[return-value]


# Schedules do not depend on the architecture: each is run on one of the two, both models on both.
@interpreted
@pytest.mark.parametrize(
    ("gpu_emulation", "model", "count", "how"),
    [
        ("sm_89", "llama", 3, {}),
        ("sm_90", "llama", 3,
         {"max_num_seqs": 2, "order": [0, 2, 1], "max_num_batched_tokens": 16}),
        ("sm_89", "one layer", 2,
         {"max_num_seqs": 1, "order": [1, 0], "max_num_batched_tokens": 3}),
        ("sm_90", "qwen3", 3, {"max_num_seqs": 2, "order": [2, 0, 1]}),
        ("sm_90", "qwen3", 2, {"max_num_batched_tokens": 3}),
        ("sm_89", "qwen3", 3, {"max_num_seqs": 1, "max_num_batched_tokens": 16}),
    ],
    indirect=["gpu_emulation"],
)  # fmt: skip
def test_generate_is_the_sequential_truth(
    gpu_emulation: str, tiny: Tiny, truth: Any, model: str, count: int, how: dict[str, Any]
) -> None:
    want = truth(model, gpu_emulation)[:count]
    made = load(tiny(**MODELS[model]), small(gpu_emulation))
    assert_same_traces(generate(made, PROMPTS[:count], TOKENS, **how), want)
    assert len({tuple(trace.tokens.tolist()) for trace in want}) == count
    assert made.operations[-2:] == ("norm", "lm_head")
    assert want[0].fingerprints.shape == (TOKENS, len(made.operations))


@interpreted
@pytest.mark.parametrize(
    ("gpu_emulation", "model"),
    [("sm_89", "qwen3"), ("sm_90", "one layer")],
    indirect=["gpu_emulation"],
)
def test_logits_in_pieces_are_the_same(
    gpu_emulation: str, tiny: Tiny, truth: Any, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(device_step, "CHOOSING", 2)  # rows of logits at a time, of three
    made = load(tiny(**MODELS[model]), small(gpu_emulation))
    assert_same_traces(generate(made, PROMPTS, TOKENS), truth(model, gpu_emulation))


@interpreted
@pytest.mark.parametrize(
    ("gpu_emulation", "arguments", "contract"),
    [
        ("sm_89", {"dtype": torch.float16, "num_hidden_layers": 1}, {"logits_dtype": "float32"}),
        ("sm_90", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}, {}),
        (
            "sm_90",
            {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
             "num_hidden_layers": 1, "model_type": "qwen3"},
            {},
        ),
    ],
    ids=["fp16 with fp32 logits", "biases", "heads of 128"],
    indirect=["gpu_emulation"],
)  # fmt: skip
def test_other_models_give_the_same_bits(
    gpu_emulation: str, tiny: Tiny, arguments: dict[str, Any], contract: dict[str, Any]
) -> None:
    checkpoint = tiny(**arguments)
    if arguments.get("attention_bias"):
        checkpoint = with_biases(checkpoint)
    rules = default_contract(gpu_emulation, **contract)
    prompts = [[9, 8, 7], [1] * 18]
    want = load_model(checkpoint, contract=rules).generate_many(prompts, 2)
    got = generate(load(checkpoint, rules), prompts, 2, max_num_batched_tokens=17)
    assert_same_traces(got, want)


def with_biases(checkpoint: Checkpoint) -> Checkpoint:
    g = torch.Generator().manual_seed(3)
    biases = {
        name.removesuffix("weight") + "bias": torch.randn(len(t), generator=g).to(t.dtype)
        for name, t in checkpoint.tensors.items()
        if name.endswith("_proj.weight")
    }
    return replace(checkpoint, tensors=dict(checkpoint.tensors) | biases)


@interpreted
def test_what_is_observed_is_what_the_reference_observes(gpu_emulation: str, tiny: Tiny) -> None:
    """Bit by bit and not only by fingerprints, in running order, with each row's width."""
    contract = small(gpu_emulation)
    checkpoint = tiny(**MODELS["qwen3"])
    made, seen, wanted = load(checkpoint, contract), {}, {}
    load_model(checkpoint, contract=contract).hidden(
        torch.tensor(PROMPTS[1]), observe=lambda name, rows: wanted.update({name: rows.clone()})
    )
    got = forward(made, PROMPTS[1:2], lambda name, rows: seen.update({name: rows.clone()}))
    assert list(seen) == list(made.operations[:-1])
    assert_same_bits(got, seen["norm"])
    for name, rows in seen.items():
        assert_same_bits(rows, wanted[name].flatten(1))


def forward(made: CausalLM, prompts: list[list[int]], observe: Any = None) -> Tensor:
    """One step over whole prompts, in a cache of its own."""
    segments = [Segment(s, 0, len(prompt)) for s, prompt in enumerate(prompts)]
    return made.forward(make_batch(made, segments, [i for p in prompts for i in p]), observe)


def silu_rounded_twice(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate.float()).to(up.dtype) * up


def attention_in_other_blocks(*arguments: Any, contract: Contract, **options: Any) -> Tensor:
    other = default_contract(contract.arch, key_block=32, key_split=32)
    return paged_attention(*arguments, contract=other, **options)


def norm_of_unrounded_sum(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    h = x.float() + residual.float()
    normed = torch.nn.functional.rms_norm(h, h.shape[-1:], weight.float(), eps)
    return normed.to(x.dtype), h.to(x.dtype)


@interpreted
@pytest.mark.parametrize(
    ("gpu_emulation", "name", "tampered", "first"),
    [
        ("sm_90", "silu_and_mul", silu_rounded_twice, "layers.0.silu_and_mul"),
        ("sm_89", "paged_attention", attention_in_other_blocks, "layers.0.attention"),
        ("sm_90", "add_rms_norm", norm_of_unrounded_sum, "layers.0.post_attention_layernorm"),
    ],
    indirect=["gpu_emulation"],
)
def test_another_rounding_is_named_by_the_first_operation_that_differs(
    gpu_emulation: str, tiny: Tiny, truth: Any, name: str, tampered: Any, first: str
) -> None:
    want = truth("one layer", gpu_emulation)
    made = CausalLM.from_pretrained(
        tiny(**MODELS["one layer"]),
        contract=small(gpu_emulation),
        device="cpu",
        ops=replace(kernel_ops(), **{name: tampered}),
    )
    got = generate(made, PROMPTS, 1)  # of later tokens there may be others
    same = torch.cat([a.fingerprints == b.fingerprints[:1] for a, b in zip(got, want, strict=True)])
    differing = [n for n, equal in zip(made.operations, same.all(0), strict=True) if not equal]
    assert differing[0] == first


@interpreted
@pytest.mark.parametrize("gpu_emulation", ["sm_90"], indirect=True)
def test_nan_names_prompt_and_step(gpu_emulation: str, tiny: Tiny) -> None:
    checkpoint, contract = tiny(**MODELS["one layer"]), small(gpu_emulation)
    prompts = [[1, 1], [2], [3, 3, 3]]
    clean = generate(load(checkpoint, contract), prompts, 2)
    chosen = int(clean[1].tokens[0])
    assert not any(chosen in trace.tokens[:1] for trace in (clean[0], clean[2]))
    table = checkpoint.tensors["model.embed_tokens.weight"].clone()
    table[chosen] = torch.nan  # met by prompt 1 at step 1
    tensors = dict(checkpoint.tensors) | {"model.embed_tokens.weight": table}
    checkpoint = replace(checkpoint, tensors=tensors)
    broken, reference = load(checkpoint, contract), load_model(checkpoint, contract=contract)
    with pytest.raises(SequenceError, match="prompt 1, step 1: .* NaN, first at id 0") as found:
        generate(broken, prompts, 2, max_num_seqs=2, order=[2, 1, 0])
    with pytest.raises(ValueError, match="prompt 1, step .* NaN") as want:
        reference.replay_many(prompts, [trace.tokens.tolist() for trace in clean])
    assert str(found.value).partition(": ")[2] == str(want.value).partition(": ")[2]


@interpreted
@pytest.mark.parametrize("gpu_emulation", ["sm_89"], indirect=True)
def test_nan_in_a_later_piece_of_a_step(
    gpu_emulation: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_step, "CHOOSING", 1)
    checkpoint = tiny(num_hidden_layers=1)
    table = checkpoint.tensors["model.embed_tokens.weight"].clone()
    table[2] = torch.nan
    tensors = dict(checkpoint.tensors) | {"model.embed_tokens.weight": table}
    model = load(replace(checkpoint, tensors=tensors), small(gpu_emulation))
    with pytest.raises(ValueError, match="prompt 1, step 0"):
        generate(model, [[1], [2]], 1)


@interpreted
@pytest.mark.parametrize("gpu_emulation", ["sm_90"], indirect=True)
def test_eps_is_the_configurations(gpu_emulation: str, tiny: Tiny) -> None:
    checkpoint = tiny(model_type="qwen3", num_hidden_layers=1, rms_norm_eps=0.05)
    contract = default_contract(gpu_emulation)
    want = load_model(checkpoint, contract=contract).generate_many([[9, 8, 7]], 2)
    assert_same_traces(generate(load(checkpoint, contract), [[9, 8, 7]], 2), want)


@interpreted
def test_unfit_models_are_refused(gpu_emulation: str, tiny: Tiny) -> None:
    checkpoint, contract = tiny(**MODELS["llama"]), small(gpu_emulation)
    other = replace(checkpoint, config=dict(checkpoint.config) | {"model_type": "mamba"})
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM \(llama\).* found model_type"):
        load(other, contract)
    arch = {"sm_89": "sm_90", "sm_90": "sm_89"}[gpu_emulation]
    with pytest.raises(RuntimeError, match=f"contract is {arch}'s"):
        load(checkpoint, default_contract(arch))
