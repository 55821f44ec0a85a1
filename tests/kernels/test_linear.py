"""linear and lm_head in the emulator: every tile, shape and value gives the reference's bits."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from bitassay.emulator import emulate
from bitassay.kernels import tiles
from bitassay.kernels.linear import bmm, linear, lm_head
from bitassay.kernels.tiles import Tile
from bitassay.reference import linear as reference
from bitassay.reference.floats import canonical_nan
from bitassay.reference.spec.contract import default_contract
from support.fresh_python import FreshPython
from support.hard_matrices import KINDS, matrix
from support.matmul_cases import mixed
from support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreting")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTER = Tile(16, 32, 32, 4, 2)
SWAPPED = Tile(16, 32, 32, 4, 2, swap=True)
TMA = Tile(16, 32, 32, 4, 2, "tma")
TMA_SWAPPED = Tile(16, 32, 32, 4, 2, "tma", swap=True)
TMA_HALVES = Tile(16, 32, 32, 4, 2, "tma", halves=True)


def all_tiles() -> list[tuple[str, str, Tile]]:
    kinds = ("bf16", "fp32")
    return [
        (a, d, t) for a in ("sm_89", "sm_90") for d in kinds for t in tiles.candidates(a, DTYPES[d])
    ]


def operands(m: int, n: int, k: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Ordinary and awkward rows, and a bias of special values."""
    x, weight = mixed(m, k, dtype, seed), mixed(n, k, dtype, seed + 1000)
    return x, weight, matrix("special", 1, n, dtype, seed + 2000)[0]


@functools.cache
def one_product(arch: str, dtype: str) -> tuple[Tensor, ...]:
    """Several tiles in either direction, and a K that ends inside a tile and a group."""
    x, weight, bias = operands(17, 264, 136 if dtype == "bf16" else 40, DTYPES[dtype], seed=1)
    return x, weight, bias, reference.linear(x, weight, bias, contract=default_contract(arch))


@pytest.mark.parametrize(("arch", "dtype", "tile"), all_tiles(), ids=str)
def test_every_tile_gives_the_reference_bits(arch: str, dtype: str, tile: Tile) -> None:
    x, weight, bias, want = one_product(arch, dtype)
    n = 3 * tile.block_n + 8  # of the columns, which may be fewer: four tiles at the most
    with emulate(arch):
        got = linear(x, weight[:n], bias[:n], contract=default_contract(arch), tile=tile)
    assert_same_bits(got, want[:, :n].contiguous())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 7, 33), (2, 16, 16), (3, 33, 15), (5, 65, 48), (17, 40, 50), (33, 9, 8)],
)
def test_any_shape(gpu_emulation: str, dtype: str, m: int, n: int, k: int, bias: bool) -> None:
    contract = default_contract(gpu_emulation)
    x, weight, b = operands(m, n, k, DTYPES[dtype], seed=m + n + k)
    got = linear(x, weight, b if bias else None, contract=contract)
    want = reference.linear(x, weight, b if bias else None, contract=contract)
    assert_same_bits(got, want)


@pytest.mark.parametrize("tile", [POINTER, SWAPPED, TMA, TMA_SWAPPED, TMA_HALVES], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_value(gpu_emulation: str, kind: str, dtype: str, tile: Tile) -> None:
    contract = default_contract(gpu_emulation)
    x = matrix(kind, 5, 72, DTYPES[dtype], 1)
    weight, bias = matrix(kind, 40, 72, DTYPES[dtype], 2), matrix(kind, 1, 40, DTYPES[dtype], 3)[0]
    got = linear(x, weight, bias, contract=contract, tile=tile)
    assert_same_bits(got, reference.linear(x, weight, bias, contract=contract))


@pytest.mark.parametrize("kind", ["special", "subnormal", "small", "cancelling", "huge"])
def test_any_value_of_fp32(gpu_emulation: str, kind: str) -> None:
    contract = default_contract(gpu_emulation)
    x, weight = (matrix(kind, rows, 40, torch.float32, rows) for rows in (5, 40))
    got = linear(x, weight, contract=contract)
    assert_same_bits(got, reference.linear(x, weight, contract=contract))


def test_fp32_chain_that_ends_in_negative_zero(gpu_emulation: str) -> None:
    contract = default_contract(gpu_emulation)
    x, weight = torch.full((2, 1), -1e-30), torch.full((3, 1), 1e-30)
    got = linear(x, weight, contract=contract)
    assert_same_bits(got, torch.zeros(2, 3))
    assert_same_bits(got, reference.linear(x, weight, contract=contract))


@pytest.mark.parametrize("tile", [POINTER, SWAPPED, TMA, TMA_SWAPPED], ids=str)
def test_any_strides(gpu_emulation: str, tile: Tile) -> None:
    contract = default_contract(gpu_emulation)
    x, weight, bias = operands(6, 40, 72, torch.bfloat16, seed=5)
    want = reference.linear(x, weight, bias, contract=contract)

    def wide(t: Tensor) -> Tensor:  # rows 24 elements apart, starting past the first 8
        return torch.nn.functional.pad(t, (8, 16))[:, 8 : 8 + t.shape[1]]

    views = [(wide(x), wide(weight)), (x, weight.t().contiguous().t())]
    if tile.kind == "pointer":
        every_second = torch.stack([weight, weight], 2).flatten(1)[:, ::2]
        views += [(x.t().contiguous().t(), every_second)]
    spread = torch.stack([bias, bias], 1)[:, 0]
    for x_view, weight_view in views:
        got = linear(x_view, weight_view, spread, contract=contract, tile=tile)
        assert_same_bits(got, want)


def test_rows_without_alignment_take_pointers(gpu_emulation: str) -> None:
    contract = default_contract(gpu_emulation)
    x, weight, _ = operands(200, 40, 24, torch.bfloat16, seed=6)
    shifted = torch.nn.functional.pad(x, (1, 0))[:, 1:]
    got = linear(shifted, weight, contract=contract)
    assert_same_bits(got, reference.linear(x, weight, contract=contract))
    with pytest.raises(ValueError, match="16-byte aligned"):
        linear(shifted, weight, contract=contract, tile=TMA)
    same_row = x[:1].expand(4, -1)  # a stride of 0 is no descriptor's either
    got = linear(same_row, weight, contract=contract)
    assert_same_bits(got, reference.linear(same_row, weight, contract=contract))


@pytest.mark.parametrize("vocab_size", [None, 1, 37, 40])
@pytest.mark.parametrize("logits_dtype", ["weight", "float32"])
@pytest.mark.parametrize("tile", [POINTER, SWAPPED, TMA, TMA_HALVES], ids=str)
def test_lm_head(gpu_emulation: str, tile: Tile, logits_dtype: str, vocab_size: int | None) -> None:
    contract = default_contract(gpu_emulation, logits_dtype=logits_dtype)
    hidden, weight, bias = operands(5, 40, 72, torch.bfloat16, seed=7)
    got = lm_head(hidden, weight, bias, contract=contract, vocab_size=vocab_size, tile=tile)
    want = reference.lm_head(hidden, weight, bias, contract=contract, vocab_size=vocab_size)
    assert_same_bits(got, canonical_nan(want))


def test_a_batch_changes_no_row(gpu_emulation: str) -> None:
    contract = default_contract(gpu_emulation)
    x, weight, bias = operands(40, 24, 64, torch.bfloat16, seed=8)
    alone = torch.cat([linear(x[i : i + 1], weight, bias, contract=contract) for i in (0, 17, 39)])
    together = linear(x, weight, bias, contract=contract)
    assert_same_bits(together[[0, 17, 39]], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bmm(gpu_emulation: str, dtype: str) -> None:
    contract = default_contract(gpu_emulation)
    parts = [operands(3, 20, 24, DTYPES[dtype], seed)[:2] for seed in (1, 2, 3)]
    x, weight = (torch.stack(t) for t in zip(*parts, strict=True))
    want = torch.stack([reference.linear(a, b, contract=contract) for a, b in parts])
    assert_same_bits(bmm(x, weight, contract=contract), want)
    assert_same_bits(bmm(x.mT.contiguous().mT, weight, contract=contract), want)


def test_nothing_to_do(gpu_emulation: str) -> None:
    contract = default_contract(gpu_emulation)
    x, weight = torch.ones(3, 8).bfloat16(), torch.ones(4, 8).bfloat16()
    assert linear(x[:0], weight, contract=contract).shape == (0, 4)
    assert linear(x, weight[:0], contract=contract).shape == (3, 0)
    assert bmm(x[None][:0], weight[None][:0], contract=contract).shape == (0, 3, 4)
    bias = torch.arange(4.0).bfloat16()
    got = linear(x[:, :0], weight[:, :0], bias, contract=contract)
    assert_same_bits(got, bias.expand(3, 4).contiguous())


def test_what_does_not_fit_is_refused(gpu_emulation: str) -> None:
    contract = default_contract(gpu_emulation)
    x, weight = torch.ones(3, 8).bfloat16(), torch.ones(4, 8).bfloat16()
    with pytest.raises(ValueError, match=r"found \[3, 8\] and \[8, 4\]"):
        linear(x, weight.t(), contract=contract)
    with pytest.raises(TypeError, match="x torch.float16, weight torch.bfloat16"):
        linear(x.half(), weight, contract=contract)
    with pytest.raises(TypeError, match="float64"):
        linear(x.double(), weight.double(), contract=contract)
    with pytest.raises(ValueError, match=r"bias: expected torch.bfloat16 \[4\], found .* \[3\]"):
        linear(x, weight, x[:, 0], contract=contract)
    with pytest.raises(ValueError, match="one device, found cpu, meta"):
        linear(x, weight.to("meta"), contract=contract)
    for vocab_size in (0, 5):
        with pytest.raises(ValueError, match=f"vocab_size {vocab_size} is not within 1 … 4"):
            lm_head(x, weight, contract=contract, vocab_size=vocab_size)
    with pytest.raises(ValueError, match="16-bit operands"):
        linear(x.float(), weight.float(), contract=contract, tile=TMA)
    with pytest.raises(ValueError, match=r"x \[B, M, K\]"):
        bmm(x, weight, contract=contract)


def test_another_architecture_than_the_emulated_is_refused(gpu_emulation: str) -> None:
    other = {"sm_89": "sm_90", "sm_90": "sm_89"}[gpu_emulation]
    x = torch.ones(1, 16).bfloat16()
    with pytest.raises(RuntimeError, match=f"contract is {other}'s, .* as {gpu_emulation}"):
        linear(x, x, contract=default_contract(other))


def test_tritons_own_interpreter_is_refused() -> None:
    x = torch.ones(1, 16).bfloat16()
    with pytest.raises(RuntimeError, match="computes as NumPy: import bitassay.emulator with"):
        linear(x, x, contract=default_contract("sm_90"))


def test_compiled_kernels_refuse_the_cpu(fresh_python: FreshPython) -> None:
    code = (
        "import torch\n"
        "from bitassay.kernels.linear import linear\n"
        "from bitassay.reference.spec.contract import default_contract\n"
        "x = torch.ones(1, 16).bfloat16()\n"
        "linear(x, x, contract=default_contract('sm_90'))"
    )
    done = fresh_python.run(code, TRITON_INTERPRET=None, BITASSAY_ARCH=None)
    assert done.returncode == 1
    assert "RuntimeError: kernels run on CUDA tensors, found cpu: move them" in done.stderr
