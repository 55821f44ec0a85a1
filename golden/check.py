"""Checking: run something, and compare every bit of what it said with the golden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from bitassay.golden.compare.diff import Comparison, compare
from bitassay.golden.errors import CannotRunError, GoldenError, StaleError
from bitassay.golden.inputs.job import Progress
from bitassay.golden.inputs.suite_inputs import Inputs, load_inputs
from bitassay.golden.provenance import Identity, another
from bitassay.golden.runs import oracle
from bitassay.golden.runs.check_options import Options, Way
from bitassay.golden.runs.engine_options import SweepOptions
from bitassay.golden.runs.engine_run import Sweep, run_engine_way
from bitassay.golden.runs.gpu import describe_gpu, gpu_arch, run_gpu
from bitassay.golden.runs.interpreter import estimate, run_interpreter
from bitassay.golden.runs.process_pool import suitable_crew
from bitassay.golden.storage.manifest import Entry
from bitassay.golden.storage.store import Golden, Store
from bitassay.golden.streams.token_stream import TokenStream
from bitassay.golden.suites import Suite, find_suite, own_suite

Tell = Callable[[str], None]


@dataclass(frozen=True)
class OwnModel:
    """A user's own model, prompts and draft head, if any, from which a golden was recorded."""

    model: Path
    prompts: Path
    draft: Path | None = None


@dataclass(frozen=True)
class Checked:
    """A comparison with the golden, and its new manifest entry if it was confirmed.

    how: what was run, in words. missing: what the run was made for and did not come to.
    """

    golden: Golden
    comparison: Comparison
    confirmed: Entry | None
    how: str
    missing: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether every bit is equal, and what was to be tested happened."""
        return self.comparison.equal and not self.missing


Runs = dict[str, tuple[str, Callable[[], Checked]]]


def check(
    store: Store,
    name: str,
    options: Options,
    *,
    own: OwnModel | None = None,
    progress: Progress,
    tell: Tell = lambda text: None,
) -> Checked:
    """Run what the options name and compare it with the golden `name`.

    own: what the golden was recorded from, where that is no suite. tell: called with what the
    user should know before the work begins. Raises GoldenError when it cannot be judged: a
    missing, damaged or stale golden, or something that cannot run here.
    """
    if options.confirm:
        store.require_writable(accept=True)
    golden, inputs = current(store, name, own)
    expected = golden.stream.first(options.prompts, options.tokens)
    has_draft = inputs.job.draft is not None
    missing: tuple[str, ...] = ()
    if options.engine or (has_draft and options.for_drafts):
        engine = options.for_drafts
        assert engine is not None
        how = replace(engine, draft_tokens=engine.drafting(has_draft)).description
        found = run_engine_way(inputs, expected, engine, tell)
        comparison, missing = found.comparison, found.missing
    else:
        how = options.description
        comparison = compare(expected, _run(inputs, expected, options, progress, tell))
    confirmed = None
    if options.confirm and comparison.equal:
        confirmed = store.confirm(golden, describe_gpu())
    return Checked(golden, comparison, confirmed, how, missing)


def check_sweep(
    store: Store, name: str, options: Options, sweep: SweepOptions, *, own: OwnModel | None = None
) -> Runs:
    """Return the runs of a sweep beside a golden, by number: what each is, and what makes it.

    They are to be made in order. options: which prompts and tokens. Raises GoldenError as `check`.
    """
    golden, inputs = current(store, name, own)
    runs = Sweep(inputs, golden.stream.first(options.prompts, options.tokens), sweep)

    def made(number: int, how: str) -> Checked:
        found = runs.check(number)
        return Checked(golden, found.comparison, None, how, found.missing)

    descriptions = enumerate(run.description for run in runs.options)
    return {str(i + 1): (how, partial(made, i, how)) for i, how in descriptions}


def current(store: Store, name: str, own: OwnModel | None) -> tuple[Golden, Inputs]:
    """Return a golden and what it follows from; GoldenError unless that is as it was recorded."""
    if own is None:
        find_suite(name)  # a misspelt name, rather than a golden that is missing
    golden = store.read(name)
    inputs = load_inputs(*_suite(golden, own))
    require_current(golden, inputs.identity, store)
    return golden, inputs


def require_current(golden: Golden, identity: Identity, store: Store) -> None:
    """Raise StaleError when the golden was recorded under another contract, model or prompts."""
    recorded, here = asdict(golden.provenance.identity), asdict(identity)
    name = identity.name
    drafts = bool(recorded["draft_model"])
    advice = store.recording(name, accept=False, tokens=identity.tokens, drafts=drafts)
    review = "record it again and review the difference"
    if recorded["contract"] != here["contract"]:
        raise StaleError(
            f"golden {name} was recorded under contract {recorded['contract_version']} "
            f"({recorded['contract'][:12]}…), this build has contract {here['contract_version']} "
            f"({here['contract'][:12]}…): {review}",
            advice=advice,
        )
    for key in ("model", "draft_model", "tokenizer", "prompts", "rotary_table"):
        if recorded[key] != here[key]:
            was, found = (
                side[key][:12] + "…" if side[key] else "none" for side in (recorded, here)
            )
            forgotten = key == "draft_model" and not here[key]
            mend = "add --draft HEAD" if forgotten else "restore it"
            raise StaleError(
                f"golden {name} was recorded with {another(key)} ({was}) than "
                f"found here ({found}): {mend}, or {review}",
                advice=advice,
            )
    if recorded["tokens"] != here["tokens"]:
        raise StaleError(
            f"golden {name} was recorded with {recorded['tokens']} tokens a prompt, here it is "
            f"{here['tokens']}: {review}",
            advice=advice,
        )


def of_this_gpu(names: list[str]) -> tuple[list[str], list[str]]:
    """Return those goldens that this machine's GPU can be checked against, and the others.

    Raises CannotRunError when there is no GPU, or none of them is for its architecture.
    """
    arch = gpu_arch()
    fitting = [name for name in names if find_suite(name)[1] == arch]
    if not fitting:
        raise CannotRunError(
            f"the GPU is {arch}, and there is no golden for it: {', '.join(names)}"
        )
    return fitting, [name for name in names if name not in fitting]


def _suite(golden: Golden, own: OwnModel | None) -> tuple[Suite, str]:
    identity = golden.provenance.identity
    if own is None:
        return find_suite(identity.name)
    arches = (identity.arch,)
    suite = own_suite(
        own.model,
        own.prompts,
        identity.tokens,
        name=identity.suite,
        arches=arches,
        draft=own.draft,
    )
    return suite, identity.arch


def _run(
    inputs: Inputs, expected: TokenStream, options: Options, progress: Progress, tell: Tell
) -> TokenStream:
    job = replace(
        inputs.first(len(expected.prompt_names), expected.steps),
        batch_size=options.batch_size,
        shuffle=options.shuffle,
        chunk_size=options.chunk_size,
    )
    if job.chunk_size is not None and not inputs.facts.has_cache:
        raise GoldenError(
            f"--chunk-size: the model of {inputs.identity.name} has no key/value cache that a "
            "prompt could fill in chunks"
        )
    if options.way is Way.GPU:
        return run_gpu(job, inputs.facts)
    if options.way is Way.INTERPRETER:
        if warning := estimate(job, inputs.facts):
            tell(f"{inputs.identity.name}: {warning}")
        return run_interpreter(job)
    crew = suitable_crew(job, inputs.facts, options.jobs)
    if crew.note:
        tell(f"{inputs.identity.name}: {crew.note}")
    if options.sequential:
        return oracle.generate(job, inputs.facts, progress, crew=crew, sequential=True)
    return oracle.replay(job, inputs.facts, expected.tokens.tolist(), progress, crew=crew)
