"""The configurations of a sweep: all pairs that can be are there, and each is what it promises."""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace

import pytest

from bitassay.golden.errors import GoldenError
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
    settings = FACTORS if graphs else FACTORS | {"eager": (True,)}
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
    assert {c.eager for c in SWEEPS[True]} == {True, False}
    assert {c.eager for c in SWEEPS[False]} == {True}


@pytest.mark.parametrize(
    "unfit",
    [
        {"draft_tokens": 5, "max_num_batched_tokens": 5},
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
    assert (usual.draft_tokens, usual.dp, usual.backend, usual.num_blocks) == (
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
    assert not run(prefix_cache="off").prefix_caching
    assert run(arrival="shuffled").shuffle == run(arrival="late").late == 5
    assert run(cancelled=True).cancel == 4
    assert run(cancelled=True, prompts="one").cancel == 1
    assert run(eager=False).eager is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"draft_tokens": 6}, "--k: expected 0 … 5, as many as a golden has, found 6"),
        ({"draft_tokens": 3, "max_num_batched_tokens": 3}, "expected at least 4, a token and its"),
        ({"backend": "cpu"}, "--backend: expected one of gpu, interpreter, reference, found cpu"),
        ({"warm": True, "prefix_caching": False}, "--warm needs the prefix cache"),
        ({"shuffle": 1, "late": 1}, "--shuffle and --arrivals exclude each other"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, message):
    with pytest.raises(GoldenError, match=message):
        EngineOptions(**given)


def test_drafts_are_asked_for_where_there_is_a_head():
    assert EngineOptions().drafting(True) == 3
    assert EngineOptions().drafting(False) == 0
    assert EngineOptions(draft_tokens=5).drafting(True) == 5
    assert EngineOptions(draft_tokens=0).drafting(True) == 0
    with pytest.raises(GoldenError, match="--k 1: this golden has no draft head: use --k 0"):
        EngineOptions(draft_tokens=1).drafting(False)
