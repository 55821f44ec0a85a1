"""Which rounds of draft and verification a greedy stream takes, from how well drafts fit it.

Drafts after a token depend on the tokens before them alone, never on how many a round drafts. So
one record of the accepted counts of all tokens tells the rounds of every K.
"""

from __future__ import annotations

from collections.abc import Sequence


def draft_count(step: int, max_tokens: int, num_draft_tokens: int) -> int:
    """Return how many tokens the round at token `step` of max_tokens drafts.

    No more than could be emitted before the last token, which the target itself chooses.
    """
    return max(0, min(num_draft_tokens, max_tokens - 2 - step))


def rounds(accepted: Sequence[int], num_draft_tokens: int) -> list[tuple[int, int, int]]:
    """Return (t, drafted, accepted) of each round that makes tokens 1 … T-1 known.

    accepted: [T], for each token how many drafts after it the target chooses (`trace.Drafts`). A
    round at t makes tokens t+1 … t+accepted+1 known; there is none where T is 1. Raises ValueError
    for num_draft_tokens below 0 and for a count that is negative or beyond what can be drafted.
    """
    if num_draft_tokens < 0:
        raise ValueError(f"expected num_draft_tokens of at least 0, found {num_draft_tokens}")
    tokens, step, found = len(accepted), 0, []
    while step < tokens - 1:
        most, own = max(0, tokens - 2 - step), int(accepted[step])
        if not 0 <= own <= most:
            raise ValueError(
                f"token {step}: expected 0 … {most} accepted drafts of {tokens} tokens, found "
                f"{own}: the counts are of another stream, or of rounds that never began here"
            )
        drafted = draft_count(step, tokens, num_draft_tokens)
        found.append((step, drafted, min(drafted, own)))
        step += found[-1][2] + 1
    return found
