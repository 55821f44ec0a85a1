"""`python -m bitassay` is the `bitassay` command."""

import sys

from bitassay.cli import script

sys.exit(script())
