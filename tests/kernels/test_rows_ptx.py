"""What the compiler and the assembler make of every row-wise kernel, with no GPU at hand.

Multiplications and additions are counted twice, in PTX and in the machine code: had the assembler
contracted any, the second count would be smaller.
"""

from __future__ import annotations

from bitassay.reference.spec.arch import get_arch
from support.compiled_kernels import Found

COMPILED = "rows"  # of tools/compile, what `compiled` holds

KERNELS = {"_silu_and_mul", "_rms_norm", "_rotary", "_write", "_log_softmax"}


def of(compiled: tuple[str, list[Found]], kernel: str) -> list[Found]:
    found = [one for one in compiled[1] if one["kernel"] == kernel]
    assert found
    return found


def elements(one: Found, block: int) -> int:
    """Elements of a block that a thread holds."""
    return max(1, block // (32 * one["num_warps"]))


def test_every_kernel_was_compiled(compiled: tuple[str, list[Found]]) -> None:
    assert {one["kernel"] for one in compiled[1]} == KERNELS | {"_only"}
    widths = {one["PADDED"] for one in of(compiled, "_rms_norm")}
    assert {1, 64, 128, 512, 1024, 2048, 4096, 8192, 16384} <= widths


def test_shared_memory_and_registers_suffice(compiled: tuple[str, list[Found]]) -> None:
    limit = get_arch(compiled[0]).shared_memory
    for one in compiled[1]:
        assert one["shared"] <= limit, one
        assert one["spilled"] == 0, one


def test_no_approximate_instruction(compiled: tuple[str, list[Found]]) -> None:
    for one in compiled[1]:
        assert one["approximate"] == one["ftz"] == one["narrow_other"] == 0, one
        # Exact divisions and roots start from the hardware's table; nothing else may look there.
        if not one["div"] and not one["sqrt"]:
            assert one["MUFU"] == 0, one


def test_nothing_may_be_contracted(compiled: tuple[str, list[Found]]) -> None:
    for one in compiled[1]:
        assert one["free"] == 0, one


def test_nothing_was_contracted(compiled: tuple[str, list[Found]]) -> None:
    only = {(one["DIVISIONS"], one["ROOTS"]): one for one in of(compiled, "_only")}

    def exact(one: Found, name: str) -> int:
        """Instructions that divisions and roots alone take: each, and a way out shared by all."""
        total = 0
        for kind, first, second in (("div", (1, 0), (2, 0)), ("sqrt", (0, 1), (0, 2))):
            each = only[second][name] - only[first][name]
            shared = only[first][name] - each
            total += each * one[kind] + shared * bool(one[kind])
        return total

    for one in compiled[1]:
        again, after = 0, {"fma": 0, "mul": 0, "add": 0}
        if one["kernel"] == "_log_softmax":
            # A short loop over sums may stand there several times: all that is in it, not after it.
            after = {"fma": 11, "mul": 1, "add": 1}
            copies, rest = divmod(one["FMUL"] - after["mul"], one["mul"] - after["mul"])
            assert (rest, copies > 0) == (0, True), one
            assert copies == 1 or one["WIDTH"] == 16, one
            again = copies - 1
        for machine, ptx in (("FFMA", "fma"), ("FMUL", "mul"), ("FADD", "add")):
            want = one[ptx] + again * (one[ptx] - after[ptx]) + exact(one, machine)
            assert one[machine] == want, (machine, one)


def test_as_many_operations_as_the_contract_has(compiled: tuple[str, list[Found]]) -> None:
    for one in of(compiled, "_silu_and_mul"):
        n = elements(one, one["BLOCK_T"] * one["BLOCK_F"])
        assert (one["fma"], one["mul"], one["add"], one["div"]) == (9 * n, 3 * n, 2 * n, n), one
    for one in of(compiled, "_rms_norm"):
        n = elements(one, one["ROWS"] * one["PADDED"])
        assert one["fma"] == 0, one
        assert one["mul"] == 2 * n, one
        assert one["div"] - one["sqrt"] == n, one  # one more a row, for the mean
        narrow = one["narrow_add"] + 2 * one["narrow_add_2"]  # of the residual, or in fp32
        if one["PADDED"] > 1:  # else it may be computed twice
            assert narrow in ((0, n) if one["ADD"] else (0,)), one
    for one in of(compiled, "_rotary"):
        n = elements(one, one["BLOCK_H"] * one["BLOCK_D"])
        both = 2 * 2 * n  # halves; and q and k, in two branches
        assert (one["fma"], one["mul"], one["add"]) == (both, both, 0), one
    for one in of(compiled, "_log_softmax"):
        n = elements(one, one["WIDTH"])
        assert (one["fma"], one["mul"]) == (9 * n + 11, n + 1), one
    for one in of(compiled, "_write"):
        assert one["float"] == 0, one


def test_sums_start_from_no_zero(compiled: tuple[str, list[Found]]) -> None:
    for one in compiled[1]:
        assert one["plus_zero"] == 0, one


def test_rows_are_read_sixteen_bytes_at_a_time(compiled: tuple[str, list[Found]]) -> None:
    for one in of(compiled, "_rms_norm"):
        if one["PADDED"] >= 2048:
            assert one["load_16_bytes"] >= one["PADDED"] // (32 * one["num_warps"] * 8), one
    assert any(one["load_16_bytes"] for one in of(compiled, "_silu_and_mul"))
    assert any(one["load_16_bytes"] for one in of(compiled, "_write"))
