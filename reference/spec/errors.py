"""What goes wrong with one sequence: which, and where in it, as fields; worded in one place."""

from __future__ import annotations

from typing import Any

_PLACE = ("prompt", "request", "step", "position", "draft")  # in the order of the text
_FIELDS = (*_PLACE, "field", "part")


class SequenceError(ValueError):
    """A sequence cannot be run, or went wrong: `problem` says how, the fields where.

    prompt: its number among those of the call that raised this, or, once a caller knows better,
    its id. request: its number in an engine. step: generated tokens before it, position: its place
    in the sequence, draft: its place in a chain of drafts; all count from 0. field: what of it is
    unfit ("max_tokens"). part: what of it a position counts in, where that is not the whole
    ("recorded tokens"). None where it does not apply.
    """

    def __init__(
        self,
        problem: str,
        *,
        prompt: int | str | None = None,
        request: int | None = None,
        step: int | None = None,
        position: int | None = None,
        draft: int | None = None,
        field: str | None = None,
        part: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem, self.prompt, self.request = problem, prompt, request
        self.step, self.position, self.draft = step, position, draft
        self.field, self.part = field, part

    def __str__(self) -> str:
        """Return "prompt 3, step 5: what is wrong"; fields that do not apply are left out."""
        found = [f"{name} {value}" for name in _PLACE if (value := getattr(self, name)) is not None]
        found += [] if self.field is None else [self.field]
        place = ", ".join(found)
        if self.part is not None:
            place = f"{self.part} of {place}" if place else self.part
        return f"{place}: {self.problem}" if place else self.problem

    def located(self, **fields: Any) -> SequenceError:
        """Return the same error with other fields: what a caller knows of the sequence.

        A field that is not given stays as it is; None takes it away. Raises TypeError for a field
        that does not exist.
        """
        if unknown := fields.keys() - set(_FIELDS):
            raise TypeError(f"expected fields of {_FIELDS}, found {sorted(unknown)}")
        return type(self)(self.problem, **self._fields() | fields)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it cross from one process to another with its fields."""
        return _rebuilt, (type(self), self.problem, self._fields())

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS}


def _rebuilt(kind: type[SequenceError], problem: str, fields: dict[str, Any]) -> SequenceError:
    return kind(problem, **fields)
