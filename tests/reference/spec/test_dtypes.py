"""The table of dtypes against torch and against the twin's formats, which know none of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch

from bitassay.reference.spec.arch import ARCHES, TensorCore
from bitassay.reference.spec.dtypes import (
    DTYPES,
    INTEGER_OF_BYTES,
    DType,
    has_role,
    listed,
    require_dtype,
    with_role,
)
from support.naive import tensor_core as twin
from support.same_bits import from_patterns, patterns

FORMATS = {
    "bfloat16": twin.BF16,
    "float16": twin.FP16,
    "float32": twin.FP32,
    "float8_e4m3fn": twin.E4M3,
    "float8_e5m2": twin.E5M2,
}
every_record = pytest.mark.parametrize("record", DTYPES.values(), ids=lambda record: record.name)


def pattern_of(value: float, dtype: torch.dtype) -> int:
    return patterns(torch.tensor([value]).to(dtype))[0]


def value_of(pattern: int, dtype: torch.dtype) -> float:
    return float(from_patterns([pattern], dtype).float())


@every_record
def test_facts_are_torch_s(record: DType) -> None:
    info = torch.finfo(record.dtype)
    assert DTYPES[record.dtype] is record
    assert str(record.dtype) == f"torch.{record.name}"
    assert (record.bits, record.largest) == (info.bits, info.max)
    assert 2.0**record.least_exponent == info.smallest_normal
    assert 2.0**-record.fraction_bits == info.eps
    assert record.integer == INTEGER_OF_BYTES[record.dtype.itemsize]
    assert not record.integer.is_floating_point
    assert record.one == pattern_of(1.0, record.dtype)
    assert record.magnitude == pattern_of(-0.0, record.dtype) - 1
    assert record.exponent_field & (1 << record.fraction_bits) - 1 == 0
    assert record.exponent_field.bit_count() + record.fraction_bits == record.bits - 1
    every = from_patterns(range(1 << min(record.bits, 16) - 1), record.dtype)
    if record.bits <= 16:
        assert int(every.float().isnan().logical_not().sum()) == record.last_number + 1
        assert not every[: record.last_number + 1].float().isnan().any()
    if record.infinity is None:
        assert record.name == "float8_e4m3fn"
    else:
        assert record.infinity == record.exponent_field
        assert value_of(record.infinity, record.dtype) == float("inf")
    if record.canonical_nan is not None:
        assert from_patterns([record.canonical_nan], record.dtype).isnan().all()
    assert (record.canonical_nan is not None) == ("result" in record.roles)


@every_record
def test_facts_are_the_twin_s(record: DType) -> None:
    fmt = FORMATS[record.name]
    assert (record.bits, record.fraction_bits) == (fmt.width, fmt.fraction_bits)
    assert record.least_exponent == 1 - fmt.bias
    if record.infinity is not None:
        assert record.infinity == fmt.infinity(False)
    if record.canonical_nan is not None:
        assert record.canonical_nan == fmt.nan


@every_record
def test_an_architecture_has_the_tensor_core(record: DType) -> None:
    cores = [getattr(arch, record.tensor_core) for arch in ARCHES.values()]
    assert any(isinstance(core, TensorCore) for core in cores)


def test_roles() -> None:
    half, every = ("bfloat16", "float16"), ("bfloat16", "float16", "float32")
    names = {"transformer": half, "weight": every, "logits": every, "result": every}
    for role, want in names.items():
        assert tuple(record.name for record in with_role(role)) == want  # type: ignore[arg-type]
    assert listed("transformer") == "bfloat16 or float16"
    assert listed("weight") == "bfloat16, float16 or float32"
    assert has_role(torch.float16, "transformer")
    assert not has_role(torch.float32, "transformer")
    assert not has_role(torch.int8, "weight")


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        DTYPES[torch.float16].bits = 8  # type: ignore[misc]


def test_the_one_dtype_of_tensors() -> None:
    half, single = torch.float16, torch.float32
    assert require_dtype("transformer", half) is DTYPES[half]
    assert require_dtype("transformer", q=half, k=half) is DTYPES[half]
    assert require_dtype("logits", single, out=single) is DTYPES[single]


@pytest.mark.parametrize(
    ("dtypes", "named", "message"),
    [
        (["float32"], {}, "expected bfloat16 or float16, found torch.float32"),
        (["float64"], {}, "expected bfloat16 or float16, found torch.float64"),
        ([], {"x": "int16"}, "expected bfloat16 or float16, found x torch.int16"),
        (
            [],
            {"q": "float16", "k": "bfloat16"},
            "expected one dtype of bfloat16 or float16, found q torch.float16, k torch.bfloat16",
        ),
        (
            [],
            {"q": "float32", "k": "float32"},
            "expected one dtype of bfloat16 or float16, found q torch.float32, k torch.float32",
        ),
        (
            ["float16"],
            {"out": "float32"},
            "expected one dtype of bfloat16 or float16, found torch.float16, out torch.float32",
        ),
    ],
)
def test_others_are_refused(dtypes: list[str], named: dict[str, str], message: str) -> None:
    with pytest.raises(TypeError) as found:
        require_dtype(
            "transformer",
            *(getattr(torch, name) for name in dtypes),
            **{name: getattr(torch, dtype) for name, dtype in named.items()},
        )
    assert str(found.value) == message


def test_the_contract_is_read_without_torch() -> None:
    """The command's help needs the contract and the architectures, and no second to load torch."""
    code = (
        "import sys; import bitassay.reference.spec.contract, bitassay.reference.spec.arch; "
        "import bitassay.reference.spec.operations; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
