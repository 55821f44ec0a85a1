"""Replacing kernels behind torch's dispatcher, and putting them back."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bitassay.kernels import embedding as _embedding
from bitassay.kernels.overrides import DTYPES, NOT_COVERED, OVERRIDES
from bitassay.reference.spec.contract import Contract


@dataclass(frozen=True)
class Coverage:
    """What a switch does. operations: ATen's names. not_covered: what keeps torch's kernels."""

    active: bool
    dispatch_key: str
    operations: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    not_covered: tuple[str, ...]

    def __str__(self) -> str:
        """Say it in four lines."""
        return (
            f"batch invariance is {'on' if self.active else 'off'} for {self.dispatch_key}\n"
            f"runs on invariant kernels: {', '.join(self.operations)}\n"
            f"for dtypes: {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}\n"
            f"passes through: {'; '.join(self.not_covered)}"
        )


class Switch:
    """Overrides for one dispatch key, counted, so that contexts may nest across threads.

    contract_of: the contract of a device, asked at every call.
    """

    def __init__(self, dispatch_key: str, contract_of: Callable[[torch.device], Contract]) -> None:
        self._key = dispatch_key
        self._contract_of = contract_of
        self._lock = threading.RLock()
        self._count = 0
        self._library: torch.library.Library | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Turn the overrides on for a block; see `invariant.batch_invariant`."""
        self.enter()
        try:
            yield
        except BaseException:
            self.leave()
            raise
        if self.leave() and not _capturing():
            _embedding.check()

    def enter(self) -> None:
        """Count one more user; the first installs the overrides."""
        with self._lock:
            if self._count == 0:
                self._install()
            self._count += 1

    def leave(self) -> bool:
        """Count one user less; the last restores torch's kernels and is told so by True."""
        with self._lock:
            if self._count == 0:
                raise RuntimeError("the switch is off already: every leave() needs its enter()")
            self._count -= 1
            if self._count == 0 and self._library is not None:
                self._library._destroy()
                self._library = None
            return self._count == 0

    def describe(self) -> Coverage:
        """Return what the switch overrides and whether it is on."""
        with self._lock:
            active = self._count > 0
        operations = tuple(name for name, _, _ in OVERRIDES)
        return Coverage(active, self._key, operations, DTYPES, NOT_COVERED)

    def _install(self) -> None:
        library = torch.library.Library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                # Replacing torch's kernel is the purpose, and torch warns of just that.
                warnings.filterwarnings("ignore", message="(?s).*previously registered kernel.*")
                for name, function, with_autograd in OVERRIDES:
                    self._override(library, name, function, self._key)
                    if with_autograd:
                        self._override(library, name, function, f"Autograd{self._key}")
        except BaseException:
            library._destroy()
            raise
        self._library = library

    def _override(
        self, library: torch.library.Library, name: str, function: Callable[..., Any], key: str
    ) -> None:
        kernel = None
        if torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"aten::{name}", key):
            kernel = torch.library.get_kernel(f"aten::{name}", key)

        def run(keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
            def original() -> Any:
                if kernel is None:
                    raise NotImplementedError(f"aten::{name} has no kernel for {key}")
                return kernel.call_boxed(keyset, *args, **kwargs)

            return function(original, self._contract_of, *args, **kwargs)

        library.impl(name, run, key, with_keyset=True)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
