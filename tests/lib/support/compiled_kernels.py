"""What the compiler makes of kernels, from a process of its own without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from support.paths import TOOLS

Found = dict[str, Any]  # what a script says of one launch


def compiled_by(script: str, arch: str) -> list[Found]:
    """Return what a script of tools/compile prints for an architecture, a JSON object a line."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BITASSAY_ARCH")
    }
    path = TOOLS / "compile" / script
    # Scripts import their neighbours, which PYTHONSAFEPATH would hide.
    paths = [str(path.parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    process = subprocess.run(
        [sys.executable, str(path), arch], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads(line) for line in process.stdout.splitlines()]
