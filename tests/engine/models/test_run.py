"""What a run tells when something in it was wrong, and that it tells of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from bitassay.engine.models import run
from bitassay.engine.models.batch import Batch, Segment, place
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.reference.checkpoints.checkpoint import Checkpoint
from bitassay.reference.model import load_model
from bitassay.reference.spec.contract import default_contract
from support.same_bits import assert_same_bits

Tiny = Callable[..., Checkpoint]


def engine(checkpoint: Checkpoint, arch: str) -> CausalLM:
    return CausalLM.from_pretrained(checkpoint, contract=default_contract(arch), device="cpu")


def test_check_clears_every_flag(gpu_emulation: str, tiny: Tiny) -> None:
    """After a bad step has raised, a good one must not be blamed for what was left."""
    model = engine(tiny(num_hidden_layers=1, max_position_embeddings=4), gpu_emulation)
    good = place([Segment(0, 0, 2)], [[0]])
    bad = replace(good, positions=torch.tensor([0, 4]), slots=torch.tensor([0, 16]))
    model.forward(Batch.of(bad, torch.tensor([1, 128]), model.new_cache(1)))
    with pytest.raises(ValueError, match="token id 128"):
        model.check()
    assert len(model.generate([[1, 2]], 1)) == 1
    model.check()


def test_nan_in_a_later_piece_of_a_step(
    gpu_emulation: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_CHOOSING", 1)
    checkpoint = tiny(num_hidden_layers=1)
    table = checkpoint.tensors["model.embed_tokens.weight"].clone()
    table[2] = torch.nan
    tensors = checkpoint.tensors | {"model.embed_tokens.weight": table}
    model = engine(replace(checkpoint, tensors=tensors), gpu_emulation)
    with pytest.raises(ValueError, match="prompt 1, step 0"):
        model.generate([[1], [2]], 1)


def test_a_run_tells_of_slots_outside(
    gpu_emulation: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = engine(tiny(num_hidden_layers=1), gpu_emulation)
    monkeypatch.setattr(
        "bitassay.engine.models.batch.slots_of",
        lambda blocks, positions: [10**6 for _ in positions],
    )
    with pytest.raises(ValueError, match="slot 1000000 is outside the cache"):
        model.generate([[1, 2]], 1)


def test_eps_is_the_configurations(gpu_emulation: str, tiny: Tiny) -> None:
    checkpoint = tiny(model_type="qwen3", num_hidden_layers=1, rms_norm_eps=0.05)
    reference = load_model(checkpoint, contract=default_contract(gpu_emulation))
    (want,) = reference.generate_many([[9, 8, 7]], 2)
    (got,) = engine(checkpoint, gpu_emulation).generate([[9, 8, 7]], 2)
    for field in fields(want):
        assert_same_bits(getattr(got, field.name), getattr(want, field.name))
