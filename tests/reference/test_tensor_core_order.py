"""An output depends on its own row, column and addend, and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitassay.reference import tensor_core, tensor_core_fast
from bitassay.reference.tensor_core import matmul, prepare
from bitassay.reference.tensor_core_fast import Tiling
from support.hard_matrices import ADDENDS, addend
from support.matmul_cases import DTYPES, PRECISION, UNITS, group_of, mixed, ordinary
from support.same_bits import assert_same_bits

M, N, K = 34, 35, 43  # three rows of every kind and one more; K ends in a tail for every group
every_unit = pytest.mark.parametrize(("arch", "kind"), UNITS)


class Case:
    """a [M, K], b [K, N], c [M, N], and their product.

    Mixed: awkward rows, columns and addends everywhere. Otherwise ordinary but for one awkward row
    in eight, so that the same row is computed by the fast path in one batch and by the exact path
    in another.
    """

    def __init__(self, arch: str, kind: str, *, awkward: bool) -> None:
        dtype = DTYPES[kind]
        self.how = {"arch": arch, "precision": PRECISION.get(kind)}
        self.a = mixed(M, K, dtype, 10)
        self.b = (mixed if awkward else ordinary)(N, K, dtype, 50).t()
        plain = self.a.float() @ self.b.float()
        parts = [addend(name, plain, i)[i :: len(ADDENDS)] for i, name in enumerate(ADDENDS)]
        self.c = torch.cat(parts)
        if not awkward:
            usual = torch.arange(M) % 8 != 3
            self.a = torch.where(
                usual[:, None], ordinary(M, K, dtype, 90).float(), self.a.float()
            ).to(dtype)
            self.c = addend("normal", plain, 9)
        self.product = matmul(self.a, self.b, self.c, **self.how)

    def same(self, a: Tensor, b: Tensor, c: Tensor | None, want: Tensor) -> None:
        assert_same_bits(matmul(a, b, c, **self.how), want)


@pytest.fixture(params=[True, False], ids=["mixed", "ordinary"])
def case(arch: str, kind: str, request: pytest.FixtureRequest) -> Case:
    return Case(arch, kind, awkward=request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_unit
def test_a_row_is_the_same_in_any_batch(case: Case) -> None:
    for size in (1, 3, 17):
        for m in range(0, M, size):
            rows = slice(m, m + size)
            case.same(case.a[rows], case.b, case.c[rows], case.product[rows])


@every_unit
def test_a_column_is_the_same_beside_any_other(case: Case) -> None:
    for size in (2, 16):
        for n in range(0, N, size):
            columns = slice(n, n + size)
            case.same(case.a, case.b[:, columns], case.c[:, columns], case.product[:, columns])


@every_unit
def test_permuted_rows_and_columns_permute_the_product(case: Case) -> None:
    g = torch.Generator().manual_seed(7)
    rows, columns = torch.randperm(M, generator=g), torch.randperm(N, generator=g)
    a, b, c = case.a[rows], case.b[:, columns], case.c[rows][:, columns]
    case.same(a, b, c, case.product[rows][:, columns])


@every_unit
def test_repeated_rows_are_equal(case: Case) -> None:
    for m in (0, 5, 9):
        a, c = case.a[m].expand(19, K), case.c[m].expand(19, N)
        case.same(a, case.b, c, case.product[m].expand(19, N))


@every_unit
@pytest.mark.parametrize(("outputs", "columns", "depth"), [(7, 5, 32), (64, 1, 32), (300, 16, 64)])
def test_tile_sizes(
    case: Case, outputs: int, columns: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_core, "EXACT_OUTPUTS", 8 * outputs)
    tiling = Tiling(outputs, columns, decomposed=1, depth=depth)
    monkeypatch.setitem(tensor_core_fast.TILINGS, "cpu", tiling)
    case.same(case.a, case.b, case.c, case.product)


@every_unit
def test_thread_counts(case: Case, threads: None) -> None:
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        case.same(case.a, case.b, case.c, case.product)


def test_the_number_of_threads_is_given_back(threads: None) -> None:
    for count in (1, 3):
        torch.set_num_threads(count)
        one = torch.ones(2, 16, dtype=torch.bfloat16)
        for value in (1.0, torch.inf):
            matmul(one * value, one.t(), arch="sm_90")
            assert torch.get_num_threads() == count


@every_unit
def test_strides(case: Case) -> None:
    """Transposed, offset and strided views give the bits of their contiguous copies."""

    def views(x: Tensor) -> Iterator[Tensor]:
        yield x.contiguous()
        yield x.t().contiguous().t()
        wide = torch.zeros(2 * x.shape[0] + 1, 3 * x.shape[1] + 2, dtype=torch.uint8).to(x.dtype)
        inside = wide[1::2, 2::3]
        inside.copy_(x)
        yield inside

    for a, b, c in zip(views(case.a), views(case.b), views(case.c), strict=True):
        case.same(a, case.b, case.c, case.product)
        case.same(case.a, b, case.c, case.product)
        case.same(case.a, case.b, c, case.product)
        case.same(a, b, c, case.product)


@pytest.mark.parametrize(("arch", "kind"), [unit for unit in UNITS if unit[1] != "fp32"])
def test_a_prepared_weight(case: Case) -> None:
    weight = prepare(case.b, **case.how)
    for rows in (slice(0, M), slice(4, 5), slice(0, 1), slice(2, 9)):
        case.same(case.a[rows], weight, case.c[rows], case.product[rows])
    case.same(case.a, prepare(case.b.contiguous(), **case.how), case.c, case.product)


@every_unit
def test_inputs_are_left_alone(case: Case) -> None:
    copies = [x.clone() for x in (case.a, case.b, case.c)]
    weight = case.b if case.how["precision"] == "ieee" else prepare(case.b, **case.how)
    for b in (case.b, weight):
        matmul(case.a, b, case.c, **case.how)
        matmul(case.a[:1], b, **case.how)
    for x, copy in zip((case.a, case.b, case.c), copies, strict=True):
        assert_same_bits(x, copy)


@every_unit
def test_k_may_be_cut_between_groups(case: Case, arch: str, kind: str) -> None:
    group = group_of(arch, kind)
    for k in range(group, K, group):
        first = matmul(case.a[:, :k], case.b[:k], case.c, **case.how)
        case.same(case.a[:, k:], case.b[k:], first, case.product)


@every_unit
def test_a_tail_is_padded_with_zeros(case: Case, arch: str, kind: str) -> None:
    missing = -K % group_of(arch, kind)
    for pad in range(0, missing + 1, 3):
        a = torch.cat([case.a, torch.zeros(M, pad).to(case.a.dtype)], 1)
        # The sign of a padding zero must not show either.
        b = torch.cat([case.b, torch.full((pad, N), -0.0).to(case.b.dtype)])
        case.same(a, b, case.c, case.product)


@every_unit
def test_no_addend_is_an_addend_of_zero(case: Case) -> None:
    case.same(case.a, case.b, None, matmul(case.a, case.b, torch.zeros(M, N), **case.how))


@every_unit
@pytest.mark.parametrize("shape", [(0, 5, 9), (3, 0, 9), (3, 5, 0), (0, 0, 0)])
def test_empty_products(arch: str, kind: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = torch.zeros(m, k).to(DTYPES[kind]), torch.zeros(k, n).to(DTYPES[kind])
    got = matmul(a, b, arch=arch, precision=PRECISION.get(kind))
    assert_same_bits(got, torch.zeros(m, n))
    c = torch.full((m, n), 1.5)
    assert_same_bits(matmul(a, b, c, arch=arch, precision=PRECISION.get(kind)), c)


@pytest.mark.gpu
@every_unit
def test_the_gpu_gives_the_same_bits(case: Case, cuda: torch.device) -> None:
    a, b, c = (x.to(cuda) for x in (case.a, case.b, case.c))
    case.same(a, b, c, case.product)
    for m in range(M):
        case.same(a[m : m + 1], b, c[m : m + 1], case.product[m : m + 1])


@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_products_beyond_fp32_set_the_exponent(arch: str) -> None:
    """2**130 - 2**130 + 2**104: the small product lies too far below the large ones to count."""
    a = torch.tensor([[2.0**100, 2.0**100, 2.0**52]]).bfloat16()
    b = torch.tensor([[2.0**30], [-(2.0**30)], [2.0**52]]).bfloat16()
    assert_same_bits(matmul(a, b, arch=arch), torch.zeros(1, 1))


def test_operands_may_require_gradients() -> None:
    a, b = (torch.ones(*shape).bfloat16().requires_grad_() for shape in ((2, 16), (16, 3)))
    assert_same_bits(matmul(a, b, arch="sm_90"), torch.full((2, 3), 16.0))
