"""The tensor-core model against what GPUs computed (Khattak and Mikaitis, BSD-2-Clause).

The files stay outside the repository. Patterns in them are those of fp32, also where the value is
of a narrower format.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitassay.reference.spec.arch import get_arch
from bitassay.reference.tensor_core import dot_add, matmul, tensor_core
from support.naive import tensor_core as twin
from support.paths import ROOT
from support.same_bits import assert_same_bits, patterns

FOLDER = Path(
    os.environ.get("BITASSAY_HARDWARE_VECTORS") or ROOT.parent / "shared" / "hardware_vectors"
)
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason=f"no hardware vectors in {FOLDER}: set BITASSAY_HARDWARE_VECTORS to their folder",
)

GPUS = {"a100": "sm_80", "ada": "sm_89", "h100": "sm_90"}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
SIXTEEN = ("bf16", "fp16", "tf32")
SETS = [(gpu, kind) for gpu in ("ada", "h100") for kind in DTYPES]
SETS += [("a100", kind) for kind in SIXTEEN]
# The H100's fp8 vectors with fp16 output went through interleaved half-precision steps.
HALF_SETS = [("a100", "fp16"), ("h100", "fp16"), ("ada", "fp16"), ("ada", "e4m3"), ("ada", "e5m2")]
CASES = 5000


def load(gpu: str, kind: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{gpu}_{kind}.npz") as archive:
        fields = {
            name: torch.from_numpy(archive[name].astype(np.uint32).view(np.int32)).view(
                torch.float32
            )
            for name in archive.files
        }
    for name in "ab":
        exact = fields[name]
        fields[name] = exact.to(DTYPES[kind])
        assert_same_value(fields[name].float(), exact)
    fields["c"] = fields["c"].flatten()
    if gpu == "h100" and kind in ("e4m3", "e5m2"):
        fields["c"] = torch.zeros_like(fields["c"])  # this column was not used
    assert len(fields["a"]) == len(fields["c"]) == CASES
    return fields


def assert_same_value(narrow: Tensor, exact: Tensor) -> None:
    """The conversion of an input lost nothing; a NaN may change its payload."""
    assert torch.equal(narrow.isnan(), exact.isnan())
    assert_same_bits(narrow.nan_to_num(nan=0.0), exact.nan_to_num(nan=0.0))


def steps(fields: dict[str, Tensor], gpu: str, kind: str, out: torch.dtype) -> Tensor:
    core = tensor_core(get_arch(GPUS[gpu]), DTYPES[kind])
    d = fields["c"]
    for k in range(0, fields["a"].shape[1], core.group):
        a, b = (fields[name][:, k : k + core.group] for name in "ab")
        d = dot_add(a, b, d.float(), core, out)
    return d


@pytest.mark.parametrize(("gpu", "kind"), SETS)
def test_dot_add_equals_hardware(gpu: str, kind: str) -> None:
    fields = load(gpu, kind)
    assert_same_bits(steps(fields, gpu, kind, torch.float32), fields["d_fp32"].flatten())


@pytest.mark.parametrize(("gpu", "kind"), HALF_SETS)
def test_dot_add_with_half_output_equals_hardware(gpu: str, kind: str) -> None:
    fields = load(gpu, kind)
    got = steps(fields, gpu, kind, torch.float16)
    assert_same_bits(got.float(), fields["d_fp16"].flatten())


@pytest.mark.parametrize(("gpu", "kind"), SETS)
def test_matmul_equals_hardware(gpu: str, kind: str) -> None:
    """Each case is a row of a and a column of b; 50 at a time lie on the diagonal of a product."""
    fields = load(gpu, kind)
    precision = "tf32" if kind == "tf32" else None
    got = torch.full((CASES,), torch.nan)
    for i in range(0, CASES, 50):
        a, b, c = (fields[name][i : i + 50] for name in "abc")
        product = matmul(a, b.t(), c.expand(50, 50), arch=GPUS[gpu], precision=precision)
        got[i : i + 50] = product.diagonal()
    assert_same_bits(got, fields["d_fp32"].flatten())


@pytest.mark.parametrize(("gpu", "kind"), SETS)
def test_twin_equals_hardware(gpu: str, kind: str) -> None:
    fields = load(gpu, kind)
    a, b, c, want = (patterns(fields[name]) for name in ("a", "b", "c", "d_fp32"))
    width = len(a) // CASES
    for i in range(CASES):
        row = slice(i * width, (i + 1) * width)
        got = twin.dot(a[row], b[row], c[i], kind, GPUS[gpu])
        assert got == want[i], f"case {i}: got {got:#010x}, want {want[i]:#010x}"
