"""embedding in the interpreter: rows copied bit for bit, and ids outside the table flagged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bitassay.kernels import embedding as module
from bitassay.kernels.embedding import embedding
from bitassay.reference import embedding as reference
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits, patterns

pytestmark = pytest.mark.usefixtures("interpreting")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def clear_flag() -> Iterator[None]:
    yield
    module._OUTSIDE.take()


def ids_of(count: int, size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "height", "width"), [(1, 1, 1), (7, 5, 33), (70, 9, 1030)])
def test_rows_are_copied(
    count: int, height: int, width: int, dtype: torch.dtype, index: torch.dtype
) -> None:
    weight = matrix("patterns", height, width, dtype, 1)  # any bits at all, NaN's payload too
    ids = ids_of(count, height, index)
    assert_same_bits(embedding(ids, weight), reference.embedding(ids, weight))
    module.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype) -> None:
    weight = matrix("patterns", 6, 20, dtype, 2)
    ids = ids_of(9, 6)
    want = reference.embedding(ids, weight)
    spread = torch.stack([ids, ids], 1)[:, 0]
    integers = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    wide = torch.nn.functional.pad(integers, (3, 5)).view(dtype)[:, 3:23]
    for view in (wide, weight.t().contiguous().t(), weight.flip(0).flip(0)):
        assert_same_bits(embedding(spread, view), want)


def test_writes_where_it_is_told() -> None:
    weight = matrix("normal", 6, 8, torch.bfloat16, 3)
    hidden = torch.full((4, 24), 7.0).bfloat16()
    ids = ids_of(4, 6)
    returned = embedding(ids, weight, out=hidden[:, 8:16])
    assert returned.data_ptr() == hidden[:, 8:].data_ptr()
    assert_same_bits(hidden[:, 8:16].contiguous(), reference.embedding(ids, weight))
    assert (hidden[:, :8] == 7).all()
    assert (hidden[:, 16:] == 7).all()


def test_no_rows_and_no_columns() -> None:
    weight = torch.ones(3, 4).bfloat16()
    none = torch.zeros(0, dtype=torch.int64)
    assert embedding(none, weight).shape == (0, 4)
    assert embedding(none, weight[:0]).shape == (0, 4)
    assert embedding(ids_of(2, 3), weight[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bad", "shown"), [(-1, -1), (6, 6), (-(1 << 62), -(1 << 31)),
                                            (1 << 40, (1 << 31) - 1)])  # fmt: skip
def test_ids_outside_become_nan_and_are_named(bad: int, shown: int, dtype: torch.dtype) -> None:
    weight = matrix("normal", 6, 10, dtype, 4)
    ids = ids_of(70, 6)
    ids[5], ids[66] = bad, 6
    got = embedding(ids, weight)
    nan = 0x7FFFFFFF if dtype == torch.float32 else 0x7FFF
    assert set(patterns(got[[5, 66]])) == {nan}
    keep = [i for i in range(70) if i not in (5, 66)]
    assert_same_bits(got[keep], reference.embedding(ids[keep], weight))
    with pytest.raises(ValueError, match=f"token id {shown} at position 5 is outside"):
        module.check()
    module.check()  # told once


def test_what_does_not_fit_is_refused() -> None:
    weight, ids = torch.ones(3, 4).bfloat16(), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="torch.int16"):
        embedding(ids.short(), weight)
    with pytest.raises(TypeError, match="torch.float64"):
        embedding(ids, weight.double())
    with pytest.raises(ValueError, match=r"found \[1, 2\] and \[3, 4\]"):
        embedding(ids[None], weight)
    with pytest.raises(ValueError, match=r"found \[2\] and \[0, 4\]"):
        embedding(ids, weight[:0])
    with pytest.raises(ValueError, match="adjacent columns"):
        embedding(ids, weight, out=torch.ones(4, 2).bfloat16().t())
    with pytest.raises(ValueError, match=r"out: expected torch.bfloat16 \[2, 4\]"):
        embedding(ids, weight, out=torch.ones(2, 4))
    with pytest.raises(ValueError, match="one device"):
        embedding(ids, weight.to("meta"))
