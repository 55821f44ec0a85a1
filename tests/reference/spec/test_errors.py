"""What goes wrong with a sequence: the same words wherever it is told, and the place as fields."""

from __future__ import annotations

import copy
import pickle

import pytest

from bitassay.reference.spec.errors import SequenceError

FIELDS = ("prompt", "request", "step", "position", "draft", "field", "part")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "too long"),
        ({"prompt": 0}, "prompt 0: too long"),
        ({"prompt": "p3", "step": 5}, "prompt p3, step 5: too long"),
        ({"step": 5, "prompt": "p3"}, "prompt p3, step 5: too long"),
        ({"position": 2}, "position 2: too long"),
        ({"request": 7, "field": "max_tokens"}, "request 7, max_tokens: too long"),
        ({"field": "max_tokens"}, "max_tokens: too long"),
        (
            {"prompt": 1, "request": 2, "step": 3, "position": 4, "draft": 0},
            "prompt 1, request 2, step 3, position 4, draft 0: too long",
        ),
        (
            {"prompt": 1, "position": 0, "part": "recorded tokens"},
            "recorded tokens of prompt 1, position 0: too long",
        ),
        ({"part": "recorded tokens"}, "recorded tokens: too long"),
    ],
)
def test_words(fields: dict[str, int | str], text: str) -> None:
    error = SequenceError("too long", **fields)  # type: ignore[arg-type]
    assert str(error) == text
    assert error.problem == "too long"
    assert {name: getattr(error, name) for name in FIELDS} == dict.fromkeys(FIELDS) | fields
    assert isinstance(error, ValueError)


def test_a_caller_knows_better() -> None:
    error = SequenceError("found NaN", prompt=1, step=2, part="drafts")
    found = error.located(prompt="p7", step=12)
    assert str(found) == "drafts of prompt p7, step 12: found NaN"
    assert str(error) == "drafts of prompt 1, step 2: found NaN"
    assert str(error.located(prompt=None, part=None)) == "step 2: found NaN"
    assert str(error.located()) == str(error)
    with pytest.raises(TypeError, match=r"expected fields of .*, found \['token'\]"):
        error.located(token=3)


class _NarrowerError(SequenceError):
    """An error of a narrower kind, as a room may have."""


@pytest.mark.parametrize("kind", [SequenceError, _NarrowerError])
def test_it_keeps_its_kind_and_fields_between_processes(kind: type[SequenceError]) -> None:
    fields = dict(zip(FIELDS, ("p1", 2, 3, 4, 5, "max_tokens", "recorded tokens"), strict=True))
    error = kind("too long", **fields)
    for got in (pickle.loads(pickle.dumps(error)), copy.copy(error), error.located()):
        assert type(got) is kind
        assert str(got) == str(error)
        assert vars(got) == vars(error)
