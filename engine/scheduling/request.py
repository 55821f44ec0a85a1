"""One request: what is known of its sequence, and how far that has been computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Status(Enum):
    """Where a request stands. A preempted one waits again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Output:
    """What a step gave one request: its new tokens, the accepted drafts among them.

    finish_reason: "length" or "stop" (the last token is an eos) once finished, None before.
    """

    request: int
    tokens: list[int]
    finished: bool
    finish_reason: str | None


@dataclass(eq=False)
class Request:
    """A sequence: the prompt's ids, then the generated ones.

    ids: all that are known. computed: so many leading positions have keys and values that stand
    for those ids, and with a draft head its keys and values as well. drafts: what to verify after
    the last known id. rounds: (t, drafted, accepted) of every verification so far; t counts
    generated tokens from 0. table: its blocks in the order of positions. registered, prefix: how
    many of them the prefix cache knows or has been offered, and the cache's number of the last.
    """

    number: int
    ids: list[int]
    max_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = True
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: str | None = None
    rounds: list[tuple[int, int, int]] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    registered: int = 0
    prefix: int = 0
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        """Remember where the prompt ends."""
        self.num_prompt = len(self.ids)

    @property
    def generated(self) -> int:
        """How many tokens have been generated."""
        return len(self.ids) - self.num_prompt

    @property
    def tokens(self) -> list[int]:
        """The generated tokens."""
        return self.ids[self.num_prompt :]

    @property
    def limit(self) -> int:
        """The last position that may ever be fed: the last token is not."""
        return self.num_prompt + self.max_tokens - 2

    @property
    def tail(self) -> int:
        """How many rows choose: the last known id's and those of its drafts, always together."""
        return 1 + len(self.drafts)

    @property
    def untouched(self) -> int:
        """How many rows before the tail have yet to be computed."""
        return len(self.ids) - 1 - self.computed

    @property
    def done(self) -> bool:
        """Whether nothing will be added to it any more."""
        return self.status in (Status.FINISHED, Status.CANCELLED)

    def extend(self, tokens: list[int], accepted: int, drafts: list[int]) -> list[int]:
        """Take what the tail's rows chose and what is drafted after it; return what is new.

        What follows an eos that counts is dropped. The round's accepted drafts are those that the
        target chose, cut or not.
        """
        if self.generated:
            self.rounds.append((self.generated - 1, len(self.drafts), accepted))
        if not self.ignore_eos:
            ends = [i for i, token in enumerate(tokens, 1) if token in self.eos_token_ids]
            if ends:
                tokens, self.finish_reason = tokens[: ends[0]], "stop"
        self.ids += tokens
        # Each new id but the last was a row of this step; rejected drafts' rows do not count.
        self.computed = len(self.ids) - 1
        left = self.max_tokens - self.generated
        if left == 0 and self.finish_reason is None:
            self.finish_reason = "length"
        # The last token is the target's own in any case: no draft can stand for it.
        self.drafts = [] if self.finish_reason else drafts[: left - 1]
        if self.finish_reason:
            self.status = Status.FINISHED
        return tokens
