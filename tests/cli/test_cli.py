"""The command: help, version, listing, and an exit status that never lies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bitassay
from bitassay.cli.console import each
from bitassay.golden.storage.store import Store


@pytest.mark.parametrize("command", ["record", "check", "show", "list"])
def test_every_command_has_help_with_an_example(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert f"Example: bitassay {command} " in out
    assert command in run("--help")[1]
    assert "2 could not check, 130 interrupted" in " ".join(run("--help")[1].split())


def test_version(run):
    assert run("--version") == (0, f"bitassay {bitassay.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("check", "--with", "hope"),
        ("check", "tiny", "--prompts", "0"),
        ("check", "tiny", "--max-num-seqs", "x"),
        ("show",),
    ],
)
def test_usage_errors_are_status_2(folder, run, arguments):
    assert run(*arguments)[0] == 2


def test_a_bug_is_status_2_with_its_traceback(folder, run, monkeypatch):
    """Python itself would end with 1, which here means that bits differ."""
    monkeypatch.setattr("bitassay.golden.check.compare", lambda *_: 1 / 0)
    status, _, err = run("check", "tiny/sm_90")
    assert status == 2
    assert "ZeroDivisionError" in err
    monkeypatch.setattr("bitassay.golden.storage.store.find_store", lambda *_: 1 / 0)
    status, _, err = run("list")
    assert status == 2
    assert "ZeroDivisionError" in err


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("check", "context-lm/sm_89", "--prompts", "1", "--tokens", "1"), ("--help",)],
)
def test_an_output_that_nobody_reads_is_status_2(arguments):
    """Whoever prints for us ends with 1 then, which here means that bits differ."""
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        command = [sys.executable, "-m", "bitassay", *arguments]
        done = subprocess.run(command, stdout=theirs, stderr=-1, text=True)
    finally:
        os.close(theirs)
    assert done.returncode == 2
    assert done.stderr == "error: whoever read the output has ended before all was said\n"


def test_after_a_broken_pipe_nothing_else_is_checked(monkeypatch):
    seen = []

    def broken(name: str) -> int:
        seen.append(name)
        raise BrokenPipeError

    monkeypatch.setattr("bitassay.cli.console.os.dup2", lambda *_: None)
    assert each(["a", "b"], broken) == 2
    assert seen == ["a"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_status_2():
    command = [sys.executable, "-m", "bitassay", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=-1, text=True)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr


def test_check_under_torchrun_is_refused(folder, run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, err = run("check", "tiny/sm_90")
    assert (status, out) == (2, "")
    assert "this is one of 2: leave torchrun away, which is for `bitassay run`" in err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run("check", "tiny/sm_90")[0] == 0


def test_bad_input_is_told_without_a_traceback(folder, run):
    for arguments in (("list", "--store", "absent"), ("show", "tiny/sm_80"), ("check", "big")):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert "Traceback" not in err


def test_a_suite_is_not_a_golden_to_show(folder, run):
    status, out, err = run("show", "tiny")
    assert (status, out) == (2, "")
    assert "'tiny' does not name one golden: expected tiny/sm_89 or tiny/sm_90" in err
    assert "expected <suite>/<arch>" in run("show", "unheard-of")[2]


def test_list_states_what_the_manifest_says(folder, run):
    status, out, _ = run("list", "--verify")
    assert status == 0
    assert "tiny/sm_89" in out
    assert "emulated" in out
    assert "2 goldens verified" in out


def test_list_verifies_on_request(folder, run):
    chunk = next((folder / "store" / "tiny" / "sm_90").glob("*/tokens/c.0.0"))
    chunk.write_bytes(b"")
    assert run("list")[0] == 0
    status, _, err = run("list", "--verify")
    assert status == 2
    assert "tiny/sm_90: tokens/c.0.0 is damaged" in err


def test_show_prints_provenance_and_streams(folder, run):
    status, out, _ = run("show", "tiny/sm_89", "--prompt", "p1")
    assert status == 0
    for fact in ("contract", "model", "tokenizer", "prompts × steps", "6 × 7", "smallest margin"):
        assert fact in out
    assert "── p1\ndef f(x):" in out
    assert "── p2" not in out
    assert run("show", "tiny/sm_89", "--text")[1].count("── p") == 6
    status, _, err = run("show", "tiny/sm_89", "--prompt", "p9")
    assert status == 2
    assert "has no prompt 'p9': it has p0 … p" in err


def test_progress_is_told_in_lines_where_there_is_no_terminal(folder, run, monkeypatch):
    assert run("record", "tiny/sm_90", "--sequential")[2] == ""  # soon done: nothing is told
    monkeypatch.setattr("bitassay.cli.console.LINE_SECONDS", 0.0)
    _, _, err = run("record", "tiny/sm_90", "--sequential")
    lines = err.splitlines()
    assert len(lines) > 6 * 7
    stream = Store(str(folder / "store")).read("tiny/sm_90").stream
    total = stream.prompt_ids.size + 6 * (stream.steps - 1)
    assert re.fullmatch(rf"tiny/sm_90: .*: \d+ of {total} rows, about 0:00:\d\d left", lines[0])
    assert lines[-1].endswith(f"{total} of {total} rows, about 0:00:00 left")


def test_help_needs_no_torch():
    """The command answers at once: torch takes seconds to import."""
    code = "import sys, bitassay.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_interrupt_while_modules_are_imported_has_no_traceback(tmp_path):
    """A module that is imported stands for the user: it interrupts the process."""
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit('went on')\n"
    (tmp_path / "typer.py").write_text(code)
    own = str(Path(bitassay.__file__).parents[1])
    path = os.pathsep.join([str(tmp_path), own])
    command = [sys.executable, "-m", "bitassay", "list"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_python_m_is_the_command():
    command = [sys.executable, "-m", "bitassay", "--version"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, f"bitassay {bitassay.__version__}\n")
