"""`python -m bitassay.golden` is the `bitassay` command."""

import os
import signal

# Ctrl-C while modules are imported, where nothing would catch it: no traceback. It may be ignored.
_before = signal.getsignal(signal.SIGINT)
if _before is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from .cli import main  # noqa: E402

signal.signal(signal.SIGINT, _before)
main()
