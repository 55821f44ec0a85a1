"""Checking: equal, different, and everything that cannot be judged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitassay.engine.distributed.parallel import Gathered
from bitassay.engine.scheduling.stats import Stats
from bitassay.engine.trace import EngineTrace
from bitassay.golden import suites
from bitassay.golden.provenance import Confirmation
from bitassay.golden.runs import engine_runner
from bitassay.golden.runs import gpu as gpu_module
from bitassay.golden.runs.backend import Backend
from bitassay.golden.runs.engine_job import EngineJob, EngineRun
from bitassay.golden.storage.store import Store
from bitassay.reference import context_lm
from bitassay.reference.checkpoints.checkpoint import load_checkpoint
from bitassay.reference.spec.contract import CONTRACT_VERSION

EQUAL = "6 prompts, 42 tokens, 336 logits, 96 fingerprints; 0 different"


class FakeGpu:
    """Stands where ranks on a GPU stand: the reference, in this process."""

    def __init__(self) -> None:
        self.job: EngineJob | None = None
        self.wrong_step: int | None = None

    def run_jobs(self, jobs, dp):
        (self.job,) = jobs
        checkpoint = load_checkpoint(self.job.job.model)
        model = context_lm.ContextLM.from_pretrained(checkpoint, contract=self.job.job.contract)
        traces = [model.generate(prompt, self.job.job.steps) for prompt in self.job.job.prompts]
        if self.wrong_step is not None:
            traces[1].tokens[self.wrong_step] ^= 1
            traces[1].top_bits[self.wrong_step, 0] ^= 1
        found = [EngineTrace(**vars(trace), drafts=None) for trace in traces]
        yield EngineRun.of(Gathered(found, [Stats()], 1.0))


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have an H100, and an engine that is never wrong."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    machine = Confirmation("NVIDIA H100", "570.1", "3.6.0", "2.11.0", "2025-01-01T00:00:00Z")
    monkeypatch.setattr("bitassay.golden.check.describe_gpu", lambda: machine)
    fake = FakeGpu()
    monkeypatch.setattr(engine_runner, "run_jobs", fake.run_jobs)
    return fake


@pytest.mark.parametrize("options", [(), ("--sequential",)])
def test_the_reference_agrees_with_what_it_said(folder, run, options):
    status, out, err = run("check", "--all", *options)
    assert (status, err) == (0, "")
    assert out.count(EQUAL) == 2


def test_the_first_prompts_alone(folder, run):
    status, out, _ = run("check", "tiny/sm_89", "--prompts", "2")
    assert status == 0
    assert "2 prompts, 14 tokens, 112 logits, 32 fingerprints; 0 different" in out
    status, out, _ = run("check", "tiny/sm_89", "--prompts", "2", "--tokens", "3")
    assert status == 0
    assert "2 prompts, 6 tokens, 48 logits, 16 fingerprints; 0 different" in out
    status, _, err = run("check", "tiny/sm_89", "--tokens", "8")
    assert status == 2
    assert "asked for 8 tokens: expected 1 to 7" in err
    status, _, err = run("check", "tiny/sm_89", "--prompts", "7")
    assert status == 2
    assert "asked for 7 prompts: expected 1 to 6" in err


def test_a_wrong_bit_in_the_engine_is_status_1_and_told(folder, run, gpu, monkeypatch):
    monkeypatch.setattr(gpu, "wrong_step", 4)
    status, out, _ = run("check", "tiny/sm_90", "--with", "gpu")
    golden = Store(str(folder / "store")).read("tiny/sm_90").stream
    token, bits = int(golden.tokens[1, 4]), int(golden.top_bits[1, 4, 0])
    assert status == 1
    assert "tiny/sm_90: different (kernels on the GPU, batches of 64): 1 of 6 streams differ" in out
    assert "  p1, token 4: no operation differs, only tokens, top_bits" in out
    assert "prompt text   'def f(x):'" in out
    assert f"expected      token {token} " in out
    assert f"found         token {token ^ 1} " in out
    assert f"logit 0x{bits:04x}" in out
    assert f"logit 0x{bits ^ 1:04x}" in out


def test_the_gpu_generates_in_the_batches_and_order_asked_for(folder, run, gpu):
    status, out, _ = run(
        "check", "tiny/sm_90", "--with", "gpu", "--max-num-seqs", "4", "--shuffle", "1"
    )
    assert status == 0
    assert EQUAL in out
    job = gpu.job
    assert (job.backend, job.job.arch, job.config.max_num_seqs) == (Backend.GPU, "sm_90", 4)
    assert sorted(job.order) == list(range(6)) != list(job.order)
    # What the golden was recorded with is what the ranks have to read.
    identity = Store(str(folder / "store")).read("tiny/sm_90").provenance.identity
    assert job.job.model_digest == identity.model


def test_all_on_a_gpu_means_its_architecture_and_says_what_was_left_out(folder, run, gpu):
    status, out, _ = run("check", "--all", "--with", "gpu")
    assert status == 0
    assert "tiny/sm_90: equal" in out
    assert "tiny/sm_89: not checked, this GPU is of another architecture" in out


def test_a_golden_for_another_gpu_cannot_be_checked(folder, run, gpu, monkeypatch):
    status, _, err = run("check", "tiny/sm_89", "--with", "gpu")
    assert status == 2
    assert "is sm_90, the golden is sm_89" in err
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    status, _, err = run("check", "--all", "--with", "gpu")
    assert status == 2
    assert "the GPU is sm_100, and there is no golden for it" in err


@pytest.mark.parametrize("names", [("tiny/sm_90",), ("--all",)])
def test_without_a_gpu_nothing_is_checked(folder, run, monkeypatch, names):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run("check", *names, "--with", "gpu")
    assert (status, out) == (2, "")
    assert "no GPU: kernels on a GPU need a CUDA device" in err
    assert "nothing else was run in their place" in err


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("True", True), ("0", False)])
def test_interpreted_kernels_do_not_pass_for_a_gpu(folder, run, gpu, monkeypatch, value, refused):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    status, _, err = run("check", "tiny/sm_90", "--with", "gpu")
    assert status == (2 if refused else 0)
    assert ("TRITON_INTERPRET is set" in err) == refused


def test_a_confirmation_goes_to_the_manifest(folder, run, gpu, monkeypatch):
    status, out, _ = run("check", "tiny/sm_90", "--with", "gpu", "--confirm")
    assert status == 0
    assert "the manifest now says NVIDIA H100, driver 570.1" in out
    assert "NVIDIA H100, driver 570.1" in run("list")[1]
    monkeypatch.setenv("CI", "1")
    assert run("check", "tiny/sm_90", "--with", "gpu", "--confirm")[0] == 2


def test_what_differs_is_not_confirmed(folder, run, gpu, monkeypatch):
    monkeypatch.setattr(gpu, "wrong_step", 0)
    assert run("check", "tiny/sm_90", "--with", "gpu", "--confirm")[0] == 1
    assert Store(str(folder / "store")).entry("tiny/sm_90").confirmed == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--shuffle", "1"), "--shuffle: an option of the engine"),
        (("--with", "gpu", "--sequential"), "--sequential and --jobs are for --with reference"),
        (("--with", "interpreter", "--jobs", "2"), "--sequential and --jobs are for --with ref"),
        (("--confirm",), "--confirm needs a GPU, all prompts and all tokens"),
        (("--confirm", "--with", "gpu", "--prompts", "3"), "--confirm needs a GPU, all prompts"),
        (("--confirm", "--with", "gpu", "--tokens", "3"), "--confirm needs a GPU, all prompts"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, run, gpu, given, message):
    status, out, err = run("check", "tiny/sm_90", *given)
    assert (status, out) == (2, "")
    assert message in err
    assert gpu.job is None


def test_a_stale_contract_is_refused(folder, run, monkeypatch):
    monkeypatch.setattr("bitassay.reference.spec.contract.CONTRACT_VERSION", CONTRACT_VERSION + 1)
    status, out, err = run("check", "tiny/sm_90")
    assert (status, out) == (2, "")
    assert f"golden tiny/sm_90 was recorded under contract {CONTRACT_VERSION} (" in err
    assert f"this build has contract {CONTRACT_VERSION + 1} (" in err
    command = f"bitassay record tiny/sm_90 --store {folder / 'store'}"
    assert f"record it again and review the difference: {command}" in err


def test_another_model_is_refused(folder, run):
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["lm_head.bias"][7] = 0.5
    save_file(tensors, folder / "model" / "model.safetensors")
    status, _, err = run("check", "tiny/sm_90")
    assert status == 2
    assert "was recorded with another model (" in err


def test_another_tokenizer_is_refused(folder, run):
    path = folder / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    path.write_text(json.dumps(tokenizer))
    status, _, err = run("check", "tiny/sm_90")
    assert status == 2
    assert "was recorded with another tokenizer (" in err


def test_other_prompts_are_refused(folder, run):
    path = folder / "prompts.jsonl"
    path.write_text(path.read_text().replace("import os", "import re"))
    status, _, err = run("check", "tiny/sm_90")
    assert status == 2
    assert "was recorded with other prompts (" in err


def test_another_length_is_refused(folder, run, monkeypatch):
    longer = replace(suites.SUITES["tiny"], tokens=8)
    monkeypatch.setattr(suites, "SUITES", {"tiny": longer})
    status, _, err = run("check", "tiny/sm_90")
    assert status == 2
    assert "was recorded with 7 tokens a prompt, here it is 8" in err


@pytest.mark.parametrize("command", ["check", "record"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, run, command, wrong):
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["embed_tokens.1.weight"][3, 5] = wrong
    save_file(tensors, folder / "model" / "model.safetensors")
    status, out, err = run(command, "tiny/sm_90")
    assert (status, out) == (2, "")
    assert f"expected finite weights, found {wrong} in embed_tokens.1.weight at [3, 5]" in err


@pytest.mark.parametrize("command", ["check", "record"])
def test_prompts_outside_the_vocabulary_are_refused(folder, run, command):
    lines = [json.dumps({"id": f"p{i}", "token_ids": [1, 256]}) for i in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    status, out, err = run(command, "tiny/sm_90")
    assert (status, out) == (2, "")
    assert "prompt 'p0', position 1: token id 256, but the model's vocabulary has ids 0" in err


@pytest.mark.parametrize("command", ["check", "record"])
def test_unknown_names_are_refused(folder, run, command):
    for name, message in (
        ("tiny/sm_91", "unknown architecture 'sm_91': known are sm_80, sm_86, sm_89, sm_90"),
        ("tiny/sm_80", "suite tiny is not recorded for sm_80: known are tiny/sm_89, tiny/sm_90"),
        ("big/sm_90", "unknown suite 'big': known are tiny"),
        ("big", "unknown suite 'big': known are tiny"),
    ):
        status, out, err = run(command, name)
        assert (status, out) == (2, "")
        assert message in err
    for unfit in ((), ("tiny", "--all")):
        status, _, err = run(command, *unfit)
        assert status == 2
        assert "expected names of goldens, or --all, one of the two" in err


def test_a_missing_model_or_store_is_refused(folder, run):
    status, _, err = run("check", "--all", "--store", str(folder / "absent"))
    assert status == 2
    assert err.count("no store at") == 2
    shutil.rmtree(folder / "model")
    status, _, err = run("check", "tiny/sm_90")
    assert status == 2
    assert "expected a directory with config.json" in err


def test_one_that_cannot_be_checked_does_not_hide_a_difference(folder, run, gpu, monkeypatch):
    """Both are told; a difference decides the status."""
    monkeypatch.setattr(gpu, "wrong_step", 0)
    status, out, err = run("check", "tiny/sm_89", "tiny/sm_90", "--with", "gpu")
    assert status == 1
    assert "the golden is sm_89" in err
    assert "tiny/sm_90: different" in out


def test_a_damaged_store_is_refused(folder, run):
    store = Store(str(folder / "store"))
    chunk = Path(store.root, store.entry("tiny/sm_89").directory, "top_bits", "c.0.0.0")
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 0x10
    chunk.write_bytes(data)
    status, out, err = run("check", "--all")
    assert status == 2
    assert "tiny/sm_89: top_bits/c.0.0.0 is damaged: sha256" in err
    assert "tiny/sm_90: equal" in out


def test_the_gpu_is_described_by_its_driver(monkeypatch):
    answer = SimpleNamespace(stdout="570.133.20\n570.133.20\n")
    monkeypatch.setattr(gpu_module.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(gpu_module, "version", lambda name: "3.6.0")
    machine = gpu_module.describe_gpu()
    assert (machine.gpu, machine.driver, machine.triton) == ("NVIDIA H100", "570.133.20", "3.6.0")


def test_the_real_suite_is_in_the_table():
    suite, arch = suites.find_suite("context-lm/sm_89")
    assert (suite.tokens, arch) == (64, "sm_89")
    assert suites.select([], everything=True) == [
        f"{suite}/{arch}"
        for suite in ("context-lm", "llama-pico", "eagle-pico")
        for arch in ("sm_89", "sm_90")
    ]
    assert suites.select(["context-lm", "context-lm/sm_90"], everything=False) == [
        "context-lm/sm_89",
        "context-lm/sm_90",
    ]
