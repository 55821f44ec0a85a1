"""What README and docs/ state is what the code does."""

import contextlib
import io
import re
from dataclasses import fields
from itertools import takewhile
from typing import Any

import pytest
import torch
from typer.main import get_command

from bitassay.cli.app import app
from bitassay.engine.config import EngineConfig
from bitassay.golden.compare.diff import compare
from bitassay.golden.runs.sweep import COUNT, FACTORS, sweep
from bitassay.golden.storage.store import find_store
from bitassay.golden.streams.token_stream import ALL_ARRAYS
from bitassay.golden.suites import SUITES
from bitassay.reference.checkpoints.checkpoint import load_tokenizer
from bitassay.reference.spec.arch import ARCHES
from bitassay.reference.spec.contract import CONTRACT_VERSION, ORDERS
from support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table whose header row begins with `heading`, code marks removed."""
    (rows,) = tables(page, heading)
    return rows


def tables(page: str, heading: str) -> list[list[list[str]]]:
    """Return those of all tables whose header row begins so."""
    found = []
    lines = (ROOT / page).read_text().splitlines()
    for start in (i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")):
        rows = takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
        found.append([[cell.strip(" `") for cell in row.strip("|").split(" | ")] for row in rows])
    return found


def examples() -> list[pytest.param]:
    """Return every Python block of every page."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for number, block in enumerate(blocks):
            absent = not torch.cuda.is_available()
            skip = pytest.mark.skipif(absent, reason="needs a CUDA device")
            marks = [pytest.mark.gpu, skip] if "cuda" in block else []
            found.append(pytest.param(block, id=f"{page.name}-{number}", marks=marks))
    return found


@pytest.mark.parametrize("code", examples())
def test_example_prints_what_its_comments_say(code):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert not said or printed.getvalue().splitlines() == said


def test_contract_page_has_every_tensor_core():
    listed = set()
    for names, inputs, group, f, floor, result in table("docs/contract.md", "architecture"):
        kinds = [kind for kind in ("bf16", "fp16", "tf32") if kind in inputs]
        kinds += ["fp8_e4m3", "fp8_e5m2"] if "fp8" in inputs else []
        numbers = tuple(int(cell.replace("−", "-")) for cell in (group, f, floor, result))
        listed |= {(name, kind, numbers) for name in names.split(", ") for kind in kinds}
    known = set()
    for name, arch in ARCHES.items():
        for kind in ("bf16", "fp16", "tf32", "fp8_e4m3", "fp8_e5m2"):
            if core := getattr(arch, kind):
                numbers = (core.group, core.fraction_bits, core.exponent_floor)
                known.add((name, kind, (*numbers, core.result_fraction_bits)))
    assert listed == known


def test_contract_page_has_every_operation():
    page = (ROOT / "docs" / "contract.md").read_text()
    assert not [name for name in ORDERS if f"`{name.split('.')[0]}`" not in page]


def test_changelog_names_the_contract_version():
    assert f"Contract version {CONTRACT_VERSION}," in (ROOT / "CHANGELOG.md").read_text()


def test_store_page_has_every_array():
    spelled = {"<i4": "int32", "<i8": "int64", "<u4": "uint32", "<u8": "uint64"}
    rows = [row for one in tables("docs/store.md", "array") for row in one]
    known = {n: (spelled[dtype], f"[{', '.join(dims)}]") for n, (dtype, dims) in ALL_ARRAYS.items()}
    assert {row[0]: (row[1], row[2]) for row in rows} == known


def test_readme_shows_a_stream_of_the_store():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(
        r"`bitassay show (\S+) --prompt (\S+)`.*?^```\n(.*?)^```", readme, re.M | re.S
    )
    assert shown
    stream = find_store().read(shown[1]).stream
    prompt = stream.prompt_names.index(shown[2])
    tokenizer = load_tokenizer(SUITES[shown[1].partition("/")[0]].model)
    ids = [*stream.prompt(prompt), *stream.tokens[prompt].tolist()]
    said = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown[3].rstrip().splitlines() == [line.rstrip() for line in said.rstrip().splitlines()]


def test_readme_says_how_the_architectures_differ():
    """The example of a difference is that between the two goldens of llama-pico."""
    readme = (ROOT / "README.md").read_text()
    hopper, ada = (find_store().read(f"llama-pico/{arch}").stream for arch in ("sm_90", "sm_89"))
    found = compare(hopper, ada)
    names = ("tokens", "logits", "fingerprints")
    counts = ", ".join(f"{getattr(found.different, name):,} {name}" for name in names)
    assert f"{found.different.streams} of 64 streams differ; different: {counts}" in readme
    first = found.differences[0]
    name = f"{hopper.prompt_names[first.prompt]}, token {first.step}: {first.operations[0]} differs"
    assert name in readme
    apart = (hopper.tokens != ada.tokens).any(1).sum()
    assert f"of llama-pico's 64 streams, {apart} part ways" in readme


def test_engine_page_has_the_sweep():
    listed = {name: settings.split(", ") for name, settings in table("docs/engine.md", "factor")}
    assert listed == {name: [str(one) for one in settings] for name, settings in FACTORS.items()}
    page = (ROOT / "docs" / "engine.md").read_text()
    assert f"`--sweep` makes {COUNT} runs" in page
    assert len(sweep(graphs=True)) == len(sweep(graphs=False)) == COUNT


def names(parameter: Any) -> list[str]:
    """Return the names of an option; none for an argument."""
    return [one for one in (*parameter.opts, *parameter.secondary_opts) if one.startswith("--")]


def options(command: str) -> set[str]:
    """Return the options of a command, but for --help."""
    return {name for one in get_command(app).commands[command].params for name in names(one)}


def help_of(command: str, option: str) -> str:
    """Return what --help says of an option."""
    (found,) = (one for one in get_command(app).commands[command].params if option in names(one))
    return found.help or ""


def test_engine_page_has_every_option_of_run():
    rows = table("docs/engine.md", "option of run")
    listed = {name for row in rows for name in re.findall(r"--[\w-]+", row[0])}
    assert listed == options("run")


def test_store_page_has_every_option_of_the_engine():
    page = (ROOT / "docs" / "store.md").read_text()
    own = {name for name in options("check") if "engine" in help_of("check", name)}
    assert {"--k", "--sweep"} <= own
    assert not sorted(name for name in own if f"`{name}" not in page)


def test_api_page_has_every_field_of_the_engine_configuration():
    page = (ROOT / "docs" / "api.md").read_text()
    known = ", ".join(f"{field.name}={field.default!r}" for field in fields(EngineConfig))
    assert f"`EngineConfig(*, {known})`" in page


def test_every_nox_session_is_described():
    source = (ROOT / "noxfile.py").read_text()
    sessions = re.findall(r"^@nox\.session.*\ndef (\w+)", source, re.MULTILINE)
    assert len(sessions) == 7
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        assert not [name for name in sessions if f"nox -s {name}" not in text], page


def test_files_that_pages_name_exist():
    missing = []
    for page in PAGES:
        named = re.findall(r"\b((?:docs|benchmarks|LICENSES)/[\w.-]+\.\w+)", page.read_text())
        missing += [f"{page.name}: {name}" for name in named if not (ROOT / name).exists()]
        linked = re.findall(r"\]\(((?!http|#)[^)#]+)", page.read_text())
        missing += [f"{page.name}: {name}" for name in linked if not (page.parent / name).exists()]
    assert not missing
