"""The engine's options on the command line, made from the record that the engine runs by.

What each is called and says stands here; its type and default are those of EngineOptions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from bitassay.golden.runs.engine_options import EngineOptions

PANEL = "Engine"

Given = dict[str, Any]  # fields of EngineOptions that were given, and their values


@dataclass(frozen=True)
class Flag:
    """How a field is given.

    default: in words, where the record's own default says too little. sets: the value that a flag
    without a value stands for.
    """

    names: str
    help: str
    metavar: str | None = None
    minimum: int | None = None
    default: str | None = None
    sets: bool = True


FLAGS = {
    "backend": Flag("--backend", "gpu, interpreter or reference", "NAME"),
    "dp": Flag("--dp", "data-parallel ranks, which share the prompts", "N", 1),
    "num_speculative_tokens": Flag("--k", "draft tokens a round", "K", 0, "3 with a head, else 0"),
    "max_num_seqs": Flag("--max-num-seqs", "requests that run at once, on each rank", "N", 1),
    "max_num_batched_tokens": Flag("--max-num-batched-tokens", "rows a step", "N", 1),
    "num_blocks": Flag(
        "--num-blocks", "blocks of 16 positions in the cache", "N", 1, "enough for all"
    ),
    "enable_prefix_caching": Flag(
        "--no-prefix-caching", "compute every prefix anew", default="kept", sets=False
    ),
    "enforce_eager": Flag(
        "--eager/--graphs",
        "decode without or with CUDA graphs",
        None,
        None,
        "as the GPU is trusted",
    ),
    "shuffle": Flag("--shuffle", "take the prompts in another order", "SEED"),
    "late": Flag("--arrivals", "let prompts come late, at steps drawn with this seed", "SEED"),
    "cancel": Flag("--cancel", "beside every Nth prompt, a copy that is cancelled", "N", 1),
    "warm": Flag("--warm", "run twice and compare the second time", default="once"),
    "timeout": Flag(
        "--timeout", "seconds that ranks wait for each other", "S", None, "60 on GPUs, else 1800"
    ),
}
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


def spelled(names: list[str]) -> str:
    """Return fields as they are spelled on the command line."""
    return ", ".join(FLAGS[name].names if name in FLAGS else name for name in names)


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
