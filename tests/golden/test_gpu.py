"""Compiled kernels on this machine's GPU against the committed goldens."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bitassay.golden.runs.backend import gpu_arch


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [(), ("--max-num-seqs", "7"), ("--shuffle", "1"), ("--max-num-seqs", "1")],
    ids=" ".join,
)
def test_compiled_kernels_give_the_goldens_bits(cuda, options):
    check("--all", "--with", "gpu", *options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        ("--max-num-batched-tokens", "16", "--max-num-seqs", "32"),
        ("--max-num-batched-tokens", "100", "--shuffle", "2"),
        ("--max-num-batched-tokens", "256", "--max-num-seqs", "2", "--shuffle", "3"),
    ],
    ids=" ".join,
)
def test_prompts_in_chunks_give_the_goldens_bits(cuda, options):
    check(f"llama-pico/{gpu_arch()}", "--with", "gpu", *options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [(), ("--k", "0"), ("--k", "5", "--warm"), ("--eager", "--cancel", "3", "--num-blocks", "64")],
    ids=" ".join,
)
def test_the_serving_engine_gives_the_goldens_bits(cuda, options):
    check(f"eagle-pico/{gpu_arch()}", "--with", "engine", *options)


def check(*arguments: str) -> None:
    """In a process of its own: this one may interpret kernels."""
    command = [sys.executable, "-m", "bitassay", "check", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
    lines = answer.stdout.splitlines()
    assert all("on the GPU" in line for line in lines if ": equal (" in line)
    assert ": equal (" in answer.stdout
