"""What the emulator refuses, what it says, and how a refusal is lifted by name."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.emulator import RefusedError, emulate

pytestmark = pytest.mark.usefixtures("interpreting")


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _one(x_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if OP == "exp":
        x = tl.exp(x)
    elif OP == "exp2":
        x = tl.exp2(x)
    elif OP == "log":
        x = tl.log(x)
    elif OP == "log2":
        x = tl.log2(x)
    elif OP == "sin":
        x = tl.sin(x)
    elif OP == "cos":
        x = tl.cos(x)
    elif OP == "erf":
        x = tl.erf(x)
    elif OP == "sqrt":
        x = tl.sqrt(x)
    elif OP == "rsqrt":
        x = tl.rsqrt(x)
    elif OP == "div":
        x = x / 3.0
    elif OP == "fdiv":
        x = tl.fdiv(x, x)
    elif OP == "mod":
        x = x % 3.0
    elif OP == "sigmoid":
        x = tl.sigmoid(x)
    elif OP == "softmax":
        x = tl.softmax(x)
    elif OP == "sum":
        x = x + tl.sum(x, 0)
    elif OP == "cumsum":
        x = tl.cumsum(x, 0)
    elif OP == "cumprod":
        x = tl.cumprod(x, 0)
    elif OP == "reduce":
        x = x + tl.reduce(x, 0, _add)
    elif OP == "associative_scan":
        x = tl.associative_scan(x, 0, _add)
    elif OP == "atomic_add":
        tl.atomic_add(out_ptr + i, x)
    elif OP == "atomic_cas":
        tl.atomic_cas(out_ptr + i, x, x)
    elif OP == "atomic_xchg":
        tl.atomic_xchg(out_ptr + i, x)
    elif OP == "rtz":
        x = x.to(tl.bfloat16, fp_downcast_rounding="rtz").to(tl.float32)
    elif OP == "fp64":
        x = (x.to(tl.float64) + 1.0).to(tl.float32)
    elif OP == "fp8":
        x = (x + 0.123).to(tl.float8e5).to(tl.float32)
    elif OP == "cat":
        x = x + tl.sum(tl.cat(i, i, can_reorder=True), 0)
    elif OP == "view":
        x = tl.reshape(x, (BLOCK,), can_reorder=True)
    elif OP == "randn":
        x = tl.randn(7, i)
    elif OP == "truncate":
        x = (x * 1e30).to(tl.int32).to(tl.float32)
    elif OP == "bf16 constant":
        x = (x.to(tl.bfloat16) * 1e-7).to(tl.float32)
    elif OP == "ticket":
        x = x + tl.atomic_add(out_ptr.to(tl.pointer_type(tl.int32)) + i, 1)
    elif OP == "argmax":
        x = x + tl.argmax(x, 0, tie_break_left=False)
    tl.store(out_ptr + i, x)


def one(op: str, x: Tensor | None = None) -> Tensor:
    x = torch.arange(16.0) + 1 if x is None else x
    out = torch.zeros(16)
    _one[(1,)](x, out, OP=op, BLOCK=16, enable_fp_fusion=False)
    return out


REFUSED = {
    "exp": "tl.exp: .*approximates.*tl.fma.*BITASSAY_ALLOW=exp",
    "exp2": "tl.exp2: ",
    "log": "tl.log: ",
    "log2": "tl.log2: ",
    "sin": "tl.sin: ",
    "cos": "tl.cos: ",
    "erf": "tl.erf: ",
    "sqrt": "tl.sqrt: .*use tl.sqrt_rn",
    "rsqrt": "tl.rsqrt: .*use tl.div_rn",
    "div": "tl.div: .*use tl.div_rn",
    "fdiv": "tl.div: .*use tl.div_rn",
    "mod": "tl.mod: ",
    "sigmoid": "tl.exp: ",
    "softmax": "tl.exp: ",
    "sum": "tl.sum of fp32: the order depends on.*BITASSAY_ALLOW=sum",
    "cumsum": "tl.cumsum of fp32: ",
    "cumprod": "tl.cumprod of fp32: ",
    "reduce": "tl.reduce of fp32: ",
    "associative_scan": "tl.associative_scan of fp32: ",
    "atomic_add": "tl.atomic_add of fp32: which program comes first",
    "atomic_cas": "tl.atomic_cas: which program comes first",
    "atomic_xchg": "tl.atomic_xchg of fp32: which program comes first",
    "rtz": "fp_downcast_rounding",
    "fp64": "tl.float64: not modelled",
    "fp8": "conversion to fp8e5: how often it rounds",
    "cat": "tl.cat: it may reorder",
    "view": "can_reorder=True",
    "randn": "tl.log: ",
    "truncate": "conversion fp32 -> int32: .* does not fit",
    "bf16 constant": "the bf16 constant 1e-07: .*six decimals",
    "ticket": "the value an atomic returned was used",
}


@pytest.mark.filterwarnings("ignore:.*can_reorder")
@pytest.mark.parametrize("op", REFUSED)
def test_refused_by_name_and_with_advice(op: str, gpu_emulation: str) -> None:
    with pytest.raises(RefusedError, match=REFUSED[op]):
        one(op)


LIFTED = ["exp", "exp2", "log", "log2", "sin", "cos", "erf", "sqrt", "rsqrt", "div", "mod", "sum"]
LIFTED += ["cumsum", "cumprod", "reduce", "associative_scan", "atomic_add"]


@pytest.mark.parametrize("op", LIFTED)
def test_allowed_by_its_name_and_by_no_other(op: str) -> None:
    others = [name for name in LIFTED if name != op]
    with emulate("sm_90", allow=others), pytest.raises(RefusedError):
        one(op)
    with emulate("sm_90", allow=[op]):
        assert one(op).isfinite().all()


def test_the_name_an_error_gives_is_the_one_that_lifts_it() -> None:
    with emulate("sm_90", allow=["exp", "div"]):
        one("sigmoid")
    with emulate("sm_90", allow=["float64"]):
        assert torch.equal(one("fp64"), torch.arange(16.0) + 2)


def test_ties_and_nan_make_argmax_undefined(gpu_emulation: str) -> None:
    with pytest.raises(RefusedError, match="tie_break_left"):
        one("argmax", torch.ones(16))
    with pytest.raises(RefusedError, match="NaN"):
        one("argmax", torch.tensor([1.0] * 15 + [float("nan")]))
    assert torch.equal(one("argmax"), torch.arange(16.0) + 16)


@triton.jit
def _multiply_add(x_ptr, out_ptr, HOW: tl.constexpr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i)
    if HOW == "mul add":
        x = x * x + x
    elif HOW == "mul sub":
        x = x - x * x
    elif HOW == "add mul":
        x = (x + x) * x
    elif HOW == "fma":
        x = tl.fma(x, x, x)
    elif HOW == "add":
        x = x + x
    else:
        x = x * x
    tl.store(out_ptr + i, x)


def launch(how: str, dtype: torch.dtype = torch.float32, **options: object) -> None:
    x = torch.ones(16, dtype=dtype)
    _multiply_add[(1,)](x, torch.empty_like(x), HOW=how, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["mul add", "mul sub", "add mul"])
@pytest.mark.parametrize("options", [{}, {"enable_fp_fusion": True}])
def test_a_launch_that_may_contract_is_refused(
    how: str, dtype: torch.dtype, options: dict[str, bool], gpu_emulation: str
) -> None:
    with pytest.raises(RefusedError, match="enable_fp_fusion=False"):
        launch(how, dtype, **options)
    launch(how, dtype, enable_fp_fusion=False)
    launch("fma", dtype, **options)


def test_what_cannot_contract_may_be_launched_plainly(gpu_emulation: str) -> None:
    for how in ("fma", "add", "mul"):
        launch(how)
        launch(how, num_warps=8, num_stages=2)


def test_the_process_default_of_fusion_is_honoured(
    gpu_emulation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    launch("mul add")
    with pytest.raises(RefusedError, match="enable_fp_fusion=False"):
        launch("mul add", enable_fp_fusion=True)


def test_an_option_that_is_not_modelled_is_refused(gpu_emulation: str) -> None:
    with pytest.raises(RefusedError, match="enable_reflect_ftz"):
        launch("add", enable_reflect_ftz=False)


def test_flushed_subnormals_are_noticed(gpu_emulation: str) -> None:
    from bitassay.emulator import EmulationError

    assert torch.set_flush_denormal(True)
    try:
        with pytest.raises(EmulationError, match="set_flush_denormal"):
            launch("add")
    finally:
        torch.set_flush_denormal(False)
    launch("add")


def test_an_operation_nobody_listed_is_refused(gpu_emulation: str) -> None:
    from bitassay.emulator.interpreted import launch as machinery

    builder = machinery.current()
    assert builder is not None
    with pytest.raises(RefusedError, match="tl.invented: it is not known to be exact"):
        builder.create_invented()
