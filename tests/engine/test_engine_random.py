"""Hundreds of random loads on the engine over a model of integers that checks every slot."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from bitassay.engine.config import EngineConfig
from bitassay.engine.engine import Engine
from bitassay.engine.scheduling.blocks import BLOCK_SIZE, blocks_for
from bitassay.engine.scheduling.request import Request
from bitassay.engine.trace import EngineTrace
from bitassay.reference.spec.rounds import rounds
from support.fake_runner import FakeModel, FakeRunner


class Watched(Engine):
    """An engine over the fake runner, which is told the prompts and looks on."""

    def __init__(self, model: FakeModel, config: EngineConfig) -> None:
        self.runner = FakeRunner(model, config)
        head = SimpleNamespace(target=model)
        super().__init__(model, head, config, runner=self.runner)  # type: ignore[arg-type]

    def add_request(self, prompt_ids: Any, max_tokens: int, **options: Any) -> int:
        number = super().add_request(prompt_ids, max_tokens, **options)
        self.runner.prompts[number] = list(prompt_ids)
        return number

    def advance(self) -> None:
        super().advance()
        self.look()

    def look(self) -> None:
        """Hold the invariants that lie between steps."""
        scheduler, blocks = self._scheduler, self._blocks
        known = [*scheduler.running, *scheduler.waiting]
        assert [r.number for r in known] == sorted(r.number for r in known), "out of turn"
        assert len(scheduler.running) <= self.config.max_num_seqs
        assert not any(r.table or r.computed for r in scheduler.waiting)
        held = [block for r in scheduler.running for block in r.table]
        holders = [held.count(block) for block in range(blocks.num_blocks)]
        assert blocks._holders == holders
        lying = [*blocks._free, *blocks._idle]
        assert sorted(lying) == [block for block, count in enumerate(holders) if count == 0]
        assert {e.block: k for k, e in blocks._entries.items()} == blocks._keys
        assert not set(blocks._free) & set(blocks._keys)
        for request in scheduler.running:
            assert request.computed < len(request.ids)
            shared = [i for i, block in enumerate(request.table) if holders[block] > 1]
            assert all((i + 1) * BLOCK_SIZE <= request.computed for i in shared), "may be written"

    def _ended(self, request: Request) -> None:
        super()._ended(request)
        self.runner.end(request.number, request.table, request.computed)


@dataclass
class Load:
    """Requests for one `generate` on a configuration, drawn from a seed."""

    prompts: list[list[int]]
    max_tokens: list[int]
    order: list[int]
    arrivals: list[int]
    cancelled: dict[int, int] = field(default_factory=dict)

    @classmethod
    def draw(cls, rng: random.Random, vocab_size: int, room: int) -> Load:
        """Prompts share prefixes, repeat, and are often whole blocks long; all fit the room."""
        stem, other = ([rng.randrange(vocab_size) for _ in range(64)] for _ in range(2))
        stems = [stem, stem, other[:BLOCK_SIZE] + stem[BLOCK_SIZE:]]  # the same after another block
        prompts, max_tokens = [], []
        for _ in range(rng.randint(1, 9)):
            most = room * BLOCK_SIZE
            prompt = rng.choice(stems)[: rng.choice([0, 8, 16, 16, 32, 33, 48])] + [
                rng.randrange(vocab_size) for _ in range(rng.choice([0, 0, 1, 5, 16, 30]))
            ]
            if prompts and rng.random() < 0.2:
                prompt = list(rng.choice(prompts))
            prompt = prompt[:most] or [0]
            prompts.append(prompt)
            left = most + 1 - len(prompt)
            max_tokens.append(
                rng.choice([left, rng.randint(1, left), rng.randint(1, min(left, 9))])
            )
        count = len(prompts)
        order = rng.sample(range(count), count)
        late = rng.random() < 0.5
        arrivals = [rng.choice([0, 0, 1, 3, 8, 30]) if late else 0 for _ in prompts]
        cancelled = {}
        if rng.random() < 0.4:
            for prompt in rng.sample(range(count), rng.randint(1, count)):
                cancelled[prompt] = rng.randint(0, max_tokens[prompt] + 1)
        return cls(prompts, max_tokens, order, arrivals, cancelled)

    @property
    def most_steps(self) -> int:
        """The first running request advances by a row in every step, and is never preempted."""
        rows = sum(len(p) + t for p, t in zip(self.prompts, self.max_tokens, strict=True))
        return rows + max(self.arrivals)


def draw_config(rng: random.Random) -> EngineConfig:
    depth = rng.randint(0, 5)
    return EngineConfig(
        num_speculative_tokens=depth,
        max_num_seqs=rng.choice([1, 2, 3, 8]),
        max_num_batched_tokens=depth + 1 + rng.choice([0, 1, 3, 12, 20, 40, 400]),
        num_blocks=rng.choice([1, 2, 4, 5, 6, 8, 12, 40]),
        enable_prefix_caching=rng.random() < 0.8,
    )


def check_trace(model: FakeModel, depth: int, prompt: list[int], count: int, trace: Any) -> None:
    """Hold a trace against the model's own stream and the rounds that every K must take."""
    assert isinstance(trace, EngineTrace)
    stream = model.stream(prompt, count)
    assert trace.tokens.tolist() == stream
    if depth == 0:
        assert trace.drafts is None
        return
    assert trace.drafts is not None
    canonical = rounds(model.accepted(prompt, stream), depth)
    assert trace.drafts.rounds == canonical
    assert trace.drafts.draft_tokens.shape == (len(canonical), depth)
    for (t, drafted, accepted), drafts in zip(
        canonical, trace.drafts.draft_tokens.tolist(), strict=True
    ):
        assert drafts[drafted:] == [-1] * (depth - drafted)
        assert drafts[:accepted] == stream[t + 1 : t + 1 + accepted]
        assert accepted == drafted or drafts[accepted] != stream[t + 1 + accepted]


@pytest.mark.parametrize("group", range(12))
def test_random_loads(group: int) -> None:
    seen = dict.fromkeys(("preemptions", "prefix_hit_tokens", "accepted", "cancelled"), 0)
    for case in range(40):
        rng = random.Random(f"load {group} {case}")
        config = draw_config(rng)
        assert config.num_blocks is not None
        model = FakeModel(vocab_size=rng.choice([2, 6, 50]), skill=rng.choice([0, 5, 8, 10]))
        engine = Watched(model, config)
        for _ in range(rng.randint(1, 3)):
            load = Load.draw(rng, model.vocab_size, min(config.num_blocks, 7))
            engine.runner.most_steps = len(engine.runner.steps) + load.most_steps
            traces = engine.generate(
                load.prompts,
                load.max_tokens,
                order=load.order,
                arrivals=load.arrivals,
                cancelled=load.cancelled,
            )
            for i, trace in enumerate(traces):
                if trace is None:
                    assert load.cancelled[i] <= load.max_tokens[i]
                    seen["cancelled"] += 1
                else:
                    # The last step may have given depth + 1 tokens at once.
                    most = load.cancelled.get(i, 10**9) + config.num_speculative_tokens
                    assert most >= load.max_tokens[i]
                    check_trace(
                        model,
                        config.num_speculative_tokens,
                        load.prompts[i],
                        load.max_tokens[i],
                        trace,
                    )
            assert not engine.has_unfinished
            assert engine._blocks.available == config.num_blocks
            assert not any(engine._blocks._holders)
            assert not engine._records
            if rng.random() < 0.3:
                engine.reset_prefix_cache()
                assert engine._blocks.registered == 0
        assert engine.stats.steps == len(engine.runner.steps)
        for name in ("preemptions", "prefix_hit_tokens", "accepted"):
            seen[name] += getattr(engine.stats, name)
    # Loads under which nothing of this happens would show nothing.
    assert all(seen.values()), seen


@pytest.mark.parametrize("seed", range(60))
def test_steps_by_hand(seed: int) -> None:
    """Requests come, stop at eos or are cancelled between any two steps, waiting or preempted."""
    rng = random.Random(f"by hand {seed}")
    config = draw_config(rng)
    assert config.num_blocks is not None
    model = FakeModel(vocab_size=6, skill=8)
    engine = Watched(model, config)
    asked: dict[int, tuple[list[int], int, list[int]]] = {}
    given: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    cancelled: set[int] = set()
    engine.runner.most_steps = 3000
    coming = 12
    while coming or engine.has_unfinished:
        if coming and rng.random() < 0.3:
            coming -= 1
            load = Load.draw(rng, model.vocab_size, min(config.num_blocks, 7))
            eos = rng.choice([[], [], [2], [0, 3]])
            number = engine.add_request(
                load.prompts[0], load.max_tokens[0], eos_token_id=eos or None, ignore_eos=not eos
            )
            asked[number], given[number] = (load.prompts[0], load.max_tokens[0], eos), []
        alive = [n for n in asked if n not in reasons and n not in cancelled]
        if alive and rng.random() < 0.1:
            number = rng.choice(alive)
            cancelled.add(number)
            engine.cancel(number)
            engine.look()
        for output in engine.step():
            assert output.request not in cancelled
            assert output.tokens
            given[output.request] += output.tokens
            assert output.finished == (output.finish_reason is not None)
            if output.finish_reason is not None:
                reasons[output.request] = output.finish_reason
    for number, (prompt, count, eos) in asked.items():
        stream = model.stream(prompt, count)
        canonical = rounds(model.accepted(prompt, stream), config.num_speculative_tokens)
        stop = next((i for i, token in enumerate(stream, 1) if token in eos), count)
        stream = stream[:stop]
        if number in cancelled:
            assert given[number] == stream[: len(given[number])]
            continue
        assert given[number] == stream
        assert reasons[number] == ("stop" if stream[-1] in eos else "length")
        trace = engine.take(number)
        assert trace.tokens.tolist() == stream
        if trace.drafts is not None:  # a round that the eos cut counts what it accepted
            assert trace.drafts.rounds == [one for one in canonical if one[0] < stop - 1]
        assert engine.runner.ended[number] == len(prompt) + len(stream) - 1
    assert set(asked) == set(reasons) | cancelled
    assert engine._blocks.available == config.num_blocks
    assert blocks_for(0) == 0
