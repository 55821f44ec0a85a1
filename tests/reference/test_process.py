"""What the reference asks of its process: memory, denormals, no operation of the switch."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitassay.reference.embedding import embedding
from bitassay.reference.linear import linear, lm_head
from bitassay.reference.spec.contract import default_contract
from bitassay.reference.tensor_core import matmul
from support.fresh_python import FreshPython

PEAK = """
import resource, torch
from bitassay.reference.tensor_core import matmul
torch.set_num_threads(4)
# In place: a temporary here would raise the peak that is compared with.
g = torch.Generator().manual_seed(1)
a = torch.empty({m}, {k}, dtype=torch.bfloat16).normal_(generator=g)
b = torch.empty({n}, {k}, dtype=torch.bfloat16).normal_(generator=g).t()
a[0, 0] = {awkward}
matmul(a[:, :16], b[:16, :8], arch="{arch}")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
matmul(a, b, arch="{arch}")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux alone")
@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
@pytest.mark.parametrize(
    ("m", "n", "k", "awkward"),
    [
        # What is held at a time does not grow with N, so these stand for a whole vocabulary …
        pytest.param(8, 6000, 4096, "1.0", id="fast"),
        pytest.param(1, 17000, 1024, "1.0", id="fast-one-row"),
        # … and one infinity sends its whole row the exact way.
        pytest.param(8, 40000, 32, "float('inf')", id="exact"),
        pytest.param(1, 270000, 32, "float('inf')", id="exact-one-row"),
    ],
)
def test_memory_beyond_the_inputs(
    fresh_python: FreshPython, m: int, n: int, k: int, awkward: str, arch: str
) -> None:
    done = fresh_python.run(PEAK.format(m=m, n=n, k=k, awkward=awkward, arch=arch))
    assert done.returncode == 0, done.stderr
    mebibytes = int(done.stdout) / 1024
    assert mebibytes < 512, f"{mebibytes:.0f} MiB beyond the inputs"


@pytest.mark.parametrize("module", ["floats", "tensor_core"])
def test_flushing_denormals_is_refused_at_import(fresh_python: FreshPython, module: str) -> None:
    flush = "import torch; print(torch.set_flush_denormal(True), flush=True)"
    done = fresh_python.run(f"{flush}; import bitassay.reference.{module}")
    if done.stdout.strip() == "False":
        pytest.skip("this processor cannot flush denormals")
    assert done.returncode != 0
    assert "denormal" in done.stderr.lower() or "flush" in done.stderr.lower()


class Calls(TorchDispatchMode):
    """The names of the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


OVERRIDDEN = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "embedding", "_scaled_mm"}


def test_the_record_of_calls_sees_a_matmul() -> None:
    with Calls() as calls:
        _ = torch.ones(2, 2) @ torch.ones(2, 2)
        torch.nn.functional.embedding(torch.tensor([0]), torch.ones(2, 2))
    assert {"mm", "embedding"} <= calls.names


@pytest.mark.parametrize("value", [1.0, float("inf"), 2.0**-130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_operation_of_the_invariance_switch_is_called(dtype: torch.dtype, value: float) -> None:
    """With these overridden by kernels the oracle would be judging itself."""
    contract = default_contract("sm_90")
    x, weight = torch.full((3, 32), value).to(dtype), torch.ones(5, 32).to(dtype)
    with Calls() as calls:
        linear(x, weight, contract=contract)
        lm_head(x, weight, weight[:, 0], contract=contract, vocab_size=4)
        embedding(torch.tensor([1, 2]), weight)
        if dtype == torch.float32:
            matmul(x, weight.t(), arch="sm_90", precision="tf32")
    assert calls.names
    assert not calls.names & OVERRIDDEN
