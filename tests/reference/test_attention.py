"""Attention: bits against a twin in integers, and every way of feeding the same rows alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitassay.reference import attention as module
from bitassay.reference.attention import attention, paged_attention
from bitassay.reference.spec.contract import Contract, default_contract
from bitassay.reference.spec.polynomials import SOFTMAX_SCALE
from bitassay.reference.tensor_core import matmul
from support.hard_matrices import matrix
from support.naive import operations as op
from support.naive import tensor_core as twin
from support.same_bits import assert_same_bits, from_patterns, patterns

KIND = {torch.bfloat16: "bf16", torch.float16: "fp16"}
UNITS = [(arch, dtype) for arch in ("sm_89", "sm_90") for dtype in KIND]
every_unit = pytest.mark.parametrize(("arch", "dtype"), UNITS)
BLOCK = 16  # the slots of a block of the paged cache

Heads = tuple[Tensor, Tensor, Tensor]  # q [T, Hq, D], k and v [S, Hkv, D]


def small(arch: str = "sm_90") -> Contract:
    """Blocks and splits so small that a few keys make many."""
    return default_contract(arch, key_block=16, key_split=32)


def draw(
    keys: int,
    *,
    rows: int | None = None,
    heads: tuple[int, int] = (2, 1),
    size: int = 64,
    kind: str = "normal",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Heads:
    rows = keys if rows is None else rows
    (hq, hkv), g = heads, (3 * seed, 3 * seed + 1, 3 * seed + 2)
    q = matrix(kind, rows * hq, size, dtype, g[0]).view(rows, hq, size)
    k = matrix(kind, keys * hkv, size, dtype, g[1]).view(keys, hkv, size)
    v = matrix(kind, keys * hkv, size, dtype, g[2]).view(keys, hkv, size)
    return q, k, v


def twin_row(q: Tensor, k: Tensor, v: Tensor, position: int, contract: Contract) -> Tensor:
    """One query head [D] over one key/value head [S, D]."""
    row = op.attention(
        patterns(q),
        [patterns(x) for x in k],
        [patterns(x) for x in v],
        position,
        kind=KIND[q.dtype],
        arch=contract.arch,
        key_block=contract.key_block,
        key_split=contract.key_split,
    )
    return from_patterns(row, q.dtype)


def assert_equals_twin(
    qkv: Heads, contract: Contract, rows: list[int] | None = None, *, heads: list[int] | None = None
) -> None:
    """Rows (from the end where negative) and heads, or all, against the twin."""
    q, k, v = qkv
    got = attention(q, k, v, contract=contract)
    group = q.shape[1] // k.shape[1]
    for row in range(len(q)) if rows is None else [row % len(q) for row in rows]:
        for head in range(q.shape[1]) if heads is None else heads:
            of_head = k[:, head // group], v[:, head // group]
            position = len(k) - len(q) + row
            want = twin_row(q[row, head], *of_head, position, contract)
            assert_same_bits(got[row, head], want)


@every_unit
@pytest.mark.parametrize("kind", ["normal", "wide", "ties", "special", "huge", "subnormal"])
def test_splits_and_blocks_equal_the_twin(kind: str, arch: str, dtype: torch.dtype) -> None:
    """The last rows of 50 keys: two splits, four blocks, the last of them ragged."""
    qkv = draw(50, rows=19, kind=kind, dtype=dtype, seed=1)
    assert_equals_twin(qkv, small(arch), [0, 1, 17, 18], heads=[1])


@every_unit
def test_the_default_blocks_equal_the_twin(arch: str, dtype: torch.dtype) -> None:
    qkv = draw(130, rows=3, dtype=dtype, seed=2)
    assert_equals_twin(qkv, default_contract(arch), heads=[0])
    assert_equals_twin(draw(3, dtype=dtype, seed=3), default_contract(arch))


def test_size_128_and_several_groups_equal_the_twin() -> None:
    qkv = draw(20, rows=2, heads=(4, 2), size=128, seed=4)
    assert_equals_twin(qkv, default_contract("sm_90"))


@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_eleven_hundred_keys_equal_the_twin(arch: str) -> None:
    """The default split: 1,024 keys and then 76."""
    qkv = draw(1100, rows=2, heads=(1, 1), seed=5)
    assert_equals_twin(qkv, default_contract(arch), [-1])


def test_many_splits_equal_the_twin() -> None:
    """Scores that rise and fall from split to split, so that every fold rescales one side."""
    q, k, v = draw(150, rows=1, heads=(1, 1), seed=6)
    k = (k.float() * torch.arange(150).remainder(48)[:, None, None] / 16).bfloat16()
    for contract in (small(), default_contract("sm_89", key_block=32, key_split=32)):
        assert_equals_twin((q, k, v), contract)


def test_scores_so_low_that_weights_vanish_equal_the_twin() -> None:
    """One key far above the others, at the start, in the middle, at the end; equal keys."""
    for at in (0, 20, 39):
        q, k, v = draw(40, rows=1, heads=(1, 1), seed=7)
        k[at] = q[0] * 40
        assert_equals_twin((q, k, v), small())
    q, k, v = draw(40, rows=1, heads=(1, 1), seed=8)
    assert_equals_twin((q, k[:1].expand(40, 1, 64), v), small())


def test_infinite_and_nan_scores_equal_the_twin() -> None:
    """Infinities of either sign and NaN among the keys: a block of -inf alone, then numbers."""
    q = torch.ones(1, 1, 64).bfloat16()
    for values in ([-torch.inf], [torch.inf], [torch.nan], [-torch.inf, torch.nan], [3e38, -3e38]):
        for keys in (range(16), range(5), range(32), range(40), range(33, 36)):
            _, k, v = draw(40, rows=1, heads=(1, 1), seed=9)
            for i in keys:
                k[i, 0, i % 64] = values[i % len(values)]
            assert_equals_twin((q, k, v), small())


@every_unit
def test_the_sums_equal_the_twin_in_fp32(arch: str, dtype: torch.dtype) -> None:
    """Before the division: 16 bits of output would hide most of a wrong order or rounding."""
    q, k, v = draw(70, rows=8, heads=(1, 1), dtype=dtype, seed=42)
    k = k * (1 + torch.arange(70) // 32 / 4)[:, None, None].to(dtype)  # later splits reach higher
    contract = small(arch)
    positions = torch.arange(62, 70)
    sums = module._splits(q[:, 0], module.Keys(k[:, 0], v[:, 0], contract), positions)
    for row, position in enumerate(positions.tolist()):
        total, values = op.attention_sums(
            patterns(q[row]),
            [patterns(x) for x in k],
            [patterns(x) for x in v],
            position,
            kind=KIND[dtype],
            arch=arch,
            key_block=16,
            key_split=32,
        )
        assert patterns(sums.den[row]) == [total]
        assert_same_bits(sums.acc[row], from_patterns(values, torch.float32))


def test_weights_come_from_the_contract_s_exp2() -> None:
    """Two keys: sums that tell it from torch's, found among many, equal the twin."""
    q, k, v = draw(2, rows=1, heads=(4000, 1), seed=44)
    scores = matmul(q[0], k[:, 0].t(), arch="sm_90") * SOFTMAX_SCALE[64]
    sums = module._splits(q[0], module.Keys(k[:, 0], v[:, 0], small()), torch.ones(4000).long())
    almost = torch.exp2(scores - scores.amax(1, keepdim=True)).sum(1)
    telling = (sums.den != almost).nonzero()[:8, 0]
    assert len(telling) >= 4
    for head in telling.tolist():
        rows = ([patterns(x) for x in k], [patterns(x) for x in v])
        options = {"kind": "bf16", "arch": "sm_90", "key_block": 16, "key_split": 32}
        total, _ = op.attention_sums(patterns(q[0, head]), *rows, 1, **options)
        assert patterns(sums.den[head]) == [total]


def test_the_last_step_is_a_division() -> None:
    """Outputs that tell it from a product with the reciprocal, found among many."""
    q, k, v = draw(40, heads=(160, 1), dtype=torch.float16, seed=43)
    positions = torch.arange(40).repeat_interleave(160)
    sums = module._splits(q.flatten(0, 1), module.Keys(k[:, 0], v[:, 0], small()), positions)
    got = attention(q, k, v, contract=small()).flatten(0, 1)
    almost = (sums.acc * (1 / sums.den[:, None])).half()
    telling = (got != almost).nonzero()
    assert len(telling) >= 8
    for row, d in telling[:50].tolist():
        (a,), (b,) = patterns(sums.acc[row, d]), patterns(sums.den[row])
        exact = from_patterns([op.convert(op.divide(a, b), op.FP32, twin.FP16)], torch.float16)
        assert_same_bits(got[row, d : d + 1], exact)


def test_results_are_never_minus_zero() -> None:
    q, k, v = draw(5, rows=5, heads=(1, 1), seed=10)
    for value in (-0.0, -1e-40):
        v = torch.full_like(v, value)
        out = attention(q, k, v, contract=small())
        assert not [x for x in patterns(out) if x == 0x8000]
        assert_equals_twin((q, k, v), small())


def test_a_quotient_of_minus_zero_becomes_plus_zero() -> None:
    """A value of -2**-133 with weight 2**-16 is -2**-149; a third of it rounds to -0 in fp32."""
    q = torch.zeros(1, 1, 64).bfloat16()
    k, v = torch.zeros(4, 1, 64).bfloat16(), torch.zeros(4, 1, 64).bfloat16()
    q[0, 0, 0], k[0, 0, 0], v[0] = 1.0, -88.5, -(2.0**-133)
    sums = module._splits(q[:, 0], module.Keys(k[:, 0], v[:, 0], small()), torch.tensor([3]))
    assert_same_bits(sums.acc, torch.full((1, 64), -(2.0**-149)))
    assert set(patterns(attention(q, k, v, contract=small()))) == {0}
    assert_equals_twin((q, k, v), small())


def in_chunks(qkv: Heads, sizes: list[int], contract: Contract) -> Tensor:
    """All rows of a prompt fed in chunks: each sees the keys up to its own last row."""
    q, k, v = qkv
    ends = torch.tensor(sizes).cumsum(0).tolist()
    assert ends[-1] == len(q) == len(k)
    parts = [
        attention(q[end - size : end], k[:end], v[:end], contract=contract)
        for end, size in zip(ends, sizes, strict=True)
    ]
    return torch.cat(parts)


CHUNKS = {
    "one row at a time": [1] * 50,
    "by 16": [16] * 3 + [2],
    "by 7": [7] * 7 + [1],
    "all but one": [49, 1],
    "one, then the rest": [1, 49],
    "across blocks": [15, 2, 15, 13, 5],
}


@every_unit
@pytest.mark.parametrize("chunks", list(CHUNKS))
def test_any_chunking_of_a_prompt_gives_the_same_bits(
    chunks: str, arch: str, dtype: torch.dtype
) -> None:
    cases = [("normal", default_contract(arch)), ("normal", small(arch)), ("ties", small(arch))]
    for kind, contract in cases[: 2 if chunks == "one row at a time" else 3]:
        qkv = draw(50, kind=kind, dtype=dtype, seed=11)
        whole = attention(*qkv, contract=contract)
        assert_same_bits(in_chunks(qkv, CHUNKS[chunks], contract), whole)


def test_decode_over_more_than_one_default_split_is_prefill() -> None:
    """1,100 keys: rows on both sides of the boundary at 1,024, alone and among others."""
    q, k, v = draw(1100, heads=(1, 1), seed=12)
    contract = default_contract("sm_90")
    whole = attention(q[1000:], k, v, contract=contract)
    for row in (1000, 1022, 1023, 1024, 1025, 1087, 1088, 1099):
        end = row + 1
        alone = attention(q[row:end], k[:end], v[:end], contract=contract)
        assert_same_bits(alone, whole[row - 1000 : end - 1000])
    part = attention(q[1010:1050], k[:1050], v[:1050], contract=contract)
    assert_same_bits(part, whole[10:50])
    assert_equals_twin((q[1024:1025], k[:1025], v[:1025]), contract)


def test_a_row_depends_on_no_later_position() -> None:
    """Keys of any value, values of any finite value, after a row change none of its bits."""
    q, k, v = draw(70, seed=13)
    before = attention(q, k, v, contract=small())
    for seen in (1, 16, 17, 31, 32, 33, 64):
        other_k, other_v = k.clone(), v.clone()
        other_k[seen:] = matrix("patterns", (70 - seen), 64, k.dtype, seen).view(-1, 1, 64)
        other_v[seen:] = matrix("huge", (70 - seen), 64, k.dtype, seen).view(-1, 1, 64)
        other_v[seen:] = other_v[seen:].nan_to_num(1.0, 3e38, -3e38)
        after = attention(q, other_k, other_v, contract=small())
        assert_same_bits(after[:seen], before[:seen])
        assert not torch.equal(after[seen:], before[seen:])


def test_the_newest_key_counts_and_the_next_does_not() -> None:
    """The mask to the row: a key far above all others draws a row to its value at once."""
    q, k, v = draw(40, heads=(1, 1), seed=14)
    k[20], q[19:22] = 60.0, q[19:22].abs()
    out = attention(q, k, v, contract=small())
    assert not torch.equal(out[19], v[20])
    assert_same_bits(out[20], v[20])
    assert_same_bits(out[21], v[20])


def test_a_fully_masked_block_changes_nothing() -> None:
    """Blocks that only later rows of the batch see, of NaN keys and huge values at that."""
    q, k, v = draw(96, seed=15)
    k[48:], v[48:] = torch.nan, 3e38
    whole = attention(q, k, v, contract=small())
    for row in (0, 15, 16, 30, 47):
        end = row + 1
        alone = attention(q[row:end], k[:end], v[:end], contract=small())
        assert_same_bits(alone, whole[row:end])
        assert alone.isfinite().all()


def test_blocks_and_splits_are_part_of_the_order() -> None:
    """Another block or split is another order, and it shows."""
    qkv = draw(200, rows=30, heads=(4, 1), seed=16)
    contracts = [
        default_contract("sm_90", key_block=block, key_split=split)
        for block, split in ((16, 32), (16, 64), (32, 64), (64, 1024))
    ]
    outputs = [attention(*qkv, contract=contract) for contract in contracts]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert not torch.equal(one, other)
    for split in (256, 4096):  # one split either way
        contract = default_contract("sm_90", key_block=64, key_split=split)
        assert_same_bits(attention(*qkv, contract=contract), outputs[-1])


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (6, 3), (4, 4)])
def test_groups_are_repeated_heads(heads: tuple[int, int]) -> None:
    q, k, v = draw(37, rows=9, heads=heads, seed=17)
    group = heads[0] // heads[1]
    repeated = [x.repeat_interleave(group, dim=1) for x in (k, v)]
    grouped = attention(q, k, v, contract=small())
    assert_same_bits(attention(q, *repeated, contract=small()), grouped)
    for head in range(heads[0]):
        one, of = slice(head, head + 1), slice(head // group, head // group + 1)
        alone = attention(q[:, one], k[:, of], v[:, of], contract=small())
        assert_same_bits(alone, grouped[:, one])


def test_nan_in_one_head_stays_there() -> None:
    q, k, v = draw(37, rows=9, heads=(4, 2), seed=18)
    before = attention(q, k, v, contract=small())
    for spoilt in ("q", "k", "v"):
        heads = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        heads[spoilt][3, 1] = torch.nan
        after = attention(heads["q"], heads["k"], heads["v"], contract=small())
        touched = [1] if spoilt == "q" else [2, 3]  # kv head 1 serves query heads 2 and 3
        assert after[3, touched].isnan().all()
        for head in set(range(4)) - set(touched):
            assert_same_bits(after[:, head], before[:, head])
    assert_same_bits(attention(q, k, v, contract=small()), before)


def test_a_nan_is_canonical() -> None:
    q, k, v = draw(3, heads=(1, 1), seed=19)
    v[0] = from_patterns([0xFFC1], torch.bfloat16)
    assert set(patterns(attention(q, k, v, contract=small()))) == {0x7FFF}


def paged(
    sequences: list[Heads], seed: int, *, garbage: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of paged_attention: blocks in random order, free slots zero or garbage."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-len(k) // BLOCK) for _, k, _ in sequences]
    order, width = torch.randperm(sum(counts) + 3, generator=g), max(counts) + 2
    example = sequences[0][1]
    shape = (len(order), BLOCK, *example.shape[1:])
    caches = [torch.full(shape, torch.nan if garbage else 0.0).to(example.dtype) for _ in "kv"]
    tables = torch.full((len(sequences), width), -1 if garbage else 0, dtype=torch.int32)
    used = 0
    for r, (_, k, v) in enumerate(sequences):
        blocks = order[used : used + counts[r]]
        used += counts[r]
        tables[r, : counts[r]] = blocks
        for cache, x in zip(caches, (k, v), strict=True):
            for j in range(len(k)):
                cache[blocks[j // BLOCK], j % BLOCK] = x[j]
    lengths = [len(q) for q, _, _ in sequences]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    seq_lens = torch.tensor([len(k) for _, k, _ in sequences], dtype=torch.int32)
    return torch.cat([q for q, _, _ in sequences]), *caches, tables, starts, seq_lens


@every_unit
def test_a_paged_cache_gives_the_same_bits(arch: str, dtype: torch.dtype) -> None:
    """Prefill, chunks and decode in one batch; one sequence without rows; blocks shuffled."""
    sizes = [(20, 20), (33, 1), (48, 7), (16, 0), (1, 1), (70, 40)]
    sequences = [
        draw(keys, rows=rows, heads=(4, 2), dtype=dtype, seed=20 + i)
        for i, (keys, rows) in enumerate(sizes)
    ]
    contract = small(arch)
    want = torch.cat([attention(*sequence, contract=contract) for sequence in sequences])
    for seed, garbage in ((1, False), (2, True)):
        got = paged_attention(*paged(sequences, seed, garbage=garbage), contract=contract)
        assert_same_bits(got, want)
    order = [3, 5, 0, 4, 2, 1]
    shuffled = [sequences[i] for i in order]
    got = paged_attention(*paged(shuffled, 3), contract=contract)
    parts = want.split([rows for _, rows in sizes])
    assert_same_bits(got, torch.cat([parts[i] for i in order]))


def test_a_neighbour_of_nan_changes_nothing() -> None:
    sequences = [draw(20, heads=(2, 1), seed=30), draw(25, rows=3, heads=(2, 1), seed=31)]
    want = attention(*sequences[0], contract=small())
    for value in (torch.nan, torch.inf, 3e38):
        spoilt = tuple(torch.full_like(x, value) for x in sequences[1])
        got = paged_attention(*paged([sequences[0], spoilt], 4), contract=small())
        assert_same_bits(got[:20], want)


def test_strides_do_not_matter() -> None:
    """q, k and v as views of one packed tensor, as a model has them."""
    packed = matrix("normal", 20, 4 * 64, torch.bfloat16, 40).view(20, 4, 64)
    q, k, v = packed.split([2, 1, 1], dim=1)
    want = attention(q.contiguous(), k.contiguous(), v.contiguous(), contract=small())
    assert_same_bits(attention(q, k, v, contract=small()), want)
    assert attention(q[:0], k, v, contract=small()).shape == (0, 2, 64)


def test_what_is_refused() -> None:
    q, k, v = draw(5, heads=(4, 2), seed=41)
    cases = [
        (TypeError, "torch.float32", (q.float(), k.float(), v.float())),
        (TypeError, "q torch.bfloat16, k torch.float16", (q, k.half(), v)),
        (ValueError, "head size of 64 or 128, found 32", (x[..., :32] for x in (q, k, v))),
        (ValueError, "multiple of key/value heads, found 3 and 2", (q[:, :3], k, v)),
        (ValueError, "found 4 and 0", (q, k[:, :0], v[:, :0])),
        (ValueError, "5 queries and 4 keys", (q, k[:4], v[:4])),
        (ValueError, r"\[5, 2, 64\], \[4, 2, 64\]", (q, k, v[:4])),
        (ValueError, r"\[5, 4, 32\]", (q[..., :32], k, v)),
        (ValueError, r"found \[20, 64\]", (q.flatten(0, 1), k, v)),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            attention(*arguments, contract=small())
