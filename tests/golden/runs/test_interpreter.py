"""Kernels in the GPU-emulating interpreter against goldens, one process an architecture."""

from __future__ import annotations

import pytest

from bitassay.golden.runs import rank_launcher
from bitassay.reference.spec.arch import EMULATED


@pytest.mark.parametrize("arch", EMULATED)
def test_kernels_give_the_goldens_bits(folder, run, arch):
    status, out, err = run(
        "check", f"tiny/{arch}", "--with", "interpreter", "--prompts", "3", "--max-num-seqs", "2"
    )
    assert (status, err) == (0, "")
    assert "equal (kernels on the interpreter, batches of 2): 3 prompts, 21 tokens" in out


def test_the_environment_decides_no_architecture(folder, run, monkeypatch):
    """The golden's does, whatever the process that checks it was started with."""
    monkeypatch.setenv("BITASSAY_ARCH", "sm_90")
    monkeypatch.setenv("BITASSAY_ALLOW", "exp")
    status, out, err = run("check", "tiny/sm_89", "--with", "interpreter", "--prompts", "1")
    assert (status, err) == (0, "")
    assert "tiny/sm_89: equal" in out


@pytest.mark.parametrize("arch", ["sm_80", "sm_86"])
def test_an_architecture_that_is_not_emulated_is_refused_at_once(folder, run, monkeypatch, arch):
    prompts, target = str(folder / "prompts.jsonl"), str(folder / "own")
    options = ["--model", str(folder / "model"), "--prompts", prompts, "--store", target]
    assert run("record", *options, "--max-tokens", "2", "--arch", arch)[0] == 0
    monkeypatch.setattr(rank_launcher, "Children", None)  # no process is started
    status, out, err = run("check", f"model/{arch}", *options, "--with", "interpreter")
    assert (status, out) == (2, "")
    assert f"cannot run as {arch} in the interpreter, which emulates sm_89 and sm_90: use" in err


def test_a_process_that_cannot_start_is_told(folder, run, monkeypatch):
    monkeypatch.setattr(rank_launcher, "child_environment", lambda **_: {"PYTHONHOME": "/absent"})
    status, out, err = run("check", "tiny/sm_89", "--with", "interpreter")
    assert (status, out) == (2, "")
    assert "the engine's process ended with status" in err
