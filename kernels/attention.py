"""Causal attention with grouped queries over a paged cache, any mix of prefill and decoding.

Keys are taken in the contract's blocks and splits, counted from the sequence's first key, by every
kernel and tile; see attention_steps.py for the arithmetic. Values have to be finite: within a
block, 0 times infinity of a key that a row does not see is NaN, as in the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.kernels import attention_tiles as tiles
from bitassay.kernels.attention_inputs import Inputs
from bitassay.kernels.attention_split import INTERPRETED, attention_split
from bitassay.kernels.attention_tiles import AttentionTile
from bitassay.kernels.attention_whole import attention_whole
from bitassay.kernels.device import check_device, multiprocessors, on_device
from bitassay.reference.spec.contract import Contract

_PAGE = 16  # keys of a block of the cache that `attention` makes


def paged_attention(
    q: Tensor,  # [T, Hq, D]
    k_cache: Tensor,  # [B, block size, Hkv, D]
    v_cache: Tensor,
    block_tables: Tensor,  # [R, W]
    query_start: Tensor,  # [R + 1]
    seq_lens: Tensor,  # [R]
    *,
    contract: Contract,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    out: Tensor | None = None,  # [T, Hq, D]
    tile: AttentionTile | None = None,
) -> Tensor:
    """Return attention of R sequences whose keys and values lie in a paged cache, [T, Hq, D].

    Sequence r has rows query_start[r] to query_start[r + 1] of q, maybe none: the last of its
    seq_lens[r] positions. Key j lies in block block_tables[r, j // block size], slot
    j % block size; nothing else of the cache or the table is read. q, k_cache, v_cache: bf16 or
    fp16, D 64 or 128, Hq a multiple of Hkv, any strides but the last; tables int32. max_query_len,
    max_seq_len: the longest sequence's, or more; None waits for the device and reads them. out:
    where to write; rows of no sequence are left alone. tile: another launch than the table's for
    all rows; it never changes a bit. Raises TypeError or ValueError for what does not fit,
    RuntimeError for another architecture than the contract's.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    x = Inputs(q, k_cache, v_cache, block_tables, query_start, seq_lens, out, contract)
    x.check()
    check_device(INTERPRETED, q.device, contract.arch)
    if q.shape[0] == 0 or x.sequences == 0:
        return out
    if q.device.type == "cpu":
        _check_lengths(x, max_query_len, max_seq_len)
    if max_query_len is None:
        max_query_len = int(query_start.diff().max())
    if max_seq_len is None:
        max_seq_len = int(seq_lens.max())
    splits = max(1, -(-max_seq_len // contract.key_split))
    with on_device(q.device):
        if tile is None:
            _dispatch(x, max_query_len, splits)
        else:
            _launch(x, 1, max_query_len, splits, tile)
    return out


def attention(  # [T, Hq, D], [S, Hkv, D], [S, Hkv, D] -> [T, Hq, D]
    q: Tensor, k: Tensor, v: Tensor, *, contract: Contract, tile: AttentionTile | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v for queries that are the last T of S positions.

    q, k, v: one dtype, bf16 or fp16, D 64 or 128, Hq a multiple of Hkv: query head h reads
    key/value head h // (Hq / Hkv). tile and errors as `paged_attention`.
    """
    if k.dim() != 3 or v.shape != k.shape or q.dim() != 3 or q.shape[0] > k.shape[0]:
        raise ValueError(
            "expected q [T, Hq, D], k and v [S, Hkv, D], T at most S, found "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    tokens, keys = q.shape[0], k.shape[0]
    k_cache, v_cache = (_paged(x) for x in (k, v))
    blocks = torch.arange(k_cache.shape[0], dtype=torch.int32, device=q.device)
    query_start = torch.arange(2, dtype=torch.int32, device=q.device) * tokens
    seq_lens = torch.full((1,), keys, dtype=torch.int32, device=q.device)
    return paged_attention(
        q, k_cache, v_cache, blocks[None], query_start, seq_lens,
        contract=contract, max_query_len=tokens, max_seq_len=keys, tile=tile,
    )  # fmt: skip


def _paged(x: Tensor) -> Tensor:  # [S, H, D] -> [ceil(S / 16), 16, H, D]
    """Return a view where S is whole blocks, otherwise a padded copy."""
    padding = -x.shape[0] % _PAGE
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding))
    return x.view(-1, _PAGE, *x.shape[1:])


def _dispatch(x: Inputs, max_query_len: int, splits: int) -> None:
    """Launch for short sequences and for long ones; each finds itself in one of the two."""
    arch, programs = x.contract.arch, multiprocessors(x.q.device)
    few = max(1, tiles.FEW_ROWS // x.group)
    least = 1
    if max_query_len <= few or x.sequences > 1:
        tokens = min(max_query_len, few)
        tile = tiles.few(arch, tokens * x.group, x.sequences * x.kv_heads * splits / programs)
        _launch(x, least, tokens, splits, tile)
        least = few + 1
    if max_query_len > few:
        rows = x.q.shape[0] * x.group * x.kv_heads
        tile = tiles.many(arch, splits, rows / programs)
        _launch(x, least, max_query_len, splits, tile)


def _launch(x: Inputs, least: int, most: int, splits: int, tile: AttentionTile) -> None:
    (attention_split if tile.split else attention_whole)(x, least, most, splits, tile)


def _check_lengths(x: Inputs, max_query_len: int | None, max_seq_len: int | None) -> None:
    """Raise ValueError for lengths that contradict each other; a GPU would have to be asked."""
    tokens, keys = x.query_start.diff(), x.seq_lens
    for name, hint, longest in (
        ("max_query_len", max_query_len, int(tokens.max())),
        ("max_seq_len", max_seq_len, int(keys.max())),
    ):
        if hint is not None and hint < longest:
            raise ValueError(f"{name} is {hint}, a sequence has {longest}")
    starts = x.query_start.tolist()
    if starts[0] < 0 or starts[-1] > x.q.shape[0] or bool((tokens < 0).any()):
        raise ValueError(
            f"query_start: expected to ascend within 0 … {x.q.shape[0]}, found {starts}"
        )
    if bool((tokens > keys).any()):
        raise ValueError("seq_lens: a sequence has more query rows than keys")
    room = x.block_tables.shape[1] * x.k_cache.shape[1]
    if int(keys.max()) > room:
        raise ValueError(f"seq_lens: {int(keys.max())} keys, the block table holds {room}")
    blocks, size = x.k_cache.shape[:2]
    for r, length in enumerate(keys.tolist()):
        used = x.block_tables[r, : -(-length // size)]
        outside = (used < 0) | (used >= blocks)
        if outside.any():
            raise ValueError(
                f"block_tables: sequence {r} needs blocks of the cache, the cache "
                f"has {blocks}, found {int(used[outside][0])}"
            )
