"""`python -m bitassay.golden` is the `bitassay` command."""

from .cli import main

main()
