"""The configurations of a sweep: all pairs that can be are there, and each is what it promises."""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace

import pytest

from bitassay.engine.config import EngineConfig
from bitassay.golden.errors import GoldenError
from bitassay.golden.runs.backend import Backend
from bitassay.golden.runs.engine_options import EVICTIONS, HITS, PREEMPTIONS, EngineOptions
from bitassay.golden.runs.sweep import FACTORS, Configuration, sweep

SWEEPS = {graphs: sweep(graphs=graphs) for graphs in (True, False)}
USUAL = Configuration(3, 64, 2048, "ample", "cold", "given", "all", False, True)


def pairs(configuration: Configuration) -> set[tuple]:
    return set(itertools.combinations(enumerate(astuple(configuration)), 2))


@pytest.mark.parametrize("graphs", [True, False])
def test_every_pair_that_can_be_is_there(graphs):
    """Found by asking for every pair whether any configuration with it is valid."""
    names, seen = list(FACTORS), set().union(*map(pairs, SWEEPS[graphs]))
    settings = FACTORS if graphs else FACTORS | {"enforce_eager": (True,)}
    every = [Configuration(*some) for some in itertools.product(*settings.values())]
    valid = [c for c in every if c.valid]
    for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
        for x, y in itertools.product(settings[a], settings[b]):
            possible = any(getattr(c, a) == x and getattr(c, b) == y for c in valid)
            assert (((i, x), (j, y)) in seen) == possible, (a, x, b, y)
    assert 36 <= len(SWEEPS[graphs]) <= 48
    assert len(set(SWEEPS[graphs])) == len(SWEEPS[graphs])
    assert all(c.valid for c in SWEEPS[graphs])


def test_it_is_the_same_every_time():
    assert sweep(graphs=True) == SWEEPS[True]


def test_graphs_are_left_out_where_they_may_not_be_used():
    assert {c.enforce_eager for c in SWEEPS[True]} == {True, False}
    assert {c.enforce_eager for c in SWEEPS[False]} == {True}


@pytest.mark.parametrize(
    "unfit",
    [
        {"num_speculative_tokens": 5, "max_num_batched_tokens": 5},
        {"blocks": "few", "max_num_seqs": 1},
        {"blocks": "few", "prefix_cache": "evicted"},
        {"blocks": "few", "prompts": "three"},
        {"prefix_cache": "evicted", "prompts": "one"},
    ],
)
def test_what_could_not_come_to_it_is_not_valid(unfit):
    assert USUAL.valid
    assert not replace(USUAL, **unfit).valid


def run(**changes) -> EngineOptions:
    facts = {"count": 9, "longest": 7, "filled": 100, "dp": 2, "backend": "reference", "seed": 5}
    return replace(USUAL, **changes).options(**facts, timeout=None)


def test_a_configuration_is_run_as_it_says():
    usual = run()
    assert (usual.num_speculative_tokens, usual.dp, usual.backend, usual.num_blocks) == (
        3,
        2,
        "reference",
        None,
    )
    assert (usual.must, usual.warm, usual.mirrored, usual.cancel) == ((), False, False, None)
    few = run(blocks="few")
    assert (few.num_blocks, few.must) == (7, (PREEMPTIONS,))
    evicted = run(prefix_cache="evicted")
    assert (evicted.num_blocks, evicted.must) == (37, (HITS, EVICTIONS))
    assert evicted.mirrored
    assert run(prefix_cache="warm").warm
    assert not run(prefix_cache="off").enable_prefix_caching
    assert run(arrival="shuffled").shuffle == run(arrival="late").late == 5
    assert run(cancelled=True).cancel == 4
    assert run(cancelled=True, prompts="one").cancel == 1
    assert run(enforce_eager=False).enforce_eager is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_speculative_tokens": 6}, "num_speculative_tokens: expected 0 … 5, found 6"),
        (
            {"num_speculative_tokens": 3, "max_num_batched_tokens": 3},
            "expected at least 4, a token and its",
        ),
        ({"backend": "cpu"}, "'cpu' is not a valid Backend"),
        ({"warm": True, "enable_prefix_caching": False}, "--warm needs the prefix cache"),
        ({"shuffle": 1, "late": 1}, "--shuffle and --arrivals exclude each other"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, message):
    with pytest.raises((GoldenError, ValueError), match=message):
        EngineOptions(**given)


def test_drafts_are_asked_for_where_there_is_a_head():
    assert EngineOptions().drafts(head=True) == 3
    assert EngineOptions().drafts(head=False) == 0
    assert EngineOptions(num_speculative_tokens=5).drafts(head=True) == 5
    assert EngineOptions(num_speculative_tokens=0).drafts(head=True) == 0
    with pytest.raises(ValueError, match="expected 0 without a draft head, found 1"):
        EngineOptions(num_speculative_tokens=1).drafts(head=False)


def test_what_the_engine_and_a_check_share_stands_once():
    """The configuration of the engine is the record's own fields, defaults included."""
    assert EngineOptions().config(head=False) == EngineConfig(num_speculative_tokens=0)
    assert EngineOptions().config(head=True) == EngineConfig(num_speculative_tokens=3)
    options = EngineOptions(max_num_seqs=3, num_blocks=7, enforce_eager=True, capture=False)
    shared = {"max_num_seqs": 3, "num_blocks": 7, "enforce_eager": True, "capture": False}
    expected = EngineConfig(num_speculative_tokens=0, **shared)
    assert options.config(head=False) == expected
    assert EngineOptions(backend="reference").backend is Backend.REFERENCE
