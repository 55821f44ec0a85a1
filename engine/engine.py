"""The engine: requests in, tokens out step by step, and the exact bits behind them at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from bitassay.engine.config import EngineConfig
from bitassay.engine.models.kv_cache import default_blocks
from bitassay.engine.scheduling.blocks import BlockManager, check_blocks
from bitassay.engine.scheduling.request import Output, Request
from bitassay.engine.scheduling.scheduler import Scheduler
from bitassay.engine.scheduling.stats import Stats
from bitassay.engine.scheduling.step_plan import Result
from bitassay.engine.serving import PromptServing
from bitassay.engine.step.record import Record
from bitassay.engine.step.runner import Runner
from bitassay.engine.trace import EngineTrace
from bitassay.engine.validation import (
    Prompts,
    What,
    check_eos,
    check_ids,
    check_lengths,
    check_max_tokens,
)
from bitassay.reference.spec.errors import SequenceError

if TYPE_CHECKING:
    from bitassay.engine.models.causal_lm import CausalLM
    from bitassay.engine.models.eagle import EagleHead


class Engine(PromptServing):
    """Serves requests on one device: greedy, batched, with or without a draft head.

    Whatever the configuration, the other requests and the moment of arrival, a request's tokens
    and bits are those of its prompt alone. Blocks of earlier requests are found again by later
    ones until `reset_prefix_cache`.
    """

    def __init__(
        self,
        model: CausalLM,
        head: EagleHead | None = None,
        config: EngineConfig | None = None,
        *,
        runner: Runner | None = None,
    ) -> None:
        """Make the caches. head: what drafts, 3 tokens a round unless the configuration says else.

        runner: what runs the steps, None for one over the model. Raises ValueError where drafts
        are asked for without a head, and for a head that was loaded for another model.
        """
        config = config or EngineConfig()
        drafts = config.drafts(head=head is not None)
        drafting = drafts > 0
        if head is not None and head.target is not model:
            raise ValueError(
                "head: expected one loaded for this model, found one loaded for another: it uses "
                "its target's weights: EagleHead.from_pretrained(path, model)"
            )
        self._model = model
        blocks = config.num_blocks
        if blocks is None:
            blocks = default_blocks(
                [model, *([head] if drafting and head is not None else [])],
                model.config.max_position_embeddings,
                max_num_seqs=config.max_num_seqs,
                capture=config.capture,
            )
        self.config = config = replace(config, num_speculative_tokens=drafts, num_blocks=blocks)
        self.stats = Stats()
        self._num_blocks = blocks
        self._blocks = BlockManager(blocks, caching=config.enable_prefix_caching, drafting=drafting)
        self._scheduler = Scheduler(config, self._blocks, self.stats)
        self._runner = runner or Runner(model, head if drafting else None, config)
        self._records: dict[int, Record] = {}
        self._untold: list[Output] = []  # what the next step() returns
        self._numbers = count()

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs, or `step` has something to return."""
        return self.busy or bool(self._untold)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    def add_request(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        ignore_eos: bool = True,
    ) -> int:
        """Put a request into the queue and return its number.

        It ends after max_tokens tokens ("length"), or with eos_token_id, or the first of several
        ("stop"), unless eos is ignored. Raises ValueError for a request that could never run: an
        empty prompt, ids outside the vocabulary, max_tokens below 1, more positions than the model
        has, more blocks than the cache has. Nothing is queued then.
        """
        number = next(self._numbers)
        (ids,) = self.check([prompt_ids], [max_tokens], "request", first=number)
        eos = check_eos(eos_token_id, self._model.config.vocab_size, "request", number)
        if not ignore_eos and not eos:
            raise SequenceError(
                "expected eos_token_id where eos is not ignored, found None", request=number
            )
        request = Request(number, ids, int(max_tokens), eos, ignore_eos)
        self._records[number] = Record(request, self._untold)
        self._scheduler.add(request)
        return number

    def cancel(self, request: int) -> None:
        """End a request between two steps, whether it waits, runs or was preempted.

        Its blocks come back, it has no further output, not even one that nobody has been given
        yet, and it leaves nothing to `take`. One that has ended stays as it is. KeyError for a
        number that is unknown, cancelled or was taken.
        """
        known = self._records[request].request
        if not known.done:
            self._scheduler.cancel(known)
            self._forget(request)

    def step(self) -> list[Output]:
        """Run one step; return what requests got, or [] if none is left.

        What `stream` and `generate` stepped for other requests meanwhile comes first, so that one
        request may have several outputs; their own prompts' outputs are not among them. Raises
        ValueError for NaN among the logits, naming the request; nothing of that step counts then,
        and the request has to be cancelled before the next. After any other error, an interrupt
        included, one can go on as well, except where it came amid the books of requests: then
        this and `take` raise RuntimeError.
        """
        self.advance()
        outputs = list(self._untold)
        self._untold.clear()
        return outputs

    def advance(self) -> None:
        """Run one step; lay what it gave each request where whoever reads it will find it."""
        rows = self._scheduler.schedule()
        if not rows:
            if self.busy:
                raise RuntimeError("requests are left, but the scheduler gave none of them a row")
            return
        results = self._runner.run(rows)
        self.stats.steps += 1
        self._scheduler.update(results, self._given, self._ended)

    def take(self, request: int) -> EngineTrace:
        """Return the trace of a request that has ended, and forget it, outputs not given included.

        ValueError for one that has not ended, and for what the device flagged since the last
        check. KeyError for a number that is unknown, cancelled or was taken.
        """
        return self.take_all([request])[0]

    def take_all(self, requests: Sequence[int]) -> list[EngineTrace]:
        """Return the traces of requests together, which waits for the device once; as `take`.

        ValueError for a request that is named twice; none is taken then.
        """
        self._scheduler.check()
        if len(set(requests)) < len(requests):
            raise ValueError(f"requests: expected each once, found {list(requests)}")
        records = [self._records[number] for number in requests]
        for record in records:
            if not record.request.done:
                raise SequenceError(
                    f"expected it to have ended, found it {record.request.status.value}: take it "
                    "after its last output, or cancel it",
                    request=record.request.number,
                )
        self.check_device()
        fold, depth = self._model.ops.fold, self.config.num_speculative_tokens or 0
        traces = [record.trace(fold, depth) for record in records]
        for number in requests:
            self._forget(number)
        return traces

    def reset_prefix_cache(self) -> None:
        """Let no later request find blocks that were computed before now."""
        self._blocks.forget()

    def check(
        self, prompts: Prompts, max_tokens: Sequence[int], what: What, *, first: int = 0
    ) -> list[list[int]]:
        """Return prompts as lists; ValueError naming the first that could never run."""
        config = self._model.config
        checked = check_ids(prompts, config.vocab_size, what, first=first)
        lengths = [len(ids) for ids in checked]
        check_max_tokens(max_tokens, what, first=first)
        positions = config.max_position_embeddings
        check_lengths(lengths, max_tokens, positions, what, first=first)
        check_blocks(lengths, max_tokens, self._num_blocks, what, first=first)
        return checked

    def check_device(self) -> None:
        """Wait for the device; ValueError for what it flagged since the last check."""
        self._model.check()

    def request(self, request: int) -> Request:
        """Return a request as it stands, for reading; KeyError as `cancel`."""
        return self._records[request].request

    def drop(self, request: int) -> None:
        """Cancel a request if it has not ended, and leave nothing to `take`."""
        if request in self._records:
            self.cancel(request)
        if request in self._records:
            self._forget(request)

    def deliver(self, request: int, inbox: list[Output]) -> None:
        """Let a request's outputs come into a list of the caller's instead of to `step`."""
        self._records[request].inbox = inbox

    def unfinished(self, request: int) -> bool:
        """Return whether a request waits or runs; not so one that was cancelled or taken."""
        return request in self._records and not self._records[request].request.done

    def _forget(self, request: int) -> None:
        inbox = self._records.pop(request).inbox
        inbox[:] = [output for output in inbox if output.request != request]

    def _given(self, result: Result, output: Output) -> None:
        """Keep what a step gave a request, on the device and as tokens."""
        record = self._records[result.request]
        record.results.append(result)
        record.inbox.append(output)

    def _ended(self, request: Request) -> None:
        """Keep the fingerprints of a request's rows, while it still holds their slots."""
        self._records[request.number].gather(
            self._runner.row_fingerprints, self._runner.draft_fingerprints
        )
