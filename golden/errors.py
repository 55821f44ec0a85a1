"""Why something could not be recorded or checked; every one of these ends in exit status 2."""


class GoldenError(Exception):
    """Bad input or a bad store: the message says what was expected, found, and what to do."""


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
