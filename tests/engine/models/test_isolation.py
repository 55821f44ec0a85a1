"""A sequence's bits depend on nothing in its batch or cache but itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.kv_cache import PagedCache
from bitassay.engine.scheduling.blocks import blocks_for
from bitassay.kernels.linear_pointer import INTERPRETED
from bitassay.reference.checkpoints.checkpoint import Checkpoint
from bitassay.reference.spec.contract import Contract, default_contract
from support.batches import Segment, make_batch, tables_of
from support.same_bits import assert_same_bits

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
BAD = 127  # the id whose embedding is broken


class Case(NamedTuple):
    """Three sequences in two steps, `long` the length of a chunk.

    Of the first, a prompt in two chunks; of the others, prompts that begin with the bad id and a
    decoding step, beside and behind it in the same batches.
    """

    long: int

    @property
    def ids(self) -> dict[int, list[int]]:
        return {0: [3] * self.long + [5, 9], 1: [BAD, 4, BAD], 2: [BAD] * (self.long + 1)}

    @property
    def steps(self) -> tuple[list[Segment], ...]:
        return (
            [Segment(1, 0, 2), Segment(0, 0, self.long), Segment(2, 0, self.long)],
            [Segment(2, self.long, 1), Segment(0, self.long, 2), Segment(1, 2, 1)],
        )

    def rows_of_first(
        self, model: CausalLM, cache: PagedCache, *, alone: bool
    ) -> dict[str, Tensor]:
        """Return sequence 0's rows of every operation, both steps' one after another."""
        kept: dict[str, list[Tensor]] = {}
        lengths = {0: self.long + 2, 1: 3, 2: self.long + 1}
        present = [0] if alone else [0, 1, 2]
        tables = dict(zip(present, tables_of([lengths[s] for s in present]), strict=True))
        for step in self.steps:
            step = [s for s in step if s.sequence in present]
            ids = [i for s in step for i in self.ids[s.sequence][s.first : s.end]]
            batch = make_batch(
                model, step, ids, cache=cache, tables=[tables[s.sequence] for s in step]
            )
            index = next(r for r, s in enumerate(step) if s.sequence == 0)
            mine = slice(*batch.query_start[index : index + 2].tolist())

            def keep(name: str, rows: Tensor, mine: slice = mine) -> None:
                kept.setdefault(name, []).append(rows[mine].clone())

            hidden = model.forward(batch, keep)
            keep("lm_head", model.logits(hidden))
        model.check()
        return {name: torch.cat(rows) for name, rows in kept.items()}


def check(case: Case, whole: Checkpoint, contract: Contract, device: str, value: float) -> None:
    """Compare sequence 0 alone and among neighbours whose embedding is a value throughout."""
    table = whole.tensors["model.embed_tokens.weight"].clone()
    table[BAD] = value
    tensors = dict(whole.tensors) | {"model.embed_tokens.weight": table}
    checkpoint = replace(whole, tensors=tensors)
    model = CausalLM.from_pretrained(checkpoint, contract=contract, device=device)
    size = blocks_for(case.long + 2)
    zeros, nans = model.new_cache(size), model.new_cache(2 * size + 3)
    for x in (*zeros.k, *zeros.v):
        x.zero_()
    for x in (*nans.k, *nans.v):  # what was never written may be anything
        x.fill_(torch.nan)
    alone = case.rows_of_first(model, zeros, alone=True)
    assert tuple(alone) == model.operations
    together = case.rows_of_first(model, nans, alone=False)
    for name, rows in alone.items():
        assert_same_bits(together[name], rows)
        assert rows.isfinite().all(), name


VALUES = pytest.mark.parametrize(
    "value", [torch.nan, torch.inf, 3e38], ids=["NaN", "infinite", "huge"]
)


@interpreted
@VALUES
@pytest.mark.parametrize(
    ("gpu_emulation", "model_type"),
    [("sm_89", "llama"), ("sm_90", "qwen3")],
    indirect=["gpu_emulation"],
)
def test_neighbours_cannot_be_felt(
    gpu_emulation: str, tiny: Callable[..., Checkpoint], model_type: str, value: float
) -> None:
    checkpoint = tiny(model_type=model_type, num_hidden_layers=1, seed=4)
    contract = default_contract(gpu_emulation, key_block=16, key_split=32)
    check(Case(17), checkpoint, contract, "cpu", value)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels: run with TRITON_INTERPRET=0")
@VALUES
@pytest.mark.parametrize("long", [17, 1100])  # 1100: more than one split of keys
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_neighbours_cannot_be_felt_on_a_gpu(
    cuda: torch.device, tiny: Callable[..., Checkpoint], model_type: str, long: int, value: float
) -> None:
    major, minor = torch.cuda.get_device_capability(cuda)
    contract = default_contract(f"sm_{major}{minor}")
    check(Case(long), tiny(model_type=model_type, seed=4), contract, "cuda", value)


@interpreted
def test_what_forward_was_given_wrongly_is_told_at_the_end(
    gpu_emulation: str, tiny: Callable[..., Checkpoint]
) -> None:
    checkpoint = tiny(num_hidden_layers=1, max_position_embeddings=4)
    contract = default_contract(gpu_emulation)
    model = CausalLM.from_pretrained(checkpoint, contract=contract, device="cpu")
    good = make_batch(model, [Segment(0, 0, 2)], [1, 2], tables=[[0]])
    for wrong, message in (
        (replace(good, ids=torch.tensor([1, 128])), "token id 128 at position 1"),
        (
            replace(good, positions=torch.tensor([0, 4])),
            "row 1: position 4 .* max_position_embeddings",
        ),
        (replace(good, slots=torch.tensor([0, 16])), "row 1: slot 16 is outside the cache"),
    ):
        model.forward(wrong)
        with pytest.raises(ValueError, match=message):
            model.check()
    several = replace(good, positions=torch.tensor([0, 4]), slots=torch.tensor([0, 16]))
    model.forward(replace(several, ids=torch.tensor([1, 128])))
    with pytest.raises(ValueError, match="token id 128"):
        model.check()
    # After a bad step has raised, a good one must not be blamed for what was left.
    model.forward(good)
    model.check()
