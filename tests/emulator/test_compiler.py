"""What the emulator assumes of the compiler, read from the code it makes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ARCHES = (89, 90)


def kernels() -> Iterator[tuple[str, str, str]]:
    """(name, body over x, y, z, element type)."""
    for dtype in ("bf16", "fp16", "fp32"):
        for name, body in (
            ("add", "x + y"),
            ("sub", "x - y"),
            ("mul", "x * y"),
            ("muladd", "x * y + z"),
            ("fma", "tl.fma(x, y, z)"),
            ("neg", "-x"),
        ):
            yield f"{name} {dtype}", body, dtype
    yield "constant bf16", "x * 1e-7", "bf16"
    yield "floor fp32", "tl.floor(x)", "fp32"
    yield "ceil fp32", "tl.ceil(x)", "fp32"
    yield "max fp32", "tl.maximum(x, y)", "fp32"
    yield "min nan fp32", "tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)", "fp32"
    yield "div_rn fp32", "tl.div_rn(x, y)", "fp32"
    yield "sqrt_rn fp32", "tl.sqrt_rn(x)", "fp32"
    yield "div fp32", "x / y", "fp32"
    yield "integer bf16", "tl.load(n_ptr + i).to(tl.bfloat16)", "bf16"


COMPILE = """
import json, sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sys.path.insert(0, sys.argv[1])
import generated
found = {}
for name, function, signature, constants, fusion in generated.SOURCES:
    for arch in (89, 90):
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        made = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": fusion}
        )
        found[f"{name} {arch}"] = [made.asm["ptx"], made.asm["ttir"]]
print(json.dumps(found))
"""

DOTS = """
@triton.jit
def dot(x_ptr, y_ptr, z_ptr, n_ptr, out_ptr, K, HOW: tl.constexpr):
    i = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    acc = tl.zeros((32, 32), tl.float32)
    if HOW == "added":
        acc = tl.dot(x, y) + tl.load(z_ptr + i)
    elif HOW == "after a constexpr loop":
        for _ in range(0, 32, 32):
            acc = tl.dot(x, y, acc)
        acc += tl.load(z_ptr + i)
    elif HOW == "after a loop":
        for _ in range(0, K, 32):
            acc = tl.dot(x, y, acc)
        acc += tl.load(z_ptr + i)
    else:
        acc = tl.dot(x, y) - tl.load(z_ptr + i)
    tl.store(out_ptr + i, acc)
"""
HOWS = ("added", "after a constexpr loop", "after a loop", "subtracted")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Every kernel's [PTX, IR], from one process that compiles."""
    folder = tmp_path_factory.mktemp("compiled")
    text = ["import triton, triton.language as tl", "SOURCES = []"]
    for n, (name, body, dtype) in enumerate(kernels()):
        text += [
            "@triton.jit",
            f"def kernel_{n}(x_ptr, y_ptr, z_ptr, n_ptr, out_ptr):",
            "    i = tl.arange(0, 128)",
            "    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)",
            f"    tl.store(out_ptr + i, {body})",
            f"types = dict.fromkeys(('x_ptr', 'y_ptr', 'z_ptr', 'out_ptr'), '*{dtype}')",
            f"SOURCES.append(({name!r}, kernel_{n}, types | {{'n_ptr': '*i32'}}, {{}}, False))",
        ]
        if name.startswith("muladd"):
            text.append(f"SOURCES.append(({name!r} + ' fused', *SOURCES[-1][1:4], True))")
    text += [
        DOTS,
        "types = {'x_ptr': '*bf16', 'y_ptr': '*bf16', 'z_ptr': '*fp32', 'n_ptr': '*i32',",
        "         'out_ptr': '*fp32', 'K': 'i32', 'HOW': 'constexpr'}",
        f"for how in {HOWS!r}:",
        "    SOURCES.append((f'dot {how}', dot, types, {'HOW': how}, False))",
    ]
    Path(folder, "generated.py").write_text("\n".join(text))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ptx(compiled: dict[str, list[str]], name: str, arch: int) -> str:
    return compiled[f"{name} {arch}"][0]


@pytest.mark.parametrize("arch", ARCHES)
def test_bf16_arithmetic_rounds_once_to_bf16(compiled: dict[str, list[str]], arch: int) -> None:
    for name in ("add", "sub", "mul"):
        code = ptx(compiled, f"{name} bf16", arch)
        # sm_89 has fused bf16 alone: x * 1 + y, and x * y + -0 so that a product of -0 stays.
        assert ("fma.rn.bf16" if arch == 89 else f"{name}.rn.bf16") in code
        assert "f32" not in code
    if arch == 89:
        assert "0x8000" in ptx(compiled, "mul bf16", arch)
    assert "fma.rn.bf16" in ptx(compiled, "fma bf16", arch)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("dtype", "suffix"), [("fp16", "f16"), ("fp32", "f32")])
def test_fp16_and_fp32_arithmetic_rounds_once(
    compiled: dict[str, list[str]], dtype: str, suffix: str, arch: int
) -> None:
    for name in ("add", "sub", "mul"):
        assert f"{name}.rn.{suffix}" in ptx(compiled, f"{name} {dtype}", arch)
    assert f"fma.rn.{suffix}" in ptx(compiled, f"fma {dtype}", arch)


@pytest.mark.parametrize("arch", ARCHES)
def test_only_a_launch_without_fusion_keeps_multiply_and_add_apart(
    compiled: dict[str, list[str]], arch: int
) -> None:
    assert "fma" not in ptx(compiled, "muladd fp32", arch)
    assert "mul.rn.f32" in ptx(compiled, "muladd fp32", arch)
    for dtype in ("bf16", "fp16", "fp32"):
        fused = ptx(compiled, f"muladd {dtype} fused", arch)
        assert fused.count("fma.rn") == 1
        assert "add.rn" not in fused


@pytest.mark.parametrize("arch", ARCHES)
def test_roundings_named_in_the_instructions(compiled: dict[str, list[str]], arch: int) -> None:
    assert "div.rn.f32" in ptx(compiled, "div_rn fp32", arch)
    assert "sqrt.rn.f32" in ptx(compiled, "sqrt_rn fp32", arch)
    assert "div.full.f32" in ptx(compiled, "div fp32", arch)  # approximate: refused
    assert "cvt.rmi.ftz.f32.f32" in ptx(compiled, "floor fp32", arch)  # subnormals count as zero
    assert "cvt.rpi.ftz.f32.f32" in ptx(compiled, "ceil fp32", arch)
    assert "max.f32" in ptx(compiled, "max fp32", arch)
    assert "min.NaN.f32" in ptx(compiled, "min nan fp32", arch)


def test_an_integer_becomes_bf16_in_two_roundings_on_sm_89(
    compiled: dict[str, list[str]],
) -> None:
    code = ptx(compiled, "integer bf16", 89)
    assert "cvt.rn.f32.s32" in code
    assert "cvt.rn.bf16.f32" in code
    assert "cvt.rn.bf16.s32" in ptx(compiled, "integer bf16", 90)


@pytest.mark.parametrize("arch", ARCHES)
def test_a_bf16_constant_is_written_with_six_decimals(
    compiled: dict[str, list[str]], arch: int
) -> None:
    lines = [line for line in compiled[f"constant bf16 {arch}"][1].splitlines() if "bf16>" in line]
    assert any("dense<0.000000e+00>" in line for line in lines)


@pytest.mark.parametrize("arch", ARCHES)
def test_negation_is_a_subtraction_before_triton_3_9(
    compiled: dict[str, list[str]], arch: int
) -> None:
    from importlib.metadata import version

    code = ptx(compiled, "neg fp32", arch)
    assert ("xor.b32" if version("triton").startswith("3.9") else "sub.rn.f32") in code


@pytest.mark.parametrize("arch", ARCHES)
def test_a_value_added_to_a_dot_of_constant_zero_becomes_its_accumulator(
    compiled: dict[str, list[str]], arch: int
) -> None:
    def adds(how: str) -> bool:
        return "arith.addf" in compiled[f"dot {how} {arch}"][1]

    assert not adds("added")
    assert not adds("after a constexpr loop")
    assert adds("after a loop")  # its bound is known at run time only
    assert "arith.subf" in compiled[f"dot subtracted {arch}"][1]
