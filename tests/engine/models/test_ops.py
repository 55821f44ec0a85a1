"""The engine on the reference's operations: plain CPU, no Triton, the same bits."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from bitassay.engine.config import EngineConfig
from bitassay.engine.engine import Engine
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.ops import Ops, kernel_ops
from bitassay.engine.scheduling import blocks
from bitassay.golden.runs import reference_ops as module
from bitassay.golden.runs.reference_ops import reference_ops
from bitassay.kernels import cache
from bitassay.kernels.flags import Flag
from bitassay.reference.checkpoints.checkpoint import Checkpoint
from bitassay.reference.model import load_model
from bitassay.reference.spec.contract import default_contract
from support.same_bits import assert_same_bits

Tiny = Callable[..., Checkpoint]
CONTRACT = default_contract("sm_89", key_block=16, key_split=32)
PROMPTS = [[5], [(5 * i + 1) % 128 for i in range(35)]]
# What only launches differ in, or only a launch can use.
LAUNCHES = {"tile", "shape"}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_whole_models(tiny: Tiny, model_type: str) -> None:
    checkpoint = tiny(model_type=model_type, num_hidden_layers=1)
    model = CausalLM.from_pretrained(
        checkpoint, contract=CONTRACT, device="cpu", ops=reference_ops()
    )
    want = load_model(checkpoint, contract=CONTRACT).generate_many(PROMPTS, 3)
    config = EngineConfig(max_num_batched_tokens=17)
    got = Engine(model, config=config).generate(PROMPTS, 3)
    for one, other in zip(got, want, strict=True):
        for field in fields(other):
            assert_same_bits(getattr(one, field.name), getattr(other, field.name))


def test_without_room_no_weight_is_prepared(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny(num_hidden_layers=1)
    traces = []
    for room in (module.PREPARED_ELEMENTS, 64 * 64):
        monkeypatch.setattr(module, "PREPARED_ELEMENTS", room)
        model = CausalLM.from_pretrained(
            checkpoint, contract=CONTRACT, device="cpu", ops=reference_ops()
        )
        traces += Engine(model).generate(PROMPTS[:1], 2)
    assert_same_bits(traces[0].fingerprints, traces[1].fingerprints)


def test_triton_is_not_imported() -> None:
    """Neither by loading nor by running: where there is no Triton, the engine still runs."""
    code = (
        "import sys; from bitassay.engine.engine import Engine; "
        "from bitassay.engine.models.eagle import EagleHead; "
        "from bitassay.golden.runs.reference_ops import reference_ops; reference_ops(); "
        "assert 'triton' not in sys.modules, sorted(m for m in sys.modules if 'bitassay' in m)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [field.name for field in fields(Ops)])
def test_signatures_are_the_kernels(name: str) -> None:
    ours, kernels = getattr(reference_ops(), name), getattr(kernel_ops(), name)
    if not callable(ours):
        assert ours != kernels
        return
    names = [p for p in inspect.signature(kernels).parameters if p not in LAUNCHES]
    assert list(inspect.signature(ours).parameters) == names


def test_blocks_are_the_kernels() -> None:
    assert blocks.BLOCK_SIZE == cache.BLOCK_SIZE


def test_slots() -> None:
    run = reference_ops()
    k = torch.arange(3 * 64, dtype=torch.float32).view(3, 1, 64).bfloat16()
    k_cache, v_cache = torch.zeros(2, 16, 1, 64).bfloat16(), torch.zeros(2, 16, 1, 64).bfloat16()
    run.write_cache(k, -k, k_cache, v_cache, torch.tensor([17, -1, 3]))
    assert_same_bits(k_cache[1, 1], k[0])
    assert_same_bits(v_cache[0, 3], -k[2])
    assert int(k_cache.count_nonzero()) == int(k[[0, 2]].count_nonzero())
    for slot in (-2, 32):
        with pytest.raises(ValueError, match=f"slots within -1 … 31, found .*{slot}"):
            run.write_cache(k, k, k_cache, v_cache, torch.tensor([0, slot, 1]))


def test_a_nan_is_kept_in_the_flag() -> None:
    run, nans = reference_ops(), Flag()
    logits = torch.zeros(3, 9)
    run.decide(logits, 2, nans=nans)
    assert nans.take() is None
    logits[1, 4] = logits[2, 0] = torch.nan
    _, ids, _ = run.decide(logits, 2, nans=nans, first_row=5)
    assert nans.take() == (6, 4)
    assert ids[0].tolist() == [0, 1]


def test_fingerprints_go_to_their_slots() -> None:
    run = reference_ops()
    rows = [torch.randn(3, 5), torch.randn(3, 7).bfloat16()]
    out = torch.full((4, 3), -7)
    run.fingerprint_into(rows, out, [2, 0], torch.tensor([3, -1, 1]))
    want = torch.full((4, 3), -7)
    for values, column in zip(rows, (2, 0), strict=True):
        want[[3, 1], column] = run.fingerprint_rows(values)[[0, 2]]
    assert_same_bits(out, want)


def test_only_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="run on the CPU, found cuda:0"):
        reference_ops().check_device(torch.device("cuda:0"), "sm_90")
