"""Ranks compare what they were given before they run anything: nothing else would tell them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from bitassay.engine.distributed.rendezvous import Meeting, RankError, RankTimeout, named

_ASK = 0.02  # seconds between two questions whether everyone has told
_LAST_WORD = 2.0  # seconds for the others to read why, before the store goes with its keeper
_ENDING = 0.5  # seconds for those who have read it to let go of the store
_SHORT = 40  # characters of a value that an error quotes


def agree(
    meeting: Meeting,
    number: int,
    facts: Mapping[str, str],
    timeout: float,
    look: Callable[[], None],
) -> None:
    """Wait until every rank has told its facts; raise unless they are the same.

    number: of the agreement, from 1, the same on every rank. facts: text by name, of what decides
    results. look: called now and then, to raise where a rank is lost. Raises RankError naming the
    ranks that were given something else, and the facts, RankTimeout naming ranks that tell none
    within `timeout` seconds.
    """
    rank_info, store = meeting.rank_info, meeting.store
    deadline = time.monotonic() + timeout
    others = [rank for rank in range(rank_info.world_size) if rank != rank_info.rank]

    def wait(what: str, until: float) -> list[int]:
        """Return the ranks that have not set their key by then."""
        waited = others
        while waited := [rank for rank in waited if not store.check([f"{what}/{number}/{rank}"])]:
            look()
            if time.monotonic() > until:
                break
            time.sleep(_ASK)
        return waited

    store.set_timeout(timedelta(seconds=timeout))
    store.set(f"facts/{number}/{rank_info.rank}", json.dumps(dict(facts)))
    if missing := wait("facts", deadline):
        raise RankTimeout(
            f"{rank_info.name}: {named(missing)} did not say within {timeout:g} s what is to be "
            "run: "
            "see what became of them, or give them longer with a larger timeout"
        )
    told = {rank: json.loads(store.get(f"facts/{number}/{rank}")) for rank in others}
    store.set(f"read/{number}/{rank_info.rank}", "")
    differing = {rank: said for rank in others if (said := _differences(facts, told[rank]))}
    if not differing:
        return
    if rank_info.keeps_store:
        wait("read", time.monotonic() + _LAST_WORD)
        time.sleep(_ENDING)
    where = "; ".join(f"rank {rank} differs in {said}" for rank, said in differing.items())
    raise RankError(
        f"{rank_info.name}: expected the same job on every rank, but {where}: start all with the "
        "same arguments; nothing was run"
    )


def _differences(own: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Return in words what differs: names, and values that are short enough."""
    names = [
        name for name in [*own, *(other.keys() - own.keys())] if own.get(name) != other.get(name)
    ]
    return ", ".join(_difference(name, own.get(name), other.get(name)) for name in names)


def _difference(name: str, own: str | None, other: str | None) -> str:
    here, there = ("nothing" if value is None else value for value in (own, other))
    if max(len(here), len(there)) > _SHORT:
        return name
    return f"{name} ({there} there, {here} here)"
