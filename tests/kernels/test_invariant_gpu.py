"""The switch on CUDA: torch's products and embeddings give the contract's bits at every batch."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from bitassay.kernels.invariant import _contract_of, batch_invariant, describe
from bitassay.reference.linear import linear as reference
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def operands(cuda: torch.device, dtype: str, k: int = 512) -> tuple[torch.Tensor, ...]:
    x, weight = (matrix("cancelling", r, k, DTYPES[dtype], r).to(cuda) for r in (70, 264))
    return x, weight, matrix("normal", 1, 264, DTYPES[dtype], 3)[0].to(cuda)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_point(cuda: torch.device, dtype: str) -> None:
    x, weight, bias = operands(cuda, dtype)
    contract = _contract_of(x.device)
    plain, biased = (reference(x, weight, b, contract=contract) for b in (None, bias))
    pair = x.expand(2, -1, -1)
    with batch_invariant():
        for inference in (False, True):
            with torch.inference_mode(inference):
                assert_same_bits(torch.mm(x, weight.t()), plain)
                assert_same_bits(torch.matmul(x, weight.t()), plain)
                assert_same_bits(torch.mm(x, weight.t(), out=torch.empty_like(plain)), plain)
                assert_same_bits(torch.addmm(bias, x, weight.t()), biased)
                assert_same_bits(torch.bmm(pair, weight.t().expand(2, -1, -1))[1], plain)
                assert_same_bits(F.linear(x, weight), plain)
                assert_same_bits(F.linear(x, weight, bias), biased)
                swapped = F.linear(pair.transpose(0, 1), weight, bias)
                assert_same_bits(swapped[:, 1].contiguous(), biased)
                assert_same_bits(torch.mv(weight, x[2]), plain[2])
                assert_same_bits(torch.matmul(x[2], weight.t()), plain[2])
                assert_same_bits(torch.dot(x[2], weight[3]), plain[2, 3])


def test_an_lm_head_is_covered(cuda: torch.device) -> None:
    """The gap of the bug this began with: the logits of a row at M = 1 and inside a batch."""
    table = torch.nn.Embedding(4096, 4096, dtype=torch.bfloat16, device=cuda)
    head = torch.nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16, device=cuda)
    head.weight = table.weight
    ids = torch.arange(64, device=cuda)
    with batch_invariant(), torch.no_grad():
        assert_same_bits(table(ids), table.weight[ids])
        together = head(table(ids))
        assert_same_bits(F.linear(F.embedding(ids, table.weight), table.weight), together)
        for m in (1, 4, 16, 17):
            assert_same_bits(head(table(ids[:m])), together[:m])
    contract = _contract_of(together.device)
    hidden = table.weight.detach()[ids]
    assert_same_bits(together, reference(hidden, table.weight.detach(), contract=contract))


def test_autograd(cuda: torch.device) -> None:
    x, weight, _ = operands(cuda, "bf16")
    contract, gradient = _contract_of(x.device), matrix("normal", 70, 264, x.dtype, 5).to(cuda)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    with batch_invariant():
        F.linear(*leaves).backward(gradient)
    assert_same_bits(leaves[0].grad, reference(gradient, weight.t(), contract=contract))
    assert_same_bits(leaves[1].grad, reference(gradient.t(), x.t(), contract=contract))


def test_other_dtypes_pass_through_and_leaving_restores(cuda: torch.device) -> None:
    x, weight, _ = operands(cuda, "fp32")
    before = torch.mm(x, weight.t()), torch.mm(x.double(), weight.t().double())
    with batch_invariant():
        assert describe().active
        assert_same_bits(torch.mm(x.double(), weight.t().double()), before[1])
    assert not describe().active
    assert_same_bits(torch.mm(x, weight.t()), before[0])


def test_threads(cuda: torch.device) -> None:
    x, weight, bias = operands(cuda, "bf16")
    want = reference(x, weight, bias, contract=_contract_of(x.device))
    failures = []

    def work() -> None:
        try:
            for _ in range(20):
                with batch_invariant():
                    assert_same_bits(F.linear(x, weight, bias), want)
        except BaseException as error:
            failures.append(error)

    with batch_invariant():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_ids_outside_are_told_on_leaving(cuda: torch.device) -> None:
    table = torch.ones(9, 64, device=cuda)
    with pytest.raises(ValueError, match="token id 9 at position 1"), batch_invariant():
        assert F.embedding(torch.tensor([0, 9], device=cuda), table)[1].isnan().all()


def test_a_graph_keeps_what_it_captured(cuda: torch.device) -> None:
    x, weight, bias = operands(cuda, "bf16")
    want = reference(x, weight, bias, contract=_contract_of(x.device))
    with batch_invariant():
        F.linear(x, weight, bias)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = F.linear(x, weight, bias)
    out.zero_()
    graph.replay()
    assert_same_bits(out, want)
