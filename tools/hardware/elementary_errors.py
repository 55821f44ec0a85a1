"""The error of exp2, exp, log and silu over every fp32 input, against float64.

Errors are in ulps of the true value in fp32 (below 2**-126 the ulp is 2**-149), or absolute where
the name says so. float64's own functions are good to about one of their ulps, 2**-29 of one here.

python tools/hardware/elementary_errors.py [--device cuda|cpu] [--step N] [--only NAME]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitassay.reference import elementary

# Inputs at once: what fits a CPU's cache, and enough to fill a GPU.
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
_SIGN = 1 << 31


def _bits(value: float) -> int:
    """The fp32 bits of a number, unsigned."""
    return int(torch.tensor(value).view(torch.int32)) & 0xFFFFFFFF


def _silu64(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


@dataclass(frozen=True)
class Domain:
    """Inputs first … last as unsigned bits, both included, of one sign: magnitudes ascend."""

    name: str
    function: Callable[[Tensor], Tensor]
    truth: Callable[[Tensor], Tensor]
    first: int
    last: int
    absolute: bool = False


@dataclass(frozen=True)
class Worst:
    """The largest error of a domain, the input that has it, and how many inputs were tried."""

    error: float
    at: float
    inputs: int


_MAX, _INFINITY = 0x7F7FFFFF, 0x7F800000
_EXP2 = (elementary.exp2, torch.exp2)
_EXP = (elementary.exp, torch.exp)
_SILU = (elementary.silu, _silu64)
# The last exp whose true value is normal: ln(2**-126) = -87.336544...
_NORMAL_EXP = _bits(-87.33654)
# The last x that exp does not cut to +0: -126.5 * ln(2) = -87.683118..., a tie that rounds to -126.
_LAST_EXP = _bits(-87.68311)

DOMAINS = (
    Domain("exp2, 0 <= x < 127.5", *_EXP2, 0, _bits(127.5) - 1),
    Domain("exp2, -126 <= x <= -0", *_EXP2, _SIGN, _bits(-126.0)),
    Domain("exp2, x < -126 (absolute)", *_EXP2, _bits(-126.0) + 1, _SIGN | _INFINITY, True),
    Domain("exp, result normal", *_EXP, _SIGN, _NORMAL_EXP),
    Domain("exp, result below normal (absolute)", *_EXP, _NORMAL_EXP + 1, _SIGN | _INFINITY, True),
    Domain("log on [1, 2**31)", elementary.log, torch.log, _bits(1.0), _bits(2.0**31) - 1),
    Domain("log on [2**31, infinity)", elementary.log, torch.log, _bits(2.0**31), _MAX),
    Domain("silu, x >= 0", *_SILU, 0, _MAX),
    Domain("silu, exp(x) above 0", *_SILU, _SIGN, _LAST_EXP),
    Domain("silu, exp(x) cut to 0 (absolute)", *_SILU, _LAST_EXP + 1, _SIGN | _MAX, True),
)


def ulps(got: Tensor, true: Tensor) -> Tensor:
    """|got - true| in fp32 ulps of the float64 true value; equal infinities and zeros are 0."""
    exponent = ((true.view(torch.int64) >> 52 & 0x7FF) - 1023).clamp_min(-126)
    unit = (exponent - 23 + 1023 << 52).view(torch.float64)  # 2**(exponent - 23)
    return torch.where(got.double() == true, 0.0, (got.double() - true).abs() / unit)


def worst(domain: Domain, device: torch.device, step: int = 1) -> Worst:
    """Measure one domain over every `step`-th input, its two ends included."""
    error, at, inputs = -1.0, 0.0, 0
    span = CHUNK[device.type] * step
    for start in range(domain.first, domain.last + 1, span):
        end = min(start + span, domain.last + 1)
        patterns = torch.arange(start, end, step, device=device)
        if end > domain.last and (domain.last - start) % step:
            patterns = torch.cat([patterns, patterns.new_tensor([domain.last])])
        x = torch.where(patterns >= _SIGN, patterns - 2 * _SIGN, patterns)
        x = x.to(torch.int32).view(torch.float32)
        got, true = domain.function(x), domain.truth(x.double())
        off = (got.double() - true).abs() if domain.absolute else ulps(got, true)
        # NaN is as wrong as can be; max would hand it on, argmax need not find it.
        off = torch.where(off.isnan(), torch.inf, off)
        place = off.argmax()
        inputs += len(x)
        if float(off[place]) > error:
            error, at = float(off[place]), float(x[place])
    return Worst(error, at, inputs)


def main() -> None:
    """Measure every domain and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--step", type=int, default=1, help="try every N-th input (default 1)")
    parser.add_argument("--only", default="", help="only domains whose name begins so")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    coverage = "every input" if args.step == 1 else f"every {args.step}th input"
    table = Table(title=f"{name}, torch {torch.__version__}, {coverage}")
    for heading in ("domain", "largest error", "unit", "at", "inputs", "seconds"):
        table.add_column(heading, justify="left" if heading in ("domain", "unit") else "right")
    for domain in (domain for domain in DOMAINS if domain.name.startswith(args.only)):
        begin = time.perf_counter()
        found = worst(domain, device, args.step)
        seconds = time.perf_counter() - begin
        error = f"{found.error:.3e}" if domain.absolute else f"{found.error:.5f}"
        unit = "absolute" if domain.absolute else "ulp"
        hex_input = float.hex(found.at)
        table.add_row(
            domain.name, error, unit, f"{found.at:.9g} = {hex_input}", f"{found.inputs:,}",
            f"{seconds:.1f}",
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
