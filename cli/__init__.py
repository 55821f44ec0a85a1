"""The `bitassay` command: options, calls, printing, exit status.

Exit status: 0 equal, 1 different, 2 could not check, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main", "script"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; argv: as in sys.argv[1:], None for those.

    Whatever goes wrong is told on stderr and is status 2, never 1; nothing is raised. Only a rank
    of torchrun's that waits in vain for the others ends its process.
    """
    from bitassay.cli.app import main

    return main(argv)


def script() -> int:
    """Run the command as a process of its own: Ctrl-C while modules load is no traceback."""
    import os
    import signal

    # It may be ignored, as in a shell's background; then it stays so.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from bitassay.cli.app import main

    signal.signal(signal.SIGINT, before)
    status = main()
    if "RANK" in os.environ:  # torchrun started this process, and others like it
        from bitassay.golden.runs.child_main import leave

        leave(status)
    return status
