"""The serving engine beside a golden: what it is given, what is compared, and every fault told."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from bitassay.engine.distributed.rendezvous import RankInfo
from bitassay.engine.scheduling.stats import Stats
from bitassay.golden.compare.diff import Comparison, Difference, compare
from bitassay.golden.errors import GoldenError, WorkerError
from bitassay.golden.runs import engine_runner
from bitassay.golden.runs.backend import Backend
from bitassay.golden.runs.engine_job import EngineJob, EngineRun
from bitassay.golden.runs.engine_options import EVICTIONS, HITS, PREEMPTIONS, EngineOptions
from bitassay.golden.runs.engine_requests import as_run, engine_job, filled, lay_out, missing
from bitassay.golden.runs.rank_worker import take_part
from bitassay.golden.storage.store import Store
from bitassay.golden.streams.drafts import run_of
from support.tiny_pair import LENGTHS, STEPS, load_pair

USUAL = EngineOptions(backend=Backend.REFERENCE)


@pytest.fixture(scope="session")
def inputs(pairs):
    return load_pair(pairs["eagle"])


def ready(inputs, options=USUAL) -> tuple[EngineJob, object]:
    requests = lay_out(len(inputs.job.prompts), options)
    return engine_job(inputs.job, options, requests), requests


@pytest.fixture(scope="session")
def ran(inputs) -> EngineRun:
    """What the engine gives on the reference's operations, in this process."""
    job, _ = ready(inputs)
    (run,) = take_part([job], RankInfo(0, 1))
    return run


class Judged(NamedTuple):
    """A run beside the golden, and what it was made for and did not come to."""

    comparison: Comparison
    missing: tuple[str, ...]
    stats: Stats

    @property
    def good(self) -> bool:
        return self.comparison.equal and not self.missing


def judged(run, inputs, golden, options=USUAL) -> Judged:
    requests = lay_out(len(inputs.job.prompts), options)
    found = as_run(run, inputs.job, inputs.facts, golden, options, requests)
    return Judged(compare(found.expected, found.found), found.missing, found.stats)


def test_the_engine_is_equal_to_the_golden(ran, inputs, generated):
    found = judged(ran, inputs, generated)
    assert found.good
    rounds = [r for run in run_of(generated.drafts, 3).rounds for r in run]
    assert found.comparison.compared.acceptances == len(rounds)
    assert found.stats.accepted == sum(accepted for _, _, accepted in rounds) > 0


def test_without_drafts_they_are_not_compared(inputs, generated):
    options = replace(USUAL, num_speculative_tokens=0)
    job, _ = ready(inputs, options)
    assert job.config.num_speculative_tokens == 0
    (run,) = take_part([job], RankInfo(0, 1))
    found = judged(run, inputs, generated, options)
    assert found.good
    assert found.comparison.compared.drafts is None
    with pytest.raises(GoldenError, match="found none: it ran without a head"):
        judged(run, inputs, generated)


def faulty(ran, change) -> EngineRun:
    """The run with something changed in the traces of its second prompt."""
    traces = copy.deepcopy(ran.traces)
    change(traces[1])
    return replace(ran, traces=traces)


def off_by_one(trace):
    """One draft fewer accepted; the next round begins a token earlier and finds that one right."""
    n = int(np.flatnonzero(trace["rounds"][:, 2] >= 1)[0])
    t, drafted, accepted = trace["rounds"][n].tolist()
    rows = [*trace["rounds"][:n].tolist(), [t, drafted, accepted - 1], [t + accepted, 1, 0]]
    trace["rounds"] = np.array(rows + trace["rounds"][n + 1 :].tolist())
    for name in ("draft_tokens", "draft_fingerprints"):
        own = trace[name]
        trace[name] = np.concatenate([own[: n + 1], own[n : n + 1], own[n + 1 :]])


def flip(name, *where):
    def change(trace):
        trace[name][where] ^= 1

    return change


@pytest.mark.parametrize(
    ("change", "arrays", "draft"),
    [
        (flip("tokens", 4), ("tokens",), None),
        (flip("top_bits", 4, 0), ("top_bits",), None),
        (flip("fingerprints", 4, 7), ("fingerprints",), None),
        (flip("prompt_fingerprints", 7), ("prompt_fingerprints",), None),
        (flip("draft_tokens", 0, 0), ("draft_tokens",), 0),
        (flip("draft_fingerprints", 0, 0, 12), ("draft_fingerprints",), 0),
        (flip("draft_first_pass", 1, 3), ("draft_fingerprints",), 0),
        (flip("draft_prompt_fingerprints", 3), ("draft_prompt_fingerprints",), None),
        (off_by_one, ("accepted",), None),
    ],
)
def test_every_fault_of_the_engine_is_told(ran, inputs, generated, change, arrays, draft):
    found = judged(faulty(ran, change), inputs, generated)
    (difference,) = found.comparison.differences
    assert (difference.prompt, difference.arrays, difference.draft) == (1, arrays, draft)


def test_a_chain_row_is_compared_up_to_the_first_mismatch(ran, inputs, generated):
    rounds = ran.traces[1]["rounds"]
    n = next(n for n, (_, drafted, accepted) in enumerate(rounds) if accepted == 1 < drafted)
    t, drafted, accepted = rounds[n].tolist()
    for j in range(drafted):
        run = faulty(ran, flip("draft_fingerprints", n, j, 4))
        expected = Difference(1, t, ("draft.attention",), ("draft_fingerprints",), j)
        known = (expected,) if j <= accepted else ()
        assert judged(run, inputs, generated).comparison.differences == known


def test_a_trace_of_another_length_is_refused(ran, inputs, generated):
    def shorter(trace):
        trace["tokens"] = trace["tokens"][:-1]

    with pytest.raises(GoldenError, match=f"p1: expected {STEPS} tokens of the engine, found 11"):
        judged(faulty(ran, shorter), inputs, generated)
    lost = replace(ran, traces=[None, *ran.traces[1:]])
    with pytest.raises(GoldenError, match="expected the engine's trace of p0, found none"):
        judged(lost, inputs, generated)


def test_what_a_run_was_made_for_has_to_happen(ran, inputs, generated):
    quiet = replace(ran, stats=[Stats(steps=9)])
    busy = replace(ran, stats=[Stats(preemptions=1), Stats(prefix_hit_tokens=16)])
    for must in ((PREEMPTIONS,), (HITS,), (PREEMPTIONS, HITS)):
        options = replace(USUAL, must=must)
        assert judged(quiet, inputs, generated, options).missing == must
        assert not judged(quiet, inputs, generated, options).good
        assert judged(busy, inputs, generated, options).good
    assert judged(quiet, inputs, generated, replace(USUAL, warm=True)).missing == (HITS,)
    whole = [(*p, *t) for p, t in zip(generated.prompts, generated.tokens.tolist(), strict=True)]
    assert filled(whole) == 1  # of 20 + 12 ids one block for certain
    assert filled([range(18), range(18), range(40), range(1, 41)]) == 4
    for blocks, lacking in ((None, (EVICTIONS,)), (1, (EVICTIONS,))):
        options = replace(USUAL, must=(EVICTIONS,), num_blocks=blocks)
        assert judged(busy, inputs, generated, options).missing == lacking


def test_every_rank_has_a_cache_of_its_own_to_overflow(inputs):
    """Two ranks have twice the blocks: one more filled than one rank has evicts nothing."""
    prompts = tuple(tuple(range(start, start + 20)) for start in (0, 20, 40))
    job = replace(inputs.job, prompts=prompts)
    trace = {"tokens": np.arange(90, 90 + STEPS)}
    run = EngineRun([trace] * 3, [Stats(), Stats()], 1.0)
    assert filled([(*prompt, *range(90, 90 + STEPS)) for prompt in prompts]) == 3
    for dp, blocks, lacking in ((1, 2, ()), (2, 2, (EVICTIONS,)), (2, 1, ())):
        options = replace(USUAL, must=(EVICTIONS,), num_blocks=blocks, dp=dp)
        assert missing(run, job, options, lay_out(3, options)) == lacking


def test_a_cancelled_neighbour_is_a_copy_that_has_no_trace(ran, inputs, generated):
    options = replace(USUAL, cancel=2)
    requests = lay_out(3, options)
    assert (requests.prompts, requests.cancelled) == ((0, 1, 1, 2), {2})
    job = engine_job(inputs.job, options, requests)
    assert job.cancelled == {2: STEPS // 2}
    first, second, third = ran.traces
    gone = replace(ran, traces=[first, second, None, third])
    assert judged(gone, inputs, generated, options).good
    stayed = replace(ran, traces=[first, second, second, third])
    assert judged(stayed, inputs, generated, options).missing == ("cancelled neighbours",)
    assert lay_out(1, replace(USUAL, cancel=4)).cancelled == {1}
    with pytest.raises(GoldenError, match="--cancel 4: expected at most 3"):
        lay_out(3, replace(USUAL, cancel=4))


def test_prompts_that_come_twice_are_both_compared(ran, inputs, generated):
    options = replace(USUAL, mirrored=True)
    assert lay_out(3, options).prompts == (0, 1, 2, 2, 1, 0)
    twice = replace(ran, traces=[*ran.traces, *reversed(ran.traces)])
    assert judged(twice, inputs, generated, options).comparison.compared.streams == 6
    wrong = [copy.deepcopy(trace) for trace in twice.traces]
    wrong[4]["margins"][3] += 1
    found = judged(replace(ran, traces=wrong), inputs, generated, options).comparison
    (difference,) = found.differences
    assert found.expected.prompt_names[difference.prompt] == "p1 again"


def test_requests_are_as_the_options_say(inputs):
    options = replace(USUAL, shuffle=3, dp=2, num_speculative_tokens=5, enforce_eager=True)
    job, _ = ready(inputs, options)
    assert sorted(job.order) == [0, 1, 2]
    assert job.arrivals is None
    assert (job.backend, job.job.arch, job.job.steps) == (Backend.REFERENCE, "sm_90", STEPS)
    assert [len(prompt) for prompt in job.job.prompts] == list(LENGTHS)
    assert job.config.num_speculative_tokens == 5
    assert job.config.enforce_eager is True
    assert job.job.model_digest == inputs.identity.model
    assert job.job.draft_digest == inputs.identity.draft_model
    late, _ = ready(inputs, replace(USUAL, late=3, num_blocks=4))
    assert len(late.arrivals) == 3
    assert late.order is None
    assert late.config.num_blocks == 4


@pytest.fixture
def recorded_pair(pairs, inputs, generated, tmp_path, provenance):
    """Options that name the pair and a store with its golden."""
    store = Store(str(tmp_path / "store"))
    store.publish(generated, replace(provenance, identity=inputs.identity), accept=True)
    folder = pairs["eagle"]
    pair = ["--model", str(folder / "target"), "--draft", str(folder / "head")]
    return [*pair, "--prompts", str(folder / "prompts.jsonl"), "--store", store.root]


def test_the_command_runs_it_on_two_ranks(recorded_pair, run):
    given = ("--backend", "reference", "--dp", "2", "--cancel", "2", "--k", "5")
    status, out, err = run("check", "pair/sm_90", *recorded_pair, "--with", "engine", *given)
    assert (status, err) == (0, "")
    assert "pair/sm_90: equal (engine on the reference, K = 5, DP = 2, 64 at once" in out
    assert "acceptance counts; 0 different" in out


@pytest.mark.parametrize("way", ["engine", "gpu"])
def test_without_a_gpu_nothing_else_is_run(recorded_pair, run, monkeypatch, way):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(engine_runner, "run_jobs", None)
    status, out, err = run("check", "pair/sm_90", *recorded_pair, "--with", way)
    assert (status, out) == (2, "")
    assert "no GPU: " in err
    assert "on a CPU use the interpreter or the reference" in err


def test_an_engine_that_differs_is_status_1_and_told(recorded_pair, run, ran, monkeypatch):
    wrong = faulty(ran, off_by_one)
    monkeypatch.setattr(engine_runner, "run_jobs", lambda jobs, dp: iter([wrong]))
    given = ("--with", "engine", "--backend", "reference")
    status, out, _ = run("check", "pair/sm_90", *recorded_pair, *given)
    assert status == 1
    assert "pair/sm_90: different (engine on the reference, K = 3" in out
    assert "the count of accepted drafts differs" in out
    assert "found         rounds (" in out


def test_what_was_not_exercised_cannot_pass(recorded_pair, run, ran, monkeypatch):
    quiet = replace(ran, stats=[Stats()])
    monkeypatch.setattr(engine_runner, "run_jobs", lambda jobs, dp: iter([quiet]))
    given = ("--with", "engine", "--backend", "reference", "--warm")
    status, out, err = run("check", "pair/sm_90", *recorded_pair, *given)
    assert status == 2
    assert "0 different" in out
    assert "not exercised (engine on the reference, K = 3" in err
    assert "was made for prefix hits and exercised none" in err


def test_a_sweep_runs_every_configuration_and_none_hides_another(
    recorded_pair, run, ran, monkeypatch
):
    """Traces of K = 3 stand for all: other K differ, as must be told; one run fails by itself."""
    starts, busy = [], [Stats(preemptions=1, prefix_hit_tokens=1)]
    prompts = map(tuple, Store(recorded_pair[-1]).read("pair/sm_90").stream.prompts)
    by_prompt = dict(zip(prompts, ran.traces, strict=True))

    def run_jobs(jobs, dp):
        starts.append(len(jobs))
        for number, job in enumerate(jobs):
            if len(starts) == 1 and number == 4:
                raise WorkerError("rank 0 of 1 was killed by SIGKILL")
            traces = [by_prompt[prompt] for prompt in job.job.prompts]
            kept = [None if r in job.cancelled else t for r, t in enumerate(traces)]
            yield replace(ran, traces=kept, stats=busy)

    monkeypatch.setattr(engine_runner, "run_jobs", run_jobs)
    given = ("--with", "engine", "--backend", "reference", "--sweep", "--cancel", "2")
    assert run("check", "pair/sm_90", *recorded_pair, *given)[0] == 2  # the sweep sets it itself
    status, out, err = run("check", "pair/sm_90", *recorded_pair, *given[:-2])
    assert status == 1
    assert starts == [40, 35]
    assert "rank 0 of 1 was killed by SIGKILL" in err
    told = [line for line in out.splitlines() if re.match(r"pair/sm_90 \d+/40: (eq|diff)", line)]
    assert len(told) == 39
    for line in told:
        assert (": equal (" in line) == ("K = 3" in line or "K = 0" in line), line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--k", "3"), "--k: an option of the engine, which --with reference does not run"),
        (("--sweep",), "--sweep: expected the engine: add --with gpu or --with engine"),
        (("--with", "engine", "--k", "6"), "--k: expected 0 … 5, found 6"),
        (("--with", "engine", "--backend", "cpu"), "'cpu' is not one of 'gpu', 'interpreter'"),
        (("--with", "gpu", "--backend", "reference"), "is --with engine --backend gpu: omit"),
        (("--with", "engine", "--seed", "3"), "--seed is of --sweep; --shuffle and --arrivals"),
        (("--with", "engine", "--sweep", "--k", "1"), "--k: a sweep chooses its configurations"),
        (("--with", "engine", "--sequential"), "--sequential and --jobs are for --with reference"),
        (("--shuffle", "1"), "--shuffle: an option of the engine"),
    ],
)
def test_options_that_do_not_fit_are_refused(recorded_pair, run, given, message):
    status, out, err = run("check", "pair/sm_90", *recorded_pair, *given)
    assert (status, out) == (2, "")
    assert re.search(message, err)


def test_a_model_without_a_cache_or_a_head_is_told(folder, run):
    given = ("--with", "engine", "--backend", "reference", "--prompts", "2")
    status, out, err = run("check", "tiny/sm_90", *given)
    assert (status, err) == (0, "")
    assert "equal (kernels on the reference, batches of 64): 2 prompts" in out
    status, _, err = run("check", "tiny/sm_90", *given, "--dp", "2", "--warm")
    assert status == 2
    assert "--dp, --warm: expected none for the model of" in err
    assert "is no transformer and runs in whole batches" in err
    status, _, err = run("check", "tiny/sm_90", *given, "--k", "2")
    assert status == 2
    assert "--k: expected 0 without a draft head, found 2" in err


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda s: s.first(2), "prompts than it was recorded for (2, expected 3)"),
        (lambda s: s.first(None, 5), "tokens a prompt than it was recorded for (5, expected"),
        (lambda s: replace(s, prompt_names=("z", *s.prompt_names[1:])), "names of prompts"),
        (lambda s: replace(s, prompt_ids=s.prompt_ids ^ (s.prompt_ids == 7)), "ids of prompts"),
        (lambda s: replace(s, operations=s.operations[::-1]), "operations"),
        (lambda s: replace(s, drafts=None), "operations of the draft head"),
    ],
)
@pytest.mark.parametrize("way", ["reference", "engine"])
def test_a_golden_that_holds_less_than_it_promises_cannot_pass(
    recorded_pair, run, generated, monkeypatch, change, what, way
):
    """Its digests are right, as if whoever recorded it had been wrong."""
    monkeypatch.delenv("CI", raising=False)
    store = Store(recorded_pair[-1])
    whole = store.read("pair/sm_90")
    assert whole.stream.prompts == generated.prompts
    changed = change(whole.stream)
    store.publish(changed, whole.provenance, accept=True)
    given = ("--with", way, *(("--backend", "reference") if way == "engine" else ()))
    status, out, err = run("check", "pair/sm_90", *recorded_pair, *given)
    assert (status, out) == (2, "")
    assert f"golden pair/sm_90 has other {what}" in err
