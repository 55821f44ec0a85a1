"""The switch, on the CPU's dispatch key in the emulator: what it covers, passes, and restores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitassay.kernels import embedding
from bitassay.kernels.dispatcher_override import Switch
from bitassay.reference.linear import linear as reference
from bitassay.reference.spec.contract import Contract, default_contract
from bitassay.reference.tensor_core import matmul
from support.fresh_python import FreshPython
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreting")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OVERRIDDEN = ("mm", "mm.out", "addmm", "addmm.out", "addmm_", "bmm", "bmm.out", "mv", "mv.out",
              "dot", "linear", "embedding")  # fmt: skip


class Counting(Switch):
    """A switch that counts what its overrides compute."""

    def __init__(self, contract: Contract) -> None:
        self.calls = 0
        self.contract = contract

        def contract_of(device: torch.device) -> Contract:
            self.calls += 1
            return contract

        super().__init__("CPU", contract_of)


@pytest.fixture
def switch(gpu_emulation: str) -> Iterator[Counting]:
    made = Counting(default_contract(gpu_emulation))
    yield made
    assert not made.describe().active
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::linear", "CPU")
    embedding._OUTSIDE.take()


@pytest.fixture(params=DTYPES)
def operands(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    dtype = DTYPES[request.param]
    # Cancelling values, so that CPU kernels and another order give other bits.
    x, weight = (matrix("cancelling", rows, 40, dtype, rows) for rows in (5, 33))
    return x, weight, matrix("normal", 1, 33, dtype, 3)[0]


def into(function: Callable[..., Tensor], *args: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    out = torch.full(shape, 7.0, dtype=args[0].dtype)
    returned = function(*args, out=out)
    assert returned.data_ptr() == out.data_ptr()
    return out


def test_every_entry_point(switch: Counting, operands: tuple[Tensor, ...]) -> None:
    x, weight, bias = operands
    plain = reference(x, weight, contract=switch.contract)
    biased = reference(x, weight, bias, contract=switch.contract)
    wt, batch, weights = weight.t(), x.expand(2, -1, -1), weight.t().expand(2, -1, -1)
    calls: list[tuple[Callable[[], Tensor], Tensor]] = [
        (lambda: torch.mm(x, wt), plain),
        (lambda: torch.matmul(x, wt), plain),
        (lambda: x @ wt, plain),
        (lambda: into(torch.mm, x, wt, shape=(5, 33)), plain),
        (lambda: into(torch.mm, x, wt, shape=(0,)), plain),
        (lambda: torch.addmm(bias, x, wt), biased),
        (lambda: into(torch.addmm, bias, x, wt, shape=(5, 33)), biased),
        (lambda: bias.repeat(5, 1).addmm_(x, wt), biased),
        (lambda: torch.bmm(batch, weights)[1], plain),
        (lambda: into(torch.bmm, batch, weights, shape=(2, 5, 33))[0], plain),
        (lambda: torch.matmul(batch, wt)[1], plain),
        (lambda: torch.matmul(batch[None], weights)[0, 1], plain),
        (lambda: torch.einsum("mk,nk->mn", x, weight), plain),
        (lambda: torch.mv(weight, x[2]), plain[2]),
        (lambda: into(torch.mv, weight, x[2], shape=(33,)), plain[2]),
        (lambda: torch.matmul(x[2], wt), plain[2]),
        (lambda: torch.dot(x[2], weight[3]), plain[2, 3]),
        (lambda: F.linear(x, weight), plain),
        (lambda: F.linear(x, weight, bias), biased),
        (lambda: F.linear(x[2], weight, bias), biased[2]),
        (lambda: F.linear(batch, weight, bias)[1], biased),
        (lambda: F.linear(batch.transpose(0, 1), weight, bias)[:, 1].contiguous(), biased),
    ]
    with switch.on():
        for number, (call, want) in enumerate(calls):
            before = switch.calls
            assert_same_bits(call(), want)
            assert switch.calls > before, f"call {number} went past the switch"
            with torch.inference_mode():
                assert_same_bits(call().clone(), want)


def test_an_lm_head_is_covered(switch: Counting) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(33, 40, dtype=torch.bfloat16)
            self.lm_head = torch.nn.Linear(40, 33, bias=False, dtype=torch.bfloat16)
            self.lm_head.weight = self.embed_tokens.weight

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.lm_head(self.embed_tokens(ids))
            return logits

    model, ids = Tied(), torch.tensor([[1, 2, 3], [32, 0, 7]])
    table = model.embed_tokens.weight.detach()
    want = reference(table[ids.flatten()], table, contract=switch.contract).view(2, 3, 33)
    with switch.on(), torch.no_grad():
        assert_same_bits(model(ids), want)
        assert_same_bits(F.linear(model.embed_tokens(ids), model.embed_tokens.weight), want)
    assert switch.calls == 2


def test_addmm_rounds_each_factor_and_the_sum(switch: Counting) -> None:
    x, weight = (matrix("normal", rows, 40, torch.bfloat16, rows) for rows in (5, 33))
    c = matrix("normal", 5, 33, torch.bfloat16, 9)
    acc = matmul(x, weight.t(), arch=switch.contract.arch)
    with switch.on():
        for shape in ((5, 33), (1, 33), (5, 1), (33,), (1,), ()):
            some = c[:1, :1].reshape(()) if shape == () else c[: shape[0], : shape[-1]]
            some = c[0, : shape[0]] if len(shape) == 1 else some
            got = torch.addmm(some, x, weight.t(), beta=0.3, alpha=-1.7)
            assert_same_bits(got, (acc * -1.7 + some.float() * 0.3).bfloat16())
            got = torch.addmm(some, x, weight.t())
            assert_same_bits(got, (acc + some.float()).bfloat16())
        nothing = torch.full((5, 33), torch.nan).bfloat16()
        got = torch.addmm(nothing, x, weight.t(), beta=0)
        assert_same_bits(got, acc.bfloat16())


def test_autograd_goes_through_the_switch(switch: Counting) -> None:
    x, weight = (matrix("normal", rows, 40, torch.float32, rows) for rows in (5, 33))
    bias = matrix("normal", 1, 33, torch.float32, 1)[0]
    gradient = matrix("normal", 5, 33, torch.float32, 2)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    with switch.on():
        F.linear(*leaves).backward(gradient)
    assert switch.calls == 3  # forward, and the products of two gradients
    contract = switch.contract
    assert_same_bits(leaves[0].grad, reference(gradient, weight.t(), contract=contract))
    assert_same_bits(leaves[1].grad, reference(gradient.t(), x.t(), contract=contract))
    assert_same_bits(leaves[2].grad, gradient.sum(0))  # a sum stays torch's own


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_other_dtypes_pass_through(switch: Counting, dtype: torch.dtype) -> None:
    a, b = torch.arange(6).view(2, 3).to(dtype), torch.arange(12).view(3, 4).to(dtype)
    calls = [
        lambda: torch.mm(a, b),
        lambda: torch.addmm(a[0, :1], a, b),
        lambda: torch.bmm(a[None], b[None]),
        lambda: F.linear(a, b.t()),
        lambda: torch.dot(a[0], a[1]),
        lambda: torch.mv(a, b[:, 0]),
        lambda: F.embedding(torch.tensor([1, 0]), a),
    ]
    before = [call() for call in calls]
    with switch.on():
        for call, want in zip(calls, before, strict=True):
            assert torch.equal(call(), want)
    assert switch.calls == 0


def test_torch_says_what_does_not_fit(switch: Counting) -> None:
    a = torch.ones(2, 3).bfloat16()
    with switch.on():
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            torch.mm(a, a)
        with pytest.raises(RuntimeError, match="dtype"):
            torch.mm(a, a.t().half())
        with pytest.raises(RuntimeError):
            torch.addmm(torch.ones(5).bfloat16(), a, a.t())
        with pytest.raises(RuntimeError):
            torch.bmm(a[None], a[None])
        with pytest.raises(RuntimeError):
            F.linear(a, a.t())
    assert switch.calls == 0


def test_embedding(switch: Counting) -> None:
    table, ids = matrix("normal", 9, 16, torch.bfloat16, 1), torch.tensor([[1, 8], [0, 1]])
    for index in (torch.int32, torch.int64):
        with switch.on():
            assert_same_bits(F.embedding(ids.to(index), table), table[ids])
    leaf = table.float().requires_grad_()
    with switch.on():
        F.embedding(ids, leaf, padding_idx=0).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 0].tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 1]


def test_ids_outside_are_told_on_leaving(switch: Counting) -> None:
    table = torch.ones(9, 4).bfloat16()

    def look_up(failure: type[Exception] | None = None) -> None:
        with switch.on():
            with switch.on():
                assert F.embedding(torch.tensor([0, 9]), table)[1].isnan().all()
            F.embedding(torch.tensor([0]), table)  # leaving an inner block does not wait
            if failure is not None:
                raise failure

    with pytest.raises(ValueError, match="token id 9 at position 1"):
        look_up()
    with pytest.raises(KeyError):  # what went wrong inside comes first
        look_up(KeyError)


def test_leaving_restores(switch: Counting) -> None:
    x, weight = (matrix("cancelling", rows, 40, torch.float32, rows) for rows in (5, 33))
    before = [F.linear(x, weight), torch.mm(x, weight.t())]
    for _ in range(3):
        with switch.on(), switch.on():
            F.linear(x, weight)
        assert_same_bits(F.linear(x, weight), before[0])
        assert_same_bits(torch.mm(x, weight.t()), before[1])
    assert switch.calls == 3
    with pytest.raises(KeyError), switch.on():
        raise KeyError
    F.linear(x, weight)
    assert switch.calls == 3
    with pytest.raises(RuntimeError, match="off already"):
        switch.leave()


def test_threads_share_the_switch(switch: Counting) -> None:
    x = matrix("normal", 2, 16, torch.bfloat16, 1)
    want = reference(x, x, contract=switch.contract)
    one_at_a_time, failures = threading.Lock(), []  # the interpreter knows no threads

    def work() -> None:
        try:
            for _ in range(5):
                with switch.on():
                    assert switch.describe().active
                    with one_at_a_time:
                        assert_same_bits(F.linear(x, x), want)
        except BaseException as error:
            failures.append(error)

    with switch.on():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert switch.describe().active
    assert switch.calls == 20


def test_describe_says_what_is_covered(switch: Counting) -> None:
    coverage = switch.describe()
    assert coverage.operations == OVERRIDDEN
    assert coverage.dtypes == (torch.bfloat16, torch.float16, torch.float32)
    assert not coverage.active
    with switch.on():
        text = str(switch.describe())
    assert "is on for CPU" in text
    for word in ("mm, ", "addmm", "linear", "embedding", "other dtypes", "bfloat16", "baddbmm"):
        assert word in text


@pytest.mark.parametrize(("value", "active"), [("1", True), ("0", False), ("", False)])
def test_the_environment_switches_it_on(
    fresh_python: FreshPython, value: str, active: bool
) -> None:
    code = (
        "from bitassay.kernels import invariant\n"
        "print(invariant.describe().active)\n"
        "with invariant.batch_invariant(): print(invariant.describe().active)\n"
        "print(invariant.describe().active)"
    )
    done = fresh_python.run(code, BITASSAY_BATCH_INVARIANT=value)
    assert done.stdout.split() == [str(active), "True", str(active)]


def test_another_value_of_the_variable_is_refused(fresh_python: FreshPython) -> None:
    done = fresh_python.run("import bitassay.kernels.invariant", BITASSAY_BATCH_INVARIANT="yes")
    assert done.returncode == 1
    assert "BITASSAY_BATCH_INVARIANT: expected 0 or 1, found 'yes'" in done.stderr
