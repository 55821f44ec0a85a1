"""How fast is batch-invariant attention beside torch's scaled_dot_product_attention?

Times `kernels.paged_attention` with a cold cache, decoding and on prompts; torch gets contiguous
keys, ours lie in shuffled blocks of 16. With --tune every tile that serves the shape is timed.

nox -s bench -- attention [--heads 32x8x128,...] [--only decode|prefill] [--tune]
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table
from timing import milliseconds

from bitassay.kernels import attention_tiles as tiles
from bitassay.kernels.attention import paged_attention
from bitassay.kernels.attention_tiles import AttentionTile
from bitassay.reference.spec.contract import Contract, default_contract

PAGE = 16
# (sequences, query tokens, keys) of each
DECODE = tuple((b, 1, keys) for keys in (1024, 4096, 16_384) for b in (1, 8, 64))
CHUNKS = ((1, 4, 4096), (8, 4, 4096), (1, 256, 16_384))
PREFILL = ((1, 512, 512), (1, 2048, 2048), (1, 8192, 8192), (8, 512, 512))
HEADS = ((32, 8, 128), (16, 8, 128), (4, 2, 64))

Work = Callable[..., object]


def calls(
    case: tuple[int, int, int], heads: tuple[int, int, int], contract: Contract
) -> tuple[Work, Work]:
    """Return a call of torch and one of ours for random bf16 inputs."""
    (batch, tokens, keys), (hq, hkv, d) = case, heads
    g = torch.Generator("cuda").manual_seed(0)
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16, generator=g)
    blocks = triton.cdiv(keys, PAGE)
    q = draw(batch * tokens, hq, d)
    k_cache, v_cache = (draw(batch * blocks, PAGE, hkv, d) for _ in range(2))
    table = torch.randperm(batch * blocks, device="cuda", dtype=torch.int32).view(batch, blocks)
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * tokens
    lengths = torch.full((batch,), keys, device="cuda", dtype=torch.int32)
    ours = partial(
        paged_attention, q, k_cache, v_cache, table, starts, lengths,
        contract=contract, max_query_len=tokens, max_seq_len=keys,
    )  # fmt: skip
    k, v = (
        c[table.long()].flatten(1, 2)[:, :keys].transpose(1, 2).contiguous()
        for c in (k_cache, v_cache)
    )
    q = q.view(batch, tokens, hq, d).transpose(1, 2)
    mask = None
    if 1 < tokens < keys:  # is_causal counts from the first key
        last = torch.arange(keys - tokens, keys, device="cuda")[:, None]
        mask = torch.arange(keys, device="cuda") <= last
    causal = tokens == keys
    peer = partial(
        F.scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
    )
    return peer, ours


def rate(case: tuple[int, int, int], heads: tuple[int, int, int], ms: float) -> str:
    """Return bytes of keys and values, or operations, a second: whichever bounds the shape."""
    (batch, tokens, keys), (hq, hkv, d) = case, heads
    if tokens <= PAGE:
        return f"{4 * batch * keys * hkv * d / ms / 1e6:,.0f} GB/s"
    seen = tokens * keys - tokens * (tokens - 1) / 2  # pairs of a query and a key
    return f"{4 * batch * seen * hq * d / ms / 1e9:,.0f} TFLOP/s"


def worth_timing(tile: AttentionTile, rows: int, splits: int) -> bool:
    """Leave out tiles that would mostly multiply padding, or read the keys too often."""
    if not tile.split:
        return rows > tile.block_m // 2
    return tile.block_m <= max(16, 2 * rows) and (tile.block_m >= 64 or rows <= 64 or splits > 4)


def tune(
    case: tuple[int, int, int], heads: tuple[int, int, int], arch: str, peer: float, ours: Work
) -> None:
    """Print the time of every tile that serves the shape, fastest first."""
    rows, times = case[1] * heads[0] // heads[1], []
    for tile in tiles.candidates(arch):
        if worth_timing(tile, rows, triton.cdiv(case[2], 1024)):
            try:
                times.append((milliseconds(partial(ours, tile=tile), repeat_ms=20), str(tile)))
            except Exception as error:  # a tile that does not compile is a row of its own
                print(f"{tile}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                torch.cuda.synchronize()
    for ms, name in sorted(times):
        print(f"    {peer / ms:6.3f} {ms * 1e3:10,.1f} us  {name}", flush=True)


def main() -> None:
    """Print one row per shape and case; ratios above 1 are faster than torch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", default=",".join("x".join(map(str, h)) for h in HEADS))
    parser.add_argument("--only", choices=("decode", "chunk", "prefill"))
    parser.add_argument("--tune", action="store_true", help="time every tile")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/attention.py needs a CUDA device: none was found")
    major, minor = torch.cuda.get_device_capability()
    contract = default_contract(f"sm_{major}{minor}")
    title = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{datetime.date.today()}; bf16, ratio = torch's time / kernel time"
    )
    table = Table(title=title)
    for name in ("heads x kv x D", "batch", "tokens", "keys", "torch", "bitassay", "rate", "ratio"):
        table.add_column(name, justify="right")
    cases = {"decode": DECODE, "chunk": CHUNKS, "prefill": PREFILL}
    chosen = [case for name, some in cases.items() if args.only in (None, name) for case in some]
    for text in args.heads.split(","):
        hq, hkv, d = map(int, text.split("x"))
        for case in chosen:
            peer, ours = calls(case, (hq, hkv, d), contract)
            theirs, own = milliseconds(peer), milliseconds(ours)
            table.add_row(
                text, *map(str, case), f"{theirs * 1e3:,.1f} us", f"{own * 1e3:,.1f} us",
                rate(case, (hq, hkv, d), own), f"{theirs / own:.2f}",
            )  # fmt: skip
            if args.tune:
                print(f"{text} {case}: torch {theirs * 1e3:.1f} us, table {theirs / own:.3f}")
                tune(case, (hq, hkv, d), contract.arch, theirs, ours)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
