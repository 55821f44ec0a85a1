"""Recording: the reference gives a suite again, and the store keeps it if it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bitassay.golden.compare.diff import Comparison, compare
from bitassay.golden.errors import CorruptError, GoldenError, MissingError, OutdatedError
from bitassay.golden.inputs.job import Job, Progress
from bitassay.golden.inputs.suite_inputs import Inputs, load_inputs
from bitassay.golden.provenance import Provenance, another, provenance_now
from bitassay.golden.runs import oracle
from bitassay.golden.runs.process_pool import Crew, suitable_crew
from bitassay.golden.storage.journal import Journal, discard, opened
from bitassay.golden.storage.manifest import Entry
from bitassay.golden.storage.store import Golden, Store
from bitassay.golden.streams.token_stream import TokenStream
from bitassay.golden.suites import Suite


@dataclass(frozen=True)
class Request:
    """How to record. accept: publish what is new or different.

    sequential: generate one prompt and one token at a time, replaying nothing. prompts: only the
    first so many, compared and never published; None for all. jobs: processes, None for as many
    as are useful.
    """

    accept: bool = False
    sequential: bool = False
    prompts: int | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.accept and self.prompts is not None:
            raise GoldenError("--accept needs all prompts: a golden is never published in part")


@dataclass(frozen=True)
class Recording:
    """What regenerating a golden showed.

    how: what was run, in words. old: the store's golden, None where it had none. changed: fields
    of the identity that differ from it. comparison: of the streams, None where there is nothing
    comparable, and then `incomparable` says why. published: the new entry, None when nothing was
    written. kept: what was generated stays in a journal, so publishing it later takes no time.
    """

    how: str
    old: Golden | None
    changed: tuple[str, ...]
    comparison: Comparison | None
    incomparable: str | None
    published: Entry | None = None
    kept: bool = False

    @property
    def equal(self) -> bool:
        """Whether the store already holds exactly this."""
        found = self.comparison
        return found is not None and found.equal and found.whole and not self.changed


def record(
    store: Store,
    suite: Suite,
    arch: str,
    request: Request,
    *,
    progress: Progress,
    log: Callable[[str], None] = lambda text: None,
) -> Recording:
    """Obtain a golden's stream again and compare it with the store's; publish it if it may be.

    A new golden of a user's own model is published without being asked; any other only when the
    request accepts it. What is equal is not written again. Raises MissingError when the store has
    none and none may be written, and every error of reading the store unless a new golden is to
    replace the old one. log: called with what the user should know before the work begins.
    """
    name = f"{suite.name}/{arch}"
    old = _read_old(store, name, suite, request)
    may_publish = request.accept or (old is None and request.prompts is None)
    if may_publish:
        store.require_writable(accept=True)  # before the work, not after it
        store.require_whole_manifest()
    inputs = load_inputs(suite, arch)
    # Now, not hours later: the commit that is noted is the one whose code runs.
    provenance = provenance_now(inputs.identity)
    changed: tuple[str, ...] = ()
    if old:
        new_identity, old_identity = asdict(inputs.identity), asdict(old.provenance.identity)
        changed = tuple(key for key in new_identity if new_identity[key] != old_identity[key])
    count = len(inputs.job.prompts) if request.prompts is None else request.prompts
    job = inputs.first(count, inputs.job.steps)
    crew = suitable_crew(job, inputs.facts, request.jobs)
    if crew.note:
        log(f"{name}: {crew.note}")
    if old and not changed and not request.sequential:
        stream, how = _replay(job, inputs, old.stream.first(count), progress, crew)
        result = Recording(how, old, changed, None, None)
        result = _conclude(store, provenance, stream, result, may_publish)
        if suite.own and not store.refusal() and result.equal:
            discard(Path(store.root), inputs.identity)
        return result
    with _journal(store, suite, inputs, request, log) as journal:
        if journal and journal.begun:
            log(f"{name}: going on where an earlier recording ended ({journal.begun})")
        stream = oracle.generate(
            job,
            inputs.facts,
            progress,
            crew=crew,
            sequential=request.sequential,
            journal=journal,
        )
        how = _generated(request, changed)
        empty = Recording(how, old, changed, None, None, kept=journal is not None)
        result = _conclude(store, provenance, stream, empty, may_publish)
        if journal and not result.kept:
            journal.remove()
        return result


def _replay(
    job: Job, inputs: Inputs, expected: TokenStream, progress: Progress, crew: Crew
) -> tuple[TokenStream, str]:
    tokens = expected.tokens.tolist()
    replayed = oracle.replay_or_generate(job, inputs.facts, tokens, progress, crew=crew)
    how = "replayed with the reference"
    if replayed.regenerated:
        names = replayed.regenerated
        listed = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        how += f"; {len(names)} generated step by step, as other tokens are chosen: {listed}"
    return replayed.stream, how


def _generated(request: Request, changed: tuple[str, ...]) -> str:
    what = "generated one token at a time" if request.sequential else "generated step by step"
    why = ", ".join(map(another, changed))
    return f"{what} with the reference" + (f", as the golden is of {why}" if why else "")


def _conclude(
    store: Store, provenance: Provenance, stream: TokenStream, result: Recording, may_publish: bool
) -> Recording:
    """Compare with the old golden and publish what is not equal, if it may be."""
    if result.old:
        try:
            expected = result.old.stream
            if len(stream.prompt_names) < len(expected.prompt_names):
                expected = expected.first(len(stream.prompt_names))
            result = replace(result, comparison=compare(expected, stream))
        except GoldenError as error:
            result = replace(result, incomparable=str(error))
    if result.equal:
        return replace(result, kept=False)
    if not may_publish:
        return result
    entry = store.publish(stream, provenance, accept=True)
    return replace(result, published=entry, kept=False)


@contextmanager
def _journal(
    store: Store,
    suite: Suite,
    inputs: Inputs,
    request: Request,
    log: Callable[[str], None],
) -> Iterator[Journal | None]:
    """The journal of a user's own model; suites are soon done. None where nothing may be written.

    Nothing will be published there either, or the request would have been refused.
    """
    name = inputs.identity.name
    if not suite.own or request.prompts is not None or request.sequential:
        yield None
        return
    if refusal := store.refusal():
        log(f"{name}: what is generated is not kept: {refusal}")
        yield None
        return
    with opened(Path(store.root), inputs.identity) as journal:
        try:
            yield journal
        except KeyboardInterrupt:
            if not journal.empty:
                log(f"{name}: interrupted; the same command goes on from here")
            raise


def _read_old(store: Store, name: str, suite: Suite, request: Request) -> Golden | None:
    """The golden to compare with, None where there is none and one may be recorded.

    A damaged or outdated one may be recorded anew, if accepted.
    """
    try:
        return store.read(name)
    except GoldenError as error:
        if request.accept and isinstance(error, MissingError | CorruptError | OutdatedError):
            return None
        if suite.own and request.prompts is None and isinstance(error, MissingError):
            return None
        raise
