"""What Triton makes of one launch without a GPU: its PTX, and the machine code in words."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitassay.reference.spec.arch import get_arch

# How a matrix product and what stands around it may show in PTX.
ARITHMETIC = {
    "mma_sync": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?:bf16\.bf16|f16\.f16)\.f32",
    "other_mma_sync": r"mma\.sync\.(?!aligned\.m16n8k16\.row\.col\.f32)",
    "wgmma": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(?:bf16\.bf16|f16\.f16)",
    "other_wgmma": r"wgmma\.mma_async\.sync\.aligned\.(?!m64n\d+k16\.f32)",
    "fma": r"\bfma\.rn\.f32",
    "mul": r"\bmul(?:\.rn)?\.f32",
    "add": r"\b(?:add|sub)(?:\.rn)?\.f32",
    "packed": r"\b(?:fma|mul|add)(?:\.\w+)*\.(?:f32x2|f16x2|bf16x2|f16|bf16|f64)\b",
    "ftz": r"\.ftz\b",
    "approximate": r"\.approx\b",
    "copy_16": r"cp\.async\.c[ag]\.shared\.global.*0x10",
    "descriptor": r"cp\.async\.bulk\.tensor",
    "round": r"cvt\.rn\.(?:bf16|f16)(?:x2)?\.f32",
    "float": r"\.f(?:16|32|64)\b",
}
INSTRUCTION_BYTES = 16
_NVDISASM = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "nvdisasm"
_EXECUTABLE = 4  # of a section's flags


@dataclass(frozen=True)
class Code:
    """A compiled launch. machine: its instructions, nothing if only its PTX was wanted."""

    ptx: str
    machine: bytes
    shared: int  # bytes of shared memory


Launch = tuple[Code, dict[str, Any]]  # what was made of it, and what is said of it


def source(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: Sequence[str] = (),
) -> ASTSource:
    """Return a kernel as a launch would specialise it.

    What types does not name is i32; pointers and what divisible names are multiples of 16.
    """
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if n in divisible or signature[n].startswith("*")]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def compiled(
    source: ASTSource, arch: str, options: Mapping[str, Any], *, assemble: bool = True
) -> Code:
    """Compile for an architecture; without assemble, as far as PTX, which is all that is read."""
    major, minor = get_arch(arch).compute_capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    triton.knobs.runtime.add_stages_inspection_hook = None if assemble else _stop_after_ptx
    try:
        built = triton.compile(source, target=target, options=dict(options))
    finally:
        triton.knobs.runtime.add_stages_inspection_hook = None
    machine = _instructions(built.asm["cubin"]) if assemble else b""
    return Code(built.asm["ptx"], machine, built.metadata.shared)


def _stop_after_ptx(*arguments: Any) -> tuple[str, str] | None:
    """Put nothing in place of the assembler's stage; asked without one, name Triton's cache entry.

    Without a name of its own, a launch would find an empty binary in the cache.
    """
    if not arguments:
        return "-ptx", "ptx"
    _, stages, *_ = arguments
    stages["cubin"] = lambda ptx, metadata: b""
    return None


def _instructions(cubin: bytes) -> bytes:
    """Return what the executable sections of an ELF file hold."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    found = b""
    for i in range(count):
        _, _, flags, _, start, length = struct.unpack_from("<IIQQQQ", cubin, table + i * size)
        if flags & _EXECUTABLE:
            found += cubin[start : start + length]
    return found


def disassembled(codes: Sequence[Code], arch: str) -> list[str]:
    """Return the instructions of each in words, a line each.

    The disassembler takes far longer to start than to read, so it reads all of them at once.
    """
    major, minor = get_arch(arch).compute_capability
    model = f"SM{major}{minor}{'a' if major >= 9 else ''}"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(code.machine for code in codes))
        file.flush()
        command = [str(_NVDISASM), "--binary", model, "--no-dataflow", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s*/\*[0-9a-f]+\*/.*$", text, re.MULTILINE)
    assert INSTRUCTION_BYTES * len(lines) == sum(len(code.machine) for code in codes)
    found, start = [], 0
    for code in codes:
        assert code.machine
        end = start + len(code.machine) // INSTRUCTION_BYTES
        found.append("\n".join(lines[start:end]))
        start = end
    return found


def counts(expressions: Mapping[str, str], text: str) -> dict[str, int]:
    """Return how often each regular expression occurs in PTX or machine code, which are ASCII."""
    return {name: len(re.findall(one, text, re.ASCII)) for name, one in expressions.items()}
