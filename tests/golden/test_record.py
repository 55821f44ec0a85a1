"""Recording: the same bits however they are generated, and a store that changes only on request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bitassay.golden import record, suites
from bitassay.golden.compare.diff import compare
from bitassay.golden.errors import GoldenError
from bitassay.golden.inputs.suite_inputs import load_inputs
from bitassay.golden.record import Request
from bitassay.golden.runs import oracle
from bitassay.golden.storage.store import Store
from bitassay.golden.streams.token_stream import ARRAYS
from bitassay.golden.suites import find_suite
from bitassay.reference.context_lm import ContextLM
from bitassay.reference.spec.contract import default_contract


def silent(done: int, total: int) -> None:
    pass


def files(folder: Path) -> dict[str, bytes]:
    root = folder / "store"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["tiny/sm_89", "tiny/sm_90"])
def test_batching_and_replaying_change_no_bit(folder, name):
    inputs = load_inputs(*find_suite(name))
    job, facts = inputs.job, inputs.facts
    batched = oracle.generate(job, facts, silent)
    sequential = oracle.generate(job, facts, silent, sequential=True)
    replayed = oracle.replay(job, facts, sequential.tokens.tolist(), silent)
    for other in (sequential, replayed):
        assert all(np.array_equal(getattr(batched, a), getattr(other, a)) for a in ARRAYS)
    for s in range(len(job.prompts)):
        alone = replace(job, prompt_names=(job.prompt_names[s],), prompts=(job.prompts[s],))
        stream = oracle.generate(alone, facts, silent)
        for a in ("tokens", "top_ids", "top_bits", "margins", "fingerprints"):
            assert np.array_equal(getattr(stream, a)[0], getattr(batched, a)[s])
        assert np.array_equal(stream.prompt_fingerprints[0], batched.prompt_fingerprints[s])
    assert batched.tokens.shape == (6, 7)
    assert batched.distinct_rows > 30


@pytest.mark.parametrize("sequential", [False, True])
def test_progress_counts_every_row_and_reaches_its_end(folder, sequential):
    inputs = load_inputs(*find_suite("tiny/sm_89"))
    seen = []
    oracle.generate(
        inputs.job, inputs.facts, lambda *step: seen.append(step), sequential=sequential
    )
    total = sum(len(prompt) + 6 for prompt in inputs.job.prompts)
    assert {whole for _, whole in seen} == {total}
    assert (seen[0][0], seen[-1][0]) == (0, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 7


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
        assert out.count("equal (replayed with the reference): 6 prompts, 42 tokens, 336") == 2
    assert files(folder) == before


def test_different_is_status_1_and_writes_nothing(folder, run):
    swap_lm_head(folder / "model")
    before = files(folder)
    status, out, _ = run("record", "tiny/sm_90")
    assert status == 1
    assert "tiny/sm_90: different" in out
    assert "of 6 streams differ" in out
    assert "lm_head differs (first in running order)" in out
    assert "(generated step by step with the reference, as the golden is of another model)" in out
    assert "recorded with another model" in out
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
    assert "recorded with other prompts" in out
    assert run("record", "tiny/sm_89", "--accept")[0] == 0
    assert run("check", "tiny/sm_89")[0] == 0


def test_equal_bits_under_another_contract_are_not_equal(folder, run, monkeypatch):
    """The bits agree, but the golden would be stale: a check refuses it, so record says so."""
    monkeypatch.setattr("bitassay.reference.spec.contract.ORDERS", {"linear": "another order"})
    status, out, _ = run("record", "tiny/sm_89")
    assert status == 1
    assert "tiny/sm_89: equal (generated step by step" in out
    assert "recorded with another contract" in out


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
    with pytest.raises(ValueError, match=r"prompt p4, step 2: .*NaN, first at id 5"):
        oracle.generate(inputs.job, inputs.facts, silent)


def test_recorded_tokens_are_not_believed(folder, run, monkeypatch):
    """A golden whose tokens are wrong is replayed, found out, and generated instead."""
    stream = Store(str(folder / "store")).read("tiny/sm_90").stream
    tokens = stream.tokens.copy()
    tokens[2, 3] ^= 1
    tokens[4, 6] ^= 1
    inputs = load_inputs(*find_suite("tiny/sm_90"))
    found = oracle.replay_or_generate(inputs.job, inputs.facts, tokens.tolist(), silent)
    assert found.regenerated == ("p2", "p4")
    assert compare(stream, found.stream).equal

    original = Store.read

    def altered(self, name):
        golden = original(self, name)
        return replace(golden, stream=replace(golden.stream, tokens=tokens))

    monkeypatch.setattr(Store, "read", altered)
    status, out, _ = run("record", "tiny/sm_90")
    assert status == 1
    assert "2 generated step by step, as other tokens are chosen: p2, p4" in out
    assert "2 of 6 streams differ" in out
    assert "p2, token 3: no operation differs, only tokens" in out


def test_a_replay_is_no_generation(folder, run, monkeypatch):
    """Without --sequential a current golden is replayed, with it generated."""
    calls = []
    generate = ContextLM.generate_many
    monkeypatch.setattr(ContextLM, "generate_many", lambda *a: calls.append(a) or generate(*a))
    assert run("record", "tiny/sm_90")[0] == 0
    assert calls == []
    status, out, _ = run("record", "tiny/sm_90", "--sequential")
    assert status == 0
    assert "equal (generated one token at a time with the reference)" in out
    assert [len(prompts) for _, prompts, *_ in calls] == [1] * 6  # each prompt alone


def test_the_quick_form_compares_the_first_prompts_and_never_publishes(folder, run):
    before = files(folder)
    status, out, _ = run("record", "--all", "--prompts", "2")
    assert status == 0
    assert out.count("equal (replayed with the reference): 2 prompts, 14 tokens, 112") == 2
    assert run("record", "tiny/sm_90", "--prompts", "2", "--sequential")[0] == 0
    status, _, err = run("record", "--all", "--prompts", "2", "--accept")
    assert status == 2
    assert "--accept needs all prompts" in err
    with pytest.raises(GoldenError, match="--accept needs all prompts"):
        Request(accept=True, prompts=2)
    swap_lm_head(folder / "model")
    assert run("record", "tiny/sm_90", "--prompts", "2")[0] == 1
    assert files(folder) == before
    status, _, err = run("record", "tiny/sm_90", "--prompts", "7")
    assert status == 2
    assert "asked for 7 prompts: expected 1 to 6" in err


def test_the_quick_form_needs_a_golden(folder, run):
    status, _, err = run("record", "tiny", "--store", str(folder / "none"), "--prompts", "2")
    assert status == 2
    assert "no store at" in err


def test_another_length_is_told_and_generated(folder, run, monkeypatch):
    longer = replace(suites.SUITES["tiny"], tokens=8)
    monkeypatch.setattr(suites, "SUITES", {"tiny": longer})
    status, out, _ = run("record", "tiny/sm_89")
    assert status == 1
    assert "recorded with another number of tokens a prompt" in out
    assert "differ in steps: expected 7, found 8" in out


def test_a_model_changed_meanwhile_is_refused(folder):
    inputs = load_inputs(*find_suite("tiny/sm_89"))
    swap_lm_head(folder / "model")
    with pytest.raises(GoldenError, match="was changed meanwhile: run this again"):
        oracle.generate(inputs.job, inputs.facts, silent)


@pytest.mark.parametrize("schema", [1, 2])
def test_goldens_of_earlier_schemas_are_recorded_again(folder, run, schema):
    path = folder / "store" / "manifest.jsonl"
    old = [replace(entry, schema=schema) for entry in Store(str(path.parent)).entries().values()]
    path.write_text("".join(entry.line + "\n" for entry in old))
    for command in (("record",), ("check",)):
        status, out, err = run(*command, "tiny/sm_90")
        assert (status, out) == (2, "")
        assert f"recorded with schema {schema}, this build reads schema 3: record it " in err
        assert "bitassay record tiny/sm_90 --accept --store" in err
    assert run("list")[0] == 0
    assert run("record", "--all", "--accept")[0] == 0
    assert run("check", "--all")[0] == 0


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


def test_the_commit_noted_is_that_of_the_start(folder, run, monkeypatch):
    """A recording may take hours, and the checkout may move on meanwhile."""
    order = []

    def noted(name, function):
        def call(*args, **kwargs):
            order.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(record, "provenance_now", noted("noted", record.provenance_now))
    monkeypatch.setattr(oracle, "generate", noted("generated", oracle.generate))
    assert run("record", "tiny/sm_90", "--sequential")[0] == 0
    assert order == ["noted", "generated"]
