"""Checking: run something, and compare every bit of what it said with the golden."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from .compare import Comparison, compare
from .device import describe_gpu, gpu_arch, run_gpu
from .errors import CannotRunError, StaleError
from .interpreter import run_interpreter
from .manifest import Entry
from .provenance import Identity
from .record import Inputs, load_inputs
from .runners import Progress, generate_sequentially, replay
from .store import Golden, Store
from .stream import TokenStream
from .suites import find_suite
from .ways import Options, Way


@dataclass(frozen=True)
class Checked:
    """A comparison with the golden, and its new manifest entry if it was confirmed."""

    golden: Golden
    comparison: Comparison
    confirmed: Entry | None


def check(store: Store, name: str, options: Options, *, progress: Progress) -> Checked:
    """Run what the options name and compare it with the golden `name`.

    Raises GoldenError when it cannot be judged: a missing, damaged or stale golden, or something
    that cannot run here.
    """
    suite, arch = find_suite(name)
    if options.confirm:
        store.require_writable(accept=True)
    golden = store.read(name)
    inputs = load_inputs(suite, arch)
    require_current(golden, inputs.identity)
    expected = golden.stream if options.prompts is None else golden.stream.first(options.prompts)
    found = _run(inputs, expected, options, progress)
    comparison = compare(expected, found)
    confirmed = None
    if options.confirm and comparison.equal:
        confirmed = store.confirm(golden, describe_gpu())
    return Checked(golden, comparison, confirmed)


def require_current(golden: Golden, identity: Identity) -> None:
    """Raise StaleError when the golden was recorded under another contract, model or prompts."""
    recorded, here = asdict(golden.provenance.identity), asdict(identity)
    name = identity.name
    advice = f'run "bitassay record {name}" and review the difference'
    if recorded["contract"] != here["contract"]:
        raise StaleError(
            f"golden {name} was recorded under contract {recorded['contract_version']} "
            f"({recorded['contract'][:12]}…), this build has contract {here['contract_version']} "
            f"({here['contract'][:12]}…): {advice}"
        )
    for key in ("model", "tokenizer", "prompts"):
        if recorded[key] != here[key]:
            raise StaleError(
                f"golden {name} was recorded with another {key} ({recorded[key][:12]}…) than the "
                f"one found here ({here[key][:12]}…): restore it, or {advice}"
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


def _run(
    inputs: Inputs, expected: TokenStream, options: Options, progress: Progress
) -> TokenStream:
    count = len(expected.prompt_names)
    job = replace(
        inputs.job,
        prompt_names=inputs.job.prompt_names[:count],
        prompts=inputs.job.prompts[:count],
        steps=expected.steps,
        batch_size=options.batch_size,
        shuffle=options.shuffle,
    )
    if options.way is Way.GPU:
        return run_gpu(job, inputs.checkpoint)
    if options.way is Way.INTERPRETER:
        return run_interpreter(job)
    if options.sequential:
        return generate_sequentially(job, inputs.checkpoint, progress)
    return replay(job, inputs.checkpoint, expected.tokens.tolist(), progress)
