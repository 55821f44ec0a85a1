"""The registry of operations: whole, found in both rooms under one signature, and used by both."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any

import pytest

from bitassay.engine.models.ops import Ops, kernel_ops
from bitassay.golden.runs.reference_ops import reference_ops
from bitassay.reference.spec.operations import (
    ENGINE_OPERATIONS,
    OPERATIONS,
    ORDERS,
    PROCEDURES,
    Operation,
)
from bitassay.reference.spec.running_order import DRAFT_KINDS, draft_operations, operations

NOT_OPERATIONS = {"name", "check", "check_device"}  # of the engine's record
every = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)


def found(room: str, operation: Operation) -> Callable[..., Any]:
    function = getattr(import_module(f"bitassay.{room}.{operation.module}"), operation.function)
    return getattr(function, "fn", function)  # within a decorator of Triton


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@every
def test_both_rooms_have_it_under_one_signature(operation: Operation) -> None:
    """What a kernel takes besides has a default: where to write, how to launch."""
    kernel = parameters(found("kernels", operation))
    if not operation.in_reference:
        with pytest.raises((AttributeError, ModuleNotFoundError)):
            found("reference", operation)
        return
    reference = parameters(found("reference", operation))
    assert [name for name in kernel if name in reference] == list(reference)
    for name, own in reference.items():
        assert (kernel[name].kind, kernel[name].default) == (own.kind, own.default), name
    for name in kernel.keys() - reference.keys():
        assert kernel[name].default is not inspect.Parameter.empty, name


def test_the_engine_s_record_has_every_operation_and_no_other() -> None:
    names = {field.name for field in fields(Ops)}
    assert names - NOT_OPERATIONS == {one.name for one in ENGINE_OPERATIONS}
    assert names >= NOT_OPERATIONS


def test_the_engine_runs_what_the_registry_says() -> None:
    kernels, reference = kernel_ops(), reference_ops()
    for one in ENGINE_OPERATIONS:
        function = getattr(kernels, one.name)
        module = import_module(f"bitassay.kernels.{one.module}")
        assert function is getattr(module, one.function)
        assert callable(getattr(reference, one.name))
    assert reference.fold is found("reference", next(o for o in OPERATIONS if o.name == "fold"))


@every
def test_a_flag_has_its_check(operation: Operation) -> None:
    if operation.name != "decide":  # which notes in the flag of whoever calls it
        module = import_module(f"bitassay.kernels.{operation.module}")
        assert operation.flagged == callable(getattr(module, "check", None))


def test_every_fingerprinted_row_is_computed_by_an_operation() -> None:
    named = {*operations("context-lm"), *operations("qwen3", 2)}
    for kind in DRAFT_KINDS:
        named |= set(draft_operations(kind))
    rows = {name.rpartition(".")[2] for name in named}
    assert rows == {name for one in OPERATIONS for name in one.computes}
    assert all(one.engine for one in OPERATIONS if one.computes)


def test_names_and_orders_are_given_once() -> None:
    for names in (
        [one.name for one in OPERATIONS],
        [one.at for one in OPERATIONS],
        [*(name for one in OPERATIONS for name in one.orders), *PROCEDURES],
    ):
        assert Counter(names).most_common(1)[0][1] == 1
    assert len(ORDERS) == len(names)
