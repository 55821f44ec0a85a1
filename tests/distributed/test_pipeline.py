"""The pipeline for GPU agents parses, retries nothing, and names what exists."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer

from bitassay.cli.app import app
from bitassay.golden.suites import select
from support.paths import ROOT

yaml = pytest.importorskip("yaml", reason="needs pyyaml, which the test group installs")

PIPELINE = yaml.safe_load((ROOT / ".buildkite" / "pipeline.yml").read_text())
STEPS: list[dict[str, Any]] = PIPELINE["steps"]
COMMANDS = [pytest.param(c, id=f"{s['key']}: {c}") for s in STEPS for c in s["commands"]]
_SET = re.compile(r"[A-Z_]+=\S+")


def words(command: str) -> tuple[dict[str, str], list[str]]:
    """Return what a command line sets in the environment, and the rest of it."""
    parts = shlex.split(command)
    count = next(i for i, part in enumerate(parts) if not _SET.fullmatch(part))
    return dict(part.split("=", 1) for part in parts[:count]), parts[count:]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["key"])
def test_step_has_a_queue_and_a_limit_and_no_retry(step: dict[str, Any]) -> None:
    assert step["agents"]["queue"] in ("cpu", "l4", "h100")
    assert step["label"]
    assert step["timeout_in_minutes"] <= 60
    assert step["retry"] == {"automatic": False}
    assert "soft_fail" not in step


def test_steps_are_of_every_machine() -> None:
    keys = [step["key"] for step in STEPS]
    assert keys == ["cpu", "l4", "h100", "h100-dp2", "h100-dp4"]
    for step in STEPS:
        sizes = [env["DP_SIZE"] for env, _ in map(words, step["commands"]) if "DP_SIZE" in env]
        ranks = "2" if step["key"] == "cpu" else step["agents"].get("gpus")
        assert sizes == ([ranks] if ranks else [])


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    environment, (program, *arguments) = words(command)
    name = program.rpartition("/")[2]
    if name == "nox":
        sessions = re.findall(
            r"^@nox\.session.*\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE
        )
        assert arguments[0] == "-s"
        assert set(arguments[1:]) <= set(sessions)
    elif name == "bitassay":
        verb = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
        with verb.make_context(arguments[0], arguments[1:]) as context:
            assert select(context.params["names"], False)
    elif name == "pytest":
        assert environment["TP_SIZE"] == "1"
        files = [argument for argument in arguments if not argument.startswith("-")]
        assert files
        assert all((ROOT / file).is_file() for file in files)
    elif name in ("python", "python3"):
        assert arguments[:2] in (["-m", "venv"], ["-m", "pip"])
    else:
        script = ROOT / program
        assert script.stat().st_mode & 0o100, f"{program} is not executable"
