"""Getting in and out of the emulator: environment, nesting, versions, modes, errors."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
import triton
import triton.language as tl

from bitassay import emulator
from bitassay.emulator import EmulationError, RefusedError, active_arch, emulate
from bitassay.reference import tensor_core
from bitassay.reference.spec.arch import EMULATED
from support.fresh_python import FreshPython
from support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreting")


@triton.jit
def _helper(x):
    return tl.cdiv(x, 2).to(tl.float32)


@triton.jit
def _dot(a_ptr, b_ptr, d_ptr, n):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    d = tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i))
    tl.store(d_ptr + i, d * _helper(n))


def product() -> torch.Tensor:
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    d = torch.empty(16, 16)
    _dot[(1,)](a.bfloat16(), b.bfloat16(), d, 2, enable_fp_fusion=False)
    return d


def expected(arch: str) -> torch.Tensor:
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    return tensor_core.matmul(a.bfloat16(), b.bfloat16(), arch=arch)


def test_blocks_nest_and_leave_nothing_behind() -> None:
    before = active_arch()
    plain = product()  # Triton's own interpreter: it multiplies the stored bits of bf16
    with emulate("sm_90"):
        assert active_arch() == "sm_90"
        assert_same_bits(product(), expected("sm_90"))
        with emulate("sm_89"):
            assert active_arch() == "sm_89"
            assert_same_bits(product(), expected("sm_89"))
        assert_same_bits(product(), expected("sm_90"))
        with pytest.raises(KeyError), emulate("sm_89"):
            raise KeyError("inside")
        assert active_arch() == "sm_90"
    assert active_arch() == before
    assert_same_bits(product(), plain)
    assert not torch.equal(plain, expected("sm_90"))


def test_install_and_uninstall() -> None:
    with emulate("sm_90"):
        emulator.install("sm_89")
        assert_same_bits(product(), expected("sm_89"))
        emulator.uninstall()
        assert active_arch() is None
        with emulate("sm_90"):
            assert_same_bits(product(), expected("sm_90"))


def test_allowances_end_with_their_block() -> None:
    @triton.jit
    def exp(x_ptr):
        tl.store(x_ptr, tl.exp(tl.load(x_ptr)))

    with emulate("sm_90"):
        with emulate("sm_90", allow=["exp"]):
            exp[(1,)](torch.ones(1))
        with pytest.raises(RefusedError):
            exp[(1,)](torch.ones(1))


def test_an_error_of_the_kernel_itself_stays_what_it_was(gpu_emulation: str) -> None:
    @triton.jit
    def wrong(x_ptr):
        tl.store(x_ptr, tl.load(x_ptr) + undefined_name)  # noqa: F821

    with pytest.raises(triton.runtime.errors.InterpreterError, match="undefined_name"):
        wrong[(1,)](torch.ones(1))


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "H100", ""])
def test_other_architectures_are_refused(arch: str) -> None:
    with pytest.raises(ValueError, match="known are sm_89, sm_90"), emulate(arch):
        pass


@pytest.mark.parametrize("found", ["3.5.1", "3.7.0", "3.7.10", "3.8.0", "3.10.0", "3.90.1", "4.0"])
def test_other_versions_of_triton_fail_closed(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "version", lambda _: found)
    with pytest.raises(EmulationError, match=r"Supported are 3\.6\.0, 3\.7\.1, 3\.9"):
        emulator.install("sm_90")
    assert active_arch() is None or active_arch() in EMULATED


@pytest.mark.parametrize("found", ["3.6.0", "3.7.1", "3.9.0", "3.9.4", "3.6.0+cpu"])
def test_supported_versions(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "version", lambda _: found)
    emulator.check_triton()


USER_CODE = """
import torch, triton, triton.language as tl
import bitassay.emulator as emulator
import linecache, types
linecache.cache["user.py"] = (0, None, '''
import triton, triton.language as tl
@triton.jit
def kernel(x_ptr, OP: tl.constexpr):
    x = tl.load(x_ptr)
    tl.store(x_ptr, tl.exp(x) if OP else x + 1.0)
'''.splitlines(True), "user.py")
user = types.ModuleType("user")
exec(compile("".join(linecache.cache["user.py"][2]), "user.py", "exec"), user.__dict__)
x = torch.tensor([1.0078125], dtype=torch.{dtype})
user.kernel[(1,)](x, OP={op})
print(emulator.active_arch(), x.item())
"""


@pytest.mark.parametrize("arch", EMULATED)
def test_the_environment_alone_is_enough(fresh_python: FreshPython, arch: str) -> None:
    code = USER_CODE.format(dtype="bfloat16", op=False)
    done = fresh_python.run(code, TRITON_INTERPRET="1", BITASSAY_ARCH=arch)
    assert done.stdout.split() == [arch, "2.0"], done.stderr  # 2.0078125 rounds to even


def test_the_environment_allows_by_name(fresh_python: FreshPython) -> None:
    code = USER_CODE.format(dtype="float32", op=True)
    done = fresh_python.run(code, TRITON_INTERPRET="1", BITASSAY_ARCH="sm_90")
    assert "RefusedError: tl.exp" in done.stderr
    done = fresh_python.run(
        code, TRITON_INTERPRET="1", BITASSAY_ARCH="sm_90", BITASSAY_ALLOW="sum, exp"
    )
    assert done.stdout.startswith("sm_90 2.7"), done.stderr


@pytest.mark.parametrize("interpret", [None, "0"])
def test_a_compiling_triton_is_an_error_that_says_what_to_set(
    fresh_python: FreshPython, interpret: str | None
) -> None:
    for code in ("import bitassay.emulator", "import triton, bitassay.emulator"):
        done = fresh_python.run(code, TRITON_INTERPRET=interpret, BITASSAY_ARCH="sm_90")
        assert "EmulationError" in done.stderr
        assert "set TRITON_INTERPRET=1" in done.stderr
        assert "before anything imports triton" in done.stderr


def test_importing_costs_nothing_unless_asked(fresh_python: FreshPython) -> None:
    code = (
        "import sys, bitassay.emulator as emulator\n"
        "print(emulator.active_arch(), 'triton' in sys.modules)"
    )
    done = fresh_python.run(code, TRITON_INTERPRET=None, BITASSAY_ARCH=None)
    assert done.stdout.split() == ["None", "False"], done.stderr


def test_the_version_asked_about_is_the_one_installed() -> None:
    assert importlib.metadata.version("triton").startswith(triton.__version__.split("+")[0])
