"""When decoding runs in CUDA graphs."""

from __future__ import annotations

import pytest

from bitassay.engine.policy import enforce_eager

CPU, L4, H100 = None, (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("capability", "asked", "force", "eager"),
    [
        (CPU, None, False, True),
        ((8, 0), None, False, True),
        (L4, None, False, True),
        (H100, None, False, False),
        ((10, 0), None, False, False),
        (L4, True, False, True),
        (H100, True, False, True),
        (H100, False, False, False),
        (CPU, None, True, False),
        (L4, None, True, False),
        (L4, False, True, False),
        (CPU, False, True, False),
    ],
)
def test_the_policy(
    capability: tuple[int, int] | None, asked: bool | None, force: bool, eager: bool
) -> None:
    assert enforce_eager(capability, asked, force) is eager


@pytest.mark.parametrize(
    ("capability", "found"), [(L4, "capability 8.9"), (CPU, "a CPU, which has no CUDA graphs")]
)
def test_graphs_below_9_0_are_refused(capability: tuple[int, int] | None, found: str) -> None:
    with pytest.raises(ValueError, match=rf"expected compute capability 9.0 .* found .*{found}"):
        enforce_eager(capability, False, False)
