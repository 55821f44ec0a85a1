"""Whole decoders: a tiny Llama and a tiny Qwen3, recorded, replayed, and run by the kernels."""

from __future__ import annotations

import json

import pytest

from bitassay.engine.scheduling.stats import Stats
from bitassay.golden.inputs.suite_inputs import load_inputs
from bitassay.golden.runs import engine_runner
from bitassay.golden.runs.engine_job import EngineJob, EngineRun
from bitassay.golden.storage.store import Store
from bitassay.golden.suites import find_suite, own_suite
from bitassay.reference.spec.contract import operations
from support.tiny_llama import write_tiny_llama

TEXTS = ("import numpy as np", "d", "def f(x):\n    return [i for i in range(x)]  # and so on, 66.")
STEPS = 4
KERNELS = {
    "llama": ("--max-num-batched-tokens", "16", "--shuffle", "3"),
    "qwen3": ("--max-num-seqs", "2", "--max-num-batched-tokens", "10"),
}


@pytest.mark.parametrize(("model_type", "arch"), [("llama", "sm_89"), ("qwen3", "sm_90")])
def test_it_is_recorded_and_the_kernels_agree(run, tmp_path, model_type, arch):
    qwen = model_type == "qwen3"
    model = write_tiny_llama(
        tmp_path / "m", model_type=model_type, llama3=True, tied=qwen, sharded=qwen
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "\n".join(json.dumps({"id": f"p{i}", "text": t}) for i, t in enumerate(TEXTS))
    )
    options = ["--model", str(model), "--prompts", str(prompts), "--store", str(tmp_path / "s")]
    assert run("record", *options, "--arch", arch, "--max-tokens", str(STEPS))[0] == 0
    golden = Store(str(tmp_path / "s")).read(f"m/{arch}")
    assert golden.stream.operations == operations(model_type, 2)
    assert golden.stream.logits_dtype == "bfloat16"
    assert len(golden.provenance.identity.rotary_table) == 64
    for way in ((), ("--sequential",)):
        status, out, _ = run("check", f"m/{arch}", *options, *way)
        assert (status, "3 prompts, 12 tokens" in out) == (0, True)
    kernels = ("--with", "interpreter", "--prompts", "2", "--tokens", "2", *KERNELS[model_type])
    status, out, err = run("check", f"m/{arch}", *options, *kernels)
    assert status == 0, err
    fingerprints = (2 + 1) * 2 * len(operations(model_type, 2))
    assert f"2 prompts, 4 tokens, 32 logits, {fingerprints} fingerprints; 0 different" in out


def test_the_rotary_tables_are_part_of_the_identity(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "token_ids": [1]}\n')
    found = set()
    for name, config in {"a": {}, "b": {"rope_theta": 5e5}, "c": {"llama3": True}}.items():
        model = write_tiny_llama(tmp_path / name, max_position_embeddings=1024, **config)
        suite = own_suite(model, prompts, 1, arches=("sm_90",))
        found.add(load_inputs(suite, "sm_90").identity.rotary_table)
    assert len(found) == 3


def test_a_model_without_a_cache_takes_no_chunks(folder, run):
    rows = ("--max-num-batched-tokens", "4")
    status, _, err = run("check", "tiny/sm_90", "--with", "interpreter", *rows)
    assert status == 2
    assert "--max-num-batched-tokens: expected none for the model of" in err


def test_another_model_type_is_refused_by_name(folder, run):
    path = folder / "model" / "config.json"
    path.write_text(path.read_text().replace("context-lm", "gpt2"))
    status, out, err = run("record", "tiny/sm_90")
    assert (status, out) == (2, "")
    assert "expected model_type to be one of context-lm, llama, qwen3, found 'gpt2'" in err


def test_what_takes_long_in_the_interpreter_is_announced(folder, run, monkeypatch):
    inputs = load_inputs(*find_suite("tiny/sm_90"))
    job = EngineJob(inputs.job)
    assert engine_runner.long_interpreted(job, inputs.facts) == ""
    monkeypatch.setattr(engine_runner, "MULTIPLY_ADDS", 200)
    text = engine_runner.long_interpreted(job, inputs.facts)
    assert " hours in the interpreter; fewer prompts and tokens take less" in text
    stream = Store(str(folder / "store")).read("tiny/sm_90").stream.first(1)
    names = "tokens top_ids top_bits margins fingerprints prompt_fingerprints".split()
    traces = [{name: getattr(stream, name)[0] for name in names}]
    ran = EngineRun(traces, [Stats()], 1.0)
    monkeypatch.setattr(engine_runner, "run_jobs", lambda jobs, dp: iter([ran]))
    status, _, err = run("check", "tiny/sm_90", "--with", "interpreter", "--prompts", "1")
    assert status == 0
    assert "tiny/sm_90: about " in err
