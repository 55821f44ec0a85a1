"""Kernels in the GPU-emulating interpreter against goldens, one process an architecture."""

from __future__ import annotations

import pytest

from bitassay.golden.runs import interpreter
from bitassay.reference.spec.arch import EMULATED as ARCHES


@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_kernels_give_the_goldens_bits(folder, run, arch):
    status, out, err = run(
        "check", f"tiny/{arch}", "--with", "interpreter", "--prompts", "3", "--batch-size", "2"
    )
    assert (status, err) == (0, "")
    assert "equal (kernels on the interpreter, batches of 2): 3 prompts, 21 tokens" in out


def test_a_process_that_emulates_another_architecture_is_refused(folder, run, monkeypatch):
    environment = interpreter._environment
    monkeypatch.setattr(interpreter, "_environment", lambda arch: environment("sm_90"))
    status, out, err = run("check", "tiny/sm_89", "--with", "interpreter", "--prompts", "1")
    assert (status, out) == (2, "")
    assert "kernels in the interpreter as sm_89 ended with status 1" in err
    assert "sm_90" in err


@pytest.mark.parametrize("arch", ["sm_80", "sm_86"])
def test_an_architecture_that_is_not_emulated_is_refused_at_once(folder, run, monkeypatch, arch):
    assert interpreter.EMULATED == ARCHES
    prompts, target = str(folder / "prompts.jsonl"), str(folder / "own")
    options = ["--model", str(folder / "model"), "--prompts", prompts, "--store", target]
    assert run("record", *options, "--max-tokens", "2", "--arch", arch)[0] == 0
    monkeypatch.setattr(interpreter, "_environment", None)  # no process is started
    status, out, err = run("check", f"model/{arch}", *options, "--with", "interpreter")
    assert (status, out) == (2, "")
    assert f"cannot run as {arch} in the interpreter, which emulates sm_89 and sm_90: use" in err


def test_a_process_that_cannot_start_is_told(folder, run, monkeypatch):
    monkeypatch.setattr(interpreter, "_environment", lambda arch: {"PATH": ""})
    status, out, err = run("check", "tiny/sm_89", "--with", "interpreter")
    assert (status, out) == (2, "")
    assert "nothing else was run in their place" in err
