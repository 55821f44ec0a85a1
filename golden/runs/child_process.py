"""Processes that this one starts, talks to and ends: tasks of the oracle and ranks of an engine.

A child is `python -m MODULE CONNECTION LIFELINE`, the numbers of two descriptors that it is
passed: a connection for messages both ways, and the read end of a pipe that nobody writes, which
ends when the parent does, however it ends. What it writes to stdout and stderr is kept, and told if
it ends badly. A message is a pair of its kind, a short text, and a value that can be pickled.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import bitassay
from bitassay.golden.errors import WorkerError
from bitassay.golden.runs.child_main import FAILED, GONE, Failure

_LAST_LINES = 8
_OTHERS_WORD = 1.0  # seconds for the other children to say what they saw when one ends badly

Message = tuple[str, Any]


@dataclass(eq=False)
class Child:
    """A process that was started.

    name: in errors. advice: added where memory may have run out. failure: what it said before it
    ended badly.
    """

    name: str
    process: subprocess.Popen[bytes]
    connection: Connection
    output: IO[bytes]
    advice: str = ""
    failure: Failure | None = None

    def send(self, message: object) -> None:
        """Send something; WorkerError, saying how it ended, where the child is gone."""
        try:
            self.connection.send(message)
        except GONE:
            raise WorkerError(self.ending()) from None

    def ending(self) -> str:
        """Wait for the process and return in words how it ended badly, with its name."""
        status = self.process.wait()
        if self.failure is not None and status > 0 and self.failure.kind != "bug":
            gave_up = self.failure.kind == "gave up"  # its text names whoever was the cause
            text = self.failure.text
            return text if gave_up or not self.name else f"{self.name}: {text}"
        self.output.seek(0)
        written = self.output.read().decode(errors="replace").strip()
        lines = written.splitlines()[-_LAST_LINES:]
        name = self.name or "the engine's process"
        if status < 0:
            reason = signal.Signals(-status).name
            memory = ""
            if status == -signal.SIGKILL:
                memory = f", as happens when memory runs out{self.advice}"
            return "\n  ".join([f"{name} was killed by {reason}{memory}", *lines])
        return "\n  ".join([f"{name} ended with status {status}", *lines])


class Children:
    """The children of one piece of work; whatever happens, none is left in the end."""

    def __init__(self) -> None:
        self.all: list[Child] = []
        self._stack = ExitStack()
        self._inbox: queue.SimpleQueue[tuple[Child, Message | None]] = queue.SimpleQueue()

    def __enter__(self) -> Children:
        self._stack.__enter__()
        self._lifeline = self._stack.enter_context(_lifeline())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        *,
        name: str = "",
        advice: str = "",
    ) -> Child:
        """Start a child. command: as `python_module` gives it, without the two descriptors.

        name: of it in errors, "" for the only one.
        """
        ours, theirs = Pipe()
        # Before the child: whoever ends is killed first, then waited for, then forgotten.
        self._stack.callback(ours.close)
        output: IO[bytes] = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        passed = (theirs.fileno(), self._lifeline)
        process = subprocess.Popen(
            [*command, *map(str, passed)],
            env=environment,
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        theirs.close()
        child = Child(name, process, ours, output, advice)
        self.all.append(child)
        return child

    def messages(self) -> Iterator[tuple[Child, Message]]:
        """Yield every child's messages as they come, until all have ended well.

        They are read as they come, also while nobody asks for them, so that no child waits for
        this process. Raises WorkerError naming the child that is to blame when any ends badly: a
        killed one first, one that gave up because of others last.
        """
        threading.Thread(target=self._listen, name="children's messages", daemon=True).start()
        left = len(self.all)
        deadline: float | None = None  # to hear from the others, once one has ended badly
        while left:
            try:
                timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
                child, message = self._inbox.get(timeout=timeout)
            except queue.Empty:
                break
            if message is None:
                left -= 1
                if child.process.wait() != 0 and deadline is None:
                    deadline = time.monotonic() + _OTHERS_WORD
            elif message[0] == FAILED:
                child.failure = message[1]
            elif deadline is None:
                yield child, message
        if bad := [child for child in self.all if child.process.poll()]:
            raise WorkerError(min(bad, key=self._blame).ending())

    def _listen(self) -> None:
        """Read what children send; a connection that ends is the last of a child."""
        open_ = {child.connection: child for child in self.all}
        while open_:
            try:
                ready = wait(list(open_))
            except (OSError, ValueError):  # closed, because the work is over
                return
            for connection in ready:
                child = open_[connection]  # type: ignore[index]
                try:
                    self._inbox.put((child, child.connection.recv()))
                except (*GONE, OSError):
                    del open_[child.connection]
                    self._inbox.put((child, None))

    def _blame(self, child: Child) -> tuple[int, int]:
        killed = child.process.returncode < 0
        gave_up = child.failure is not None and child.failure.kind == "gave up"
        return 0 if killed else 2 if gave_up else 1, self.all.index(child)


def python_module(module: str) -> tuple[str, ...]:
    """Return the command that runs a module with this Python."""
    return sys.executable, "-m", module


def child_environment(**more: str) -> dict[str, str]:
    """Return this process's environment with this bitassay first on the path, no GPU, and `more`.

    Threads of torch that sleep while they wait, as a machine with other work needs them.
    """
    here = str(Path(bitassay.__file__).parents[1])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        **more,
    }


def cpu_count() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _lifeline() -> Iterator[int]:
    """Give a descriptor to pass to children: its pipe ends when this process does, however."""
    passed, held = os.pipe()  # held: never written, and no child has it
    try:
        yield passed
    finally:
        os.close(passed)
        os.close(held)
