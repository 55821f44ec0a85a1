"""Which tile is fastest? Times every candidate of the launch table against cuBLAS.

nox -s bench -- tiles [--out tiles.json] [--shapes 4096x4096,...] [--rows 1,8,...]
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from timing import SHAPES, milliseconds, operands

from bitassay.kernels import tiles
from bitassay.kernels.linear import linear
from bitassay.reference.spec.contract import default_contract

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def worth_timing(tile: tiles.Tile, m: int) -> bool:
    """Leave out tiles that would mostly multiply padding, or read the weight too often."""
    if m <= 16:
        return tile.block_m == 16
    return 16 < tile.block_m <= max(2 * m, 64) and (tile.block_m >= 128 or m <= 256)


def main() -> None:
    """Print, for every shape, the five fastest tiles and their speed relative to torch.mm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    args = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    contract = default_contract(f"sm_{major}{minor}")
    found = []
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for m in map(int, args.rows.split(",")):
            x, weight = operands(m, n, k)
            cublas = milliseconds(partial(torch.mm, x, weight.t()))
            times = []
            for tile in tiles.candidates(contract.arch, x.dtype):
                if not worth_timing(tile, m):
                    continue
                try:
                    ms = milliseconds(
                        partial(linear, x, weight, contract=contract, tile=tile), repeat_ms=20
                    )
                except Exception as error:  # a tile that does not compile is a row of its own
                    print(f"{tile}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                    torch.cuda.synchronize()
                    continue
                times.append((ms, tile))
            times.sort(key=lambda pair: pair[0])
            chosen = tiles.select(contract.arch, x.dtype, m, n, k)
            own = next((ms for ms, tile in times if tile == chosen), float("nan"))
            print(f"({n}, {k}) M={m}: cuBLAS {cublas * 1e3:.1f} us, table {cublas / own:.3f}")
            for ms, tile in times[:5]:
                print(f"    {cublas / ms:.3f} {tile}", flush=True)
            found += [
                {"n": n, "k": k, "m": m, "cublas": cublas, "ms": ms, "tile": str(tile)}
                for ms, tile in times
            ]
    if args.out:
        args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
