"""Work spread over processes: no division changes a bit, and no process is left or lost unsaid."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitassay.golden.compare.diff import compare
from bitassay.golden.errors import WorkerError
from bitassay.golden.inputs.suite_inputs import Inputs, load_inputs
from bitassay.golden.runs import oracle, oracle_tasks
from bitassay.golden.runs.process_pool import Crew, Machine, suitable_crew
from bitassay.golden.storage.store import Store
from bitassay.golden.suites import own_suite
from support.tiny_llama import write_tiny_llama

LENGTHS = (1, 5, 66, 17, 2, 129)
STEPS = 6


def write_prompts(path: Path, lengths: tuple[int, ...] = LENGTHS) -> Path:
    random = np.random.default_rng(4)
    ids = [random.integers(0, 128, length).tolist() for length in lengths]
    lines = [json.dumps({"id": f"p{i}", "token_ids": own}) for i, own in enumerate(ids)]
    path.write_text("\n".join(lines) + "\n")
    return path


def load(folder: Path, arch: str = "sm_90", **config: object) -> Inputs:
    model = write_tiny_llama(folder / "model", **config)  # type: ignore[arg-type]
    prompts = write_prompts(folder / "prompts.jsonl")
    return load_inputs(own_suite(model, prompts, STEPS, arches=(arch,)), arch)


def silent(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize(("model_type", "arch"), [("llama", "sm_89"), ("qwen3", "sm_90")])
def test_no_division_changes_a_bit(tmp_path, monkeypatch, model_type, arch):
    inputs = load(tmp_path, arch, model_type=model_type, llama3=True, tied=model_type == "qwen3")
    job, facts = inputs.job, inputs.facts
    sequential = oracle.generate(job, facts, silent, sequential=True)
    tokens = sequential.tokens.tolist()
    for rows, batch in ((1, 2), (64, 4), (10_000, 6)):
        monkeypatch.setattr(oracle_tasks, "REPLAYED_ROWS", rows)
        monkeypatch.setattr(oracle, "BATCH", batch)
        assert compare(sequential, oracle.generate(job, facts, silent)).equal
        assert compare(sequential, oracle.replay(job, facts, tokens, silent)).equal
    assert sequential.distinct_rows > 30


def test_no_number_of_processes_changes_a_bit(tmp_path):
    inputs = load(tmp_path)
    job, facts, seen = inputs.job, inputs.facts, []
    alone = oracle.generate(job, facts, silent)
    shared = oracle.generate(job, facts, lambda *step: seen.append(step), crew=Crew(3))
    replayed = oracle.replay(job, facts, alone.tokens.tolist(), silent, crew=Crew(2, threads=2))
    assert compare(alone, shared).equal
    assert compare(alone, replayed).equal
    total = sum(length + STEPS - 1 for length in LENGTHS)
    assert seen[-1] == (total, total)
    assert len(seen) > STEPS


def test_work_is_divided_longest_first(tmp_path):
    job = load(tmp_path).job
    tasks = oracle_tasks.generating(job, dict.fromkeys(range(6), ()), batch=2)
    assert [task.prompts for task in tasks] == [(5, 1), (2, 4), (3, 0)]
    known = {prompt: (1,) * (prompt % 3) for prompt in range(6)}
    tasks = oracle_tasks.generating(job, known, batch=6)
    assert [task.prompts for task in tasks] == [(5, 2), (3, 0), (1, 4)]
    assert [task.known for task in tasks] == [2, 0, 1]
    tasks = oracle_tasks.replaying(job, dict.fromkeys(range(6), (1,) * STEPS))
    assert [task.prompts for task in tasks] == [(5, 2, 3, 1, 4, 0)]  # 256 rows
    assert not any(task.binding for task in tasks)


def test_small_work_stays_in_one_process_and_memory_limits_the_rest(tmp_path):
    inputs = load(tmp_path)
    machine = Machine(cpus=8, free_memory=1 << 40)
    assert suitable_crew(inputs.job, inputs.facts, None, machine) == Crew(1)
    assert suitable_crew(inputs.job, inputs.facts, 5, machine) == Crew(5)
    machine = replace(machine, worth=1000)
    assert suitable_crew(inputs.job, inputs.facts, None, machine) == Crew(8)
    machine = replace(machine, free_memory=1 << 30)
    crew = suitable_crew(inputs.job, inputs.facts, None, machine)
    assert (crew.jobs, crew.threads) == (1, 8)
    assert crew.note.startswith("1 of 8 processes, because memory")
    assert Machine.here().cpus >= 1


def test_a_failing_process_is_named_with_its_prompt(tmp_path):
    """The longest prompt is beyond what the model allows; the others would be generated."""
    inputs = load(tmp_path, max_position_embeddings=128)
    before = set(children(os.getpid()))  # what other tests of this session keep running
    with pytest.raises(WorkerError, match=r"process \d \(prompts p5.*\): prompt p5: .*128"):
        oracle.generate(inputs.job, inputs.facts, silent, crew=Crew(2))
    assert set(children(os.getpid())) <= before


@contextmanager
def recording(folder: Path, steps: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A `bitassay record` with two processes that has noted at least some steps."""
    if not (folder / "model").exists():
        write_tiny_llama(folder / "model")
        write_prompts(folder / "prompts.jsonl")
    command = [sys.executable, "-m", "bitassay", "record", *options]
    command += ["--model", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl")]
    command += ["--arch", "sm_90", "--max-tokens", str(steps), "--store", str(folder / "store")]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, process_group=0) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while sum(p.read_bytes().count(b"\n") for p in folder.glob("store/.work/*/journal")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_prompts(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until every prompt has chosen a token, whichever process has it."""
    wait_for_steps(folder, 2, process)
    (journal,) = folder.glob("store/.work/*/journal")
    deadline, chosen = time.monotonic() + 60, set()
    while len(chosen) < len(LENGTHS):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
        whole = journal.read_bytes().rpartition(b"\n")[0]
        notes = [json.loads(line.partition(b" ")[2]) for line in whole.splitlines()]
        chosen = {prompt for note in notes for prompt, _ in note.get("tokens", [])}


def children(pid: int) -> list[int]:
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def assert_gone(pids: list[int]) -> None:
    """Ended: absent, or a zombie that nobody here can reap."""
    deadline = time.monotonic() + 20

    def running(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    while any(map(running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_process_is_told_and_the_others_are_ended(tmp_path):
    with recording(tmp_path, 1000, "--jobs", "2") as process:
        wait_for_prompts(tmp_path, process)  # so that neither is still loading
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert "was killed by SIGKILL, as happens when memory runs out: try fewer with --jobs" in err
    assert "error: process " in err
    assert "prompts p" in err
    assert_gone(workers)


def test_an_interrupt_ends_every_process(tmp_path):
    with recording(tmp_path, 1000, "--jobs", "2") as process:
        wait_for_steps(tmp_path, 4, process)
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "model/sm_90: interrupted; the same command goes on from here" in err
    assert "Traceback" not in err
    assert_gone(workers)


def test_the_interpreter_ends_with_its_parent_and_leaves_no_files(tmp_path):
    """Its work takes minutes: it ends because the parent was killed, not because it was done."""
    with recording(tmp_path, 24) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "bitassay", "check", "model/sm_90"]
    command += ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.jsonl")]
    command += ["--store", str(tmp_path / "store"), "--with", "interpreter"]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(command, stdout=-1, stderr=-1, env=environment) as process:
        try:
            deadline = time.monotonic() + 60
            while not (started := children(process.pid)):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.kill()
    assert_gone(started)
    assert list(scratch.iterdir()) == []


def test_a_recording_that_was_killed_goes_on_and_gives_the_same_bits(tmp_path):
    steps = 24
    with recording(tmp_path, steps, "--jobs", "2") as process:
        wait_for_steps(tmp_path, 8, process)
        workers = children(process.pid)
        process.kill()
        process.wait()
    assert_gone(workers)
    assert not (tmp_path / "store" / "manifest.jsonl").exists()
    with recording(tmp_path, steps, "--jobs", "2") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    # How many prompts were begun depends on when the kill came.
    assert re.search(r"going on where an earlier recording ended \(0 prompts finished, [1-6] ", err)
    assert "model/sm_90: generated step by step with the reference; written" in out
    assert not (tmp_path / "store" / ".work").exists()
    suite = own_suite(tmp_path / "model", tmp_path / "prompts.jsonl", steps, arches=("sm_90",))
    inputs = load_inputs(suite, "sm_90")
    golden = Store(str(tmp_path / "store")).read("model/sm_90")
    assert compare(golden.stream, oracle.generate(inputs.job, inputs.facts, silent)).equal
