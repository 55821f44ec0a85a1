"""Every planted fault is found by the checks, on the reference's operations on a CPU.

The model is `wide`, but small, under a contract that splits keys early; its golden is what the
oracle generates here. What only a GPU shows is planted there: test_faults_gpu.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from bitassay.golden.runs.backend import Backend
from bitassay.golden.runs.reference_ops import reference_ops
from bitassay.golden.streams.token_stream import TokenStream
from bitassay.reference.spec.contract import default_contract
from support.engine_harness import Trial, first_check, job_of, oracle
from support.idle_rank import start
from support.paths import ROOT
from support.planted_faults import FAULTS, IDLE_RANK, Fault
from support.wide_suite import NARROW, wide_prompts, write_wide

ARCH, TOKENS = "sm_90", 10
# All prompts in one step; or two at a time, so that later ones find blocks of earlier ones.
TOGETHER: dict[str, Any] = {"backend": Backend.REFERENCE, "num_speculative_tokens": 3}
IN_PAIRS: dict[str, Any] = {
    "backend": Backend.REFERENCE,
    "num_speculative_tokens": 1,
    "max_num_seqs": 2,
}
# What finds a fault first: in the first differing stream the first row, and of that the first
# operation, whose bits differ. The lm_head has run for a draft or a token, whichever comes first.
FOUND: dict[str, tuple[dict[str, Any], str]] = {
    "lm_head on cuBLAS": (TOGETHER, "lm_head"),
    "draft position off by one": (TOGETHER, "prompt: draft.rotary"),
    # The slots of the next round's rows hold prints of rejected rows, which have other ids.
    "rejected slots kept": (TOGETHER, "generated row: embedding"),
    # In the first layer keys and values depend on ids and positions alone: those are right.
    "stale prefix block": (IN_PAIRS, "prompt: layers.0.attention"),
    "prefix ids not compared": (IN_PAIRS, "prompt: embedding"),
    "block freed too early": (IN_PAIRS | {"enable_prefix_caching": False}, "prompt: embedding"),
    "RMSNorm by rows": (TOGETHER, "prompt: layers.0.input_layernorm"),
    "attention by batch": (IN_PAIRS, "generated row: layers.0.attention"),
    "padded row in a sum": (TOGETHER, "prompt: layers.0.attention"),
    "ties to the highest id": (TOGETHER, "generated row: choice"),
    "acceptance off by one": (TOGETHER, "accepted drafts"),
}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("narrow")
    write_wide(folder, sizes=NARROW)
    job = job_of(folder, ARCH, wide_prompts(NARROW["vocab_size"], 8), TOKENS)
    contract = default_contract(ARCH, key_block=32, key_split=64)
    return Trial.load(job, contract, reference_ops(), "cpu")


@pytest.fixture(scope="module")
def golden(trial: Trial) -> TokenStream:
    return oracle(trial)


def test_the_golden_is_sensitive(golden: TokenStream) -> None:
    """Streams differ, choices are close, drafts are right about as often as wrong."""
    assert golden.drafts is not None
    assert len({tuple(own) for own in golden.tokens.tolist()}) == len(golden.tokens)
    assert (golden.margins <= 1).mean() > 0.4
    assert 1.5 < golden.drafts.acceptance_length(3) < 3.5


@pytest.mark.parametrize("options", [TOGETHER, IN_PAIRS], ids=["together", "in pairs"])
def test_without_a_fault_all_is_equal(
    trial: Trial, golden: TokenStream, options: dict[str, Any]
) -> None:
    assert first_check(trial.run(golden, **options)) == ""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found(trial: Trial, golden: TokenStream, fault: Fault, note: Any) -> None:
    options, first = FOUND[fault.name]
    with fault.put(trial.switch):
        comparison = trial.run(golden, **options)
    found = first_check(comparison)
    note(fault, "CPU", found, comparison)
    assert found.endswith(first)
    if fault.name == "acceptance off by one":
        assert comparison.different.tokens == 0  # which is why tokens alone do not tell


def test_every_fault_is_looked_for() -> None:
    assert list(FOUND) == [fault.name for fault in FAULTS]


def test_the_page_of_faults_says_what_finds_each() -> None:
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if "|" in line
    ]
    assert [row[:2] for row in rows[2:]] == [[f.name, f.does] for f in (*FAULTS, IDLE_RANK)]
    for name, _, on_cpu, *_ in rows[2:-1]:
        assert on_cpu.endswith(FOUND[name][1]), name


def test_an_idle_rank_that_skips_a_collective_ends_in_a_timeout_that_names_it(note: Any) -> None:
    ended = start("cpu", timeout=2)
    assert ended.status == 3, ended
    assert "RankTimeout: rank 0 of 2: collective 5 (after step 4)" in ended.errors
    assert "was not done after 2 s, because rank 1 did not enter it" in ended.errors
    assert ended.seconds < 60
    note(IDLE_RANK, "CPU, two ranks over gloo", "timeout that names the rank")
