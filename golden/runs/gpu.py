"""Runs compiled kernels on this machine's GPU, or says why it cannot."""

from __future__ import annotations

import subprocess
from importlib.metadata import version

import torch

from bitassay.golden.errors import CannotRunError
from bitassay.golden.inputs.job import Job
from bitassay.golden.inputs.model_info import ModelFacts
from bitassay.golden.provenance import Confirmation, now
from bitassay.golden.runs.collect import run_engine
from bitassay.golden.streams.token_stream import TokenStream
from bitassay.reference.spec.arch import get_arch


def gpu_arch() -> str:
    """Return the architecture of the current GPU (`sm_90`); CannotRunError without one."""
    if not torch.cuda.is_available():
        raise CannotRunError(
            "no GPU: --with gpu needs a CUDA device that torch can use, and nothing else was run "
            "in its place; on a CPU use --with interpreter or --with reference"
        )
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def require_gpu(arch: str) -> None:
    """Raise CannotRunError unless the current GPU is of this architecture."""
    found = gpu_arch()
    if get_arch(arch).name != found:
        raise CannotRunError(
            f"the GPU ({torch.cuda.get_device_name()}) is {found}, the golden is {arch}: check "
            f"the golden of {found}, or run this one on a GPU of its kind"
        )


def run_gpu(job: Job, facts: ModelFacts) -> TokenStream:
    """Return what the engine generates on the GPU; CannotRunError unless it is the job's kind."""
    require_gpu(job.arch)
    if _interpreting():
        raise CannotRunError(
            "TRITON_INTERPRET is set, so kernels would be interpreted on the CPU: unset it"
        )
    return run_engine(job, facts, device="cuda")


def describe_gpu() -> Confirmation:
    """Return this machine, driver and versions, as a golden's confirmation notes them."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotRunError(
            f"the driver's version is unknown: nvidia-smi failed ({error})"
        ) from None
    return Confirmation(
        gpu=torch.cuda.get_device_name(),
        driver=answer.splitlines()[0].strip(),
        triton=version("triton"),
        torch=torch.__version__,
        date=now(),
    )


def _interpreting() -> bool:
    """Whether kernels of this process are interpreted: triton settles it when it is imported."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    return bool(triton.knobs.runtime.interpret) or isinstance(
        triton.language.cdiv, InterpretedFunction
    )
