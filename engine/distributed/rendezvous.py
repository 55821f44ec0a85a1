"""Where a rank stands among the others, and how ranks find each other: through a TCPStore."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import (  # type: ignore[attr-defined]  # exported, not annotated so
    PrefixStore,
    Store,
    TCPStore,
)

_ASK = 0.02  # seconds between two questions whether everyone is there
TIMEOUT = 60.0  # seconds for a collective, unless told otherwise
LONGEST = 86400.0  # seconds, a day: longer ones overflow somewhere below, and help nobody
_LAST_WORD = 2.0  # seconds for the others to read why the one that keeps the store refuses
_MEETINGS = itertools.count()  # a process may join one group after another, all in one store


def check_timeout(seconds: float) -> None:
    """Raise ValueError unless it is a time that ranks may wait for each other."""
    if not (math.isfinite(seconds) and 0 < seconds <= LONGEST):
        raise ValueError(
            f"timeout: expected more than 0 seconds and at most {LONGEST:g}, a day, found "
            f"{seconds:g}"
        )


class RankError(RuntimeError):
    """What ranks do together cannot go on; the group cannot be used any more."""


class RankTimeout(RankError):  # noqa: N818  (it is one)
    """Some ranks did not take part in time: the message names them."""


class RankLost(RankError):  # noqa: N818
    """Some ranks failed, or are not heard of any more: the message names them."""


@dataclass(frozen=True)
class RankInfo:
    """One process among `world_size` that run the same requests together.

    local_rank: its number on this host, hence its GPU. address, port: of the store. keeps_store:
    whether this process serves it; a launcher that does so itself leaves it to no rank. attempt:
    how often the launcher has started the ranks anew, for its store remembers earlier ones.
    """

    rank: int
    world_size: int
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    keeps_store: bool = False
    attempt: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that cannot be a place."""
        if self.world_size < 1:
            raise ValueError(f"world size: expected at least 1, found {self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: expected 0 … {self.world_size - 1}, found {self.rank}")
        if not 0 <= self.local_rank <= self.rank:
            raise ValueError(f"local rank: expected 0 … {self.rank}, found {self.local_rank}")
        if self.world_size > 1 and not 0 < self.port < 65536:
            raise ValueError(f"port of the store: expected 1 … 65535, found {self.port}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankInfo:
        """Return the place that torchrun's variables state; ValueError for one missing or unfit.

        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; TORCHELASTIC_USE_AGENT_STORE says
        that the launcher serves the store; else rank 0 does.
        """

        def number(name: str, default: int | None = None) -> int:
            text = environment.get(name, "" if default is None else str(default))
            if not text.isdecimal():
                found = repr(text) if name in environment else "nothing"
                raise ValueError(
                    f"{name} in the environment: expected a number, found {found}: start the ranks "
                    "with torchrun, or with --dp, which set it"
                )
            return int(text)

        rank, world_size = number("RANK"), number("WORLD_SIZE")
        alone = world_size <= 1  # needs no store
        if not alone and not environment.get("MASTER_ADDR"):
            raise ValueError(
                "MASTER_ADDR in the environment: expected the host of the store, found nothing: "
                "start the ranks with torchrun, or with --dp, which set it"
            )
        served = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(
            rank,
            world_size,
            number("LOCAL_RANK", rank),
            environment.get("MASTER_ADDR", ""),
            number("MASTER_PORT", 0 if alone else None),
            keeps_store=rank == 0 and not served,
            attempt=number("TORCHELASTIC_RESTART_COUNT", 0),
        )

    @property
    def name(self) -> str:
        """What errors call this rank."""
        return f"rank {self.rank} of {self.world_size}"


def serve(timeout: float) -> TCPStore:
    """Return a store on a free port of this host, for ranks that this process starts."""
    wait = timedelta(seconds=timeout)
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)


@dataclass(frozen=True)
class Meeting:
    """What a rank holds once all have met: two connections, one of them for its heartbeat."""

    rank_info: RankInfo
    store: Store
    beats: Store


def meet(rank_info: RankInfo, timeout: float) -> Meeting:
    """Connect to the store and wait until every rank has; RankError says who is missing or wrong.

    timeout: seconds until RankTimeout names the ranks that did not come.
    """
    deadline = time.monotonic() + timeout
    prefix = f"bitassay/{rank_info.attempt}/{next(_MEETINGS)}"
    store, beats = (
        PrefixStore(prefix, _connect(rank_info, deadline, keeps=keeps))
        for keeps in (rank_info.keeps_store, False)
    )
    try:
        _gather(rank_info, store, deadline, timeout)
    except RankError:
        raise
    except RuntimeError as error:
        raise RankError(
            f"{rank_info.name} has lost the ranks' store at {rank_info.address}:{rank_info.port} "
            f"while it waited for the others ({str(error).splitlines()[0]}): whoever kept it has "
            "ended, see what it said"
        ) from None
    return Meeting(rank_info, store, beats)


def _gather(rank_info: RankInfo, store: Store, deadline: float, timeout: float) -> None:
    """Join, and wait until every rank has."""
    # The size first: a rank of another world never joins, and says so where the others wait.
    world = store.compare_set("world", "", str(rank_info.world_size)).decode()
    if world != str(rank_info.world_size):
        store.set("refused", rank_info.name)
        if rank_info.keeps_store:
            time.sleep(_LAST_WORD)
        raise RankError(
            f"{rank_info.name}: another rank was started as one of {world}: give all the same "
            "WORLD_SIZE"
        )
    if store.add(f"joined/{rank_info.rank}", 1) > 1:
        raise RankError(f"{rank_info.name} was started twice: give every process a RANK of its own")
    missing = list(range(rank_info.world_size))
    while missing := [rank for rank in missing if not store.check([f"joined/{rank}"])]:
        if store.check(["refused"]):
            other = store.get("refused").decode()
            if rank_info.keeps_store:
                time.sleep(_LAST_WORD)
            raise RankError(
                f"{rank_info.name}: another process was started as {other}: "
                "give all the same WORLD_SIZE"
            )
        if time.monotonic() > deadline:
            raise RankTimeout(
                f"{rank_info.name}: {named(missing)} did not join within {timeout:g} s: see what "
                "became of them, or give them longer with a larger timeout"
            )
        time.sleep(_ASK)


def named(ranks: list[int]) -> str:
    """Return ranks in words: rank 1; ranks 1, 2 and 5."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _connect(rank_info: RankInfo, deadline: float, *, keeps: bool) -> TCPStore:
    left = max(1.0, deadline - time.monotonic())
    try:
        return TCPStore(
            rank_info.address,
            rank_info.port,
            is_master=keeps,
            wait_for_workers=False,
            timeout=timedelta(seconds=left),
            multi_tenant=True,  # a later group of this process may use the same port
        )
    except (RuntimeError, ValueError) as error:
        where = f"{rank_info.address}:{rank_info.port}"
        said = str(error).splitlines()[0]
        if keeps:
            raise RankError(
                f"{rank_info.name} cannot serve the ranks' store at {where}, as MASTER_ADDR and "
                f"MASTER_PORT say ({said}): free that port or choose another"
            ) from None
        raise RankError(
            f"{rank_info.name} finds no store of the ranks at {where} within {left:.0f} s "
            f"({said}): see whether rank 0, or the launcher, runs there"
        ) from None


def bind(rank_info: RankInfo, device: str) -> torch.device:
    """Return the device of a rank, made the current one.

    Raises ValueError where there is no GPU of its own for it: two ranks cannot share one.
    """
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if rank_info.local_rank >= count:
        raise ValueError(
            f"{rank_info.name} needs GPU {rank_info.local_rank} of its host, which has {count}: "
            "NCCL cannot share one between ranks: start fewer, or use CPUs"
        )
    own = torch.device("cuda", rank_info.local_rank)
    torch.cuda.set_device(own)
    torch.zeros((), device=own)  # opens the device now, before anyone counts the seconds
    return own
