"""Which device a rank runs on: a GPU of its own, or the CPU."""

from __future__ import annotations

import torch

from .rendezvous import Place


def bind(place: Place, device: str) -> torch.device:
    """Return the device of a rank, made the current one.

    Raises ValueError where there is no GPU of its own for it: two ranks cannot share one.
    """
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise ValueError(
            f"{place.name} needs GPU {place.local_rank} of its host, which has {count}: NCCL "
            "cannot share one between ranks: start fewer, or use CPUs"
        )
    own = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(own)
    torch.zeros((), device=own)  # opens the device now, before anyone counts the seconds
    return own
