"""When decoding runs in CUDA graphs."""

from __future__ import annotations

import pytest

from bitassay.engine.step.cuda_graphs import enforce_eager
from bitassay.reference.spec.arch import get_arch

CPU, L4, H100 = None, "sm_89", "sm_90"


@pytest.mark.parametrize(
    ("arch", "asked", "force", "eager"),
    [
        (CPU, None, False, True),
        ("sm_80", None, False, True),
        (L4, None, False, True),
        (H100, None, False, False),
        (L4, True, False, True),
        (H100, True, False, True),
        (H100, False, False, False),
        (CPU, None, True, False),
        (L4, None, True, False),
        (L4, False, True, False),
        (CPU, False, True, False),
    ],
)
def test_the_policy(arch: str | None, asked: bool | None, force: bool, eager: bool) -> None:
    assert enforce_eager(arch and get_arch(arch), asked, force) is eager


@pytest.mark.parametrize(
    ("arch", "found"), [(L4, "sm_89"), (CPU, "a CPU, which has no CUDA graphs")]
)
def test_graphs_where_they_are_not_trusted_are_refused(arch: str | None, found: str) -> None:
    with pytest.raises(ValueError, match=rf"expected an architecture .*sm_90.* found {found}"):
        enforce_eager(arch and get_arch(arch), False, False)
