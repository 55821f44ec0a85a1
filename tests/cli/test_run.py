"""`bitassay run` and the processes behind it: any number of ranks gives the same bits."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitassay.cli.run import _eos
from bitassay.engine.config import EngineConfig
from bitassay.golden.errors import CannotRunError, GoldenError, WorkerError
from bitassay.golden.inputs.job import Job
from bitassay.golden.runs.backend import Backend
from bitassay.golden.runs.engine_job import EngineJob, EngineRun
from bitassay.golden.runs.rank_launcher import run_jobs, run_ranks
from support.tiny_eagle import write_tiny_eagle
from support.tiny_llama import write_tiny_llama

LENGTHS = (1, 5, 20, 17, 2)
TOKENS = 10
NAMES = tuple(f"p{i}" for i in range(len(LENGTHS)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a head for it, and a file of prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder / "model")
    write_tiny_eagle(folder / "head", folder / "model")
    random = np.random.default_rng(4)
    ids = [random.integers(0, 128, length).tolist() for length in LENGTHS]
    lines = [json.dumps({"id": f"p{i}", "token_ids": own}) for i, own in enumerate(ids)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_job(tiny: Path, *, job: dict[str, Any] | None = None, **fields: Any) -> EngineJob:
    """Return the tiny prompts for the model with its head; job: other fields of the Job."""
    lines = (tiny / "prompts.jsonl").read_text().splitlines()
    prompts = tuple(tuple(json.loads(line)["token_ids"]) for line in lines)
    own = Job(tiny / "model", "", "sm_90", NAMES, prompts, TOKENS, draft=tiny / "head")
    given = {
        "config": EngineConfig(num_speculative_tokens=3, max_num_seqs=2),
        "backend": Backend.REFERENCE,
        "timeout": 60,
    }
    return EngineJob(replace(own, **job or {}), **given | fields)


def options(tiny: Path, *more: str) -> list[str]:
    own = ["--model", str(tiny / "model"), "--prompts", str(tiny / "prompts.jsonl")]
    return ["run", *own, "--max-tokens", str(TOKENS), "--backend", "reference", *more]


def assert_same(got: EngineRun, want: EngineRun, *, without: int | None = None) -> None:
    assert len(got.traces) == len(want.traces)
    for prompt, (one, other) in enumerate(zip(got.traces, want.traces, strict=True)):
        if prompt == without:
            assert one is None
            continue
        assert one is not None
        assert other is not None
        assert one.keys() == other.keys()
        for name, array in one.items():
            assert array.dtype == other[name].dtype
            np.testing.assert_array_equal(array, other[name], f"prompt {prompt}, {name}")


@pytest.fixture(scope="module")
def alone(tiny: Path) -> EngineRun:
    """What one rank gives."""
    return run_ranks(make_job(tiny))


def test_one_rank_gives_whole_traces(alone):
    assert [own["tokens"].shape for own in alone.traces] == [(TOKENS,)] * len(LENGTHS)
    for own in alone.traces:
        drafted, accepted = own["rounds"][:, 1:].T
        assert own["draft_tokens"].shape == (len(own["rounds"]), 3)
        assert ((own["draft_tokens"] >= 0).sum(1) == drafted).all()
        assert (accepted <= drafted).all()
        assert len(np.unique(own["fingerprints"])) > TOKENS
    assert alone.total.tokens == TOKENS * len(LENGTHS)
    assert alone.seconds > 0


@pytest.mark.parametrize(
    ("dp", "fields", "without"),
    [
        (3, {"order": (4, 2, 0, 1, 3), "arrivals": (0, 3, 0, 7, 1), "cancelled": {2: 4}}, 2),
        (2, {"warm": True}, None),
    ],
)
def test_no_number_of_ranks_changes_a_bit(tiny, alone, dp, fields, without):
    seen: dict[int, list[int]] = {}
    ends: dict[int, str | None] = {}

    def on_tokens(prompt: int, tokens: list[int], reason: str | None) -> None:
        seen.setdefault(prompt, []).extend(tokens)
        ends[prompt] = reason

    found = run_ranks(make_job(tiny, **fields), dp, on_tokens)
    assert_same(found, alone, without=without)
    for prompt, own in enumerate(found.traces):
        assert ends[prompt] == (None if own is None else "length")
        assert own is None or seen[prompt] == own["tokens"].tolist()
    assert len(found.stats) == dp
    whole = sum(map(len, seen.values()))
    assert found.total.tokens == whole
    assert [s.tokens > 0 for s in found.stats] == [True] * dp
    assert (found.total.prefix_hit_tokens > 0) == ("warm" in fields)


def test_fewer_prompts_than_ranks_and_another_job_on_the_same_ranks(tiny, alone):
    job = make_job(tiny)
    plain = replace(job, config=EngineConfig(num_speculative_tokens=0, max_num_seqs=1))
    two = {"prompts": job.job.prompts[:2], "prompt_names": NAMES[:2]}
    fewer, found = run_jobs([make_job(tiny, job=two), plain], 3)
    assert_same(fewer, EngineRun(alone.traces[:2], alone.stats, alone.seconds))
    assert [stats.tokens for stats in fewer.stats] == [TOKENS, TOKENS, 0]
    assert found.total.tokens == TOKENS * len(LENGTHS)
    for one, other in zip(found.traces, alone.traces, strict=True):
        assert "rounds" not in one
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_jobs_of_different_models_are_refused(tiny):
    jobs = [make_job(tiny), make_job(tiny, job={"draft": None}, config=EngineConfig())]
    with pytest.raises(WorkerError, match="expected the same model, found several"):
        list(run_jobs(jobs))


def children() -> list[int]:
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_a_rank_that_is_killed_is_named_within_seconds(tiny):
    before = set(children())
    heard: set[int] = set()
    killed = []

    def on_tokens(prompt: int, tokens: list[int], reason: str | None) -> None:
        heard.add(prompt % 2)  # which is the rank
        if len(heard) == 2 and not killed:
            own = sorted(set(children()) - before)  # started in the order of ranks
            os.kill(own[1], signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(WorkerError, match="^rank 1 of 2 was killed by SIGKILL, as happens when"):
        run_ranks(make_job(tiny, job={"steps": 2000}), 2, on_tokens)
    assert time.monotonic() - killed[0] < 10
    assert set(children()) <= before


def test_a_rank_that_fails_is_named_with_its_reason(tiny):
    """The last prompt's ids are beyond the vocabulary: rank 1 alone sees it."""
    prompts = (*make_job(tiny).job.prompts[:3], (9999,))
    job = make_job(tiny, job={"prompts": prompts, "prompt_names": NAMES[:4]})
    with pytest.raises(WorkerError, match=r"^rank 1 of 2: prompt p3, .*9999"):
        run_ranks(job, 2)


def test_a_crash_shows_the_last_lines_of_what_the_rank_wrote(tiny):
    crash = "import sys; print('so it goes', file=sys.stderr); sys.exit(7)"
    command = (sys.executable, "-c", crash)
    with pytest.raises(WorkerError, match=r"^rank 0 of 2 ended with status 7\n  so it goes$"):
        run_ranks(make_job(tiny), 2, command=command)


def test_a_rank_that_takes_no_part_ends_in_the_timeout(tiny, tmp_path):
    """What a rank runs is replaced: no switch of the product makes it skip a collective."""
    script = tmp_path / "idle.py"
    script.write_text(
        "import runpy, time\n"
        "from bitassay.engine.distributed.group import Group\n"
        "whole = Group.sum\n"
        "def skip(self, step, count):\n"
        "    if self.rank == 1 and step == 3:\n"
        "        time.sleep(600)\n"
        "    return whole(self, step, count)\n"
        "Group.sum = skip\n"
        "runpy.run_module('bitassay.golden.runs.rank_worker', run_name='__main__')\n"
    )
    command = (sys.executable, str(script))
    before, begun = set(children()), time.monotonic()
    with pytest.raises(
        WorkerError,
        match=r"^rank 0 of 2: collective 4 \(after step 3\) was not done after 2 s, because rank 1 "
        r"did not enter it \(rank 1 last heard of 0\.\d s ago: done with step 3, ",
    ):
        run_ranks(make_job(tiny, timeout=2), 2, command=command)
    assert time.monotonic() - begun < 25
    assert set(children()) <= before


def test_ranks_end_with_the_process_that_started_them(tiny):
    command = [sys.executable, "-m", "bitassay", *options(tiny, "--dp", "2", "--stream")]
    command[command.index(str(TOKENS))] = "2000"
    process = subprocess.Popen(command, stdout=-1, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("p")
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        started = [int(child) for task in tasks for child in task.read_text().split()]
        assert len(started) == 2
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_command_prints_streams_and_counts(tiny, run, alone):
    status, out, err = run(*options(tiny, "--dp", "2", "--draft", str(tiny / "head")))
    assert (status, err) == (0, "")
    for i in range(len(LENGTHS)):
        assert out.count(f"── p{i}\n") == 1
    header, *rows = [line.split() for line in out.splitlines()[-4:]]
    assert header[:3] == ["rank", "steps", "tokens"]
    assert [row[0] for row in rows] == ["0", "1", "all"]
    assert [row[2] for row in rows] == ["30", "20", "50"]
    assert rows[-1][3:6] == [str(n) for n in (alone.total.rounds, *_drafts(alone))]


def _drafts(run: EngineRun) -> tuple[int, int]:
    return run.total.drafted, run.total.accepted


def test_the_command_streams_every_step(tiny, run, alone):
    status, out, _ = run(*options(tiny, "--prompts", "2", "--stream"))
    assert status == 0
    lines = [line for line in out.splitlines() if line.startswith("p1: ")]
    assert len(lines) == TOKENS  # no head: one a step
    text = "".join(eval(line.removeprefix("p1: ")) for line in lines)
    assert [ord(c) for c in text] == alone.traces[1]["tokens"].tolist()


def test_torchrun_starts_the_same_command(tiny, run):
    _, expected, _ = run(*options(tiny))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable, *launch, "-m", "bitassay", *options(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr

    def streams(out: str) -> list[str]:
        return sorted(out.partition("rank ")[0].split("── ")[1:])

    assert [s.strip() for s in streams(done.stdout)] == [s.strip() for s in streams(expected)]
    rows = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [row[:1] + row[2:3] for row in rows] == [["0", "30"], ["1", "20"], ["all", "50"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a suite (context-lm, "),
        (["nothing"], "unknown suite 'nothing': known are context-lm"),
        (["context-lm", "--backend", "reference"], "expected a model with a KV cache, which the"),
        (["llama-pico", "--draft", "x"], "--draft needs --model DIR"),
        (
            ["llama-pico", "--backend", "reference", "--k", "3"],
            "expected 0 without a draft head, found 3",
        ),
        (["llama-pico", "--backend", "reference", "--prompts", "999"], "asked for 999 prompts"),
        (["llama-pico", "--model", "x", "--prompts", "f"], "name a suite (context-lm, "),
        (["--model", "x", "--prompts", "f"], "--model needs --max-tokens T"),
    ],
)
def test_what_cannot_be_run_is_told(run, arguments, message):
    status, out, err = run("run", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_without_a_gpu_nothing_else_is_run(tiny, run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out, err = run("run", "llama-pico", "--dp", "2")
    assert (status, out) == (2, "")
    assert "no GPU: kernels on a GPU need a CUDA device that torch can use, and nothing else" in err
    with pytest.raises(CannotRunError, match="no GPU: .* use the interpreter or the reference"):
        run_ranks(make_job(tiny, backend=Backend.GPU))


def test_more_ranks_than_gpus_are_refused(tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(CannotRunError, match="--dp 4: expected a GPU for every rank, found 2"):
        run_ranks(make_job(tiny, backend=Backend.GPU), 4)


def test_an_architecture_that_is_not_emulated_is_refused(tiny):
    job = make_job(tiny, backend=Backend.INTERPRETER, job={"arch": "sm_80"})
    with pytest.raises(CannotRunError, match="sm_80 in the interpreter, which emulates sm_89 and"):
        run_ranks(job)


def started(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Start a rank for each command, as torchrun would; rank 0 keeps the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bitassay", *command],
            stdout=-1,
            stderr=-1,
            text=True,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, command in enumerate(commands)
    ]
    try:
        return [(p.wait(60), *p.communicate()) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("differs", "same"),
    [
        (["prompts", 'arch ("sm_89" there, "sm_90" here)', "max_tokens (9 there"], ["draft"]),
        (["draft", "num_speculative_tokens (3 there, 0 here)"], ["prompts", "arch", "max_tokens"]),
    ],
)
def test_ranks_that_were_given_other_jobs_run_nothing(tiny, differs, same):
    own = options(tiny)
    if "draft" in differs:
        theirs = [*own, "--draft", str(tiny / "head")]
    else:
        lines = (tiny / "prompts.jsonl").read_text().splitlines()[:3]
        fewer = tiny / "fewer.jsonl"
        fewer.write_text("\n".join(lines) + "\n")
        theirs = [{str(tiny / "prompts.jsonl"): str(fewer), "10": "9"}.get(x, x) for x in own]
        theirs += ["--arch", "sm_89"]
    results = started([own, theirs])
    for rank, (status, out, err) in enumerate(results):
        assert (status, out) == (2, "")
        assert f"error: rank {rank} of 2: expected the same job on every rank, but rank " in err
        assert "Traceback" not in err
    for one in differs:
        assert one in results[0][2]
    for one in same:
        assert one not in results[0][2]


def test_what_decides_results_is_a_fact(tiny):
    job = make_job(tiny)
    facts = job.facts
    assert make_job(tiny, job={"model": Path("elsewhere")}, timeout=5).facts == facts
    config = EngineConfig(num_speculative_tokens=3, max_num_seqs=2, max_num_batched_tokens=2048)
    assert make_job(tiny, config=config).facts == facts
    changes: dict[str, dict[str, Any]] = {
        "prompts": {"job": {"prompts": job.job.prompts[::-1]}},
        "arch": {"job": {"arch": "sm_89"}},
        "max_tokens": {"job": {"steps": 9}},
        "backend": {"backend": Backend.INTERPRETER},
        "order": {"order": (4, 3, 2, 1, 0)},
        "arrivals": {"arrivals": (0,) * 5},
        "cancelled": {"cancelled": {1: 1}},
        "eos_token_id": {"eos_token_id": (0,)},
        "warm": {"warm": True},
        "num_speculative_tokens": {"config": replace(config, num_speculative_tokens=1)},
    }
    for name, change in changes.items():
        other = make_job(tiny, **change).facts
        assert [key for key in facts if facts[key] != other[key]] == [name]


@pytest.mark.parametrize("dp", ["1", "2"])
@pytest.mark.parametrize("timeout", ["inf", "nan", "1e12", "0"])
def test_a_timeout_that_is_no_time_is_refused(tiny, run, dp, timeout):
    status, out, err = run(*options(tiny, "--dp", dp, "--timeout", timeout))
    assert (status, out) == (2, "")
    assert "error: timeout: expected more than 0 seconds and at most 86400, a day, found" in err


def test_errors_of_one_rank_name_none(tiny):
    prompts = (*make_job(tiny).job.prompts[:1], (9999,))
    job = make_job(tiny, job={"prompts": prompts, "prompt_names": NAMES[:2]})
    with pytest.raises(WorkerError, match=r"^prompt p1, .*9999"):
        run_ranks(job)


@pytest.mark.parametrize(("said", "ids"), [(0, (0,)), (7, (7,)), ([0, 5], (0, 5)), ([3], (3,))])
def test_eos_is_one_id_or_several(tmp_path, said, ids):
    assert _eos(write_tiny_llama(tmp_path, eos_token_id=said)) == ids


@pytest.mark.parametrize("said", [None, [], -1, "2", True, [1, None]])
def test_an_eos_that_is_none_is_told(tmp_path, said):
    model = write_tiny_llama(tmp_path, eos_token_id=said)
    with pytest.raises(GoldenError, match="--stop-at-eos: expected 'eos_token_id' of .* found "):
        _eos(model)


def test_a_model_without_eos_is_told(tmp_path):
    model = write_tiny_llama(tmp_path)
    config = json.loads((model / "config.json").read_text())
    del config["eos_token_id"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(GoldenError, match="to be an id or a list of ids, found nothing: correct"):
        _eos(model)


def test_a_bad_place_under_torchrun_is_told(tiny):
    command = [sys.executable, "-m", "bitassay", *options(tiny)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"RANK": "0", "WORLD_SIZE": "x"}
    )
    assert (done.returncode, done.stdout) == (2, "")
    message = "error: WORLD_SIZE in the environment: expected a number, found 'x': start the ranks"
    assert message in done.stderr


def test_help_has_an_example(run):
    status, out, _ = run("run", "--help")
    assert status == 0
    assert "Example: bitassay run eagle-pico --dp 2 --prompts 8" in out
