"""What the compiler makes of a layer's fingerprints for sm_89 and sm_90, with no GPU at hand."""

from __future__ import annotations

from bitassay.reference.spec.arch import get_arch
from support.compiled_kernels import Found

COMPILED = "fingerprints"  # of tools/compile, what `compiled` holds


def test_integers_alone_and_each_print_written_once(compiled: tuple[str, list[Found]]) -> None:
    assert {one["dtype"] for one in compiled[1]} == {"bf16", "fp16", "fp32"}
    assert {one["tensors"] for one in compiled[1]} == {3, 11, 16}
    for one in compiled[1]:
        assert one["float"] == one["atomic"] == one["spill"] == 0, one
        assert one["store"] == 1, one
        assert one["shared"] <= get_arch(compiled[0]).shared_memory, one


def test_whole_rows_are_read_in_16_bytes(compiled: tuple[str, list[Found]]) -> None:
    for one in compiled[1]:
        if one["pairs"] and one["tensors"] > 3:
            assert one["wide_load"] == one["load"] - 1, one  # but for the slots
        else:
            assert one["wide_load"] == 0 < one["load"], one


def test_two_products_an_element(compiled: tuple[str, list[Found]]) -> None:
    for one in compiled[1]:
        shape = one["shape"]
        words = shape["rows"] * shape["words"] // (32 * shape["warps"])
        elements = words if one["dtype"] == "fp32" else 2 * words
        # And a few for the strides of rows and slots.
        assert 2 * elements <= one["multiply"] <= 2 * elements + 8 + shape["rows"], one
