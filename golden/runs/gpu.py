"""This machine's GPU, as a golden's confirmation notes it."""

from __future__ import annotations

import subprocess
from importlib.metadata import version

import torch

from bitassay.golden.errors import CannotRunError
from bitassay.golden.provenance import Confirmation, now


def describe_gpu() -> Confirmation:
    """Return this machine, driver and versions; CannotRunError where the driver is unknown."""
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
