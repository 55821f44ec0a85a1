"""Why something could not be recorded or checked; every one of these ends in exit status 2."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecordAgain:
    """What would mend an error: recording a golden; the command words it for its users.

    golden: `<suite>/<arch>`, "" for all suites. store: its root, "" for the usual one. accept:
    whether what is recorded is to be published; if not, it is to be compared. tokens: for each
    prompt of a user's own model, where known. drafts: whether it was recorded with a draft head.
    new: whether there is none yet.
    """

    golden: str
    store: str
    accept: bool
    tokens: int | None = None
    drafts: bool = False
    new: bool = False


class GoldenError(Exception):
    """Bad input or a bad store: the message says what was expected, found, and what to do.

    advice: what to record, where that would mend it, for whoever words the error for a user.
    """

    def __init__(self, message: str, *, advice: RecordAgain | None = None) -> None:
        super().__init__(message)
        self.advice = advice


class StoreError(GoldenError):
    """The store is missing, read-only, locked, or may not be written now."""


class MissingError(StoreError):
    """There is no store, or it holds no golden of this name."""


class CorruptError(StoreError):
    """Stored bytes are not the bytes that were written."""


class SchemaError(StoreError):
    """A newer bitassay wrote this; reading it with this one could misjudge it."""


class OutdatedError(SchemaError):
    """An earlier bitassay recorded this; it has to be recorded again."""


class StaleError(GoldenError):
    """The golden was recorded under another contract, model, tokenizer, prompts or length."""


class PromptError(GoldenError):
    """A prompts file that cannot be read, or ids that the model does not have."""


class CannotRunError(GoldenError):
    """What was asked to run cannot run here; nothing else was run in its place."""


class WorkerError(GoldenError):
    """A process that did part of the work failed or was killed."""
