"""Errors as the command tells them: with its own options, and the command that would mend them."""

from __future__ import annotations

import shlex

from bitassay.cli.flags import spelled
from bitassay.engine.config import OptionError
from bitassay.golden import suites
from bitassay.golden.errors import GoldenError, RecordAgain


def worded(error: Exception) -> str:
    """Return what an error says, and the command that it advises, if any."""
    if isinstance(error, OptionError):
        return f"{spelled(error.options)}: {error.reason}"
    advice = error.advice if isinstance(error, GoldenError) else None
    return str(error) if advice is None else f"{error}: {recording(advice)}"


def recording(advice: RecordAgain) -> str:
    """Return the command that records a golden.

    A new golden of a user's own model is published without being asked. Which directories and
    prompts it was of is in no table.
    """
    name, _, arch = advice.golden.partition("/")
    what, accept = advice.golden or "--all", advice.accept
    if name and name not in suites.SUITES:
        of = "" if not arch else f" --name {name} --arch {arch}"
        head = " --draft HEAD" if advice.drafts else ""
        what = f"--model DIR{head} --prompts FILE --max-tokens {advice.tokens or 'N'}{of}"
        accept = accept and not advice.new
    store = f" --store {shlex.quote(advice.store)}" if advice.store else ""
    return f"bitassay record {what}{' --accept' if accept else ''}{store}"
