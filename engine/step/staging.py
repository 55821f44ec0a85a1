"""Host memory that steps are packed in and answers come back to; pinned where there is a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_TURNS = 2  # a step may be packed while the one before is still being copied


class Staging:
    """Buffers in turns for what goes up, and one for what comes down."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pinned = device, device.type == "cuda"
        self._up = [torch.empty(0, dtype=torch.uint8) for _ in range(_TURNS)]
        self._copied: list[torch.cuda.Event | None] = [None] * _TURNS
        self._turn = 0
        self._down = torch.empty(0, dtype=torch.int64)

    def take(self, size: int) -> tuple[Tensor, np.ndarray[Any, Any]]:
        """Return so many bytes on the host, as a tensor and as an array, for the next step."""
        self._turn = (self._turn + 1) % _TURNS
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()  # of two steps ago
        if len(self._up[self._turn]) < size:
            self._up[self._turn] = torch.empty(2 * size, dtype=torch.uint8, pin_memory=self._pinned)
        taken = self._up[self._turn][:size]
        return taken, taken.numpy()

    def sent(self) -> None:
        """Note that the copy of what was taken last is on its way."""
        if self._pinned:
            self._copied[self._turn] = torch.cuda.current_stream(self._device).record_event()

    def fetch(self, answer: Tensor) -> list[int]:
        """Wait for int64 [N] of the device, and with it for the step."""
        if not self._pinned:
            return list(answer.tolist())
        size = len(answer)
        if len(self._down) < size:
            self._down = torch.empty(2 * size, dtype=torch.int64, pin_memory=True)
        self._down[:size].copy_(answer, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return list(self._down[:size].tolist())
