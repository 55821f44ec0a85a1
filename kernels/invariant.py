"""The switch: inside it, torch's matrix products and embeddings run on these kernels.

Products of bf16, fp16 and fp32 CUDA tensors (fp32 always in full precision, whatever torch allows
for tf32) follow the order contract of the device, so no row's bits depend on the batch. What is
replaced is the kernel behind torch's dispatcher. Hence `nn.Linear`, a tied lm_head, autograd's
backward products and `torch.compile`'s calls of ATen are covered alike.

torch.compile: what Inductor hands to ATen is covered; what it generates itself (templates under
max-autotune, fused epilogues) is not. Compiled code is therefore outside the guarantee: run
eagerly. CUDA graphs: a graph replays the kernels it captured, so capture inside the switch; one
captured inside stays invariant outside, one captured outside does not become so. Run one step
before capture, so that kernels are compiled.

`BITASSAY_BATCH_INVARIANT=1` turns the switch on for the whole process when this is imported.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch

from bitassay.kernels.dispatcher_override import Coverage, Switch
from bitassay.reference.spec.arch import ARCHES
from bitassay.reference.spec.contract import Contract, default_contract

_VARIABLE = "BITASSAY_BATCH_INVARIANT"


def batch_invariant() -> AbstractContextManager[None]:
    """Return a context in which torch's products and embeddings on CUDA are batch-invariant.

    Process-wide: other threads are covered as well. Contexts nest; leaving the outermost restores
    what was there, after waiting for the device to raise ValueError if an embedding met an id
    outside its table. Enter it before threads multiply: torch's dispatcher does not guard a call
    in flight against a change of its kernel.
    """
    return _SWITCH.on()


def describe() -> Coverage:
    """Return what the switch overrides, for which dtypes, what passes through, and if it is on."""
    return _SWITCH.describe()


def _contract_of(device: torch.device) -> Contract:
    capability = torch.cuda.get_device_capability(device)
    for arch in ARCHES.values():
        if arch.compute_capability == capability:
            return default_contract(arch)
    known = ", ".join(ARCHES)
    raise RuntimeError(
        f"batch_invariant(): {device} has compute capability {capability[0]}.{capability[1]}, and "
        f"contracts exist for {known}: leave the switch off on this device"
    )


_SWITCH = Switch("CUDA", _contract_of)

_value = os.environ.get(_VARIABLE, "0")
if _value not in ("", "0", "1"):
    raise ValueError(f"{_VARIABLE}: expected 0 or 1, found {_value!r}")
if _value == "1":
    _SWITCH.enter()
