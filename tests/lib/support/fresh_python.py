"""Programs in a Python of their own, at the price of a fork: torch is imported once for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

_FORKS = sys.platform == "linux"  # elsewhere a fork does not survive what torch has started

# Each line asks for a program; it runs in a child with an environment of its own.
_SERVER = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    program, environment, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(environment)
        status = 0
        try:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class FreshPython:
    """A context whose `run` is as a start of Python with torch imported and nothing of ours."""

    def __init__(self, folder: Path) -> None:
        """folder: for what programs print."""
        self._out, self._err = (str(folder / name) for name in ("stdout", "stderr"))
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> FreshPython:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.communicate()  # its input ends, and so it does

    def run(self, program: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
        """Run a program in a changed environment, of which None removes a variable."""
        merged = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
        if not _FORKS:
            command = [sys.executable, "-c", program]
            return subprocess.run(command, env=merged, capture_output=True, text=True)
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps([program, merged, self._out, self._err]) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        output, errors = (Path(path).read_text() for path in (self._out, self._err))
        return subprocess.CompletedProcess([program], status, output, errors)
