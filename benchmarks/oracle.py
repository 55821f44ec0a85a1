"""How fast is the oracle, and beside its peers?

Multiply-adds a second of `reference.tensor_core.matmul` on this machine's CPU: one call, several
processes side by side (what a suite gets when it is split), and other bit-accurate simulators on
the same inputs, with the share of their outputs whose bits equal the oracle's.

nox -s bench -- oracle [--memory] [--mma-sim PATH] [--hawkeye PATH] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import bitassay
from bitassay.reference.tensor_core import Precision, matmul, prepare

Record = dict[str, Any]
Shape = tuple[int, int, int]  # M, N, K
Peer = Callable[[Tensor, Tensor], Tensor]

ARCHES = ("sm_90", "sm_89")
LAYER, ONE_ROW, SMALL, LM_HEAD = (
    (64, 4096, 1024),
    (1, 4096, 1024),
    (64, 1024, 512),
    (8, 128256, 4096),
)
CALLS: tuple[tuple[str, Shape, torch.dtype, Precision | None, bool], ...] = (
    ("bf16", LAYER, torch.bfloat16, None, False),
    ("bf16, prepared weight", ONE_ROW, torch.bfloat16, None, True),
    ("bf16", ONE_ROW, torch.bfloat16, None, False),
    ("fp16", SMALL, torch.float16, None, False),
    ("fp8 e4m3", SMALL, torch.float8_e4m3fn, None, False),
    ("fp8 e5m2", SMALL, torch.float8_e5m2, None, False),
    ("tf32", SMALL, torch.float32, "tf32", False),
    ("fp32 ieee", SMALL, torch.float32, "ieee", False),
)
SECONDS = 0.3  # a run repeats short calls for about this long
TINY = 2.0**-66  # operands of this size: products near the least exponent that the adders align to
SPAWN = multiprocessing.get_context("spawn")  # workers that inherit no memory and no threads


def operands(
    shape: Shape, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return random a [M, K] and b [K, N], b the transposed view that a linear layer passes."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n + k)
    a = torch.randn(m, k, generator=generator) * scale
    weight = torch.randn(n, k, generator=generator) * scale
    return a.to(dtype), weight.to(dtype).t()


def measure(work: Callable[[], Tensor], shape: Shape, runs: int) -> tuple[Record, Tensor]:
    """Return the median speed of the runs, and what the first, untimed call gave."""
    start = time.perf_counter()
    result = work()
    calls = max(1, round(SECONDS / (time.perf_counter() - start)))
    seconds, busy = [], []
    for _ in range(runs):
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            work()
        seconds.append((time.perf_counter() - start) / calls)
        busy.append((time.process_time() - cpu) / calls)
    return speed(shape, 1, seconds, busy), result


def speed(shape: Shape, calls: int, seconds: list[float], busy: list[float]) -> Record:
    """Return the figures of runs of so many calls, from their wall-clock and CPU times."""
    m, n, k = shape
    millions = calls * m * n * k / 1e6
    return {
        "m": m, "n": n, "k": k,
        "million_per_second": millions / median(seconds),
        "million_per_core_second": millions / median(busy),
        "cores_used": median(cpu / wall for cpu, wall in zip(busy, seconds, strict=True)),
    }  # fmt: skip


def one_call(runs: int) -> Iterator[Record]:
    """Time single calls of every input type and shape."""
    for arch in ARCHES:
        for inputs, shape, dtype, precision, prepared in CALLS:
            a, b = operands(shape, dtype)
            weight = prepare(b, arch=arch) if prepared else b
            work = partial(matmul, a, weight, arch=arch, precision=precision)
            yield {"arch": arch, "inputs": inputs, **measure(work, shape, runs)[0]}


_barrier: Any = None


def _share(barrier: Any) -> None:
    global _barrier  # a barrier reaches a worker only while it starts
    _barrier = barrier


def _timed_together(arch: str, runs: int) -> list[tuple[float, float, float]]:
    """In a worker: return start, end and CPU seconds of every run; all workers start at once."""
    a, b = operands(LAYER)
    matmul(a, b, arch=arch)
    found = []
    for _ in range(runs):
        _barrier.wait(timeout=300)  # should a worker die, the others fail rather than hang
        start, cpu = time.monotonic(), time.process_time()
        matmul(a, b, arch=arch)
        found.append((start, time.monotonic(), time.process_time() - cpu))
    return found


def side_by_side(processes: list[int], runs: int) -> Iterator[Record]:
    """Time processes that each make the same call, as one: from the first start to the last end."""
    for arch in ARCHES:
        for count in processes:
            with ProcessPoolExecutor(count, SPAWN, _share, (SPAWN.Barrier(count),)) as pool:
                workers = pool.map(_timed_together, [arch] * count, [runs] * count)
                seconds, busy = [], []
                for run in zip(*workers, strict=True):
                    starts, ends, cpu = zip(*run, strict=True)
                    seconds.append(max(ends) - min(starts))
                    busy.append(sum(cpu))
            yield {"arch": arch, "processes": count, **speed(LAYER, count, seconds, busy)}


def mma_sim(path: Path) -> dict[str, Peer]:
    """Return products chained over K from m16n8k16 instructions of an MMA-Sim checkout."""
    sys.path.append(str(path))
    try:
        simulator = importlib.import_module("mmasim.simulator.nv_ptx")
    except ImportError as error:
        sys.exit(f"--mma-sim: expected a checkout with mmasim/simulator/, found {path}: {error}")

    def product(instruction: Any, a: Tensor, b: Tensor) -> Tensor:
        d = torch.zeros(a.shape[0], b.shape[1])
        for i in range(0, d.shape[0], 16):
            for j in range(0, d.shape[1], 8):
                tile = d[i : i + 16, j : j + 8]
                for k in range(0, a.shape[1], 16):
                    left, right = a[i : i + 16, k : k + 16], b[k : k + 16, j : j + 8]
                    tile.copy_(instruction(left, right, tile))
        return d

    names = {"sm_90": "Hopper", "sm_89": "Ada Lovelace"}
    qualifier = "m16n8k16.f32.bf16.bf16.f32"
    return {arch: partial(product, simulator.mma(names[arch], qualifier)) for arch in ARCHES}


def hawkeye(path: Path) -> dict[str, Peer]:
    """Return the products of Hawkeye's extension module, compiled by the user."""
    built = [path] if path.is_file() else sorted(path.glob("gpu_simulator_py*.so"))
    try:
        if not built:
            raise ImportError("no such file there")
        spec: Any = importlib.util.spec_from_file_location("gpu_simulator_py", built[0])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        sys.exit(
            "--hawkeye: expected gpu_simulator_py*.so or its folder, built with this Python "
            f"{platform.python_version()} and torch {torch.__version__}, found {path}: {error}"
        )
    # It has no class for Ada, whose adder is the A100's as far as published vectors can tell.
    return {"sm_90": module.Hopper_simulator().matmul, "sm_89": module.Ampere_simulator().matmul}


# One option each: how it is read, the shape that is timed, and one for tiny inputs, which the
# oracle sends down its exact path.
PEERS: dict[str, tuple[Callable[[Path], dict[str, Peer]], Shape, Shape]] = {
    "mma_sim": (mma_sim, (16, 64, 128), (16, 64, 128)),
    "hawkeye": (hawkeye, (64, 512, 1024), (16, 512, 256)),
}


def beside(name: str, peers: dict[str, Peer], runs: int) -> Iterator[Record]:
    """Time a peer and the oracle on the same inputs; compare on normal and on tiny ones."""
    _, shape, small = PEERS[name]
    for arch, peer in peers.items():
        a, b = operands(shape)
        ours, want = measure(partial(matmul, a, b, arch=arch), shape, runs)
        theirs, got = measure(partial(peer, a, b), shape, runs)
        left, right = operands(small, scale=TINY)
        tiny = equal_share(peer(left, right), matmul(left, right, arch=arch))
        per_core = ours["million_per_core_second"]
        yield {
            "peer": name, "arch": arch, **theirs,
            "oracle_million_per_core_second": per_core,
            "oracle_times_peer": per_core / theirs["million_per_core_second"],
            "equal": equal_share(got, want), "equal_tiny": tiny,
        }  # fmt: skip


def equal_share(got: Tensor, want: Tensor) -> float:
    """Return the share of fp32 outputs whose bits are equal."""
    return (got.view(torch.int32) == want.view(torch.int32)).double().mean().item()


def _peak() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def memory_beyond_inputs(arch: str) -> Record:
    """In a fresh process: return by how much one lm_head raised the peak of resident memory."""
    m, n, k = LM_HEAD
    # In place: a temporary here would raise the peak that is compared with.
    a = torch.empty(m, k, dtype=torch.bfloat16).normal_()
    b = torch.empty(n, k, dtype=torch.bfloat16).normal_().t()
    matmul(a[:, :16], b[:16, :8], arch=arch)
    before = _peak()
    matmul(a, b, arch=arch)
    return {"arch": arch, "m": m, "n": n, "k": k, "mebibytes": (_peak() - before) / 1024}


def memory() -> Iterator[Record]:
    """Measure each architecture in a process of its own."""
    for arch in ARCHES:
        with ProcessPoolExecutor(1, SPAWN) as pool:
            yield pool.submit(memory_beyond_inputs, arch).result()


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "CPU": models[0] if models else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "bitassay": bitassay.__version__,
        "date": str(datetime.date.today()),
    }


def table(title: str, columns: dict[str, str], records: list[Record]) -> Table:
    """Return records as a table; columns: heading -> format of a record."""
    made = Table(title=title, title_justify="left")
    for heading in columns:
        made.add_column(heading, justify="right")
    for record in records:
        made.add_row(*(form.format_map(record) for form in columns.values()))
    return made


ARCH, SHAPE = {"arch": "{arch}"}, {"M": "{m}", "N": "{n}", "K": "{k}"}
SPEED = {
    "million/s": "{million_per_second:,.2f}",
    "cores used": "{cores_used:.2f}",
    "per core": "{million_per_core_second:,.2f}",
}
AGAINST = {
    "oracle": "{oracle_million_per_core_second:,.2f}",
    "ratio": "{oracle_times_peer:,.1f}",
    "equal": "{equal:.2%}",
    "equal, tiny": "{equal_tiny:.2%}",
}
LEGEND = """\
million/s: million multiply-adds a second of wall-clock time; a figure is the median of several runs
cores used: CPU seconds a second; below 1 the machine was busy. One call computes on one core:
  above 1 there, idle threads of torch were spinning
per core: million multiply-adds a CPU second, which other work on the machine disturbs least
"""


def main() -> None:
    """Measure, print the tables and write the JSON file that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="a figure is the median of so many")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4], help="how many side by side"
    )
    parser.add_argument("--memory", action="store_true", help="the peak beyond an lm_head's inputs")
    parser.add_argument("--mma-sim", type=Path, help="a checkout of microsoft/MMA-Sim")
    parser.add_argument(
        "--hawkeye",
        type=Path,
        help="Hawkeye's compiled extension gpu_simulator_py*.so, or the folder that holds it; "
        "build it as that project says, with the Python and torch that run this script",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    if min(args.runs, *args.processes) < 1:
        parser.error("--runs and --processes are at least 1")
    if args.memory and not Path("/proc/self/status").exists():
        parser.error("--memory reads the peak from /proc/self/status, which only Linux has")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    paths = {name: getattr(args, name) for name in PEERS}
    # Read before anything is timed: a wrong path shows at once.
    peers = {name: PEERS[name][0](path) for name, path in paths.items() if path}

    console, found = Console(width=120, highlight=False), {}
    about = machine()
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    console.print(LEGEND)

    def report(name: str, title: str, columns: dict[str, str], records: Iterator[Record]) -> None:
        found[name] = list(records)
        console.print(table(title, columns, found[name]))

    calls = ARCH | {"inputs": "{inputs}"} | SHAPE | SPEED
    report("one_call", "One call: on one core, by design", calls, one_call(args.runs))
    together = ARCH | {"processes": "{processes}"} | SHAPE | SPEED
    title = "bf16, processes side by side: their sum, as when a suite is split"
    report("side_by_side", title, together, side_by_side(args.processes, args.runs))
    for name, of_peer in peers.items():
        title = f"{name} on bf16 inputs, the oracle's speed per core there, and equal outputs"
        report(name, title, ARCH | SHAPE | SPEED | AGAINST, beside(name, of_peer, args.runs))
    for name in PEERS.keys() - peers.keys():
        option = "--" + name.replace("_", "-")
        console.print(f"{name} is left out: add it with {option} PATH (see --help)")
    if args.memory:
        columns = ARCH | SHAPE | {"MiB": "{mebibytes:,.0f}"}
        report("memory", "bf16: peak memory beyond the inputs", columns, memory())
    if args.json:
        args.json.write_text(json.dumps({"machine": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
