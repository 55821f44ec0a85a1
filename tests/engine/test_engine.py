"""The engine on the reference's operations against the sequential truth, bit by bit.

And what it refuses, streams and forgets, on a model of integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitassay.engine.config import EngineConfig
from bitassay.engine.engine import Engine
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.eagle import EagleHead
from bitassay.engine.scheduling.request import Output
from bitassay.engine.trace import EngineDrafts, EngineTrace
from bitassay.golden.runs.reference_ops import reference_ops
from bitassay.reference.eagle import Eagle
from bitassay.reference.spec.contract import default_contract
from bitassay.reference.spec.rounds import rounds
from bitassay.reference.trace import Drafts, EagleTrace
from support.fake_runner import FakeModel, FakeRunner
from support.same_bits import assert_same_bits
from support.tiny_eagle import make_agreeable, write_tiny_eagle
from support.tiny_llama import write_tiny_llama

CONTRACT = default_contract("sm_90", key_block=16, key_split=32)
V = 128  # tiny_llama's vocabulary
_STEM = [(7 * i * i + 3) % V for i in range(32)]
PROMPTS = [
    _STEM,  # whole blocks
    [5],
    _STEM[:27],  # tokens enter a third block
    [*_STEM[:16], *(11 * i % V for i in range(13))],
    _STEM[:27],  # a twin
    [(5 * i + 1) % V for i in range(12)],
]
TOKENS = 8


class Case:
    """An agreeable pair of random weights, in both rooms, and the truth about PROMPTS."""

    def __init__(self, kind: str, make: Callable[[str], Any]) -> None:
        folder = make(kind)
        target = write_tiny_llama(
            folder / "target", num_hidden_layers=3, max_position_embeddings=64
        )
        make_agreeable(target)
        head = write_tiny_eagle(folder / "head", target, kind=kind, seed=7, agreeable=True)
        self.truth = Eagle.from_pretrained(target, head, contract=CONTRACT)
        self.model = CausalLM.from_pretrained(
            target, contract=CONTRACT, device="cpu", ops=reference_ops()
        )
        self.head = EagleHead.from_pretrained(head, self.model)
        self.replayed = self.truth.generate_many(PROMPTS, TOKENS)

    def engine(self, **options: Any) -> Engine:
        config = EngineConfig(**options)
        engine = Engine(self.model, self.head if config.num_speculative_tokens else None, config)
        # What was never written may be anything: nothing may read it.
        for kept in engine._runner.caches:
            for x in (*kept.k, *kept.v):
                x.fill_(torch.nan)
        return engine


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cache(lambda kind: Case(kind, tmp_path_factory.mktemp))


def check(trace: EngineTrace | None, want: EagleTrace, depth: int) -> None:
    """Compare a trace with the truth: the target's part, then the rounds of this depth."""
    assert trace is not None
    for name in vars(want.target):
        assert_same_bits(getattr(trace, name), getattr(want, name))
    assert (trace.drafts is None) == (depth == 0)
    if trace.drafts is not None:
        assert trace.drafts.rounds == rounds(want.drafts.accepted.tolist(), depth)
        check_drafts(trace.drafts, want.drafts)


def check_drafts(drafts: EngineDrafts, want: Drafts) -> None:
    """Compare drafts up to the first of a round that the target did not choose."""
    assert_same_bits(drafts.prompt_fingerprints, want.prompt_fingerprints)
    count = TOKENS - 2  # tokens after which something can be drafted
    assert_same_bits(drafts.first_pass[:count, :-1], want.fingerprints[:count, 0, :-1])
    assert len(drafts.first_pass) == TOKENS
    assert not drafts.first_pass[:, -1].any()
    for row, (t, drafted, _) in enumerate(drafts.rounds):
        same = min(drafted, int((want.tokens[t] >= 0).sum()))
        assert_same_bits(drafts.draft_tokens[row, :same], want.tokens[t, :same])
        assert_same_bits(drafts.fingerprints[row, :same], want.fingerprints[t, :same])
        assert (drafts.draft_tokens[row, :drafted] >= 0).all()
        assert (drafts.draft_tokens[row, drafted:] == -1).all()
        assert not drafts.fingerprints[row, drafted:].any()


# The head's kind, the configuration, arguments of `generate`, and what must have happened for the
# comparison to mean anything.
CONFIGURATIONS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "eagle",
        {"num_speculative_tokens": 1, "max_num_seqs": 3, "num_blocks": 5},
        {"again": True},
        "accepted preemptions prefix_hit_tokens",
    ),
    (
        "eagle",
        {"num_speculative_tokens": 3, "max_num_batched_tokens": 9},
        {"order": [5, 4, 3, 2, 1, 0]},
        "accepted prefix_hit_tokens",
    ),
    (
        "eagle",
        {"num_speculative_tokens": 5, "max_num_batched_tokens": 20, "num_blocks": 4},
        {},
        "accepted preemptions prefix_hit_tokens",
    ),
    ("eagle", {"num_speculative_tokens": 3, "max_num_seqs": 1}, {}, "accepted prefix_hit_tokens"),
    (
        "eagle",
        {"num_speculative_tokens": 3, "num_blocks": 5, "enable_prefix_caching": False},
        {"arrivals": [0, 5, 2, 2, 0, 20]},
        "accepted preemptions",
    ),
    ("eagle", {"num_speculative_tokens": 5}, {"cancelled": {0: 3, 3: 0, 5: 1}}, "accepted"),
    ("eagle", {"num_speculative_tokens": 0, "enforce_eager": False, "force_graphs": True}, {}, ""),
    (
        "eagle3",
        {"num_speculative_tokens": 0, "max_num_batched_tokens": 17, "num_blocks": 4},
        {},
        "preemptions prefix_hit_tokens",
    ),
    (
        "eagle3",
        {"num_speculative_tokens": 1, "max_num_batched_tokens": 40},
        {"again": True},
        "accepted prefix_hit_tokens",
    ),
    (
        "eagle3",
        {"num_speculative_tokens": 3, "max_num_seqs": 3, "num_blocks": 5},
        {"cancelled": {2: 4}, "arrivals": [3, 0, 0, 0, 3, 1]},
        "accepted preemptions prefix_hit_tokens",
    ),
    (
        "eagle3",
        {"num_speculative_tokens": 5, "enforce_eager": False, "force_graphs": True},
        {},
        "accepted",
    ),
]


@pytest.mark.parametrize(("kind", "options", "load", "seen"), CONFIGURATIONS)
def test_every_bit(
    case: Callable[[str], Case],
    kind: str,
    options: dict[str, Any],
    load: dict[str, Any],
    seen: str,
) -> None:
    one, load = case(kind), dict(load)
    engine = one.engine(**options)
    for _ in range(1 + load.pop("again", False)):  # the second time on a warm prefix cache
        traces = engine.generate(PROMPTS, TOKENS, **load)
        for i, (trace, want) in enumerate(zip(traces, one.replayed, strict=True)):
            if i in load.get("cancelled", {}):
                assert trace is None
            else:
                check(trace, want, options["num_speculative_tokens"])
    assert engine._blocks.available == engine.config.num_blocks
    assert all(getattr(engine.stats, name) for name in seen.split()), engine.stats


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("depth", [2, 5])
def test_the_literal_loop(case: Callable[[str], Case], kind: str, depth: int) -> None:
    """What each round drafts, rejected drafts included, is that of one sequence alone."""
    one = case(kind)
    some = [1, 3]
    engine = one.engine(num_speculative_tokens=depth, max_num_batched_tokens=13)
    traces = engine.generate([PROMPTS[i] for i in some], TOKENS)
    for i, trace in zip(some, traces, strict=True):
        want = one.truth.generate(PROMPTS[i], TOKENS, depth)
        assert trace is not None
        assert trace.drafts is not None
        drafted = [t for t, count, _ in trace.drafts.rounds if count]
        for row, (t, count, accepted) in enumerate(trace.drafts.rounds):
            assert int(want.drafts.accepted[t]) == accepted
            assert_same_bits(trace.drafts.draft_tokens[row, :count], want.drafts.tokens[t, :count])
            row_fingerprints = want.drafts.fingerprints[t, :count]
            assert_same_bits(trace.drafts.fingerprints[row, :count], row_fingerprints)
        first_pass = want.drafts.fingerprints[: drafted[-1] + 1, 0, :-1]
        assert_same_bits(trace.drafts.first_pass[: drafted[-1] + 1, :-1], first_pass)
        assert_same_bits(trace.drafts.prompt_fingerprints, want.drafts.prompt_fingerprints)
        for name in vars(want.target):
            assert_same_bits(getattr(trace, name), getattr(want, name))


def test_without_capture_there_are_tokens_and_rounds(case: Callable[[str], Case]) -> None:
    one = case("eagle")
    (trace,) = one.engine(num_speculative_tokens=3, capture=False).generate([PROMPTS[2]], TOKENS)
    assert trace is not None
    assert trace.drafts is not None
    assert_same_bits(trace.tokens, one.replayed[2].tokens)
    assert trace.drafts.rounds == rounds(one.replayed[2].drafts.accepted.tolist(), 3)
    assert trace.top_ids.shape == trace.top_bits.shape == trace.fingerprints.shape == (TOKENS, 0)
    assert trace.margins.shape == trace.prompt_fingerprints.shape == (0,)
    assert trace.drafts.fingerprints.shape == (len(trace.drafts.rounds), 3, 0)
    assert trace.drafts.first_pass.shape == (TOKENS, 0)


def test_a_trace_ends_with_eos(case: Callable[[str], Case]) -> None:
    one = case("eagle")
    want, stream = one.replayed[0], one.replayed[0].tokens.tolist()
    eos = stream[5]
    count = stream.index(eos) + 1
    engine = one.engine(num_speculative_tokens=5)
    number = engine.add_request(PROMPTS[0], TOKENS, eos_token_id=eos, ignore_eos=False)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert outputs[-1].finish_reason == "stop"
    trace = engine.take(number)
    for name in ("tokens", "top_ids", "top_bits", "margins", "fingerprints"):
        assert_same_bits(getattr(trace, name), getattr(want, name)[:count])
    assert trace.drafts is not None
    assert_same_bits(trace.drafts.first_pass[:, :-1], want.drafts.fingerprints[:count, 0, :-1])


def fake(depth: int = 2, **options: Any) -> Engine:
    config = EngineConfig(num_speculative_tokens=depth, num_blocks=8, **options)
    model = FakeModel(positions=100)
    runner = FakeRunner(model, config)
    runner.prompts = dict.fromkeys(range(99), PROMPT)
    head = SimpleNamespace(target=model)
    return Engine(model, head, config, runner=runner)  # type: ignore[arg-type]


def tokens(outputs: Iterable[Output], request: int) -> list[int]:
    return [token for output in outputs if output.request == request for token in output.tokens]


PROMPT = [1, 2, 3]
STREAM = FakeModel().stream(PROMPT, 20)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {"max_tokens": 3}, "request 0: expected at least one token id"),
        ([1, 6], {"max_tokens": 3}, "request 0, position 1: expected an id within 0 … 5"),
        ([1.5], {"max_tokens": 3}, "request 0: expected integer ids"),
        ([1], {"max_tokens": 0}, "request 0: expected max_tokens of at least 1, found 0"),
        ([1] * 50, {"max_tokens": 52}, r"expected at most 100 positions .* found 101: 50 tokens"),
        ([1], {"max_tokens": 2.5}, "request 0, max_tokens: expected an integer, found 2.5"),
        ([1], {"max_tokens": True}, "request 0, max_tokens: expected an integer, found True"),
        ([1] * 30, {"max_tokens": 20, "ignore_eos": False}, "expected eos_token_id"),
        ([1], {"max_tokens": 2, "eos_token_id": []}, "expected ids in eos_token_id, found none"),
        ([1], {"max_tokens": 2, "eos_token_id": [0, 6]}, "eos_token_id: .* within 0 … 5 .* 6"),
        ([1], {"max_tokens": 2, "eos_token_id": -1}, "eos_token_id: expected an id .* found -1"),
        ([1], {"max_tokens": 2, "eos_token_id": (1.0,)}, "expected an integer, found 1.0"),
        ([1], {"max_tokens": 2, "eos_token_id": "2"}, "expected an integer, found '2'"),
    ],
)
def test_requests_that_could_never_run(prompt: Any, options: dict[str, Any], message: str) -> None:
    engine = fake()
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt, **options)
    assert not engine.has_unfinished


def test_a_request_that_the_whole_cache_could_not_hold() -> None:
    config = EngineConfig(num_blocks=3)
    model = FakeModel()
    runner = FakeRunner(model, config)
    runner.prompts[0] = [1] * 10
    engine = Engine(model, None, config, runner=runner)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prompt 1: expected at most 3 blocks.* found 4: 10 tok"):
        engine.generate([[1], [1] * 10], [4, 40])
    assert not engine.has_unfinished  # nothing was added, not even the first
    assert engine.generate([[1] * 10], 39)  # 48 positions are fed


def test_drafts_need_a_head() -> None:
    with pytest.raises(
        ValueError, match="num_speculative_tokens: expected 0 without a draft head, found 2"
    ):
        Engine(FakeModel(), None, EngineConfig(num_speculative_tokens=2))  # type: ignore[arg-type]


def test_tokens_come_as_they_are_made() -> None:
    engine = fake()
    outputs = list(engine.stream([PROMPT, PROMPT], [20, 4]))
    for place, count in ((0, 20), (1, 4)):
        own = [o for o in outputs if o.request == place]
        assert [token for o in own for token in o.tokens] == STREAM[:count]
        assert [o.finished for o in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].finish_reason == "length"
    assert len(outputs) > 4
    with pytest.raises(KeyError):
        engine.take(0)


def test_streams_and_requests_take_turns() -> None:
    """Whoever steps, each has its own tokens."""
    engine = fake()
    number = engine.add_request(PROMPT, 20)
    a, b = engine.stream([PROMPT, PROMPT], [9, 8]), engine.stream([PROMPT], 12)
    of_a, of_b, own = [next(a)], [next(b)], engine.step()
    assert tokens(own, number)  # all of what the streams' steps gave it
    (trace,) = engine.generate([PROMPT], 14)
    assert trace is not None
    assert trace.tokens.tolist() == STREAM[:14]
    of_b += b
    while engine.has_unfinished:
        own += engine.step()
    of_a += a
    assert tokens(of_a, 0) == STREAM[:9]
    assert tokens(of_a, 1) == STREAM[:8]
    assert tokens(of_b, 0) == STREAM[:12]
    assert {output.request for output in own} == {number}
    assert tokens(own, number) == STREAM
    assert engine.take(number).tokens.tolist() == STREAM
    assert not engine._records


def test_what_others_stepped_is_still_returned() -> None:
    engine = fake()
    number = engine.add_request(PROMPT, 4)
    gone = engine.add_request(PROMPT, 20)
    engine.generate([PROMPT], 20)
    assert not engine.busy
    assert engine.has_unfinished  # nobody has been given the request's tokens
    assert tokens(engine.step(), number) == STREAM[:4]
    assert (engine.step(), engine.has_unfinished) == ([], False)
    assert engine.take(gone).tokens.tolist() == STREAM
    other = engine.add_request(PROMPT, 20)
    next(engine.stream([PROMPT], 2))
    engine.cancel(other)
    assert (engine.step(), engine.has_unfinished) == ([], False)  # nothing of a cancelled one


def test_a_stream_ends_when_nothing_of_it_is_left() -> None:
    engine = fake()
    outputs = []
    for output in engine.stream([PROMPT, PROMPT], 20):
        outputs.append(output)
        assert len(outputs) < 50, "no end in sight"
        if len(outputs) == 1:
            engine.cancel(1)
    assert tokens(outputs, 0) == STREAM
    assert not tokens(outputs, 1)
    cancelled = engine.stream([PROMPT], 20)
    next(cancelled)
    engine.cancel(2)
    assert list(cancelled) == []


@pytest.mark.parametrize("where", ["run", "update"])
def test_an_interrupt_between_run_and_books_loses_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake()
    numbers = [engine.add_request(PROMPT, 9) for _ in range(2)]
    outputs = engine.step()

    def interrupted(*arguments: Any) -> Any:
        if where == "run":
            run(*arguments)
        raise KeyboardInterrupt

    run = engine._runner.run
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner if where == "run" else engine._scheduler, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    while engine.has_unfinished:
        outputs += engine.step()
    for number, trace in zip(numbers, engine.take_all(numbers), strict=True):
        assert tokens(outputs, number) == trace.tokens.tolist() == STREAM[:9]
        assert trace.drafts is not None
        canonical = FakeModel().accepted(PROMPT, STREAM[:9])
        assert trace.drafts.rounds == rounds(canonical, 2)


def test_an_interrupt_amid_the_books_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request has its tokens and the other has not: better no trace than a wrong one."""
    engine = fake()
    ended, number = engine.add_request(PROMPT, 1), engine.add_request(PROMPT, 9)
    engine.step()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._blocks, "register", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    with pytest.raises(RuntimeError, match="go on with a new engine"):
        engine.step()
    with pytest.raises(RuntimeError, match="go on with a new engine"):
        engine.take(ended)
    engine.drop(number)


def test_what_the_device_flagged_keeps_the_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake()
    numbers = [engine.add_request(PROMPT, 3) for _ in range(2)]
    while engine.has_unfinished:
        engine.step()

    def flagged() -> None:
        raise ValueError("an id out of range")

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "check", flagged)
        with pytest.raises(ValueError, match="an id out of range"):
            engine.take_all(numbers)
        with pytest.raises(ValueError, match="an id out of range"):
            engine.generate([PROMPT], 3)
    assert sorted(engine._records) == numbers  # and nothing of what nobody could take
    assert [t.tokens.tolist() for t in engine.take_all(numbers)] == [STREAM[:3]] * 2


def test_a_request_named_twice_is_not_taken() -> None:
    engine = fake()
    number = engine.add_request(PROMPT, 3)
    while engine.has_unfinished:
        engine.step()
    with pytest.raises(ValueError, match=r"requests: expected each once, found \[0, 0\]"):
        engine.take_all([number, number])
    assert engine.take(number).tokens.tolist() == STREAM[:3]


@pytest.mark.parametrize("eos", [0, [0], (5, 0), STREAM[4], [STREAM[4], STREAM[3]]])
def test_any_of_several_eos_ends_a_request(eos: Any) -> None:
    engine = fake()
    number = engine.add_request(PROMPT, 20, eos_token_id=eos, ignore_eos=False)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    ends = {eos} if isinstance(eos, int) else set(eos)
    stop = 1 + next(i for i, token in enumerate(STREAM) if token in ends)
    assert stop < 20
    assert outputs[-1].finish_reason == "stop"
    assert tokens(outputs, number) == STREAM[:stop]


def test_a_head_of_another_model_is_refused(case: Callable[[str], Case]) -> None:
    one = case("eagle")
    other = copy(one.model)
    for depth in (0, 2):
        config = EngineConfig(num_speculative_tokens=depth, num_blocks=8)
        with pytest.raises(ValueError, match="head: expected one loaded for this model"):
            Engine(other, one.head, config)
        Engine(one.model, one.head, config)


def test_a_stream_that_is_closed_cancels_what_is_left() -> None:
    engine = fake()
    stream = engine.stream([PROMPT, PROMPT], 20)
    next(stream)
    assert engine.has_unfinished
    stream.close()  # type: ignore[attr-defined]
    assert not engine.has_unfinished
    assert engine._blocks.available == 8


def test_a_trace_is_taken_once_and_only_of_what_has_ended() -> None:
    engine = fake()
    number = engine.add_request(PROMPT, 3)
    with pytest.raises(ValueError, match="request 0: expected it to have ended, found it waiting"):
        engine.take(number)
    engine.step()
    with pytest.raises(ValueError, match="found it running"):
        engine.take(number)
    while engine.has_unfinished:
        engine.step()
    engine.cancel(number)  # too late: it has ended
    assert engine.take(number).tokens.tolist() == STREAM[:3]
    with pytest.raises(KeyError):
        engine.take(number)
    other = engine.add_request(PROMPT, 3)
    engine.cancel(other)
    with pytest.raises(KeyError):
        engine.take(other)


def test_an_error_leaves_an_engine_that_can_go_on() -> None:
    engine = fake()
    run = engine._runner.run

    def fail(rows: Any) -> Any:
        if len(engine._runner.steps) == 2:  # type: ignore[attr-defined]
            raise ValueError("request 0: found NaN")
        return run(rows)

    engine._runner.run = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="found NaN"):
        engine.generate([PROMPT, PROMPT], 20)
    assert not engine.has_unfinished
    assert engine._blocks.available == 8
    engine._runner.run = run  # type: ignore[method-assign]
    (trace,) = engine.generate([PROMPT], 20)
    assert trace is not None
    assert trace.tokens.tolist() == STREAM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": [0, 0]}, "order: expected each of 0 … 1 once"),
        ({"max_tokens": 2.5}, "max_tokens: expected an integer, found 2.5"),
        ({"arrivals": [0, 0.5]}, "arrivals: expected an integer, found 0.5"),
        ({"arrivals": [0]}, "arrivals: expected one for each of 2 prompts, found 1"),
        ({"max_tokens": [1, 2, 3]}, "max_tokens: expected one for each of 2 prompts, found 3"),
        ({"cancelled": {2: 1}}, "cancelled: expected prompts within 0 … 1, found 2"),
    ],
)
def test_arguments_that_do_not_fit_the_prompts(arguments: dict[str, Any], message: str) -> None:
    engine = fake()
    with pytest.raises(ValueError, match=message):
        engine.generate([PROMPT, PROMPT], **{"max_tokens": 3} | arguments)
    assert not engine.has_unfinished


def test_no_prompts_are_no_traces() -> None:
    assert fake().generate([], 3) == []
    assert list(fake().stream([], 3)) == []


def test_the_prefix_cache_can_be_emptied() -> None:
    engine, prompt = fake(), [1, 2, 3] * 11
    engine._runner.prompts = dict.fromkeys(range(9), prompt)  # type: ignore[attr-defined]
    hits = []
    for reset in (False, True, False):
        engine.generate([prompt], 3)
        hits.append(engine.stats.prefix_hit_tokens)
        if reset:
            engine.reset_prefix_cache()
    assert hits == [0, 32, 32]
