"""A child process's own side: its work over the connection to its parent, and its end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

from bitassay.golden.errors import GoldenError

FAILED = "failed"  # the kind of a child's last message when it ends badly; its value: a Failure
BAD_INPUT = (GoldenError, ValueError, OSError)  # told in a sentence; any other exception is a bug
GONE = (EOFError, BrokenPipeError, ConnectionResetError)  # of a connection whose other end is
_UNWRITTEN = 2  # the status of a process whose last words could not be written


@dataclass(frozen=True)
class Failure:
    """Why a child ended badly. kind: "input", "gave up" because of other children, or "bug"."""

    text: str
    kind: str


def run_as_child(
    work: Callable[[Connection], None], gave_up: type[Exception] | tuple[type[Exception], ...] = ()
) -> NoReturn:
    """In a child: do the work over the connection to the parent, and end this process.

    An exception is sent to the parent. gave_up: exceptions of which other children are the cause.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    descriptor, lifeline = map(int, sys.argv[1:3])
    _end_with_parent(lifeline)
    os.set_inheritable(descriptor, False)  # its end tells the parent of this process's
    connection = Connection(descriptor)
    try:
        work(connection)
    except GONE:
        leave(1)  # the parent is gone
    except Exception as error:
        kind = "gave up" if isinstance(error, gave_up) else "input"
        if not isinstance(error, (*BAD_INPUT, *_as_tuple(gave_up))):
            traceback.print_exc()
            kind = "bug"
        connection.send((FAILED, Failure(str(error), kind)))
        leave(1)
    leave(0)


def leave(status: int) -> NoReturn:
    """End this process at once, as a rank must: an orderly end may wait for the GPU for ever."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, or a reader that has gone: no more can be told
            status = status or _UNWRITTEN
    os._exit(status)


def _as_tuple(kinds: type[Exception] | tuple[type[Exception], ...]) -> tuple[type[Exception], ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _end_with_parent(lifeline: int) -> None:
    """In a child: end this process as soon as the parent that holds the lifeline is gone."""

    def wait_for_end() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()
