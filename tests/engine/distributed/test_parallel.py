"""Ranks that step together: nothing is lost between them, and none waits for ever."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain

import pytest
from torch.distributed import HashStore

from bitassay.engine.distributed import configuration_check, rendezvous
from bitassay.engine.distributed.configuration_check import agree
from bitassay.engine.distributed.group import Group
from bitassay.engine.distributed.parallel import Requests, run_parallel, share, total
from bitassay.engine.distributed.rendezvous import Meeting, RankError, RankInfo, RankTimeout, serve
from bitassay.engine.scheduling.stats import Stats
from support.paths import ROOT, SUPPORT
from support.stub_ranks import StubEngine

PROMPTS = [[n, 10 * n] for n in range(1, 8)]


def environment(port: int, rank: int, world_size: int) -> dict[str, str]:
    src = str(ROOT / "src")
    return os.environ | {
        "PYTHONPATH": src,
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "LOCAL_WORLD_SIZE": str(world_size),
    }


@contextmanager
def ranks(
    world_size: int,
    fault: str = "none",
    *,
    timeout: float = 30,
    prompts: list[list[int]] = PROMPTS,
    started: int | None = None,
    **overrides: str,
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of a group, the first `started` of its ranks; none is left afterwards."""
    store = serve(timeout)
    arguments = [fault, str(timeout), json.dumps(prompts)]
    command = [sys.executable, str(SUPPORT / "stub_ranks.py"), *arguments]
    processes = [
        subprocess.Popen(
            command,
            stdout=-1,
            stderr=-1,
            text=True,
            env=environment(store.port, rank, world_size) | overrides,
        )
        for rank in range(world_size if started is None else started)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str], within: float) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


@pytest.mark.parametrize(("world_size", "count"), [(2, 7), (3, 2)])
def test_what_ranks_share_is_put_together_in_order(world_size, count):
    """With 3 ranks and 2 prompts one has nothing to do, and takes part all the same."""
    with ranks(world_size, prompts=PROMPTS[:count]) as processes:
        results = [ended(process, 60) for process in processes]
    assert [status for status, _, _ in results] == [0] * world_size, results
    found = json.loads(results[0][1])
    expected = [[11 * n + t for t in range(9)] for n in range(1, count + 1)]
    assert found["tokens"] == [expected[0], None, *expected[2:]]
    assert found["total"] == 9 * (count - 1) + 1  # the cancelled one gave a token
    assert found["told"] == sorted(list(reversed(range(count)))[::world_size])
    assert [out for _, out, _ in results[1:]] == [""] * (world_size - 1)


@pytest.mark.parametrize(("fault", "world_size"), [("kill", 2), ("freeze", 2)])
def test_a_rank_that_goes_silent_is_named_long_before_the_timeout(fault, world_size):
    with ranks(world_size, fault, timeout=300) as processes:
        begun = time.monotonic()
        status, out, err = ended(processes[0], 40)
        assert time.monotonic() - begun < 30  # starting takes most of it
        if fault == "kill":
            assert processes[-1].wait(1) == -signal.SIGKILL
    assert (status, out) == (3, "")
    # The sum before may be under way when it happens. What another rank found out may be told.
    assert re.search(
        rf"RankLost: rank 0 of {world_size} cannot go on with collective [45] .*: "
        rf"rank {world_size - 1} has not been heard of for 5\.\d s \(.* part in collective [34]\)",
        err,
    ), err


def test_a_rank_that_takes_no_part_is_named_when_the_time_is_over():
    """It lives and its heart beats: only the timeout tells."""
    with ranks(2, "skip", timeout=2) as processes:
        status, out, err = ended(processes[0], 60)
        assert processes[1].poll() is None
    assert (status, out) == (3, "")
    assert (
        "RankTimeout: rank 0 of 2: collective 5 (after step 4) was not done after 2 s, because "
        "rank 1 did not enter it (rank 1 last heard of 0."
    ) in err


def test_a_rank_that_is_stuck_itself_ends_too():
    """Its step would never end: a thread beside it sees that the other takes no part."""
    with ranks(2, "stuck", timeout=1) as processes:
        status, out, err = ended(processes[0], 60)
    assert (status, out) == (3, "")
    assert (
        "RankTimeout: rank 0 of 2: collective 5 was not done after 4 s, because rank 1 did not "
        "enter it (rank 1 last heard of 0."
    ) in err


def test_a_rank_that_skipped_one_collective_is_found_out():
    """All sums are complete: only the steps that they carry tell."""
    with ranks(2, "astray") as processes:
        results = [ended(process, 60) for process in processes]
    assert [status for status, _, _ in results] == [3, 3]
    assert (
        "collective 5 (after step 4): expected every rank at step 4, but rank 1 is at step 5"
        in results[0][2]
    )


def test_what_went_wrong_on_one_rank_is_told_by_the_others():
    prompts = [[660], [1]]
    with ranks(2, prompts=prompts) as processes:
        results = [ended(process, 60) for process in processes]
    # The order is reversed: rank 1 has prompt 0.
    assert [status for status, _, _ in results] == [3, 3]
    assert "SequenceError: prompt 0, step 7: expected no 666" in results[1][2]
    assert re.search(
        r"RankLost: rank 0 of 2 cannot go on with collective [67] \(after step [56]\): rank 1 "
        "failed: SequenceError: prompt 0, step 7: expected no 666",
        results[0][2],
    )


def test_ranks_that_do_not_come_are_named():
    with ranks(3, timeout=1, started=1) as processes:
        status, _, err = ended(processes[0], 60)
    assert status == 3
    assert "RankTimeout: rank 0 of 3: ranks 1 and 2 did not join within 1 s" in err


def test_a_rank_that_is_stopped_is_named_before_its_silence_is_long_enough():
    """It has begun the collective that it never ends, and the timeout is shorter than 5 s."""
    with ranks(2, "freeze in", timeout=1) as processes:
        status, out, err = ended(processes[0], 60)
    assert (status, out) == (3, "")
    assert re.search(
        r"RankTimeout: rank 0 of 2: collective 5 \(after step 4\) was not done after 1 s, because "
        r"rank 1 went silent in it \(rank 1 last heard of [2-4]\.\d s ago: ",
        err,
    ), err


def places(sizes: list[int]) -> list[RankInfo]:
    return [RankInfo(rank, size, port=9) for rank, size in enumerate(sizes)]


def together(calls: list) -> list[str]:
    """Make calls at once and return what each raised, "" for nothing."""

    def one(call) -> str:
        try:
            call()
        except RankError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def agreed(told: list[dict[str, str] | None]) -> list[str]:
    """What ranks say that tell these facts, None for one that never does."""
    store, meant = HashStore(), places([len(told)] * len(told))
    return together(
        [
            lambda rank_info=rank_info, facts=facts: agree(
                Meeting(rank_info, store, store), 1, facts, 0.5, lambda: None
            )
            for rank_info, facts in zip(meant, told, strict=True)
            if facts is not None
        ]
    )


def test_ranks_that_are_given_the_same_agree():
    assert agreed([{"k": "3", "arch": "x"}, {"arch": "x", "k": "3"}]) == ["", ""]


def test_a_rank_that_is_given_another_job_is_named_on_every_rank():
    usual = {"k": "3", "prompts": "p" * 99}
    first, second, third = agreed([usual, usual | {"k": "1", "prompts": "q" * 99}, usual])
    assert first.startswith(
        "rank 0 of 3: expected the same job on every rank, but rank 1 differs in "
        "k (1 there, 3 here), prompts: start all with the same arguments; nothing was run"
    )
    assert "rank 0 differs in k (3 there, 1 here), prompts; rank 2 differs in k (3" in second
    assert third == first.replace("rank 0 of", "rank 2 of")
    assert "k (nothing there, 3 here)" in agreed([{"k": "3"}, {}])[0]
    assert "k (3 there, nothing here)" in agreed([{"k": "3"}, {}])[1]


def test_a_rank_that_never_says_what_it_was_given_is_named():
    (said,) = agreed([{}, None])
    assert said.startswith("rank 0 of 2: rank 1 did not say within 0.5 s what is to be run")


def test_a_lost_rank_ends_the_comparison():
    def lost() -> None:
        raise RankTimeout("rank 1 is lost")

    (rank_info, _), store = places([2, 2]), HashStore()
    with pytest.raises(RankTimeout, match="rank 1 is lost"):
        agree(Meeting(rank_info, store, store), 1, {}, 60, lost)
    assert configuration_check._ASK < 1


def test_ranks_of_another_world_are_told_on_both_sides():
    store, deadline = HashStore(), time.monotonic() + 30
    said = together(
        [
            lambda rank_info=rank_info: rendezvous._gather(rank_info, store, deadline, 30)
            for rank_info in places([2, 3])
        ]
    )
    assert time.monotonic() < deadline - 20  # at once, not at the timeout
    assert all("give all the same WORLD_SIZE" in one for one in said)
    assert sorted("another process was started as rank " in one for one in said) == [False, True]
    assert sorted("another rank was started as one of " in one for one in said) == [False, True]


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), 1e12])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_timeout_that_is_no_time_is_refused(timeout, world_size):
    with pytest.raises(ValueError, match="timeout: expected more than 0 seconds and at most 86400"):
        Group.join(RankInfo(0, world_size, port=9), device="cpu", timeout=timeout)


def test_a_rank_given_twice_is_refused():
    with ranks(2, timeout=2, RANK="0", LOCAL_RANK="0") as processes:
        errors = [ended(process, 60)[2] for process in processes]
    assert sum("rank 0 of 2 was started twice: give every process" in err for err in errors) == 1


def test_a_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        own = {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": ""}
        with ranks(2, timeout=5, started=1, **own) as processes:
            status, _, err = ended(processes[0], 60)
    assert status == 3
    assert f"rank 0 of 2 cannot serve the ranks' store at 127.0.0.1:{port}, as MASTER_ADDR" in err
    assert "free that port or choose another" in err


def test_a_store_that_is_not_there_is_told():
    with ranks(2, timeout=1, started=1, MASTER_PORT="1") as processes:
        status, _, err = ended(processes[0], 60)
    assert status == 3
    assert "rank 0 of 2 finds no store of the ranks at 127.0.0.1:1 within " in err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "RANK in the environment: expected a number, found nothing: start the ranks with"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE in the .* expected a number, found 'two'"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "9"},
            "0 … 1, found 2",
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "9"}, "MASTER_ADDR in the environment"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_PORT in the environment"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "70000"},
            "port of the store: expected 1 … 65535, found 70000",
        ),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "world size: expected at least 1, found 0"),
    ],
)
def test_an_unfit_environment_is_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        RankInfo.from_environment(variables)


def test_an_environment_says_who_keeps_the_store():
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "9"}
    assert RankInfo.from_environment(variables) == RankInfo(0, 2, 0, "h", 9, keeps_store=True)
    served = variables | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert not RankInfo.from_environment(served).keeps_store
    assert not RankInfo.from_environment(variables | {"RANK": "1"}).keeps_store
    assert RankInfo.from_environment({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"rank 1 of 2 needs GPU 1 of its host, which has 1: NCCL"):
        Group.join(RankInfo(1, 2, 1, port=9), device="cuda")


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_prompts_are_dealt_out_in_turn(world_size):
    order = [3, 1, 4, 0, 2]
    requests = Requests([[1]] * 5, 1, order=order)
    shares = [share(requests, rank, world_size) for rank in range(world_size)]
    assert sorted(chain(*shares)) == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [own[0] for own in shares if own] == order[:world_size]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": [0, 0]}, "order: expected a permutation of 0 … 1"),
        ({"arrivals": [0]}, "arrivals: expected 2 steps from 0, one a prompt"),
        ({"arrivals": [0, -1]}, "arrivals: expected 2 steps"),
        ({"cancelled": {2: 0}}, "cancelled: expected prompts 0 … 1"),
        ({"cancelled": {1: -1}}, "and tokens from 0"),
    ],
)
def test_requests_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Requests([[1], [2]], 3, **fields)


def test_late_requests_are_waited_for():
    group = Group.join(RankInfo(0, 1), device="cpu")
    requests = Requests([[1], [2], [3]], 4, arrivals=[0, 30, 10])
    told: list[int] = []
    engine = StubEngine()
    gathered = run_parallel(
        engine, requests, group, lambda outputs: told.extend(p for p, _ in outputs)
    )
    expected = [[n + t for t in range(4)] for n in (1, 2, 3)]
    assert [trace.tokens.tolist() for trace in gathered.traces] == expected
    assert list(dict.fromkeys(told)) == [0, 2, 1]
    assert gathered.stats == [Stats(steps=12, tokens=12)]
    # What an engine counted before is no part of a run.
    assert run_parallel(engine, requests, group).stats == [Stats(steps=12, tokens=12)]


def test_what_ranks_counted_is_added_up():
    parts = [Stats(3, 10, 2, 6, 5, 1, 16), Stats(5, 4, 1, 3, 0, 0, 32)]
    summed = total(parts)
    assert summed == Stats(5, 14, 3, 9, 5, 1, 48)
    assert summed.acceptance_length == 1 + 5 / 3
