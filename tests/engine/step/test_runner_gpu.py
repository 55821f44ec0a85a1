"""Steps on a GPU, eager and in CUDA graphs, against the sequential truth of drafting."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bitassay.engine.config import EngineConfig
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.eagle import EagleHead
from bitassay.engine.models.kv_cache import blocks_for
from bitassay.engine.step.cuda_graphs import CudaGraphs
from bitassay.engine.step.device_step import DeviceStep
from bitassay.engine.step.runner import Runner
from bitassay.kernels.linear_pointer import INTERPRETED
from bitassay.reference.checkpoints.checkpoint import Checkpoint, load_checkpoint
from bitassay.reference.eagle import Eagle
from bitassay.reference.spec.contract import default_contract
from support.runner_driver import Drive, compare
from support.tiny_eagle import write_tiny_eagle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels: TRITON_INTERPRET=0"),
]

V = 128  # tiny_llama's vocabulary
# One has a second split of keys, another gets one while it decodes.
LENGTHS = [1, 19, 35, 1020, 7, 1100, 64]
PROMPTS = [[(7 * i * i + 3 * n) % V for i in range(length)] for n, length in enumerate(LENGTHS)]
TOKENS = 12
MODES = {"eager": {"enforce_eager": True}, "graphs": {"enforce_eager": False, "force_graphs": True}}


class Case:
    """A target of three layers with a head of random weights, in both rooms."""

    def __init__(self, target: Checkpoint, head: Checkpoint, device: torch.device) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        contract = default_contract(f"sm_{major}{minor}")
        self.truth = Eagle.from_pretrained(target, head, contract=contract)
        self.model = CausalLM.from_pretrained(target, contract=contract, device=device)
        self.head = EagleHead.from_pretrained(head, self.model)
        self.plain = self.truth.generate_many(PROMPTS, TOKENS)
        self.full = cache(lambda k: [self.truth.generate(p, TOKENS, k) for p in PROMPTS])

    def runner(self, num_drafts: int, **options: Any) -> Runner:
        config = EngineConfig(num_speculative_tokens=num_drafts, max_num_seqs=8, **options)
        blocks = sum(blocks_for(len(p) + TOKENS - 1) for p in PROMPTS)
        runner = Runner(self.model, self.head if num_drafts else None, config, num_blocks=blocks)
        # What was never written may be anything: nothing may read it.
        for kept in runner.caches:
            for x in (*kept.k, *kept.v):
                x.fill_(torch.nan)
        return runner

    def check(self, drive: Drive) -> None:
        count = drive.runner.num_drafts
        full = self.full(count) if count else [None] * len(PROMPTS)
        for s, plain, other in zip(drive.run(), self.plain, full, strict=True):
            compare(drive, s, plain, other)

    def planted(self, number: int, t: int) -> list[int]:
        """Drafts of which (t + number) % 4 are right; all of five, where that is 3."""
        right = (t + number) % 4
        drafts = self.plain[number].tokens[t + 1 : t + 6].tolist()
        return [d if i < right or right == 3 else (d + 1) % V for i, d in enumerate(drafts)]


@pytest.fixture(scope="module")
def case(
    cuda: torch.device, tiny: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    @cache
    def of(kind: str) -> Case:
        target = tiny(num_hidden_layers=3, max_position_embeddings=2048)
        folder: Path = tmp_path_factory.mktemp(kind)
        head = write_tiny_eagle(folder / "head", target.path, kind=kind, seed=7)
        device = torch.device("cuda", torch.cuda.current_device())
        return Case(target, load_checkpoint(head), device)

    return of


@contextmanager
def forbidden_to_wait() -> Iterator[None]:
    """Let torch raise for anything that waits for the device."""
    with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_drafts", [0, 1, 3, 5])
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_every_bit(case: Any, kind: str, num_drafts: int, mode: str) -> None:
    one = case(kind)
    runner = one.runner(num_drafts, **MODES[mode])
    drive = Drive(
        runner, PROMPTS, TOKENS, chunks=(700, 1000, 16), starts=(0, 5, 0, 0, 2, 1, 0),
        drafts=one.planted,
    )  # fmt: skip
    one.check(drive)
    assert bool(runner._graphs.shapes) == (mode == "graphs")


@pytest.mark.parametrize("mode", MODES)
def test_own_drafts(case: Any, mode: str) -> None:
    one = case("eagle")
    one.check(Drive(one.runner(3, **MODES[mode]), PROMPTS, TOKENS))


def test_a_graph_serves_many_steps_and_another_run(case: Any) -> None:
    one = case("eagle3")
    runner = one.runner(3, **MODES["graphs"])
    one.check(Drive(runner, PROMPTS, TOKENS, drafts=one.planted))
    shapes = runner._graphs.shapes
    assert {s.tails for s in shapes} <= {1, 2, 4, 8}
    one.check(Drive(runner, PROMPTS, TOKENS, drafts=one.planted))
    assert runner._graphs.shapes == shapes


def test_without_capture(case: Any) -> None:
    one = case("eagle")
    for mode in MODES.values():
        drive = Drive(one.runner(3, capture=False, **mode), PROMPTS, TOKENS, drafts=one.planted)
        for s, plain in zip(drive.run(), one.plain, strict=True):
            assert s.ids[len(s.prompt) :] == plain.tokens.tolist()


def test_no_step_waits_for_the_device(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager step does not wait; the answer is waited for once it is on its way."""
    step, steps = DeviceStep.__call__, []

    def guarded(self: DeviceStep, *arguments: Any) -> Any:
        with forbidden_to_wait():
            steps.append(self)
            return step(self, *arguments)

    one = case("eagle3")
    Drive(one.runner(3, enforce_eager=True), PROMPTS, TOKENS).run()  # compiled
    runner = one.runner(3, enforce_eager=True)
    monkeypatch.setattr(DeviceStep, "__call__", guarded)
    Drive(runner, PROMPTS[:3], TOKENS, chunks=(16,), drafts=one.planted).run()
    assert len(steps) > 4


def test_no_replay_waits_for_the_device(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, replays = CudaGraphs.run, []

    def guarded(self: CudaGraphs, sizes: Any, packed: Any) -> Any:
        if sizes not in self.shapes:
            return run(self, sizes, packed)
        with forbidden_to_wait():
            replays.append(sizes)
            return run(self, sizes, packed)

    monkeypatch.setattr(CudaGraphs, "run", guarded)
    one = case("eagle")
    one.check(Drive(one.runner(3, **MODES["graphs"]), PROMPTS, TOKENS, drafts=one.planted))
    assert len(replays) >= 2
