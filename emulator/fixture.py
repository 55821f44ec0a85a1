"""The pytest fixture `gpu_emulation`: import it into a conftest to have it there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bitassay.emulator import emulate
from bitassay.reference.spec.arch import EMULATED


@pytest.fixture(params=EMULATED)
def gpu_emulation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for each architecture, its kernels emulated; the value is its name."""
    with emulate(request.param):
        yield request.param
