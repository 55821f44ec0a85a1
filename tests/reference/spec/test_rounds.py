"""Which rounds a stream takes: against a literal run over words that say yes or no."""

from __future__ import annotations

import random

import pytest

from bitassay.reference.spec.contract import DRAFT_DEPTH
from bitassay.reference.spec.rounds import draft_count, rounds


def test_rounds_by_hand() -> None:
    """Six tokens: after token 0 three drafts are right, after token 2 none, and so on."""
    accepted = [3, 2, 0, 1, 0, 0]
    assert rounds(accepted, 0) == [(t, 0, 0) for t in range(5)]
    assert rounds(accepted, 1) == [(0, 1, 1), (2, 1, 0), (3, 1, 1)]
    assert rounds(accepted, 2) == [(0, 2, 2), (3, 1, 1)]
    assert rounds(accepted, 5) == [(0, 4, 3), (4, 0, 0)]


def test_short_streams() -> None:
    assert rounds([], 3) == []
    assert rounds([0], 3) == []
    assert rounds([0, 0], 3) == [(0, 0, 0)]  # the last token is never drafted
    assert rounds([1, 0, 0], 3) == [(0, 1, 1)]
    assert rounds([0, 0, 0], 3) == [(0, 1, 0), (1, 0, 0)]


@pytest.mark.parametrize("drafts", range(DRAFT_DEPTH + 1))
def test_rounds_are_those_of_the_loop(drafts: int) -> None:
    """Every token is emitted once, in order, and no draft beyond the last but one."""
    rng = random.Random(drafts)
    for _ in range(200):
        tokens = rng.randrange(1, 30)
        accepted = [rng.randint(0, max(0, min(DRAFT_DEPTH, tokens - 2 - t))) for t in range(tokens)]
        known = 1
        for t, drafted, right in rounds(accepted, drafts):
            assert t == known - 1
            assert drafted == draft_count(t, tokens, drafts)
            assert drafted <= drafts
            assert known + drafted + 1 <= tokens  # room for all drafts and the target's own
            assert right == min(drafted, accepted[t])
            known += right + 1
        assert known == tokens


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="num_draft_tokens of at least 0, found -1"):
        rounds([0], -1)
    with pytest.raises(ValueError, match="token 1: expected 0 … 0 accepted drafts of 3 tokens"):
        rounds([0, 1, 0], 2)
    with pytest.raises(ValueError, match="token 0: .* found -1: .* rounds that never began"):
        rounds([-1, 0, 0], 2)
