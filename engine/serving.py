"""Many prompts through an engine: all of them to their end, or as a stream of what steps give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from bitassay.engine.scheduling.request import Output, Request
from bitassay.engine.trace import EngineTrace
from bitassay.engine.validation import Prompts, What, check_order, each
from bitassay.reference.spec.errors import SequenceError


def of_prompt(error: SequenceError, prompt: int, length: int) -> SequenceError:
    """Return a request's error as that of its prompt, which has so many tokens."""
    where: dict[str, int | None] = {"request": None, "prompt": prompt}
    if error.position is not None and error.position >= length:
        where |= {"position": None, "step": error.position - length}
    return error.located(**where)


class PromptServing(ABC):
    """`generate` and `stream`, for an engine that takes requests and steps."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a request waits or runs."""

    @abstractmethod
    def add_request(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        ignore_eos: bool = True,
    ) -> int:
        """Queue a request and return its number."""

    @abstractmethod
    def cancel(self, request: int) -> None:
        """End a request between two steps."""

    @abstractmethod
    def advance(self) -> None:
        """Run one step; lay what it gave each request where whoever reads it will find it."""

    @abstractmethod
    def take_all(self, requests: Sequence[int]) -> list[EngineTrace]:
        """Return the traces of requests that have ended, and forget these."""

    @abstractmethod
    def check(
        self, prompts: Prompts, max_tokens: Sequence[int], what: What, *, first: int = 0
    ) -> list[list[int]]:
        """Return prompts as lists; ValueError naming the first that could never run."""

    @abstractmethod
    def check_device(self) -> None:
        """Wait for the device; ValueError for what it flagged since the last check."""

    @abstractmethod
    def request(self, request: int) -> Request:
        """Return a request as it stands, for reading."""

    @abstractmethod
    def drop(self, request: int) -> None:
        """Cancel a request if it has not ended, and leave nothing to take."""

    @abstractmethod
    def deliver(self, request: int, inbox: list[Output]) -> None:
        """Let a request's outputs come into a list of the caller's instead of to `step`."""

    @abstractmethod
    def unfinished(self, request: int) -> bool:
        """Return whether a request waits or runs."""

    def generate(
        self,
        prompts: Prompts,
        max_tokens: int | Sequence[int],
        *,
        order: Sequence[int] | None = None,
        arrivals: Sequence[int] | None = None,
        cancelled: Mapping[int, int] | None = None,
    ) -> list[EngineTrace | None]:
        """Run prompts to their end, eos ignored; return traces in the order of the prompts.

        max_tokens: of all, or of each. order: the permutation in which prompts are added.
        arrivals: for each prompt the step, counted from 0, before which it is added. cancelled:
        for some prompts the number of tokens after which they are cancelled, 0 for before their
        first row; their trace is None, unless the step that brings these brings the last as well.
        Other requests of the engine go on beside. Raises ValueError as `add_request`, before
        anything is added.
        """
        limits = each("max_tokens", max_tokens, len(prompts))
        checked = self.check(prompts, limits, "prompt")
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
                if not self.busy:
                    step = max(step, steps[coming[0]])  # nothing happens until then
                while coming and steps[coming[0]] <= step:
                    prompt = coming.popleft()
                    number = self.add_request(checked[prompt], limits[prompt])
                    requests[prompt] = self.request(number)
                    self.deliver(number, unread)
                    # One token more than it can have is never.
                    alive[prompt] = cancelled.get(prompt, limits[prompt] + 1)
                self._cancel_due(requests, alive)
                self._advance({request.number: p for p, request in requests.items()})
                unread.clear()
                self._cancel_due(requests, alive)
                step += 1
            ended = {p: r.number for p, r in requests.items() if r.finish_reason != "cancelled"}
            traces = dict(zip(ended, self.take_all(list(ended.values())), strict=True))
        finally:  # an error: let nothing of it run on, and leave nothing that nobody could take
            for request in requests.values():
                self.drop(request.number)
        return [traces.get(prompt) for prompt in range(len(checked))]

    def stream(self, prompts: Prompts, max_tokens: int | Sequence[int]) -> Iterator[Output]:
        """Yield what each step gives each prompt, whose place among the prompts is its `request`.

        Tokens alone: there is nothing to `take` afterwards. Closed early, it cancels what is left.
        Several streams, `generate` and `step` may take turns: whoever steps, each prompt's outputs
        come here, all of them, once. Raises ValueError as `add_request`, before anything is added.
        """
        limits = each("max_tokens", max_tokens, len(prompts))
        checked = self.check(prompts, limits, "prompt")
        places: dict[int, int] = {}  # request -> prompt
        inbox: list[Output] = []  # filled by whoever steps the engine
        try:
            for place, (ids, limit) in enumerate(zip(checked, limits, strict=True)):
                number = self.add_request(ids, limit)
                places[number] = place
                self.deliver(number, inbox)
            while inbox or any(self.unfinished(number) for number in places):
                if not inbox:
                    self._advance(places)
                while inbox:
                    output = inbox.pop(0)
                    yield replace(output, request=places[output.request])
            self.check_device()
        finally:
            for number in places:
                self.drop(number)

    def _advance(self, prompts: Mapping[int, int]) -> None:
        """Run one step; what goes wrong with a prompt's request is said of the prompt."""
        try:
            self.advance()
        except SequenceError as error:
            if error.request is None or error.request not in prompts:
                raise
            length = self.request(error.request).num_prompt
            raise of_prompt(error, prompts[error.request], length) from error

    def _cancel_due(self, requests: dict[int, Request], alive: dict[int, int]) -> None:
        """Cancel who has the tokens to be cancelled after, and forget who has ended."""
        for prompt, most in list(alive.items()):
            request = requests[prompt]
            if not request.done and request.generated >= most:
                self.cancel(request.number)
            if request.done:
                del alive[prompt]
