"""What the compiler makes of kernels, from a process of its own without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from support.paths import TOOLS

Found = dict[str, Any]  # what a module of tools/compile says of one launch


def compiled_once(arch: str, modules: Iterable[str], folder: Path) -> dict[str, list[Found]]:
    """Return what modules of tools/compile find for an architecture.

    Compiling takes a minute, so the workers of a session share what the first of them compiled
    and left in a folder that all of them see.
    """
    answer = folder / f"compiled-{arch}.json"
    with FileLock(answer.with_suffix(".lock")):
        if not answer.exists():
            answer.write_text(json.dumps(_compile(arch, sorted(modules))))
    said = json.loads(answer.read_text())
    assert said["status"] == 0, said["errors"]
    found: dict[str, list[Found]] = json.loads(said["output"])
    return found


def _compile(arch: str, modules: list[str]) -> dict[str, Any]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BITASSAY_ARCH")
    }
    paths = [str(TOOLS), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "compile", arch, *modules]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    return {
        "status": process.returncode,
        "output": process.stdout,
        "errors": process.stderr[-4000:],
    }
