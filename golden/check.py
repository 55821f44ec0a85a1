"""Checking: run something, and compare every bit of what it said with the golden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from bitassay.golden.compare.diff import Comparison, compare
from bitassay.golden.errors import CannotRunError, CorruptError, GoldenError, StaleError
from bitassay.golden.inputs.job import Progress
from bitassay.golden.inputs.suite_inputs import Inputs, load_inputs
from bitassay.golden.provenance import Identity, another
from bitassay.golden.runs.backend import gpu_arch
from bitassay.golden.runs.engine_options import SweepOptions
from bitassay.golden.runs.engine_runner import Sweep
from bitassay.golden.runs.gpu import describe_gpu
from bitassay.golden.runs.runner import Log, Runner
from bitassay.golden.storage.manifest import Entry
from bitassay.golden.storage.store import Golden, Store
from bitassay.golden.suites import Suite, find_suite, own_suite


@dataclass(frozen=True)
class OwnModel:
    """A user's own model, prompts and draft head, if any, from which a golden was recorded."""

    model: Path
    prompts: Path
    draft: Path | None = None


@dataclass(frozen=True)
class Part:
    """Which of a golden is checked: the first prompts, the first tokens of each; None for all."""

    prompts: int | None = None
    tokens: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of it."""
        return self.prompts is None and self.tokens is None


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
        """Whether every bit of the golden is equal, and what was to be tested happened."""
        return self.comparison.equal and self.comparison.whole and not self.missing


def check(
    store: Store,
    name: str,
    runner: Runner,
    part: Part,
    *,
    own: OwnModel | None = None,
    confirm: bool = False,
    progress: Progress,
    log: Log = lambda text: None,
) -> Checked:
    """Run something and compare it with the golden `name`.

    own: what the golden was recorded from, where that is no suite. confirm: note in the manifest
    that this machine's GPU gave every bit. log: called with what the user should know before the
    work begins. Raises GoldenError when it cannot be judged: a missing, damaged or stale golden,
    or something that cannot run here.
    """
    if confirm:
        if not (runner.on_gpu and part.whole):
            raise GoldenError("--confirm needs a GPU, all prompts and all tokens")
        store.require_writable(accept=True)
    golden, inputs = current(store, name, own)
    expected = golden.stream.first(part.prompts, part.tokens)
    run = runner.run(inputs, expected, progress, log)
    if confirm and (expected.drafts is None) != (run.expected.drafts is None):
        raise GoldenError(
            f"--confirm: golden {name} has drafts, and the run made none to compare: omit --k 0"
        )
    comparison = compare(run.expected, run.found)
    confirmed = None
    if confirm and comparison.equal and comparison.whole:
        confirmed = store.confirm(golden, describe_gpu())
    return Checked(golden, comparison, confirmed, runner.describe(inputs), run.missing)


Runs = dict[str, tuple[str, Callable[[], Checked]]]


def check_sweep(
    store: Store, name: str, part: Part, sweep: SweepOptions, *, own: OwnModel | None = None
) -> Runs:
    """Return the runs of a sweep beside a golden, by number: what each is, and what makes it.

    They are to be made in order. Raises GoldenError as `check`.
    """
    golden, inputs = current(store, name, own)
    runs = Sweep(inputs, golden.stream.first(part.prompts, part.tokens), sweep)
    head = inputs.job.draft is not None

    def made(number: int, how: str) -> Checked:
        run = runs.run(number)
        return Checked(golden, compare(run.expected, run.found), None, how, run.missing)

    descriptions = enumerate(options.description(head=head) for options in runs.options)
    return {str(i + 1): (how, partial(made, i, how)) for i, how in descriptions}


def current(store: Store, name: str, own: OwnModel | None) -> tuple[Golden, Inputs]:
    """Return a golden and what it follows from; GoldenError unless that is as it was recorded."""
    if own is None:
        find_suite(name)  # a misspelt name, rather than a golden that is missing
    golden = store.read(name)
    inputs = load_inputs(*_suite(golden, own))
    require_current(golden, inputs.identity, store)
    require_whole(golden, inputs)
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


def require_whole(golden: Golden, inputs: Inputs) -> None:
    """Raise CorruptError unless a golden holds all that its identity promises.

    A run is made of the golden's prompts and tokens: of a golden that holds fewer, or others, less
    would be compared, and the result would be equal.
    """
    stream, job, facts = golden.stream, inputs.job, inputs.facts
    promised: list[tuple[str, object, object]] = [
        ("prompts", len(job.prompts), len(stream.prompt_names)),
        ("names of prompts", job.prompt_names, stream.prompt_names),
        ("ids of prompts", [list(ids) for ids in job.prompts], stream.prompts),
        ("tokens a prompt", job.steps, stream.steps),
        ("operations", facts.operations, stream.operations),
        (
            "operations of the draft head",
            facts.draft_operations,
            () if stream.drafts is None else stream.drafts.draft_operations,
        ),
    ]
    for what, expected, found in promised:
        if expected != found:
            figures = f" ({found}, expected {expected})" if isinstance(expected, int) else ""
            raise CorruptError(
                f"golden {inputs.identity.name} has other {what} than it was recorded for"
                f"{figures}: restore the store, or record it in an empty one"
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
