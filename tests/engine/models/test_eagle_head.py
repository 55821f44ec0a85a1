"""Draft heads on the kernels, in the emulator, against the reference: every operation's bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitassay.engine.config import EngineConfig
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.eagle import EagleHead
from bitassay.engine.step.runner import Runner
from bitassay.golden.runs.reference_ops import reference_ops
from bitassay.kernels.linear_pointer import INTERPRETED
from bitassay.reference.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from bitassay.reference.eagle import Eagle
from bitassay.reference.spec.contract import default_contract
from support.batches import Segment, make_batch
from support.runner_driver import Drive, compare
from support.same_bits import assert_same_bits
from support.tiny_eagle import write_tiny_eagle

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
Tiny = Callable[..., Checkpoint]
# EAGLE-3 reads the residual stream before three layers.
LAYERS = {"eagle": 1, "eagle3": 3}
TOKENS = 4


@interpreted
@pytest.mark.parametrize(
    ("gpu_emulation", "kind", "options", "padded"),
    [
        ("sm_89", "eagle", {"fc_bias": True, "own_embedding": True}, True),
        ("sm_90", "eagle3", {"attention_bias": True}, False),
    ],
    indirect=["gpu_emulation"],
)
def test_a_prompt_and_its_rounds(
    gpu_emulation: str, tiny: Tiny, tmp_path: Path, kind: str, options: dict[str, Any],
    padded: bool,
) -> None:  # fmt: skip
    """A prompt in two chunks, then rounds of two drafts: first pass, chain and verification."""
    target = tiny(num_hidden_layers=LAYERS[kind])
    head = load_checkpoint(
        write_tiny_eagle(tmp_path / "head", target.path, kind=kind, seed=3, **options)
    )
    contract = default_contract(gpu_emulation)
    truth = Eagle.from_pretrained(target, head, contract=contract)
    prompt = [7, 3]
    (plain,), full = truth.generate_many([prompt], TOKENS), truth.generate(prompt, TOKENS, 2)
    model = CausalLM.from_pretrained(target, contract=contract, device="cpu")
    config = EngineConfig(num_speculative_tokens=2, max_num_seqs=1, force_graphs=padded)
    runner = Runner(model, EagleHead.from_pretrained(head, model), config, num_blocks=1)
    right = plain.tokens.tolist()
    drive = Drive(runner, [prompt], TOKENS, chunks=(1, 9), drafts=lambda _, t: [right[t + 1], 5])
    (driven,) = drive.run()
    compare(drive, driven, plain, full)
    assert driven.rounds[0][2] >= 1


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_operations_are_observed_in_order(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    target = tiny(num_hidden_layers=3)
    path = write_tiny_eagle(tmp_path / "head", target.path, kind=kind)
    model = CausalLM.from_pretrained(
        target, contract=default_contract("sm_90"), device="cpu", ops=reference_ops()
    )
    head = EagleHead.from_pretrained(path, model)
    width = len(head.config.hidden_operations) * head.config.hidden_size
    hidden = torch.randn(3, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    cache = head.new_cache(1)
    batch = make_batch(model, [Segment(0, 0, 3)], [4, 5, 6], cache=cache, tables=[[0]])
    seen: dict[str, Any] = {}
    kept: dict[str, Any] = {}

    def observe(name: str, rows: Any) -> None:
        seen[name], kept[name] = rows, rows.clone()

    scored, out = head.forward(batch, hidden, observe, chain=False)
    assert tuple(seen) == head.operations[:-1]
    for name, rows in seen.items():  # what is fingerprinted later must not change
        assert_same_bits(rows, kept[name])
    assert_same_bits(out, seen["draft.hidden"])
    assert_same_bits(scored, seen["draft.norm" if kind == "eagle3" else "draft.hidden"])
    assert head.logits(scored).shape == (3, head.config.draft_vocab_size)
    assert head.logits(scored).shape == (3, 96 if kind == "eagle3" else 128)


def test_draft_ids_are_the_targets(tiny: Tiny, tmp_path: Path) -> None:
    target = tiny(num_hidden_layers=3)
    model = CausalLM.from_pretrained(
        target, contract=default_contract("sm_90"), device="cpu", ops=reference_ops()
    )
    path = write_tiny_eagle(tmp_path / "head", target.path, kind="eagle3")
    checkpoint = load_checkpoint(path)
    d2t = checkpoint.tensors["d2t"]
    assert d2t.any()
    ids = torch.arange(96)
    assert_same_bits(EagleHead.from_pretrained(path, model).token_ids(ids), ids + d2t)


def test_a_head_of_another_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    target = tiny(num_hidden_layers=1)
    model = CausalLM.from_pretrained(
        target, contract=default_contract("sm_90"), device="cpu", ops=reference_ops()
    )
    head = load_checkpoint(write_tiny_eagle(tmp_path / "head", target.path))
    other = replace(head, config=dict(head.config) | {"vocab_size": 64})
    with pytest.raises(CheckpointError, match="vocab_size 128, as the target has"):
        EagleHead.from_pretrained(other, model)
