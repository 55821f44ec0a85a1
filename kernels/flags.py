"""Errors found on the device: written without waiting for it, read at the end of a step."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

CLEAR = (1 << 63) - 1  # every place is below it, so the least value written is the first error


class Flag:
    """One int64 per device that keeps the first error as ``row << 32 | value``, or CLEAR."""

    def __init__(self) -> None:
        self._words: dict[torch.device, Tensor] = {}
        self._lock = threading.Lock()

    def on(self, device: torch.device) -> Tensor:  # -> [1]
        """Return the word of a device, made on first use and kept, so that graphs may hold it."""
        with self._lock:
            if device not in self._words:
                self._words[device] = torch.full((1,), CLEAR, dtype=torch.int64, device=device)
            return self._words[device]

    def note(self, place: Tensor) -> None:
        """Keep the least of int64 places, on their device and without waiting for it."""
        if place.numel():
            word = self.on(place.device)
            word.scatter_reduce_(0, torch.zeros_like(place), place, "amin")

    def take(self) -> tuple[int, int] | None:
        """Wait for every device, clear the flag, and return the first (row, value), or None."""
        with self._lock:
            found = [int(word) for word in self._words.values()]
            for word in self._words.values():
                word.fill_(CLEAR)
        first = min(found, default=CLEAR)
        value = (first & 0xFFFFFFFF) - (first & 0x80000000) * 2  # the low half is an int32
        return None if first == CLEAR else (first >> 32, value)
