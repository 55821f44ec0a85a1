"""A model of integers that remembers what was written to every slot, to try the scheduling on.

The next token is a hash of all ids so far. A slot holds the position it was written for and the
hash of the ids up to there, so reading one that is stale, freed too early, not yet written or of a
rejected draft gives another hash than the sequence has: every row checks all slots it would attend
to. The head's slots hold the hash with the next id.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from bitassay.engine.config import EngineConfig
from bitassay.engine.scheduling.step_plan import Result, Rows
from bitassay.reference.spec.contract import DRAFT_DEPTH

SIZE = 16
_MODULUS = (1 << 61) - 1


def mix(before: int, token: int) -> int:
    """Return the hash of a prefix continued by one id."""
    return (before * 6364136223846793005 + (token + 1) * 1442695040888963407) % _MODULUS


def hashes(ids: Sequence[int]) -> list[int]:
    """Return the hash of each prefix of ids, the empty one first."""
    found = [1]
    for token in ids:
        found.append(mix(found[-1], token))
    return found


class FakeModel:
    """What it says after any prefix, by its hash; `skill` tenths of its drafts are right."""

    def __init__(self, vocab_size: int = 6, skill: int = 7, positions: int = 400) -> None:
        self.vocab_size, self.skill = vocab_size, skill
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=positions)
        self.ops = SimpleNamespace(fold=None)  # there are no fingerprints to be folded

    def check(self) -> None:
        """Find nothing: there is no device."""

    def choose(self, prefix: int) -> int:
        """Return the target's token after a prefix."""
        return prefix // 7 % self.vocab_size

    def draft(self, prefix: int) -> int:
        """Return the head's token after a prefix."""
        wrong = prefix // 1009 % 10 >= self.skill
        return (self.choose(prefix) + wrong) % self.vocab_size

    def stream(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Return the tokens that plain greedy decoding gives."""
        prefix, tokens = hashes(prompt)[-1], []
        for _ in range(max_tokens):
            tokens.append(self.choose(prefix))
            prefix = mix(prefix, tokens[-1])
        return tokens

    def accepted(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Return how many drafts after each token are right, as a golden has it."""
        found, total = [], len(tokens)
        for t in range(total):
            prefix = hashes([*prompt, *tokens[: t + 1]])[-1]
            right = 0
            while right < min(DRAFT_DEPTH, total - 2 - t):
                if self.draft(prefix) != tokens[t + 1 + right]:
                    break
                prefix = mix(prefix, tokens[t + 1 + right])
                right += 1
            found.append(right)
        return found


class FakeRunner:
    """Runs steps of the fake model; any slot that does not hold what it must fails at once.

    prompts: of every request that will be made, by its number, may grow. most_steps: how many
    steps there may be.
    """

    row_fingerprints = draft_fingerprints = None

    def __init__(self, model: FakeModel, config: EngineConfig, most_steps: int = 10**9) -> None:
        assert config.num_blocks is not None
        self.model, self.config, self.most_steps = model, config, most_steps
        self.target: list[object] = [None] * config.num_blocks * SIZE
        self.head: list[object] = [None] * config.num_blocks * SIZE
        self.prompts: dict[int, list[int]] = {}
        self.ended: dict[int, int] = {}
        self._truth: dict[int, list[int]] = {}
        self.steps: list[list[Rows]] = []

    def true_ids(self, request: int, count: int) -> list[int]:
        """Return the ids that a request's sequence must have."""
        truth = self._truth.setdefault(request, list(self.prompts[request]))
        if len(truth) < count:
            truth += self.model.stream(truth, count - len(truth))
        return truth[:count]

    def run(self, rows: list[Rows]) -> list[Result]:
        """Write all rows' slots, then read them, as the layers of a model do."""
        self.steps.append(list(rows))
        assert len(self.steps) <= self.most_steps, "no end in sight"
        assert 0 < len(rows) <= self.config.max_num_seqs
        assert sum(len(part.ids) for part in rows) <= self.config.max_num_batched_tokens
        assert len({part.request for part in rows}) == len(rows)
        written: list[int] = []
        for part in rows:
            known = part.first + len(part.ids) - part.drafts
            truth = self.true_ids(part.request, known + 1)
            assert part.ids[: len(part.ids) - part.drafts] == truth[part.first : known]
            assert part.next_id == (None if part.chooses else truth[known])
            assert len(part.ids) > part.drafts >= 0, "no row of a known id"
            assert part.chooses or part.drafts == 0
            assert part.first + len(part.ids) - 1 <= part.limit
            for i, after in enumerate(hashes(truth[: part.first] + part.ids)[part.first + 1 :]):
                written.append(self._write(self.target, part, part.first + i, after))
        assert len(set(written)) == len(written), "two rows of a step went to one slot"
        return [result for part in rows if (result := self._rest(part)) is not None]

    def end(self, request: int, table: list[int], length: int) -> None:
        """Read, as fingerprints are, every slot of a sequence that ended."""
        assert request not in self.ended
        self.ended[request] = length
        truth = self.true_ids(request, length + 1)
        self._check(self.target, table, hashes(truth[:length])[1:], f"end of request {request}")
        if self.config.num_speculative_tokens:
            self._check(self.head, table, hashes(truth)[2:], f"end of request {request}, head")

    def _rest(self, part: Rows) -> Result | None:
        """Check what the target's rows read, then choose, verify and draft."""
        where = f"request {part.request}, rows {part.first} … {part.first + len(part.ids) - 1}"
        start = part.first + len(part.ids) - 1 - part.drafts
        truth = self.true_ids(part.request, part.first)
        prefixes = hashes(truth + part.ids)
        self._check(self.target, part.table, prefixes[1:], where)
        choices = [self.model.choose(prefix) for prefix in prefixes[start + 1 :]]
        drafts = part.ids[len(part.ids) - part.drafts :]
        accepted = 0
        while accepted < part.drafts and drafts[accepted] == choices[accepted]:
            accepted += 1
        if self.config.num_speculative_tokens:
            ids = truth + part.ids
            nexts = ids[part.first + 1 : start + 1]
            nexts += choices if part.chooses else [*ids[start + 1 :], part.next_id]
            for i, (prefix, after) in enumerate(
                zip(prefixes[part.first + 1 :], nexts, strict=True), part.first
            ):
                self._write(self.head, part, i, mix(prefix, after))
        if not part.chooses:
            if self.config.num_speculative_tokens:
                whole = hashes([*truth, *part.ids, part.next_id])
                self._check(self.head, part.table, whole[2:], f"{where}, head")
            return None
        tokens = choices[: accepted + 1]
        found = truth + part.ids[: len(part.ids) - part.drafts] + tokens
        return Result(part.request, tokens, accepted, self._draft(part, found, where), None)  # type: ignore[arg-type]

    def _draft(self, part: Rows, ids: list[int], where: str) -> list[int]:
        """Return K drafts after ids; the last of ids is the base row's next."""
        if not self.config.num_speculative_tokens:
            return []
        base = len(ids) - 2
        prefixes = hashes(ids)
        self._check(self.head, part.table, prefixes[2:], f"{where}, base row")
        drafts = [self.model.draft(prefixes[-1])]
        for j in range(1, self.config.num_speculative_tokens):
            prefixes.append(mix(prefixes[-1], drafts[-1]))
            if base + j > part.limit:
                drafts.append(self.model.vocab_size + 99)  # nobody may use it
                continue
            self._write(self.head, part, base + j, prefixes[-1])
            self._check(self.head, part.table, prefixes[2:], f"{where}, chain row {j}")
            drafts.append(self.model.draft(prefixes[-1]))
        return drafts

    def _write(self, slots: list[object], part: Rows, position: int, value: int) -> int:
        slot = part.table[position // SIZE] * SIZE + position % SIZE
        slots[slot] = (position, value)
        return slot

    def _check(
        self, slots: list[object], table: list[int], wanted: Sequence[int], where: str
    ) -> None:
        for position, value in enumerate(wanted):
            slot = table[position // SIZE] * SIZE + position % SIZE
            assert slots[slot] == (position, value), (
                f"{where}: slot {slot} of position {position} holds {slots[slot]}"
            )
