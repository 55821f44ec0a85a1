"""Goldens of a user's own checkpoint: recorded, resumed, checked, and kept from harm."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bitassay.golden.compare.diff import compare
from bitassay.golden.errors import GoldenError
from bitassay.golden.inputs.suite_inputs import load_inputs
from bitassay.golden.runs import oracle
from bitassay.golden.storage import journal
from bitassay.golden.storage.store import Store
from bitassay.golden.suites import own_suite
from support.tiny_llama import write_tiny_llama

STEPS = 5


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the tiny model under a name of its own, and options that name it."""
    model = tmp_path / "my-model"
    shutil.copytree(folder / "model", model)
    return model


@pytest.fixture
def options(own, folder, tmp_path):
    """--model, --prompts and --store."""
    prompts, target = str(folder / "prompts.jsonl"), str(tmp_path / "own-store")
    return ["--model", str(own), "--prompts", prompts, "--store", target]


def tokens(steps: int = STEPS) -> list[str]:
    return ["--max-tokens", str(steps)]


def test_it_is_recorded_for_both_architectures_checked_listed_and_shown(run, options, own):
    status, out, _ = run("record", *options, *tokens())
    assert status == 0
    assert out.count("generated step by step with the reference; written, digest") == 2
    target = options[-2:]
    assert not Path(target[1], ".work").exists()
    for way in ((), ("--sequential",), ("--prompts", "2"), ("--with", "interpreter")):
        status, out, _ = run("check", "my-model/sm_90", *options, *way)
        assert status == 0
        assert "my-model/sm_90: equal" in out
    assert run("record", *options, *tokens())[0] == 0  # there already, and equal
    shutil.rmtree(own)
    status, out, _ = run("list", "--verify", *target)
    assert status == 0
    assert "my-model/sm_89" in out
    assert "2 goldens verified" in out
    status, out, _ = run("show", "my-model/sm_89", "--prompt", "p1", *target)
    assert status == 0
    stream = Store(target[1]).read("my-model/sm_89").stream
    ids = stream.prompt(1) + stream.tokens[1].tolist()
    assert "── p1\n" + " ".join(map(str, ids)) in out
    assert run("check", "my-model/sm_90", *options)[0] == 2


def test_architectures_and_name_are_chosen(run, options):
    status, _, _ = run("record", *options, *tokens(), "--arch", "sm_80", "--name", "other.1")
    assert status == 0
    assert list(Store(options[-1]).entries()) == ["other.1/sm_80"]
    assert run("check", "other.1/sm_80", *options)[0] == 0
    status, _, err = run("record", *options, *tokens(), "--arch", "sm_91")
    assert status == 2
    assert "unknown architecture 'sm_91'" in err


@pytest.mark.parametrize(
    "name", ["", ".work", "../up", "a/b", "-x", "x" * 65, "é", "manifest.jsonl", "tiny", "a b"]
)
def test_unfit_names_are_refused(run, options, name):
    status, out, err = run("record", *options, *tokens(), "--name", name)
    assert (status, out) == (2, "")
    assert "choose another --name" in err if name == "tiny" else "name it with --name" in err
    assert not Path(options[-1]).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", *tokens()], "--model needs --prompts FILE"),
        (["--model", "m", "--prompts", "p"], "--model needs --max-tokens N"),
        (["--model", "m", "--prompts", "p", *tokens(), "tiny"], "name no others, and not --all"),
        (["tiny", *tokens()], "need --model DIR"),
        (["tiny", "--arch", "sm_90"], "need --model DIR"),
        (["tiny", "--prompts", "p"], "a file of them needs --model DIR"),
        (["tiny", "--prompts", "0"], "expected at least 1 prompt"),
        (["tiny", "--prompts", "1", "--prompts", "2"], "at most one number and one file"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, run, arguments, message):
    status, out, err = run("record", *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_the_store_of_the_suites_takes_no_other_models(run, options, monkeypatch):
    monkeypatch.delenv("BITASSAY_STORE")
    status, _, err = run("record", *options[:-2], *tokens())
    assert status == 2
    assert "bitassay's own store is for its suites: name one for your models" in err


@pytest.mark.parametrize("spelt", ["link", "store/", "store/../store", "inner"])
def test_the_store_of_the_suites_is_known_by_any_path(run, options, tmp_path, monkeypatch, spelt):
    packaged = tmp_path / "store"
    packaged.mkdir()
    monkeypatch.setattr("bitassay.cli.record.PACKAGED", packaged)
    (tmp_path / "link").symlink_to(packaged)
    (tmp_path / "inner").symlink_to("link")
    for way in ("option", "variable"):
        root = f"{tmp_path}/{spelt}"
        monkeypatch.setenv("BITASSAY_STORE", root)
        given = ["--store", root] if way == "option" else []
        status, out, err = run("record", *options[:-2], *given, *tokens())
        assert (status, out) == (2, "")
        assert "bitassay's own store is for its suites" in err
    assert list(packaged.iterdir()) == []


def test_a_different_one_needs_accept_and_keeps_what_was_generated(run, options, own, monkeypatch):
    assert run("record", *options, *tokens(), "--arch", "sm_90")[0] == 0
    before = Store(options[-1]).entry("my-model/sm_90")
    change(own)
    status, out, _ = run("record", *options, *tokens(), "--arch", "sm_90")
    assert status == 1
    assert "recorded with another model" in out
    assert "nothing was written; to replace it: the same command with --accept (what was" in out
    assert Store(options[-1]).entry("my-model/sm_90") == before
    assert len(list(Path(options[-1]).glob(".work/*/journal"))) == 1
    monkeypatch.setattr(
        "bitassay.golden.runs.oracle_tasks._generate", None
    )  # nothing is generated again
    status, out, err = run("record", *options, *tokens(), "--arch", "sm_90", "--accept")
    assert status == 0
    assert "written, digest" in out
    assert "6 prompts finished, 0 begun" in err
    assert not Path(options[-1], ".work").exists()
    assert run("check", "my-model/sm_90", *options)[0] == 0


def test_what_fails_at_once_leaves_no_journal(run, options, own, tmp_path):
    """A sequence longer than the model's positions, say."""
    model = write_tiny_llama(tmp_path / "short", max_position_embeddings=8)
    prompts = tmp_path / "long.jsonl"
    prompts.write_text('{"id": "long", "text": "more than 8"}\n')
    replaced = ["--model", str(model), "--prompts", str(prompts), *options[-2:]]
    status, _, err = run("record", *replaced, *tokens(), "--arch", "sm_90")
    assert status == 2
    assert "prompt long: expected at most 8 positions" in err
    assert not Path(options[-1], ".work").exists()


def test_nothing_is_written_under_ci(run, options, monkeypatch):
    monkeypatch.setenv("CI", "1")
    status, _, err = run("record", *options, *tokens())
    assert status == 2
    assert err.count("CI is set") == 1  # for both architectures
    assert not Path(options[-1]).exists()


@pytest.mark.parametrize("why", ["CI", "read-only", "URL"])
def test_where_nothing_may_be_written_a_difference_is_told_all_the_same(
    run, options, own, monkeypatch, why
):
    assert run("record", *options, *tokens(), "--arch", "sm_90")[0] == 0
    change(own)
    before = sorted(Path(options[-1]).rglob("*"))
    if why == "CI":
        monkeypatch.setenv("CI", "1")
    elif why == "read-only":
        monkeypatch.setattr("os.access", lambda path, mode, **_: not mode & os.W_OK)
    else:
        options[-1] = f"file://{options[-1]}"
    status, out, err = run("record", *options, *tokens(), "--arch", "sm_90")
    assert status == 1
    assert "my-model/sm_90: different" in out
    assert "(what was generated is kept" not in out
    assert "my-model/sm_90: what is generated is not kept: " in err
    assert ("CI is set" if why == "CI" else "is read-only") in err
    assert sorted(Path(options[-1].removeprefix("file://")).rglob("*")) == before
    assert run("record", *options, *tokens(), "--arch", "sm_90", "--accept")[0] == 2


def test_a_damaged_manifest_is_noticed_before_the_work(run, options, monkeypatch):
    assert run("record", *options, *tokens(), "--arch", "sm_90")[0] == 0
    manifest = Path(options[-1], "manifest.jsonl")
    manifest.write_bytes(manifest.read_bytes()[:-9])
    monkeypatch.setattr("bitassay.golden.record.load_inputs", None)  # the work does not begin
    status, out, err = run("record", *options, *tokens(), "--arch", "sm_90", "--accept")
    assert (status, out) == (2, "")
    assert "manifest.jsonl: " in err
    assert "restore it from git" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("noted", [0, 2])
@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupt_says_whether_anything_is_kept(run, options, monkeypatch, noted, kept):
    append, left = journal.Journal.append, [noted]

    def interrupted(self, facts):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        append(self, facts)

    monkeypatch.setattr(journal.Journal, "append", interrupted)
    if not kept:
        monkeypatch.setattr("bitassay.golden.runs.oracle.run", raises(KeyboardInterrupt))
    status, _, err = run("record", *options, *tokens(), "--arch", "sm_90")
    assert status == 130
    assert ("the same command goes on from here" in err) == (kept and noted > 0)
    assert list(Path(options[-1]).glob(".work/*")) == [] or (kept and noted > 0)


def test_the_quick_form_publishes_nothing(run, options):
    quick = ("--prompts", "2")
    status, _, err = run("record", *options, *quick, *tokens(), "--arch", "sm_90")
    assert status == 2
    assert "no store at" in err
    assert run("record", *options, *tokens(), "--arch", "sm_90")[0] == 0
    status, out, _ = run("record", *options, *quick, *tokens(), "--arch", "sm_90")
    assert status == 0
    assert "2 prompts, 10 tokens" in out


def test_another_model_or_length_is_not_checked(run, options, own):
    assert run("record", *options, *tokens(), "--arch", "sm_90")[0] == 0
    for unfit in ((), ("--all",), ("my-model",)):
        assert run("check", *unfit, *options)[0] == 2
    status, _, err = run("check", "my-model/sm_90", "--store", options[-1])
    assert status == 2
    assert "a golden of a model of your own needs --model DIR and --prompts FILE" in err
    change(own)
    status, _, err = run("check", "my-model/sm_90", *options)
    assert status == 2
    assert "was recorded with another model (" in err
    again = "record --model DIR --prompts FILE --max-tokens 5 --name my-model --arch sm_90 --store"
    assert f"and review the difference: bitassay {again} {options[-1]}" in err
    status, _, err = run("check", "other/sm_90", *options)
    assert status == 2
    assert "record it: bitassay record --model DIR --prompts FILE" in err
    assert f"--name other --arch sm_90 --store {options[-1]}" in err


def test_a_journal_left_by_a_kill_after_publishing_is_cleared_away(run, options, own, folder):
    assert run("record", *options, *tokens(), "--arch", "sm_90")[0] == 0
    suite = own_suite(own, folder / "prompts.jsonl", STEPS, arches=("sm_90",))
    with journal.opened(Path(options[-1]), load_inputs(suite, "sm_90").identity) as notes:
        notes.chosen({0: 1})
    assert Path(options[-1], ".work").exists()
    assert run("record", *options, *tokens(), "--arch", "sm_90")[0] == 0
    assert not Path(options[-1], ".work").exists()


def test_two_recordings_of_one_golden_do_not_meet(run, options, own, folder):
    suite = own_suite(own, folder / "prompts.jsonl", STEPS, arches=("sm_90",))
    identity = load_inputs(suite, "sm_90").identity
    with journal.opened(Path(options[-1]), identity):
        status, out, err = run("record", *options, *tokens(), "--arch", "sm_90")
    assert (status, out) == (2, "")
    assert "my-model/sm_90 is being recorded by another process" in err
    assert run("record", *options, *tokens(), "--arch", "sm_90")[0] == 0


class Killed(BaseException):
    pass


@pytest.mark.parametrize("model_type", ["context-lm", "llama"])
def test_a_recording_cut_at_any_step_goes_on_to_the_same_bits(
    own, folder, tmp_path, monkeypatch, model_type
):
    """Cut again and again, after 1, 2, 3 … further notes, until it comes to its end."""
    model = own if model_type == "context-lm" else write_tiny_llama(tmp_path / "llama")
    prompts = folder / "prompts.jsonl"
    if model_type == "llama":
        lines = [json.dumps({"id": f"p{n}", "text": "x" * n}) for n in (1, 20, 3)]
        prompts.write_text("\n".join(lines))
    inputs = load_inputs(own_suite(model, prompts, STEPS, arches=("sm_89",)), "sm_89")
    whole = oracle.generate(inputs.job, inputs.facts, lambda *_: None)
    monkeypatch.setattr(oracle, "JOURNALED", 2)
    append, cuts = journal.Journal.append, 0
    while True:
        left = [cuts % 3 + 1]

        def counted(self, facts, left=left):
            append(self, facts)
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        monkeypatch.setattr(journal.Journal, "append", counted)
        try:
            with journal.opened(tmp_path / "own-store", inputs.identity) as notes:
                stream = oracle.generate(inputs.job, inputs.facts, lambda *_: None, journal=notes)
            break
        except Killed:
            cuts += 1
    assert cuts > 5
    assert compare(whole, stream).equal


def test_a_journal_that_the_model_contradicts_is_refused(own, folder, tmp_path):
    suite = own_suite(own, folder / "prompts.jsonl", STEPS, arches=("sm_89",))
    inputs = load_inputs(suite, "sm_89")
    tokens = oracle.generate(inputs.job, inputs.facts, lambda *_: None).tokens
    for known in (2, STEPS):
        with journal.opened(tmp_path / "own-store", inputs.identity) as notes:
            for step in range(known):
                notes.chosen({4: int(tokens[4, step]) ^ (step == 1)})
            with pytest.raises(GoldenError, match="p4: the model does not choose the tokens noted"):
                oracle.generate(inputs.job, inputs.facts, lambda *_: None, journal=notes)
            notes.remove()


def test_a_model_without_a_tokenizer_takes_prompts_as_ids(run, own, tmp_path):
    (own / "tokenizer.json").unlink()
    prompts = tmp_path / "ids.jsonl"
    prompts.write_text('{"id": "a", "token_ids": [3, 4, 5]}\n')
    options = ["--model", str(own), "--prompts", str(prompts), "--store", str(tmp_path / "s")]
    assert run("record", *options, *tokens())[0] == 0
    assert Store(str(tmp_path / "s")).read("my-model/sm_90").provenance.identity.tokenizer == ""
    prompts.write_text('{"id": "a", "text": "x"}\n')
    status, _, err = run("record", *options, *tokens())
    assert status == 2
    assert err.count('has no tokenizer.json to encode it: add that file, or give "token_ids"') == 1


def test_absurd_sizes_are_refused_at_once(run, options, own, tmp_path):
    status, _, err = run("record", *options, *tokens(2**24 + 1))
    assert status == 2
    assert "--max-tokens: expected at most 16,777,216, found 16,777,217" in err
    options[1] = str(write_tiny_llama(tmp_path / "deep"))
    config = json.loads(Path(options[1], "config.json").read_text())
    Path(options[1], "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**12}))
    status, _, err = run("record", *options, *tokens())
    assert status == 2
    assert "num_hidden_layers to be no more than there are tensors; found 1000000000000 l" in err


def raises(error: type[BaseException]):
    def function(*arguments, **options):
        raise error

    return function


def change(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][:, :2] = tensors["lm_head.weight"][:, [1, 0]]
    save_file(tensors, model / "model.safetensors")
