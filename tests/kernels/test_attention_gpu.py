"""Compiled attention on a GPU: model shapes, long contexts, each tile, all outputs compared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitassay.kernels import attention_tiles as tiles
from bitassay.kernels.attention import attention, paged_attention
from bitassay.reference import attention as reference
from bitassay.reference.spec.contract import Contract, default_contract
from support.attention_cases import FINITE, Batch, Drawn, Shape, batch, random_sequence, sequence
from support.oracle_pool import OraclePool
from support.same_bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]

LLAMA_8B, QWEN_1_7B = Shape(32, 8, 128), Shape(16, 8, 128)
PICO, SEVEN = Shape(4, 2, 64), Shape(14, 2, 64)
SHAPES = {"llama-8b": LLAMA_8B, "qwen-1.7b": QWEN_1_7B, "pico": PICO, "seven": SEVEN}
# Around the ends of blocks and splits.
CONTEXTS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 500, 1023, 1024, 1025, 2048, 2049, 5000)


@pytest.fixture(scope="module")
def oracle() -> Iterator[OraclePool]:
    with OraclePool() as pool:
        yield pool


def drawn(lengths: tuple[tuple[int, int], ...], shape: Shape, seed: int = 0) -> list[Drawn]:
    return [random_sequence(t, s, shape, seed + i, "cuda") for i, (t, s) in enumerate(lengths)]


def check(of: Batch, contract: Contract, want: Tensor, **options: object) -> None:
    got = paged_attention(*of.arguments, contract=contract, **options)  # type: ignore[arg-type]
    assert_same_bits(got, want)


@pytest.mark.parametrize("name", SHAPES)
def test_decoding(contract: Contract, oracle: OraclePool, name: str) -> None:
    """One batch of every context, 16,384 keys among them, then each sequence alone."""
    lengths = tuple((1, keys) for keys in (*CONTEXTS, 16_384))
    sequences = drawn(lengths, SHAPES[name])
    together = batch(sequences, seed=1)
    want = oracle.attend_paged(*together.arguments, contract)
    check(together, contract, want)
    for i, one in enumerate(sequences):
        check(batch([one], seed=i), contract, want[i : i + 1])


@pytest.mark.parametrize("tokens", [2, 4, 5, 9, 17, 33, 70])
@pytest.mark.parametrize("name", ["llama-8b", "pico", "seven"])
def test_few_tokens(contract: Contract, oracle: OraclePool, name: str, tokens: int) -> None:
    """As speculative decoding asks, on either side of where the launch changes."""
    lengths = tuple((tokens, tokens + keys) for keys in (0, 1, 60, 1000, 1024, 3000))
    of = batch(drawn(lengths, SHAPES[name]))
    check(of, contract, oracle.attend_paged(*of.arguments, contract))


@pytest.mark.parametrize("name", SHAPES)
def test_prompts(contract: Contract, oracle: OraclePool, name: str) -> None:
    lengths = tuple((keys, keys) for keys in (1, 63, 64, 65, 100, 513, 1025, 2100))
    of = batch(drawn(lengths, SHAPES[name]))
    check(of, contract, oracle.attend_paged(*of.arguments, contract))


@pytest.mark.parametrize("chunk", [16, 100, 256])
@pytest.mark.parametrize("name", ["llama-8b", "pico"])
def test_a_prompt_in_chunks(contract: Contract, oracle: OraclePool, name: str, chunk: int) -> None:
    whole = random_sequence(2200, 2200, SHAPES[name], 5, "cuda")
    (want,) = oracle.attend([(whole.q, whole.k, whole.v)], contract)
    assert_same_bits(attention(whole.q, whole.k, whole.v, contract=contract), want)
    parts = []
    for start in range(0, 2200, chunk):
        end = min(start + chunk, 2200)
        parts.append(Drawn(whole.q[start:end], whole.k[:end], whole.v[:end]))
        check(batch(parts[-1:]), contract, want[start:end])
    check(batch(parts), contract, want)  # all chunks as sequences of one batch


@pytest.mark.parametrize("name", ["llama-8b", "qwen-1.7b"])
def test_a_chunk_of_a_long_context(contract: Contract, oracle: OraclePool, name: str) -> None:
    of = batch(drawn(((100, 16_384),), SHAPES[name]))
    check(of, contract, oracle.attend_paged(*of.arguments, contract))


@pytest.mark.parametrize("size", [2, 7, 32, 64])
def test_a_mixed_batch(contract: Contract, oracle: OraclePool, size: int) -> None:
    g = torch.Generator().manual_seed(size)
    lengths = []
    for i in range(size):
        keys = int(torch.randint(1, 3000, (), generator=g))
        tokens = (1, 1, 4, min(keys, 150), 0, 1, keys if keys < 700 else 1)[i % 7]
        lengths.append((min(tokens, keys), keys))
    sequences = drawn(tuple(lengths), LLAMA_8B, seed=size)
    mixed = batch(sequences)
    want = oracle.attend_paged(*mixed.arguments, contract)
    check(mixed, contract, want)
    check(mixed, contract, want, max_query_len=1000, max_seq_len=10_000)
    order = torch.randperm(size, generator=g).tolist()
    rows = torch.split(want, [len(s.q) for s in sequences])
    check(batch([sequences[i] for i in order], 3), contract, torch.cat([rows[i] for i in order]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_each_tile_in_use(
    contract: Contract, oracle: OraclePool, name: str, dtype: torch.dtype
) -> None:
    of = SHAPES[name]
    lengths = ((1, 1), (1, 1500), (0, 20), (20, 20), (4, 1024), (300, 2100), (130, 130), (1, 64))
    mixed = batch(drawn(lengths, Shape(of.heads, of.kv_heads, of.head_dim, dtype)))
    want = oracle.attend_paged(*mixed.arguments, contract)
    check(mixed, contract, want)
    for tile in tiles.in_use(contract.arch):
        try:
            check(mixed, contract, want, tile=tile)
        except AssertionError as error:
            raise AssertionError(f"{tile}: {error}") from error


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("kind", [*FINITE, "special", "patterns"])
def test_any_value(contract: Contract, kind: str, head_dim: int, dtype: torch.dtype) -> None:
    """The oracle on the GPU here: most of these values take its exact path, slow on a CPU."""
    shape = Shape(8, 2, head_dim, dtype)
    values = kind if kind in FINITE else "normal"
    lengths = ((1, 40), (5, 70), (1, 1100), (70, 130))
    sequences = []
    for seed, (tokens, keys) in enumerate(lengths):
        for kinds in ((kind, kind, values), (kind, "normal", "wide"), ("normal", "scaled", values)):
            sequences.append(sequence(tokens, keys, shape, seed, kinds, "cuda"))
    mixed = batch(sequences)
    want = reference.paged_attention(*mixed.arguments, contract=contract)
    check(mixed, contract, want)
    for tile in tiles.in_use(contract.arch):
        check(mixed, contract, want, tile=tile)


def test_neighbours_change_no_bit(contract: Contract) -> None:
    clean = drawn(((1, 1500), (200, 300)), LLAMA_8B)
    alone = [paged_attention(*batch([one]).arguments, contract=contract) for one in clean]
    bad = [
        Drawn(*(torch.full_like(x, value) for x in (one.q, one.k, one.v)))
        for value in (torch.nan, torch.inf, -torch.inf, 3e38)
        for one in drawn(((1, 1100), (70, 70)), LLAMA_8B)
    ]
    got = paged_attention(
        *batch([bad[0], clean[0], *bad[1:5], clean[1], *bad[5:]]).arguments, contract=contract
    )
    assert_same_bits(got[1:2], alone[0])
    before = 2 + sum(len(one.q) for one in bad[1:5])
    assert_same_bits(got[before : before + 200], alone[1])
    assert got[0].isnan().all()


def test_the_hints_spare_the_wait(
    contract: Contract, oracle: OraclePool, cuda: torch.device
) -> None:
    """With them a call can be captured into a graph, and replayed for other lengths."""
    first = batch(drawn(((1, 700), (1, 2500)), LLAMA_8B))
    hints = {"max_query_len": 1, "max_seq_len": 4096}
    out = torch.empty_like(first.q)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile before the capture
        paged_attention(*first.arguments, contract=contract, out=out, **hints)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention(*first.arguments, contract=contract, out=out, **hints)
    for shorter in (0, 37, 699):
        first.seq_lens.copy_(torch.tensor([700 - shorter, 2500 - shorter]))
        graph.replay()
        want = oracle.attend_paged(*first.arguments, contract)
        assert_same_bits(out, want)


def test_offsets_beyond_31_bits(contract: Contract, oracle: OraclePool, cuda: torch.device) -> None:
    if torch.cuda.get_device_properties(cuda).total_memory < 40 << 30:
        pytest.skip("needs 20 GiB of device memory")
    one = random_sequence(3, 1100, LLAMA_8B, 1, "cuda")
    blocks = (1 << 31) // (16 * 8 * 128) + 100  # elements beyond 2**31
    caches = [torch.zeros(blocks, 16, 8, 128, dtype=torch.bfloat16, device=cuda) for _ in range(2)]
    pages = -(-1100 // 16)
    for cache, values in zip(caches, (one.k, one.v), strict=True):
        cache[-pages:].view(-1, 8, 128)[:1100] = values
    table = torch.arange(blocks - pages, blocks, dtype=torch.int32, device=cuda)[None]
    starts = torch.tensor([0, 3], dtype=torch.int32, device=cuda)
    lengths = torch.tensor([1100], dtype=torch.int32, device=cuda)
    got = paged_attention(one.q, *caches, table, starts, lengths, contract=contract)
    (want,) = oracle.attend([(one.q, one.k, one.v)], contract)
    assert_same_bits(got, want)


def test_another_architecture_is_refused(contract: Contract, cuda: torch.device) -> None:
    other = {"sm_89": "sm_90"}.get(contract.arch, "sm_89")
    one = random_sequence(1, 5, PICO, 1, "cuda")
    with pytest.raises(RuntimeError, match=f"contract is {other}'s"):
        attention(one.q, one.k, one.v, contract=default_contract(other))
