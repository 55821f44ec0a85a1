"""Ranks of a real group, one request, and a fault in whoever has none.

`python idle_rank.py DEVICE TIMEOUT`, with RANK, WORLD_SIZE and the store's address in the
environment, is one rank; `start` starts all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from bitassay.engine.distributed.group import Group
from bitassay.engine.distributed.parallel import Requests, run_parallel
from bitassay.engine.distributed.rendezvous import RankError, RankInfo, serve
from support.planted_faults import IDLE_RANK
from support.stub_ranks import StubEngine

_LONGEST = 90.0  # seconds for a run: starting takes most of it
_TOKENS = 12  # steps of the one request


@dataclass(frozen=True)
class Ended:
    """How the rank with the request ended. seconds: since all were started; -1 is a hang."""

    status: int
    errors: str
    seconds: float


def start(device: str, *, timeout: float, world_size: int = 2) -> Ended:
    """Start ranks, of which the first has all the work, and wait for that one."""
    store = serve(timeout)
    processes = []
    begun = time.monotonic()
    try:
        for rank in range(world_size):
            rank_info = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            }
            command = [sys.executable, __file__, device, str(timeout)]
            processes.append(
                subprocess.Popen(command, stderr=-1, text=True, env=os.environ | rank_info)
            )
        try:
            _, errors = processes[0].communicate(timeout=_LONGEST)
        except subprocess.TimeoutExpired:
            return Ended(-1, "", time.monotonic() - begun)
        return Ended(processes[0].returncode, errors, time.monotonic() - begun)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _main(device: str, timeout: float) -> int:
    rank_info = RankInfo.from_environment()
    try:
        with Group.join(rank_info, device=device, timeout=timeout) as group, IDLE_RANK.put(None):
            run_parallel(StubEngine(), Requests([[1, 2]], _TOKENS), group)
    except RankError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    found = _main(sys.argv[1], float(sys.argv[2]))
    sys.stderr.flush()
    os._exit(found)  # an orderly end would wait for the other rank
