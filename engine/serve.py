"""Many prompts through an engine: all of them to their end, or as a stream of what steps give."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .checks import Prompts, check_order, each
from .request import Output, Request
from .trace import EngineTrace

if TYPE_CHECKING:
    from .engine import Engine


def generate(
    engine: Engine,
    prompts: Prompts,
    max_tokens: int | Sequence[int],
    order: Sequence[int] | None,
    arrivals: Sequence[int] | None,
    cancelled: Mapping[int, int] | None,
) -> list[EngineTrace | None]:
    """Return `Engine.generate`'s traces."""
    limits = each("max_tokens", max_tokens, len(prompts))
    checked = engine.check(prompts, limits, "prompt")
    order = list(range(len(checked)) if order is None else order)
    check_order(order, len(checked))
    steps = each("arrivals", 0 if arrivals is None else arrivals, len(checked))
    cancelled = cancelled or {}
    for prompt in sorted(cancelled):
        if not 0 <= prompt < len(checked):
            raise ValueError(
                f"cancelled: expected prompts within 0 … {len(checked) - 1}, found {prompt}"
            )
    coming = deque(sorted(order, key=lambda prompt: steps[prompt]))  # stable: order decides
    requests: dict[int, Request] = {}
    alive: dict[int, int] = {}  # prompt -> after how many tokens it is to be cancelled
    unread: list[Output] = []  # the traces have the tokens
    step = 0
    try:
        while coming or alive:
            if not engine.busy:
                step = max(step, steps[coming[0]])  # nothing happens until then
            while coming and steps[coming[0]] <= step:
                prompt = coming.popleft()
                number = engine.add_request(checked[prompt], limits[prompt])
                requests[prompt] = engine.request(number)
                engine.deliver(number, unread)
                # One token more than it can have is never.
                alive[prompt] = cancelled.get(prompt, limits[prompt] + 1)
            _end(engine, requests, alive)
            engine.advance()
            unread.clear()
            _end(engine, requests, alive)
            step += 1
        ended = {p: r.number for p, r in requests.items() if r.finish_reason != "cancelled"}
        traces = dict(zip(ended, engine.take_all(list(ended.values())), strict=True))
    finally:  # an error: let nothing of it run on, and leave nothing that nobody could take
        for request in requests.values():
            engine.drop(request.number)
    return [traces.get(prompt) for prompt in range(len(checked))]


def stream(engine: Engine, prompts: Prompts, max_tokens: int | Sequence[int]) -> Iterator[Output]:
    """Yield `Engine.stream`'s outputs."""
    limits = each("max_tokens", max_tokens, len(prompts))
    checked = engine.check(prompts, limits, "prompt")
    places: dict[int, int] = {}  # request -> prompt
    inbox: list[Output] = []  # filled by whoever steps the engine
    try:
        for place, (ids, limit) in enumerate(zip(checked, limits, strict=True)):
            number = engine.add_request(ids, limit)
            places[number] = place
            engine.deliver(number, inbox)
        while inbox or any(engine.unfinished(number) for number in places):
            if not inbox:
                engine.advance()
            while inbox:
                output = inbox.pop(0)
                yield replace(output, request=places[output.request])
        engine.check_device()
    finally:
        for number in places:
            engine.drop(number)


def _end(engine: Engine, requests: dict[int, Request], alive: dict[int, int]) -> None:
    """Cancel who has the tokens to be cancelled after, and forget who has ended."""
    for prompt, most in list(alive.items()):
        request = requests[prompt]
        if not request.done and request.generated >= most:
            engine.cancel(request.number)
        if request.done:
            del alive[prompt]
