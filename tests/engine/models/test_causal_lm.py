"""Whole models, batched and paged in the emulator, against the reference's sequential truth."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitassay.engine.models import run
from bitassay.engine.models.batch import Batch, Segment, place
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.kv_cache import BlockAllocator
from bitassay.engine.models.ops import kernels_backend
from bitassay.engine.trace import Trace
from bitassay.kernels.attention import paged_attention
from bitassay.kernels.linear_pointer import INTERPRETED
from bitassay.reference.checkpoints.checkpoint import Checkpoint, CheckpointError
from bitassay.reference.model import load_model
from bitassay.reference.spec.contract import Contract, default_contract
from bitassay.reference.trace import Trace as ReferenceTrace
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


def engine(checkpoint: Checkpoint, contract: Contract) -> CausalLM:
    return CausalLM.from_pretrained(checkpoint, contract=contract, device="cpu")


@interpreted
@pytest.mark.parametrize(
    ("model", "count", "how"),
    [
        ("llama", 3, {}),
        ("llama", 3, {"batch_size": 2, "order": [0, 2, 1], "chunk_size": 16}),
        ("one layer", 2, {"batch_size": 1, "order": [1, 0], "chunk_size": 3}),
        ("qwen3", 3, {"batch_size": 2, "order": [2, 0, 1]}),
        ("qwen3", 2, {"chunk_size": 3}),
        ("qwen3", 3, {"batch_size": 1, "chunk_size": 16}),
    ],
)
def test_generate_is_the_sequential_truth(
    gpu_emulation: str, tiny: Tiny, truth: Any, model: str, count: int, how: dict[str, Any]
) -> None:
    want = truth(model, gpu_emulation)[:count]
    made = engine(tiny(**MODELS[model]), small(gpu_emulation))
    assert_same_traces(made.generate(PROMPTS[:count], TOKENS, **how), want)
    assert len({tuple(trace.tokens.tolist()) for trace in want}) == count
    assert made.operations[-2:] == ("norm", "lm_head")
    assert want[0].fingerprints.shape == (TOKENS, len(made.operations))


@interpreted
@pytest.mark.parametrize("model", ["one layer", "qwen3"])
def test_replay_says_what_the_reference_says(
    gpu_emulation: str, tiny: Tiny, truth: Any, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(run, "_CHOOSING", 4)  # rows of logits at a time, of nine
    checkpoint, contract = tiny(**MODELS[model]), small(gpu_emulation)
    generated = truth(model, gpu_emulation)
    # What was generated, the beginning of it, and something else.
    recorded = [generated[0].tokens.tolist(), generated[1].tokens[:2].tolist(), [0, V - 1, 4, 0]]
    got = engine(checkpoint, contract).replay(PROMPTS, recorded)
    want = load_model(checkpoint, contract=contract).replay_many(PROMPTS, recorded)
    assert_same_traces(got, want)
    assert_same_traces(got[:1], generated[:1])
    assert got[1].tokens.tolist() == recorded[1]
    assert got[2].tokens.tolist() != recorded[2]


@interpreted
@pytest.mark.parametrize(
    ("arguments", "contract"),
    [
        ({"dtype": torch.float16, "num_hidden_layers": 1}, {"logits_dtype": "float32"}),
        ({"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}, {}),
        (
            {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
             "num_hidden_layers": 1, "model_type": "qwen3"},
            {},
        ),
    ],
    ids=["fp16 with fp32 logits", "biases", "heads of 128"],
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
    assert_same_traces(engine(checkpoint, rules).generate(prompts, 2, chunk_size=17), want)


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
    made, seen, wanted = engine(checkpoint, contract), {}, {}
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
    allocator = BlockAllocator(sum(len(prompt) // 16 + 1 for prompt in prompts))
    segments = [Segment(s, 0, len(prompt)) for s, prompt in enumerate(prompts)]
    placement = place(segments, [allocator.grow(s.sequence, s.end) for s in segments])
    ids = torch.tensor([i for prompt in prompts for i in prompt])
    return made.forward(Batch.of(placement, ids, made.new_cache(allocator.blocks)), observe)


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
    ("name", "tampered", "first"),
    [
        ("silu_and_mul", silu_rounded_twice, "layers.0.silu_and_mul"),
        ("paged_attention", attention_in_other_blocks, "layers.0.attention"),
        ("add_rms_norm", norm_of_unrounded_sum, "layers.0.post_attention_layernorm"),
    ],
)
def test_another_rounding_is_named_by_the_first_operation_that_differs(
    gpu_emulation: str, tiny: Tiny, truth: Any, name: str, tampered: Any, first: str
) -> None:
    want = truth("one layer", gpu_emulation)
    made = CausalLM.from_pretrained(
        tiny(**MODELS["one layer"]),
        contract=small(gpu_emulation),
        device="cpu",
        backend=replace(kernels_backend(), **{name: tampered}),
    )
    got = made.replay(PROMPTS, [trace.tokens.tolist() for trace in want])
    same = torch.cat([a.fingerprints == b.fingerprints for a, b in zip(got, want, strict=True)])
    differing = [n for n, equal in zip(made.operations, same.all(0), strict=True) if not equal]
    assert differing[0] == first


@interpreted
def test_no_prompts_no_traces(gpu_emulation: str, tiny: Tiny) -> None:
    made = engine(tiny(**MODELS["qwen3"]), small(gpu_emulation))
    assert made.generate([], 3) == []
    assert made.replay([], []) == []


@interpreted
def test_bad_input_is_refused(gpu_emulation: str, tiny: Tiny) -> None:
    made = engine(tiny(**MODELS["qwen3"], max_position_embeddings=4), small(gpu_emulation))
    with pytest.raises(ValueError, match="prompt 1: expected at least one token id"):
        made.generate([[1], []], 2)
    for bad in (-1, V):
        with pytest.raises(ValueError, match=f"prompt 0, position 1: .* 0 … 127 .* found {bad}"):
            made.generate([[1, bad]], 2)
        with pytest.raises(ValueError, match=f"recorded tokens of prompt 0, position 0: .*{bad}"):
            made.replay([[1]], [[bad]])
    with pytest.raises(ValueError, match="prompt 0: expected integer ids, found float"):
        made.generate([[1.5]], 2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least 1, found 0 and 1"):
        made.generate([[1]], 0)
    with pytest.raises(ValueError, match="at least 1, found 2 and 0"):
        made.generate([[1]], 2, batch_size=0)
    with pytest.raises(ValueError, match="chunk_size of at least 1, or None, found 0"):
        made.generate([[1]], 2, chunk_size=0)
    for order in ([0], [0, 0], [0, 2]):
        with pytest.raises(ValueError, match=r"order: expected each of 0 … 1 once"):
            made.generate([[1], [2]], 2, order=order)
    with pytest.raises(ValueError, match="2 prompts, but 1 recorded"):
        made.replay([[1], [2]], [[1]])
    too_long = r"prompt 1: expected at most 4 positions \(max_position_embeddings\), found 5"
    with pytest.raises(ValueError, match=too_long):
        made.generate([[1], [2, 2, 2]], 3)
    with pytest.raises(ValueError, match=too_long):
        made.replay([[1], [2, 2, 2]], [[1], [1, 1, 1]])
    assert len(made.generate([[1, 2, 3]], 2)[0].tokens) == 2  # as long as the model allows


@interpreted
def test_nan_names_prompt_and_step(gpu_emulation: str, tiny: Tiny) -> None:
    checkpoint, contract = tiny(**MODELS["one layer"]), small(gpu_emulation)
    prompts = [[1, 1], [2], [3, 3, 3]]
    clean = engine(checkpoint, contract).generate(prompts, 2)
    chosen = int(clean[1].tokens[0])
    assert not any(chosen in trace.tokens[:1] for trace in (clean[0], clean[2]))
    table = checkpoint.tensors["model.embed_tokens.weight"].clone()
    table[chosen] = torch.nan  # met by prompt 1 at step 1
    tensors = dict(checkpoint.tensors) | {"model.embed_tokens.weight": table}
    checkpoint = replace(checkpoint, tensors=tensors)
    broken, reference = engine(checkpoint, contract), load_model(checkpoint, contract=contract)
    with pytest.raises(ValueError, match="prompt 1, step 1: .* NaN, first at id 0"):
        broken.generate(prompts, 2, batch_size=2, order=[2, 1, 0])
    tokens = [trace.tokens.tolist() for trace in clean]
    with pytest.raises(ValueError, match="prompt 1, step .* NaN") as want:
        reference.replay_many(prompts, tokens)
    with pytest.raises(ValueError, match=re.escape(str(want.value))):
        broken.replay(prompts, tokens)


@interpreted
def test_unfit_models_are_refused(gpu_emulation: str, tiny: Tiny) -> None:
    checkpoint, contract = tiny(**MODELS["llama"]), small(gpu_emulation)
    other = replace(checkpoint, config=dict(checkpoint.config) | {"model_type": "mamba"})
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM \(llama\).* found model_type"):
        engine(other, contract)
    arch = {"sm_89": "sm_90", "sm_90": "sm_89"}[gpu_emulation]
    with pytest.raises(RuntimeError, match=f"contract is {arch}'s"):
        engine(checkpoint, default_contract(arch))
