"""The engine's options on the command line, made from the record that the engine runs by.

What each is called and says stands in FLAGS; its type and default are those of EngineOptions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from bitassay.cli.flags import FLAGS
from bitassay.golden.runs.engine_options import EngineOptions

PANEL = "Engine"

Given = dict[str, Any]  # fields of EngineOptions that were given, and their values


# Fields that only a program sets: a sweep, or what a command keeps of a run.
INTERNAL = ("capture", "force_graphs", "mirrored", "must")


def takes_engine_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the engine's options of these fields, as its parameter `engine: Given`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            engine = {name: values.pop(name) for name in names}
            command(**values, engine={k: _value(k, v) for k, v in engine.items() if v is not None})

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "engine"]
        parameters = [*own, *map(_parameter, names)]
        vars(with_options)["__signature__"] = signature.replace(parameters=parameters)
        with_options.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_options

    return decorate


def _value(name: str, given: Any) -> Any:
    """Return what a field is set to by what was given."""
    alone = isinstance(given, bool) and "/" not in FLAGS[name].names
    return FLAGS[name].sets if alone else given


def _parameter(name: str) -> inspect.Parameter:
    """Return a field as a parameter of a command: its type, and None where it is not given."""
    (field,) = (field for field in fields(EngineOptions) if field.name == name)
    flag, kind = FLAGS[name], get_type_hints(EngineOptions)[name]
    default = flag.default
    if default is None and field.default is not None:
        default = str(field.default)
    text = flag.help if default is None else f"{flag.help} (default: {default})"
    option = typer.Option(
        flag.names,
        help=text,
        metavar=flag.metavar,
        min=flag.minimum,
        rich_help_panel=PANEL,
        show_default=False,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


assert FLAGS.keys() | set(INTERNAL) == {field.name for field in fields(EngineOptions)}
