"""EAGLE under data parallelism says what plain greedy decoding says, and both what the oracle says.

TP_SIZE=1 DP_SIZE=2 pytest -v -s tests/distributed/test_eagle_dp.py

As many ranks as DP_SIZE says (2 if unset) run a Llama with and without an EAGLE head that drafts
three tokens a round: over gloo on CPUs, with the reference's operations and a few tokens; over NCCL
on GPUs, with compiled kernels and the whole suite. Beyond equal tokens, every logit kept, every
fingerprint and every count of accepted drafts is the golden's.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from bitassay.golden.check import current
from bitassay.golden.compare.diff import Comparison, compare
from bitassay.golden.runs.backend import Backend, gpu_arch
from bitassay.golden.runs.engine_options import EngineOptions
from bitassay.golden.runs.engine_runner import EngineRunner
from bitassay.golden.runs.runner import Run
from bitassay.golden.storage.store import find_store

SUITE, DRAFTS = "eagle-pico", 3
CPU_ARCH, CPU_PROMPTS, CPU_TOKENS = "sm_90", 3, 8


def size(name: str, default: int) -> int:
    """Return a number of the environment's."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        pytest.fail(f"{name}: expected a number from 1, found {text!r}")
    return int(text)


@pytest.fixture
def dp() -> int:
    """How many ranks."""
    tp = size("TP_SIZE", 1)
    if tp != 1:
        pytest.fail(f"TP_SIZE: expected 1, found {tp}: this engine has no tensor parallelism")
    return size("DP_SIZE", 2)


@pytest.fixture
def gpus(dp: int) -> int:
    """How many ranks, each with a GPU; fails where so many were asked for and are not there."""
    found = torch.cuda.device_count()
    if found == 0:
        pytest.skip("needs CUDA devices")
    if found < dp and "DP_SIZE" in os.environ:
        pytest.fail(f"DP_SIZE={dp}: expected as many GPUs, found {found}")
    if found < dp:
        pytest.skip(f"needs {dp} GPUs, found {found}: DP_SIZE=1 runs on one")
    return dp


def check(
    golden: str, prompts: int | None, tokens: int | None, **options: Any
) -> tuple[Run, Comparison]:
    """Run the engine on so many prompts of a golden and compare with it."""
    found, inputs = current(find_store(), golden, None)
    expected = found.stream.first(prompts, tokens)
    runner = EngineRunner(EngineOptions(**options))
    run = runner.run(inputs, expected, lambda done, total: None, print)
    return run, compare(run.expected, run.found)


def require_equal(golden: str, part: tuple[int | None, int | None], **options: Any) -> None:
    """Run with and without drafts, and hold each to the golden and one to the other."""
    plain, eagle = (check(golden, *part, **options, num_speculative_tokens=k) for k in (0, DRAFTS))
    for run, comparison in (plain, eagle):
        assert comparison.differences == ()
        assert not run.missing
    assert np.array_equal(plain[0].found.tokens, eagle[0].found.tokens)
    assert plain[0].stats.drafted == 0
    # Else nothing was speculated and nothing compared.
    assert 0 < eagle[0].stats.accepted < eagle[0].stats.drafted
    show(f"{golden}, DP = {options['dp']}", *eagle)


def show(what: str, run: Run, comparison: Comparison) -> None:
    """Print what was compared, for `pytest -s`."""
    compared = comparison.compared
    counts = {
        "tokens": compared.tokens,
        "logits": compared.logits,
        "fingerprints": compared.fingerprints,
        "drafts": compared.drafts,
        "counts of accepted drafts": compared.acceptances,
    }
    print(
        f"\n{what}: {compared.streams} streams, with and without drafts; equal are "
        f"{', '.join(f'{count:,} {name}' for name, count in counts.items())}; acceptance length "
        f"{run.stats.acceptance_length:.2f}"
    )


def test_eagle_dp_on_cpus(dp: int) -> None:
    part = (max(CPU_PROMPTS, dp), CPU_TOKENS)
    require_equal(f"{SUITE}/{CPU_ARCH}", part, dp=dp, backend=Backend.REFERENCE)


@pytest.mark.gpu
def test_eagle_dp_on_gpus(gpus: int) -> None:
    require_equal(f"{SUITE}/{gpu_arch()}", (None, None), dp=gpus, backend=Backend.GPU)


@pytest.mark.parametrize("sizes", [{"TP_SIZE": "2"}, {"DP_SIZE": "0"}, {"DP_SIZE": "two"}])
def test_sizes_that_cannot_be_run_fail(
    sizes: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for name, value in sizes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(pytest.fail.Exception, match=f"{next(iter(sizes))}: expected"):
        request.getfixturevalue("dp")


def test_more_ranks_than_gpus_fail_if_asked_for_and_skip_if_not(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("TP_SIZE", raising=False)
    monkeypatch.setenv("DP_SIZE", "2")
    with pytest.raises(pytest.fail.Exception, match="DP_SIZE=2: expected as many GPUs, found 1"):
        request.getfixturevalue("gpus")
