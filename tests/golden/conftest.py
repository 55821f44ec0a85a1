"""What a developer's or CI's environment says must not reach these tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a developer's or CI's environment says must not reach these tests."""
    for name in ("CI", "BITASSAY_STORE", "TRITON_INTERPRET", "BITASSAY_ARCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
