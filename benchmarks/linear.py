"""How fast are the batch-invariant linear layers beside cuBLAS?

Times `kernels.linear` against torch.mm with a cold cache, and batch_invariant_ops where its path is
given. Every timed call is also compared with torch.mm's bits, so that a reader sees which calls of
cuBLAS split K; the oracle's verdict is tests/hardware/linear_sweep.py.

nox -s bench -- linear [--rows 1,8,...] [--shapes 4096x4096,...] [--batch-invariant-ops PATH]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from timing import SHAPES, milliseconds, operands

from bitassay.kernels.linear import linear
from bitassay.reference.spec.contract import default_contract

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MEMORY_BOUND = 64  # up to here GB/s says more than TFLOP/s


def peer(path: Path | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return batch_invariant_ops' matmul from a checkout at that path."""
    if path is None:
        return None
    sys.path.insert(0, str(path))
    return importlib.import_module("batch_invariant_ops").matmul_persistent  # type: ignore


def rate(m: int, n: int, k: int, ms: float) -> str:
    """Return bytes or operations a second, whichever bounds the shape."""
    if m <= MEMORY_BOUND:
        return f"{2 * (m * k + n * k + m * n) / ms / 1e6:,.0f} GB/s"
    return f"{2 * m * n * k / ms / 1e9:,.0f} TFLOP/s"


def main() -> None:
    """Print one row per shape and batch; ratios above 1 are faster than cuBLAS."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--batch-invariant-ops", type=Path, help="a checkout of the peer")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/linear.py needs a CUDA device: none was found")
    major, minor = torch.cuda.get_device_capability()
    contract = default_contract(f"sm_{major}{minor}")
    other = peer(args.batch_invariant_ops)
    title = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{datetime.date.today()}; bf16, ratio = cuBLAS time / kernel time"
    )
    table = Table(title=title)
    for name in ("(N, K)", "M", "cuBLAS", "bitassay", "rate", "ratio", "cuBLAS differs"):
        table.add_column(name, justify="right")
    if other:
        table.add_column("batch_invariant_ops ratio", justify="right")
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for m in map(int, args.rows.split(",")):
            x, weight = operands(m, n, k)
            cublas = milliseconds(partial(torch.mm, x, weight.t()))
            ours = milliseconds(partial(linear, x, weight, contract=contract))
            differs = (torch.mm(x, weight.t()) != linear(x, weight, contract=contract)).sum()
            row = [
                f"({n}, {k})", str(m), f"{cublas * 1e3:,.1f} us", f"{ours * 1e3:,.1f} us",
                rate(m, n, k, ours), f"{cublas / ours:.2f}", f"{int(differs) / (m * n):.2%}",
            ]  # fmt: skip
            if other:
                row.append(f"{cublas / milliseconds(partial(other, x, weight.t())):.2f}")
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
