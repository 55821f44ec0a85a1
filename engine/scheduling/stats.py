"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Counts since the engine was made.

    steps: steps that ran rows. tokens: generated. rounds: verifications of at least one draft.
    drafted, accepted: drafts in those. prefix_hit_tokens: positions that were not computed because
    a registered block had them, for preempted requests too.
    """

    steps: int = 0
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens a round: the accepted drafts and the target's own; 1.0 where none was drafted."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0
