"""What goes wrong with one sequence: which, and where in it, as fields; worded in one place."""

from __future__ import annotations

from typing import Any


class SequenceError(ValueError):
    """A sequence cannot be run, or went wrong: `problem` says how, the fields where.

    prompt: its number among those of the call that raised this, or, once a caller knows better,
    its id. request: its number in an engine. step: generated tokens before it, position: its place
    in the sequence, draft: its place in a chain of drafts; all count from 0. field: what of it is
    unfit ("max_tokens"). None where it does not apply.
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
    ) -> None:
        super().__init__(problem)
        self.problem, self.prompt, self.request = problem, prompt, request
        self.step, self.position, self.draft, self.field = step, position, draft, field

    def __str__(self) -> str:
        """Return "prompt 3, step 5: what is wrong"; fields that do not apply are left out."""
        names = ("prompt", "request", "step", "position", "draft")
        found = [f"{name} {value}" for name in names if (value := getattr(self, name)) is not None]
        found += [] if self.field is None else [self.field]
        return f"{', '.join(found)}: {self.problem}" if found else self.problem

    def located(self, **fields: Any) -> SequenceError:
        """Return the same error with other fields: what a caller knows of the sequence.

        A field that is not given stays as it is; None takes it away.
        """
        names = ("prompt", "request", "step", "position", "draft", "field")
        if unknown := fields.keys() - set(names):
            raise TypeError(f"expected fields of {names}, found {sorted(unknown)}")
        kept = {name: getattr(self, name) for name in names}
        return type(self)(self.problem, **kept | fields)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it cross from one process to another with its fields."""
        names = ("prompt", "request", "step", "position", "draft", "field")
        return _rebuilt, (type(self), self.problem, {name: getattr(self, name) for name in names})


def _rebuilt(kind: type[SequenceError], problem: str, fields: dict[str, Any]) -> SequenceError:
    return kind(problem, **fields)
