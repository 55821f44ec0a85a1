"""Times of GPU work: a captured graph, replayed with a cold cache, median of many."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

# lm_head and linear layers of Llama-3.1-8B and Qwen3-1.7B, [N, K].
SHAPES = ((128256, 4096), (151936, 2048), (6144, 4096), (4096, 4096), (4096, 14336))


def milliseconds(work: Callable[[], object], *, repeat_ms: int = 40) -> float:
    """Return the median time of one call; the L2 cache is flushed before each."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return float(
        triton.testing.do_bench(graph.replay, warmup=5, rep=repeat_ms, return_mode="median")
    )


def operands(m: int, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random bf16 x [M, K] and weight [N, K] on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    return x, weight
