"""Every planted fault is found on compiled kernels, on this machine's GPU, or cannot show there.

Two suites: `wide`, whose shapes let a library split K, its golden made here by the oracle of what
the engine says; and `eagle-pico`, whose golden is committed. A fault in the arithmetic is counted
while it runs: where it changed no output, the streams must be the golden's and the table says so;
where it changed one, the check must find it. The table is printed at the end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bitassay.engine.models.ops import kernel_ops
from bitassay.golden.check import current
from bitassay.golden.runs.backend import gpu_arch
from bitassay.golden.storage.store import find_store
from bitassay.golden.streams.token_stream import TokenStream
from bitassay.kernels.linear_pointer import INTERPRETED
from bitassay.reference.spec.contract import default_contract
from support.engine_harness import Trial, first_check, job_of, oracle
from support.idle_rank import start
from support.planted_faults import FAULTS, IDLE_RANK, Fault
from support.wide_suite import SIZES, products_on, wide_prompts, write_wide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels: TRITON_INTERPRET=0"),
]

WIDE_TOKENS = 24
PICO_PROMPTS, PICO_TOKENS = 24, 48
# Four rows for each sequence that decodes: at most 12, where cuBLAS splits K of 4096.
FEW: dict[str, Any] = {"num_speculative_tokens": 3, "max_num_seqs": 3}
TOGETHER: dict[str, Any] = {"num_speculative_tokens": 3}
IN_PAIRS: dict[str, Any] = {"num_speculative_tokens": 1, "max_num_seqs": 2}
ARITHMETIC = (
    "lm_head on cuBLAS",
    "RMSNorm by rows",
    "attention by batch",
    "padded row in a sum",
    "ties to the highest id",
)
# How each fault is run, and what finds it where it shows.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "lm_head on cuBLAS": (FEW, "lm_head"),
    "draft position off by one": (TOGETHER, "draft.rotary"),
    "rejected slots kept": (TOGETHER, "embedding"),
    "stale prefix block": (IN_PAIRS, "layers.0.attention"),
    "prefix ids not compared": (IN_PAIRS, "embedding"),
    "block freed too early": (FEW | {"enable_prefix_caching": False}, "embedding"),
    "RMSNorm by rows": (TOGETHER, "norm"),
    "attention by batch": (FEW, "attention"),
    "padded row in a sum": (TOGETHER, "layers.0.attention"),
    "ties to the highest id": (TOGETHER, "choice"),
    "acceptance off by one": (TOGETHER, "accepted drafts"),
}
# It takes prompts with the same ids in their second blocks after other first ones, which those of
# `wide` are made to be.
NOT_ON_PICO = ("stale prefix block",)


@dataclass(frozen=True)
class Suite:
    """A trial with its golden."""

    name: str
    trial: Trial
    golden: TokenStream


@pytest.fixture(scope="module")
def wide(cuda: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("wide")
    write_wide(folder)
    job = job_of(folder, gpu_arch(), wide_prompts(SIZES["vocab_size"]), WIDE_TOKENS)
    trial = Trial.load(job, default_contract(job.arch), kernel_ops(), cuda)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(8, len(os.sched_getaffinity(0))))  # rows are wide: threads do help
    with products_on(cuda):
        golden = oracle(trial, trial.tokens())
    torch.set_num_threads(threads)
    return Suite("wide", trial, golden)


@pytest.fixture(scope="module")
def pico(cuda: torch.device) -> Suite:
    found, inputs = current(find_store(), f"eagle-pico/{gpu_arch()}", None)
    job = inputs.first(PICO_PROMPTS, PICO_TOKENS)
    trial = Trial.load(job, job.contract, kernel_ops(), cuda)
    return Suite("eagle-pico", trial, found.stream.first(PICO_PROMPTS, PICO_TOKENS))


@pytest.fixture(params=["wide", "pico"])
def suite(request: pytest.FixtureRequest) -> Suite:
    found: Suite = request.getfixturevalue(request.param)
    return found


def test_wide_is_sensitive(wide: Suite) -> None:
    """Streams differ, choices are close, drafts are right about as often as wrong."""
    golden = wide.golden
    assert golden.drafts is not None
    assert len({tuple(own) for own in golden.tokens.tolist()}) == len(golden.tokens)
    assert (golden.margins <= 1).mean() > 0.3
    assert 1.2 < golden.drafts.acceptance_length(3) < 3.5


@pytest.mark.parametrize(
    "options", [TOGETHER, IN_PAIRS, FEW, FEW | {"enforce_eager": True}], ids=lambda o: ", ".join(o)
)
def test_without_a_fault_all_is_equal(suite: Suite, options: dict[str, Any]) -> None:
    assert first_check(suite.trial.run(suite.golden, **options)) == ""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found(suite: Suite, fault: Fault, note: Any) -> None:
    if suite.name == "eagle-pico" and fault.name in NOT_ON_PICO:
        pytest.skip("needs prompts that could be taken for each other: planted in wide")
    options, first = CASES[fault.name]
    with fault.put(suite.trial.switch):
        comparison = suite.trial.run(suite.golden, **options)
    found = first_check(comparison)
    if fault.name in ARITHMETIC and not suite.trial.switch.changed:
        note(fault, where(suite), "cannot differ here: it changed no output")
        assert found == ""
        return
    note(fault, where(suite), found or "NOT FOUND", comparison)
    assert found.endswith(first)


def where(suite: Suite) -> str:
    return f"{suite.name}, {torch.cuda.get_device_name()}"


def test_every_fault_is_looked_for() -> None:
    assert list(CASES) == [fault.name for fault in FAULTS]


def test_an_idle_rank_that_skips_a_collective_ends_in_a_timeout_that_names_it(note: Any) -> None:
    if (count := torch.cuda.device_count()) < 2:
        note(IDLE_RANK, torch.cuda.get_device_name(), "cannot happen with one rank")
        pytest.skip(f"needs 2 GPUs, found {count}: over gloo it is planted on CPUs")
    ended = start("cuda", timeout=5)
    assert ended.status == 3, ended
    assert "RankTimeout: rank 0 of 2: collective 5 (after step 4)" in ended.errors
    assert "was not done after 5 s, because rank 1 did not enter it" in ended.errors
    note(IDLE_RANK, f"two ranks over NCCL, {torch.cuda.get_device_name()}", "timeout, by name")
