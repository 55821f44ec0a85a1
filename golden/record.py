"""Recording: the reference generates a suite again, and the store keeps it if it is accepted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from bitassay.reference.checkpoint import Checkpoint, load_checkpoint, load_tokenizer
from bitassay.reference.contract import default_contract

from .compare import Comparison, compare
from .errors import CorruptError, GoldenError, MissingError, PromptError
from .manifest import Entry
from .prompts import encode_prompts, load_prompts
from .provenance import Identity, provenance_now
from .runners import Job, Progress, generate
from .store import Golden, Store
from .suites import Suite, find_suite


@dataclass(frozen=True)
class Inputs:
    """All that a golden follows from: the model, the encoded prompts, and their digests."""

    checkpoint: Checkpoint
    identity: Identity
    job: Job


@dataclass(frozen=True)
class Recording:
    """What regenerating a golden showed.

    old: the store's golden, None where it had none. changed: fields of the identity that differ
    from it. comparison: of the streams, None where there is nothing comparable, and then
    `incomparable` says why. published: the new entry, None when nothing was written.
    """

    old: Golden | None
    changed: tuple[str, ...]
    comparison: Comparison | None
    incomparable: str | None
    published: Entry | None

    @property
    def equal(self) -> bool:
        """Whether the store already holds exactly this."""
        return self.comparison is not None and self.comparison.equal and not self.changed


def load_inputs(suite: Suite, arch: str) -> Inputs:
    """Read a suite's model, tokenizer and prompts; errors say which of them is unfit and why."""
    checkpoint = load_checkpoint(suite.model)
    prompts, prompts_digest = load_prompts(suite.prompts)
    vocab_size = checkpoint.config.get("vocab_size")
    if type(vocab_size) is not int:
        raise PromptError(f"{Path(suite.model, 'config.json')}: vocab_size is not an integer")
    encoded = encode_prompts(prompts, load_tokenizer(suite.model), vocab_size)
    contract = default_contract(arch)
    identity = Identity(
        suite=suite.name,
        arch=arch,
        contract_version=contract.version,
        contract=contract.digest,
        model=checkpoint.digest,
        tokenizer=str(checkpoint.tokenizer_digest),
        prompts=prompts_digest,
    )
    names = tuple(prompt.id for prompt in prompts)
    job = Job(Path(suite.model), arch, names, tuple(map(tuple, encoded)), suite.tokens)
    return Inputs(checkpoint, identity, job)


def record(store: Store, name: str, *, accept: bool, progress: Progress) -> Recording:
    """Generate a golden again and compare it with the store; publish it if `accept` says so.

    What is equal is not written again. Raises MissingError when the store has none and nothing is
    accepted, and every error of reading the store unless a new golden is to replace the old one.
    """
    suite, arch = find_suite(name)
    if accept:
        store.require_writable(accept)  # before the work, not after it
    old = _read_old(store, name, accept)
    inputs = load_inputs(suite, arch)
    stream = generate(inputs.job, inputs.checkpoint, progress)
    comparison, incomparable = None, None
    changed: tuple[str, ...] = ()
    if old:
        new_identity, old_identity = asdict(inputs.identity), asdict(old.provenance.identity)
        changed = tuple(key for key in new_identity if new_identity[key] != old_identity[key])
        try:
            comparison = compare(old.stream, stream)
        except GoldenError as error:
            incomparable = str(error)
    result = Recording(old, changed, comparison, incomparable, None)
    if result.equal or not accept:
        return result
    entry = store.publish(stream, provenance_now(inputs.identity), accept=accept)
    return Recording(old, changed, comparison, incomparable, entry)


def _read_old(store: Store, name: str, accept: bool) -> Golden | None:
    """The golden to compare with. A missing or damaged one may be recorded anew, if accepted."""
    try:
        return store.read(name)
    except GoldenError as error:
        if accept and isinstance(error, MissingError | CorruptError):
            return None
        raise
