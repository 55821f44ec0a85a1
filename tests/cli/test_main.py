"""The command as a function: whatever it is given, it returns a status and raises nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bitassay.cli import main


@pytest.mark.parametrize("argv", [5, "check", [1], ["check", None], b"list"])
def test_what_is_no_list_of_strings_is_told(capsys, argv):
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: argv: expected a list of strings, found ")
    assert told.count("\n") == 1


def test_a_rank_of_torchruns_returns_too(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["run", "nothing"]) == 2
    assert "unknown suite 'nothing'" in capsys.readouterr().err


def test_what_nobody_is_told_is_no_success():
    command = f"{sys.executable} -m bitassay list >&-"
    done = subprocess.run(["sh", "-c", command], stderr=-1, text=True)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)
