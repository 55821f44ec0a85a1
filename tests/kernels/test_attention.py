"""attention in the emulator: every tile, batch, layout and value gives the reference's bits."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from bitassay.emulator import emulate
from bitassay.kernels import attention_tiles as tiles
from bitassay.kernels.attention import attention, paged_attention
from bitassay.kernels.attention_tiles import AttentionTile
from bitassay.reference import attention as reference
from bitassay.reference.spec.arch import family_of
from bitassay.reference.spec.contract import Contract, default_contract
from support.attention_cases import FINITE, Batch, Drawn, Shape, batch, of_lengths, sequence
from support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreting")

SMALL = Shape(heads=2, kv_heads=1, head_dim=64)
# One row, two; inside a block, at its end and beyond; one split, several; a chunk; nothing at all.
LENGTHS = ((1, 1), (1, 33), (3, 40), (0, 20), (20, 20), (40, 75), (1, 64), (2, 97))
FEW = ((1, 33), (0, 20), (9, 41), (1, 16))
SPLIT = AttentionTile(16, 4, 2, fold_rows=8)
WHOLE = AttentionTile(32, 4, 2, split=False)


def short(arch: str) -> Contract:
    """A contract in which a few keys make several blocks and splits."""
    return default_contract(arch, key_block=16, key_split=32)


def want(of: Batch, contract: Contract) -> Tensor:
    return reference.paged_attention(*of.arguments, contract=contract)


@functools.cache
def every_length(
    arch: str, shape: Shape, lengths: tuple[tuple[int, int], ...] = LENGTHS
) -> tuple[Batch, Tensor]:
    drawn = batch(of_lengths(lengths, shape))
    return drawn, want(drawn, short(arch))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mixed_batch(gpu_emulation: str, dtype: torch.dtype, head_dim: int) -> None:
    drawn, expected = every_length(gpu_emulation, Shape(2, 1, head_dim, dtype))
    got = paged_attention(*drawn.arguments, contract=short(gpu_emulation))
    assert_same_bits(got, expected)


def test_the_mixed_batch_takes_both_ways(gpu_emulation: str, monkeypatch) -> None:
    """Long sequences walk all splits in one program and short ones do not, in one call."""
    monkeypatch.setattr(tiles, "FEW_ROWS", 16)
    monkeypatch.setitem(tiles.CHUNK, family_of(gpu_emulation), WHOLE)
    drawn, expected = every_length(gpu_emulation, SMALL)
    got = paged_attention(*drawn.arguments, contract=short(gpu_emulation))
    assert_same_bits(got, expected)


def distinct_tiles() -> list[AttentionTile]:
    """Every tile in which the interpreter sees a difference: warps and stages are none."""
    found = [t for arch in ("sm_89", "sm_90") for t in tiles.candidates(arch)]
    return list(dict.fromkeys(dataclasses.replace(t, warps=4, stages=2) for t in found))


@pytest.mark.parametrize("tile", distinct_tiles(), ids=str)
def test_every_tile(tile: AttentionTile) -> None:
    """On one architecture each: what an architecture changes, a tile does not."""
    arch = ("sm_89", "sm_90")[distinct_tiles().index(tile) % 2]
    drawn, expected = every_length(arch, SMALL, FEW)
    with emulate(arch):
        got = paged_attention(*drawn.arguments, contract=short(arch), tile=tile)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("tile", [SPLIT, WHOLE], ids=["split", "whole"])
def test_the_default_blocks_and_splits(gpu_emulation: str, tile: AttentionTile) -> None:
    contract = default_contract(gpu_emulation)
    lengths = ((1, 63), (1, 64), (2, 65), (1, 1024), (2, 1025))
    drawn = batch(of_lengths(lengths, SMALL))
    got = paged_attention(*drawn.arguments, contract=contract, tile=tile)
    assert_same_bits(got, want(drawn, contract))


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_a_prompt_in_chunks(gpu_emulation: str, chunk: int) -> None:
    contract = short(gpu_emulation)
    whole = sequence(70, 70, SMALL, seed=3)
    expected = reference.attention(whole.q, whole.k, whole.v, contract=contract)
    starts = range(0, 70, chunk) if chunk > 1 else (0, 15, 16, 31, 32, 69)
    ends = [min(start + chunk, 70) for start in starts]
    parts = [
        Drawn(whole.q[a:b], whole.k[:b], whole.v[:b]) for a, b in zip(starts, ends, strict=True)
    ]
    rows = torch.cat([torch.arange(a, b) for a, b in zip(starts, ends, strict=True)])
    got = paged_attention(*batch(parts).arguments, contract=contract)
    assert_same_bits(got, expected[rows])


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (2, 1), (8, 2), (7, 1), (8, 1), (6, 2), (70, 1)]
)
def test_any_group(gpu_emulation: str, heads: int, kv_heads: int) -> None:
    contract = short(gpu_emulation)
    drawn = batch(of_lengths(((1, 17), (5, 37)), Shape(heads, kv_heads, 64)))
    got = paged_attention(*drawn.arguments, contract=contract)
    assert_same_bits(got, want(drawn, contract))


@pytest.mark.parametrize("tile", [SPLIT, WHOLE], ids=["split", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_value(gpu_emulation: str, dtype: torch.dtype, tile: AttentionTile) -> None:
    """Each kind of query and key beside another kind of value; infinities and NaN in the former."""
    contract, shape = short(gpu_emulation), Shape(2, 1, 64, dtype)
    kinds = [(kind, kind, FINITE[(i + 3) % len(FINITE)]) for i, kind in enumerate(FINITE)]
    kinds += [("special", "normal", "normal"), ("normal", "special", "wide")]
    kinds += [("patterns", "patterns", "huge")]
    drawn = batch([sequence(6, 40, shape, i, k) for i, k in enumerate(kinds)])
    got = paged_attention(*drawn.arguments, contract=contract, tile=tile)
    expected = want(drawn, contract)
    assert expected.isnan().any()
    assert expected.isfinite().any()
    assert_same_bits(got, expected)


def test_any_value_of_v_where_all_keys_are_seen(gpu_emulation: str) -> None:
    contract = short(gpu_emulation)
    kinds = ("normal", "normal", "special")
    drawn = batch([sequence(1, keys, SMALL, keys, kinds) for keys in (5, 33, 64)])
    got = paged_attention(*drawn.arguments, contract=contract)
    assert_same_bits(got, want(drawn, contract))


@pytest.mark.parametrize("tile", [SPLIT, WHOLE], ids=["split", "whole"])
def test_scores_of_minus_infinity(gpu_emulation: str, tile: AttentionTile) -> None:
    """In the first block, in a whole split, everywhere (0 / 0)."""
    contract = short(gpu_emulation)
    drawn = [sequence(3, 70, SMALL, seed) for seed in range(3)]
    for one, lost in zip(drawn, (16, 32, 70), strict=True):
        one.q[:, :, 0] = 1.0
        one.k[:lost, :, 0] = -torch.inf
    got = paged_attention(*batch(drawn).arguments, contract=contract, tile=tile)
    assert_same_bits(got, want(batch(drawn), contract))
    assert got[:6].isfinite().all()
    assert got[6:].isnan().all()


def test_negative_zero_does_not_show(gpu_emulation: str) -> None:
    """A sum of -2**-148, over 40 keys of weight 1, is a quotient of -0."""
    contract = short(gpu_emulation)
    q, k, v = (
        torch.zeros(rows, heads, 64).bfloat16() for rows, heads in ((1, 2), (40, 1), (40, 1))
    )
    q[..., 0], k[5, :, 0], v[5] = 1.0, -83.0, -(2.0**-133)  # weight 2**-15
    got = attention(q, k, v, contract=contract)
    assert_same_bits(got, torch.zeros_like(q))
    assert_same_bits(got, reference.attention(q, k, v, contract=contract))


@pytest.mark.parametrize("tile", [None, SPLIT, WHOLE], ids=["table", "split", "whole"])
def test_neighbours_change_no_bit(gpu_emulation: str, tile: AttentionTile | None) -> None:
    contract = short(gpu_emulation)
    clean = of_lengths(((1, 50), (9, 37)), SMALL)
    bad = [
        Drawn(*(torch.full_like(x, value) for x in (one.q, one.k, one.v)))
        for value in (torch.nan, torch.inf, 3e38)
        for one in of_lengths(((1, 20), (5, 40)), SMALL)
    ]
    alone = [
        paged_attention(*batch([one], seed=4).arguments, contract=contract, tile=tile)
        for one in clean
    ]
    among = [bad[0], clean[0], *bad[1:4], clean[1], *bad[4:]]
    got = paged_attention(*batch(among, seed=5).arguments, contract=contract, tile=tile)
    rows = got.split([len(one.q) for one in among])
    assert_same_bits(rows[1], alone[0])
    assert_same_bits(rows[5], alone[1])
    assert rows[0].isnan().all()


def test_no_layout_of_the_cache_changes_a_bit(gpu_emulation: str) -> None:
    contract = short(gpu_emulation)
    drawn = of_lengths(((1, 50), (9, 37)), SMALL)
    first = paged_attention(*batch(drawn, seed=1).arguments, contract=contract)
    for seed, page in ((2, 16), (3, 32), (4, 8)):
        other = batch(drawn, seed, page)
        assert_same_bits(paged_attention(*other.arguments, contract=contract), first)
    q, k_cache, v_cache, *rest = batch(drawn, seed=1).arguments
    both = torch.stack([k_cache, v_cache], 1)  # keys and values of a block side by side
    packed = torch.cat([q, torch.full_like(q, torch.nan)], 1)[:, :2]
    got = paged_attention(packed, both[:, 0], both[:, 1], *rest, contract=contract)
    assert_same_bits(got, first)


def test_longer_hints_and_a_given_output(gpu_emulation: str) -> None:
    contract = short(gpu_emulation)
    drawn, expected = every_length(gpu_emulation, SMALL)
    q, *rest = drawn.arguments
    room = torch.full((len(q) + 3, 4, 64), 7.0, dtype=q.dtype)
    padded = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, 3))  # rows of no sequence
    got = paged_attention(
        padded, *rest, contract=contract, max_query_len=90, max_seq_len=200, out=room[:, 1:3]
    )
    assert got.data_ptr() == room[:, 1:3].data_ptr()
    assert_same_bits(got[: len(q)].contiguous(), expected)
    room[: len(q), 1:3] = 7.0
    assert (room == 7.0).all()


def test_more_sequences_than_a_tile_looks_through_at_once() -> None:
    contract = short("sm_90")
    drawn, expected = every_length("sm_90", SMALL)
    q, k_cache, v_cache, tables, starts, lengths = drawn.arguments
    empty = 256
    tables = torch.cat([tables[:1].expand(empty, -1), tables])
    starts = torch.nn.functional.pad(starts, (empty, 0))
    lengths = torch.cat([torch.ones(empty, dtype=torch.int32), lengths])
    with emulate("sm_90"):
        got = paged_attention(
            q, k_cache, v_cache, tables, starts, lengths,
            contract=contract, tile=AttentionTile(64, 4, 2, split=False),
        )  # fmt: skip
    assert_same_bits(got, expected)


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (5, 32), (1, 48), (21, 37)])
def test_contiguous_keys(gpu_emulation: str, tokens: int, keys: int) -> None:
    contract, shape = short(gpu_emulation), Shape(4, 2, 64)
    one = sequence(tokens, keys, shape, seed=tokens)
    expected = reference.attention(one.q, one.k, one.v, contract=contract)
    assert_same_bits(attention(one.q, one.k, one.v, contract=contract), expected)
    packed = torch.cat([one.k, one.v, one.v], 1)  # as a projection leaves them
    k, v = packed[:, :2], packed[:, 4:]
    assert_same_bits(attention(one.q, k, v, contract=contract, tile=WHOLE), expected)


def test_nothing_to_do(gpu_emulation: str) -> None:
    contract = short(gpu_emulation)
    drawn = batch(of_lengths(((0, 5), (0, 20)), SMALL))
    assert paged_attention(*drawn.arguments, contract=contract).shape == (0, 2, 64)
    one = sequence(0, 5, SMALL, 1)
    assert attention(one.q, one.k, one.v, contract=contract).shape == (0, 2, 64)


def test_what_does_not_fit_is_refused(gpu_emulation: str) -> None:
    contract = short(gpu_emulation)
    q, k, v, tables, starts, lengths = batch(of_lengths(((3, 20), (1, 5)), SMALL)).arguments

    def refused(error: type[Exception], match: str, *arguments: Tensor, **options: object) -> None:
        given = (*arguments, *(q, k, v, tables, starts, lengths)[len(arguments) :])
        with pytest.raises(error, match=match):
            paged_attention(*given, contract=contract, **options)  # type: ignore[arg-type]

    refused(
        TypeError, "bfloat16 or float16, found q torch.float32", q.float(), k.float(), v.float()
    )
    refused(TypeError, "found q torch.float16, k_cache torch.bfloat16", q.half())
    refused(ValueError, r"k_cache and v_cache .* found \[4, 2, 64\]", q, k[0], v[0])
    refused(ValueError, r"q \[T, Hq, D\]", q[..., :32])
    refused(ValueError, "head size of 64 or 128, found 32", *(x[..., :32] for x in (q, k, v)))
    refused(ValueError, "multiple of key/value heads, found 2 and 0", q, k[:, :, :0], v[:, :, :0])
    three = torch.cat([k, k, k], 2)
    refused(ValueError, "multiple of key/value heads, found 2 and 3", q, three, three)
    refused(ValueError, "q: expected a head's 64 values side by side", q.mT.contiguous().mT)
    refused(ValueError, r"out: expected \[4, 2, 64\], found \[3, 2, 64\]", out=q[:3])
    refused(ValueError, r"seq_lens: expected int32 \[2\]", q, k, v, tables, starts, lengths.long())
    refused(ValueError, r"query_start: expected int32 \[3\], .* \[2\]", q, k, v, tables, starts[1:])
    refused(ValueError, r"block_tables: expected int32 \[2, 3\]", q, k, v, tables[:1])
    every_second = torch.stack([tables, tables], 2).flatten(1)[:, ::2]
    refused(ValueError, "block_tables: expected adjacent entries", q, k, v, every_second)
    refused(ValueError, "one device, found cpu, meta", q, k, v.to("meta"))
    refused(ValueError, "max_query_len is 2, a sequence has 3", max_query_len=2)
    refused(ValueError, "max_seq_len is 19, a sequence has 20", max_seq_len=19)
    refused(ValueError, "query_start: expected to ascend within 0 … 4", q, k, v, tables, starts * 2)
    refused(ValueError, "more query rows than keys", q, k, v, tables, starts, lengths // 10)
    refused(ValueError, "200 keys, the block table holds 48", q, k, v, tables, starts, lengths * 10)
    one = sequence(3, 5, SMALL, 1)
    with pytest.raises(ValueError, match=r"T at most S, found \[3, 2, 64\], \[2, 1, 64\]"):
        attention(one.q, one.k[:2], one.v[:2], contract=contract)
    with pytest.raises(ValueError, match=r"v \[S, Hkv, D\]"):
        attention(one.q, one.k, one.v[:2], contract=contract)
    other = {"sm_89": "sm_90", "sm_90": "sm_89"}[gpu_emulation]
    with pytest.raises(RuntimeError, match=f"contract is {other}'s"):
        attention(one.q, one.k, one.v, contract=short(other))
