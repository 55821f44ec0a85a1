"""Every output of linear and lm_head on this GPU against the oracle, at model sizes.

The oracle runs on the GPU, once per shape and kind of input, over all rows that any batch holds;
each batch is then compared row by row with it, output by output. torch.mm stands beside it, so
that a reader sees which calls of cuBLAS split K. Exit status: 0 all equal, 1 a difference.

python tools/hardware/linear_sweep.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bitassay.kernels import linear as kernels
from bitassay.reference import linear as reference
from bitassay.reference.spec.contract import Contract, default_contract

SHAPES = (
    (77, 4099), (1021, 77), (32003, 1000), (4096, 4096), (6144, 4096), (4096, 14336),
    (151936, 2048), (128256, 4096),
)  # fmt: skip
BATCHES = (1, 2, 3, 7, 8, 16, 17, 64, 65, 128, 256, 1000, 1024)
LARGE = 1 << 28  # weights from here on: fewer rows for inputs other than normal


Pair = tuple[Tensor, Tensor]  # x [M, K], weight [N, K]


def _randn(rows: int, k: int, g: torch.Generator) -> Tensor:
    return torch.randn(rows, k, device="cuda", generator=g)


def _chosen(share: float, a: Tensor, b: Tensor, g: torch.Generator) -> Tensor:
    return torch.where(torch.rand(a.shape, device="cuda", generator=g) < share, a, b)


def normal(m: int, n: int, k: int, g: torch.Generator) -> Pair:
    """Return standard normal values."""
    return _randn(m, k, g), _randn(n, k, g)


def wide(m: int, n: int, k: int, g: torch.Generator) -> Pair:
    """Return values with exponents spread evenly over 60 binades."""

    def spread(rows: int) -> Tensor:
        exponents = torch.randint(-30, 31, (rows, k), device="cuda", generator=g)
        return torch.ldexp(_randn(rows, k, g), exponents)

    return spread(m), spread(n)


def cancelling(m: int, n: int, k: int, g: torch.Generator) -> Pair:
    """Return large products in neighbouring pairs of opposite sign, and a little noise."""
    sign = 1 - 2 * (torch.arange(k, device="cuda") % 2)
    x, weight = (_randn(r, k // 2 + 1, g).repeat_interleave(2, 1)[:, :k] for r in (m, n))
    return 256 * x * sign + _randn(m, k, g), weight


def subnormal(m: int, n: int, k: int, g: torch.Generator) -> Pair:
    """Return subnormal inputs, and products and sums around the least normal fp32."""
    x = _chosen(0.7, _randn(m, k, g) * 2.0**-126, _randn(m, k, g) * 2.0**-112, g)
    return x, _chosen(0.3, _randn(n, k, g) * 2.0**-126, _randn(n, k, g) * 2.0**-8, g)


def special(m: int, n: int, k: int, g: torch.Generator) -> Pair:
    """Return normal values with rare zeros, infinities, NaN, subnormals and largest numbers."""
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.3e38, -3.3e38, 1e-40]

    def sprinkled(rows: int) -> Tensor:
        picks = torch.randint(0, len(values), (rows, k), device="cuda", generator=g)
        # Every eighth row is full of them; of the others, one in ten holds one.
        full = torch.arange(rows, device="cuda")[:, None] % 8 == 0
        rate = torch.where(full, 0.01, 0.1 / k)
        where = torch.rand(rows, k, device="cuda", generator=g) < rate
        return torch.where(where, torch.tensor(values, device="cuda")[picks], _randn(rows, k, g))

    return sprinkled(m), sprinkled(n)


KINDS: dict[str, Callable[[int, int, int, torch.Generator], Pair]] = {
    "normal": normal, "wide": wide, "cancelling": cancelling, "subnormal": subnormal,
    "special": special,
}  # fmt: skip


def differing(got: Tensor, want: Tensor) -> int:
    """Return how many outputs differ in any bit."""
    integer = torch.int16 if got.element_size() == 2 else torch.int32
    return int((got.view(integer) != want.view(integer)).sum())


def first(got: Tensor, want: Tensor) -> str:
    """Describe the first difference."""
    integer = torch.int16 if got.element_size() == 2 else torch.int32
    at = (got.view(integer) != want.view(integer)).nonzero()[0].tolist()
    return f"at {at}: got {got[tuple(at)].item():.9g}, want {want[tuple(at)].item():.9g}"


class Tally:
    """Counts of outputs compared and different, with a line per comparison that differs."""

    def __init__(self) -> None:
        self.compared = self.different = 0

    def compare(self, name: str, got: Tensor, want: Tensor) -> int:
        count = differing(got, want)
        self.compared += got.numel()
        self.different += count
        if count:
            print(f"DIFFERENT {name}: {count} of {got.numel()}, first {first(got, want)}")
        return count


def sweep(n: int, k: int, kind: str, contract: Contract, tally: Tally, singles: int) -> None:
    """Compare one shape and kind of input at every batch size, and rows alone at M = 1."""
    rows = 128 if n * k >= LARGE and kind != "normal" else max(BATCHES)
    g = torch.Generator("cuda").manual_seed(n * 31 + k)
    x, weight = (t.bfloat16() for t in KINDS[kind](rows, n, k, g))
    start = time.perf_counter()
    want = reference.linear(x, weight, contract=contract)
    torch.cuda.synchronize()
    speed = rows * n * k / (time.perf_counter() - start) / 1e9
    cublas = {}
    before = tally.compared, tally.different
    for m in (m for m in BATCHES if m <= rows):
        name = f"({n}, {k}) {kind} M={m}"
        tally.compare(name, kernels.linear(x[:m], weight, contract=contract), want[:m])
        cublas[m] = differing(torch.mm(x[:m], weight.t()), want[:m])
    if kind == "normal" and n * k < LARGE:  # the largest batch, of rows seen before
        got = kernels.linear(x.repeat(8, 1), weight, contract=contract)
        tally.compare(f"({n}, {k}) {kind} M={8 * rows}", got, want.repeat(8, 1))
    for row in range(min(rows, singles)):
        got = kernels.linear(x[row : row + 1], weight, contract=contract)
        tally.compare(f"({n}, {k}) {kind} row {row} alone", got, want[row : row + 1])
    nan = int(want.isnan().sum())
    print(
        f"({n}, {k}) {kind}: compared {tally.compared - before[0]:,}, different "
        f"{tally.different - before[1]}; oracle {speed:.1f} G multiply-adds/s, NaN {nan:,}; "
        f"torch.mm different by M: { {m: c for m, c in cublas.items() if c} or 'none' }",
        flush=True,
    )


def variants(contract: Contract, tally: Tally) -> None:
    """Compare bias, fp16, fp32 by fused multiply-adds, fp32 logits, padding and strides."""
    g = torch.Generator("cuda").manual_seed(7)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, k in ((4096, 1024), (1021, 333), (515, 4096)):
            x, weight = (t.to(dtype) for t in normal(300, n, k, g))
            bias = _randn(n, 1, g)[:, 0].to(dtype)
            for case in (x, x.repeat(1, 2)[:, :k], x[::2], x.t().contiguous().t()):
                want = reference.linear(case, weight, bias, contract=contract)
                for m in (1, 5, 33, 150):
                    got = kernels.linear(case[:m], weight, bias, contract=contract)
                    tally.compare(f"bias {dtype} ({n}, {k}) M={m}", got, want[:m])
            exact = default_contract(contract.arch, logits_dtype="float32")
            want = reference.lm_head(x, weight, bias, contract=exact, vocab_size=n - 5)
            for m in (1, 20, 300):
                got = kernels.lm_head(x[:m], weight, bias, contract=exact, vocab_size=n - 5)
                tally.compare(f"fp32 logits {dtype} ({n}, {k}) M={m}", got, want[:m])


def main() -> int:
    """Run the sweep and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    args = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    contract = default_contract(f"sm_{major}{minor}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, contract {contract.arch}")
    tally = Tally()
    variants(contract, tally)
    print(f"variants: compared {tally.compared:,}, different {tally.different}", flush=True)
    for n, k in SHAPES:
        if args.quick and n * k > 1 << 25:
            continue
        for kind in KINDS:
            sweep(n, k, kind, contract, tally, singles=1024 if kind == "normal" else 64)
    print(f"compared {tally.compared:,} outputs, different {tally.different}")
    return 1 if tally.different else 0


if __name__ == "__main__":
    sys.exit(main())
