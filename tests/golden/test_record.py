"""Recording: the same bits however they are generated, and a store that changes only on request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bitassay.golden import runners
from bitassay.golden.compare import compare
from bitassay.golden.record import load_inputs
from bitassay.golden.store import Store
from bitassay.golden.stream import ARRAYS
from bitassay.golden.suites import find_suite
from bitassay.reference.context_lm import ContextLM
from bitassay.reference.contract import default_contract


def silent(done: int, total: int) -> None:
    pass


def files(folder: Path) -> dict[str, bytes]:
    root = folder / "store"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["tiny/sm_89", "tiny/sm_90"])
def test_batching_and_replaying_change_no_bit(folder, name):
    inputs = load_inputs(*find_suite(name))
    job, checkpoint = inputs.job, inputs.checkpoint
    batched = runners.generate(job, checkpoint, silent)
    sequential = runners.generate_sequentially(job, checkpoint, silent)
    replayed = runners.replay(job, checkpoint, sequential.tokens.tolist(), silent)
    for other in (sequential, replayed):
        assert all(np.array_equal(getattr(batched, a), getattr(other, a)) for a in ARRAYS)
    for s in range(len(job.prompts)):
        alone = replace(job, prompt_names=(job.prompt_names[s],), prompts=(job.prompts[s],))
        stream = runners.generate(alone, checkpoint, silent)
        for a in ("tokens", "top_ids", "top_bits", "margins", "fingerprints"):
            assert np.array_equal(getattr(stream, a)[0], getattr(batched, a)[s])
        assert np.array_equal(stream.prompt_fingerprints[0], batched.prompt_fingerprints[s])
    assert batched.tokens.shape == (6, 7)
    assert batched.distinct_rows > 30


def test_progress_reaches_its_end(folder):
    inputs = load_inputs(*find_suite("tiny/sm_89"))
    seen = []
    runners.generate(inputs.job, inputs.checkpoint, lambda *step: seen.append(step))
    assert seen == [(done, 7) for done in range(8)]


def test_a_golden_knows_where_it_comes_from(folder):
    golden = Store(str(folder / "store")).read("tiny/sm_90")
    identity, contract = golden.provenance.identity, default_contract("sm_90")
    assert identity.contract == contract.digest
    assert (identity.contract_version, identity.arch) == (contract.version, "sm_90")
    assert golden.provenance.packages.keys() == {"torch", "numpy", "zarr", "bitassay"}
    assert golden.provenance.confirmed == ()
    assert golden.stream.operations == ("embedding", "lm_head")
    assert golden.stream.logits_dtype == "bfloat16"


def test_equal_is_status_0_and_writes_nothing(folder, run):
    before = files(folder)
    for arguments in ((), ("--accept",)):
        status, out, _ = run("record", "--all", *arguments)
        assert status == 0
        assert out.count("equal (generated with the reference): 6 prompts, 42 tokens, 336") == 2
    assert files(folder) == before


def test_different_is_status_1_and_writes_nothing(folder, run):
    swap_lm_head(folder / "model")
    before = files(folder)
    status, out, _ = run("record", "tiny/sm_90")
    assert status == 1
    assert "tiny/sm_90: different" in out
    assert "of 6 streams differ" in out
    assert "operation lm_head" in out
    assert "recorded under another model" in out
    assert "to replace it: bitassay record tiny/sm_90 --accept" in out
    assert files(folder) == before


def test_different_is_published_with_accept(folder, run):
    swap_lm_head(folder / "model")
    status, out, _ = run("record", "tiny/sm_90", "--accept")
    assert status == 0
    assert "tiny/sm_90: different" in out
    assert "tiny/sm_90: written, digest" in out
    assert run("check", "tiny/sm_90")[0] == 0
    assert run("check", "tiny/sm_89")[0] == 2  # this one is stale now


def test_other_prompts_cannot_be_compared_and_are_different(folder, run):
    (folder / "prompts.jsonl").write_text(json.dumps({"id": "p0", "text": "another"}))
    status, out, _ = run("record", "tiny/sm_89")
    assert status == 1
    assert "the two streams continue different prompts" in out
    assert "recorded under another prompts" in out
    assert run("record", "tiny/sm_89", "--accept")[0] == 0
    assert run("check", "tiny/sm_89")[0] == 0


def test_equal_bits_under_another_contract_are_not_equal(folder, run, monkeypatch):
    """The bits agree, but the golden would be stale: a check refuses it, so record says so."""
    monkeypatch.setattr("bitassay.reference.contract.ORDERS", {"linear": "another order"})
    status, out, _ = run("record", "tiny/sm_89")
    assert status == 1
    assert "tiny/sm_89: equal (generated" in out
    assert "recorded under another contract" in out


def test_missing_without_accept_is_status_2(folder, run):
    empty = str(folder / "elsewhere")
    status, _, err = run("record", "tiny", "--store", empty)
    assert status == 2
    assert err.count("no store at") == 2
    assert not Path(empty).exists()
    assert run("record", "tiny/sm_89", "--store", empty, "--accept")[0] == 0
    status, _, err = run("record", "tiny/sm_90", "--store", empty)
    assert status == 2
    assert "no golden tiny/sm_90" in err


def test_ci_never_accepts_but_compares(folder, run, monkeypatch):
    monkeypatch.setenv("CI", "1")
    before = files(folder)
    assert run("record", "--all")[0] == 0
    status, _, err = run("record", "--all", "--accept")
    assert status == 2
    assert "CI is set" in err
    assert files(folder) == before


def test_a_damaged_golden_is_an_error_and_mended_with_accept(folder, run):
    store = Store(str(folder / "store"))
    chunk = Path(store.root, store.entry("tiny/sm_89").directory, "tokens", "c.0.0")
    chunk.write_bytes(chunk.read_bytes()[:-1])
    status, _, err = run("record", "tiny/sm_89")
    assert status == 2
    assert "tokens/c.0.0 is damaged" in err
    assert run("record", "tiny/sm_89", "--accept")[0] == 0
    assert run("check", "tiny/sm_89")[0] == 0


def test_nan_among_the_logits_is_an_error_that_names_step_and_prompt(folder, monkeypatch):
    logits, calls = ContextLM.logits, []

    def spoiled(self, hidden):
        calls.append(logits(self, hidden))
        if len(calls) == 3:
            calls[-1][1, 5] = float("nan")
        return calls[-1]

    monkeypatch.setattr(ContextLM, "logits", spoiled)
    inputs = load_inputs(*find_suite("tiny/sm_89"))
    with pytest.raises(ValueError, match=r"prompt 1, step 2: .*NaN, first at id 5"):
        runners.generate(inputs.job, inputs.checkpoint, silent)


def test_the_two_architectures_are_kept_apart(folder):
    store = Store(str(folder / "store"))
    ampere, hopper = (store.read(f"tiny/{arch}") for arch in ("sm_89", "sm_90"))
    assert ampere.entry.digest != hopper.entry.digest
    assert compare(ampere.stream, hopper.stream).compared.streams == 6


def swap_lm_head(model: Path) -> None:
    """Exchange the first two columns of the lm_head: another model of the same shape."""
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][:, :2] = tensors["lm_head.weight"][:, [1, 0]]
    save_file(tensors, model / "model.safetensors")
