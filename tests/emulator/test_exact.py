"""Reductions that no order can change, shapes, memory, loops and random integers."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bitassay.emulator import RefusedError
from bitassay.reference import floats
from support.hard_matrices import specials
from support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreting")


@triton.jit
def _xor(a, b):
    return a ^ b


@triton.jit
def _integers(x_ptr, out_ptr, OP: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    x = tl.load(x_ptr + r[:, None] * C + c[None, :])
    if OP == "sum":
        y = tl.sum(x, 1)
    elif OP == "max":
        y = tl.max(x, 1)
    elif OP == "min":
        y = tl.min(x, 1)
    elif OP == "argmax":
        y = tl.argmax(x, 1)
    elif OP == "argmin":
        y = tl.argmin(x, 1)
    elif OP == "xor":
        y = tl.xor_sum(x, 1)
    elif OP == "reduce":
        y = tl.reduce(x, 1, _xor)
    elif OP == "cumsum":
        y = tl.sum(tl.cumsum(x, 1), 1)
    elif OP == "all":
        y = tl.zeros((R,), x.dtype) + tl.sum(x)
    else:
        y = tl.sum(tl.sort(x, 1) * c[None, :], 1)
    tl.store(out_ptr + r, y.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize(
    "op", ["sum", "max", "min", "argmax", "argmin", "xor", "reduce", "cumsum", "all", "sort"]
)
def test_integers_reduce_in_any_order(op: str, gpu_emulation: str) -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randint(-(2**31), 2**31, (4, 8), generator=g).int()
    x[0, 3] = x[0, 5]
    out = torch.empty(4, dtype=torch.int32)
    _integers[(1,)](x, out, OP=op, R=4, C=8, enable_fp_fusion=False)
    rows = x.tolist()

    def xor(row: list[int]) -> int:
        total = 0
        for value in row:
            total ^= value
        return total

    truth = {
        "sum": sum,
        "max": max,
        "min": min,
        "argmax": lambda row: row.index(max(row)),
        "argmin": lambda row: row.index(min(row)),
        "xor": xor,
        "reduce": xor,
        "cumsum": lambda row: sum(sum(row[: i + 1]) for i in range(8)),
        "all": lambda row: sum(map(sum, rows)),
        "sort": lambda row: sum(i * value for i, value in enumerate(sorted(row))),
    }[op]
    want = [(truth(row) + 2**31) % 2**32 - 2**31 for row in rows]
    assert out.tolist() == want


@triton.jit
def _extremes(x_ptr, max_ptr, min_ptr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    x = tl.load(x_ptr + r[:, None] * C + c[None, :])
    tl.store(max_ptr + r, tl.max(x, 1).to(x.dtype))
    tl.store(min_ptr + r, tl.min(x, 1).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_largest_and_smallest_floats(dtype: torch.dtype, gpu_emulation: str) -> None:
    odd = specials(dtype)
    g = torch.Generator().manual_seed(3)
    x = odd[torch.randint(0, len(odd), (64, 4), generator=g)].view(dtype)
    x[0] = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    x[1] = torch.tensor([-0.0, float("nan"), -0.0, float("nan")])
    x[2] = float("nan")
    largest, smallest = torch.empty(2, 64, dtype=dtype)
    _extremes[(1,)](x, largest, smallest, R=64, C=4)
    nan = floats.canonical_nan(torch.tensor(float("nan"), dtype=dtype))
    for got, sign in ((largest, 1), (smallest, -1)):
        want = []
        for row in x:
            numbers = [v for v in row if not v.isnan()]
            # By value, then by sign: the GPU puts -0 below +0.
            key = [(sign * v.double().item(), -sign * int(v.signbit())) for v in numbers]
            want.append(numbers[key.index(max(key))] if numbers else nan)
        assert_same_bits(got, torch.stack(want))


@triton.jit
def _halving(x_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, 16))
    for half in tl.static_range(4):
        a, b = tl.split(tl.trans(tl.reshape(x, (2, 8 >> half)), (1, 0)))
        x = a + b
    tl.store(out_ptr + tl.arange(0, 1), x)


def test_a_halving_tree_is_the_sum_to_write(gpu_emulation: str) -> None:
    x = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 1e4
    out, want = torch.empty(1), x
    _halving[(1,)](x, out)
    while len(want) > 1:
        want = want[: len(want) // 2] + want[len(want) // 2 :]
    assert_same_bits(out, want)


@triton.jit
def _shapes(x_ptr, out_ptr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i)
    y = tl.join(x, -x)
    y = tl.reshape(tl.trans(y), (32,))
    y = tl.flip(y, 0)
    y = tl.where(tl.arange(0, 32) < 20, y, 0.0)
    y = tl.gather(y, 31 - tl.arange(0, 32), 0)
    y = y.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
    tl.store(out_ptr + tl.arange(0, 32), tl.interleave(i + 0.0, i + 16.0), mask=y < -1000)
    tl.store(out_ptr + tl.multiple_of(tl.max_contiguous(tl.arange(0, 32), 32), 32), y)


def test_shapes_move_and_never_compute(gpu_emulation: str) -> None:
    x, out = torch.arange(16.0) + 1, torch.empty(32)
    _shapes[(1,)](x, out)
    want = torch.cat([x, -x])
    want[:12] = 0.0
    assert_same_bits(out, want)


@triton.jit
def _count(x_ptr, out_ptr, N, BLOCK: tl.constexpr, BINS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0)
    counts = tl.histogram(x, BINS, mask=i < N)
    tl.atomic_add(out_ptr + tl.arange(0, BINS), counts, sem="relaxed")


def test_integer_atomics_and_histograms(gpu_emulation: str) -> None:
    x = torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(1)).int()
    out = torch.zeros(8, dtype=torch.int32)
    _count[(4,)](x, out, 50, BLOCK=16, BINS=8)
    assert torch.equal(out, torch.bincount(x, minlength=9)[:8].int())  # 8 is no bin


@triton.jit
def _loops(out_ptr, N, START, STEP: tl.constexpr):
    total = 0
    for i in range(START, N, STEP):
        total += i
    for i in tl.range(0, N, num_stages=2, flatten=True):
        total += i
    for i in tl.static_range(3):
        total += i
    i = 0
    while i < N:
        i += 1
        if i == 4:
            total += 100
    tl.store(out_ptr, total)


def test_loops_over_arguments(gpu_emulation: str) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    _loops[(1,)](out, 10, 3, STEP=2)
    assert out.item() == 3 + 5 + 7 + 9 + 45 + 3 + 100


@triton.jit
def _through_descriptors(host, x_ptr, out_ptr, R, C, S: tl.constexpr):
    made = tl.make_tensor_descriptor(x_ptr, [R, C], [C, 1], [S, S])
    out = tl.make_tensor_descriptor(out_ptr, [R, C], [C, 1], [S, S])
    for c in range(0, C, S):
        out.store([0, c], host.load([0, c]) + made.load([0, c]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensor_descriptors(dtype: torch.dtype, gpu_emulation: str) -> None:
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = torch.zeros_like(x)
    host = TensorDescriptor(x, [12, 32], [32, 1], [16, 16])
    _through_descriptors[(1,)](host, x, out, 12, 32, S=16)
    assert_same_bits(out, x + x)


def test_a_descriptor_that_rounds_is_refused(gpu_emulation: str) -> None:
    if "round_f32_to_tf32" not in TensorDescriptor.__dataclass_fields__:
        pytest.skip(f"Triton {triton.__version__} has no such descriptor")
    x = torch.zeros(16, 16)
    host = TensorDescriptor(x, [16, 16], [16, 1], [16, 16], round_f32_to_tf32=True)
    with pytest.raises(RefusedError, match="round_f32_to_tf32"):
        _through_descriptors[(1,)](host, x, x, 16, 16, S=16)


@triton.jit
def _masked(x_ptr, out_ptr, N, OTHER: tl.constexpr):
    i = tl.arange(0, 8)
    x = tl.load(x_ptr + i, mask=i < N, cache_modifier=".cg", eviction_policy="evict_first")
    y = tl.load(x_ptr + i, mask=i < N, other=OTHER)
    tl.store(out_ptr + i, x)
    tl.store(out_ptr + 8 + i, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_mask_leaves_out_shows_as_nan(dtype: torch.dtype, gpu_emulation: str) -> None:
    x, out = torch.arange(8.0).to(dtype), torch.empty(16, dtype=dtype)
    _masked[(1,)](x, out, 5, OTHER=7.0)
    assert torch.equal(out[:5], x[:5])
    assert torch.equal(out[8:], torch.cat([x[:5], torch.full((3,), 7.0).to(dtype)]))
    assert_same_bits(out[5:8], floats.canonical_nan(torch.full((3,), torch.nan).to(dtype)))


@triton.jit
def _random(out_ptr, seed, FLOAT: tl.constexpr):
    i = tl.arange(0, 16)
    if FLOAT:
        tl.store(out_ptr + i, tl.rand(seed, i))
    else:
        a, b, c, d = tl.randint4x(seed, i)
        tl.store(out_ptr + i, a)
        tl.store(out_ptr + 16 + i, b)
        tl.store(out_ptr + 32 + i, c)
        tl.store(out_ptr + 48 + i, d)


def philox(counter: int, seed: int) -> list[int]:
    """Philox-4x32-10 (Salmon et al. 2011) of a counter in the first word."""
    c, key, mask = [counter, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return c


@pytest.mark.parametrize("seed", [7, 0x123456789])
def test_random_numbers_are_philox(seed: int, gpu_emulation: str) -> None:
    out = torch.empty(4, 16, dtype=torch.int32)
    _random[(1,)](out, seed, FLOAT=False)
    want = torch.tensor([philox(i, seed) for i in range(16)]).t()
    assert torch.equal(out.long() & 0xFFFFFFFF, want)
    uniform = torch.empty(16)
    _random[(1,)](uniform, seed, FLOAT=True, enable_fp_fusion=False)
    assert ((uniform >= 0) & (uniform < 1)).all()


def test_sorting_keeps_every_value(gpu_emulation: str) -> None:
    x = torch.randn(16, generator=torch.Generator().manual_seed(2))
    out = torch.empty(16)
    _sort[(1,)](x, out, N=16)
    assert_same_bits(out, x.sort().values)


@triton.jit
def _sort(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.sort(tl.load(x_ptr + i)))
