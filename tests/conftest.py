"""Fixtures for every room's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def cuda():
    """The CUDA device; a test that asks for it is skipped, aloud, where there is none."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
