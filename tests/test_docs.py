"""What README and docs/ state is what the code does."""

import contextlib
import importlib.util
import io
import re
import tomllib
from dataclasses import fields
from itertools import takewhile
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.main import get_command

from bitassay.cli.app import app
from bitassay.cli.engine_options import FLAGS
from bitassay.engine.config import EngineConfig
from bitassay.golden.compare.diff import compare
from bitassay.golden.report.decoding import decoder
from bitassay.golden.report.goldens import confirmed as confirmed_words
from bitassay.golden.report.text import difference, verdict
from bitassay.golden.runs.sweep import COUNT, FACTORS, sweep
from bitassay.golden.storage.store import find_store
from bitassay.golden.streams.token_stream import ALL_ARRAYS
from bitassay.golden.suites import SUITES
from bitassay.reference.checkpoints.checkpoint import load_tokenizer
from bitassay.reference.spec.arch import ARCHES
from bitassay.reference.spec.contract import CONTRACT_VERSION, ORDERS
from support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = (
    "reference|kernels|emulator|engine|golden|integrations|cli|tests|tools|docs|benchmarks|LICENSES"
)
README_WORDS = 900  # fewer than these; the rest is in docs/


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


def test_readme_is_short_and_starts_with_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) < README_WORDS
    title, nothing, fence, clone, golden, tests, end, *_ = readme.splitlines()
    assert title.startswith("# bitassay")
    assert (nothing, fence, end) == ("", "```", "```")
    assert clone.startswith("git clone ")
    assert golden.startswith("pip install nox && nox -s golden ")
    assert tests.startswith("pip install nox && nox -s tests ")


def test_readme_shows_goldens_of_the_store():
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"^golden +prompts .*\n((?:.+\n)+?)```", readme, re.MULTILINE)
    entries = find_store().entries()
    for line in shown.splitlines():
        name, prompts, tokens, _, confirmed = line.split(maxsplit=4)
        entry = entries[name]
        assert (prompts, tokens) == (f"{entry.prompts:,}", f"{entry.tokens:,}")
        assert confirmed == confirmed_words(entry)
    assert len(entries) == 6
    assert "(two of six)" in readme


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


def test_readme_shows_how_the_architectures_differ():
    """The failing check is that between the two goldens of llama-pico."""
    readme = (ROOT / "README.md").read_text()
    hopper, ada = (find_store().read(f"llama-pico/{arch}").stream for arch in ("sm_90", "sm_89"))
    found = compare(hopper, ada)
    printed = io.StringIO()
    console = Console(file=printed, width=300)
    name = "llama-pico/sm_90"
    console.print(verdict(name, "", found), difference(found, decoder(name)), sep="\n")
    real = [line.rstrip() for line in printed.getvalue().splitlines()]
    (shown,) = re.findall(r"^```\n(llama-pico/sm_90: different.*?)^```", readme, re.M | re.S)
    first, *others = shown.splitlines()
    assert real[0].replace(" ():", ":").startswith(f"{first}; compared: ")
    assert [line for line in real if line in others] == others
    diverging = (hopper.tokens != ada.tokens).any(1).sum()
    assert f"{diverging} of llama-pico's {len(hopper.tokens)} streams diverge" in readme


def test_example_of_an_own_kernel(gpu_emulation, interpreting):
    """The test that README proposes passes for the matmul of Triton's tutorials."""
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"^```python\n((?:(?!```).)*my_matmul.*?)^```", readme, re.M | re.S)
    path = ROOT / "tests" / "emulator" / "test_tutorial_matmul.py"
    spec = importlib.util.spec_from_file_location("tutorial", path)
    tutorial = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tutorial)
    names = {"my_matmul": lambda a, b: tutorial.matmul(a, b, "", torch.float32)}
    exec(code, names)
    names["test_my_matmul"](gpu_emulation)


def test_tour_shows_what_a_golden_has():
    tour = (ROOT / "docs" / "index.md").read_text()
    for name in find_store().entries():
        stream = find_store().read(name).stream
        line = verdict(name, "replayed with the reference", compare(stream, stream)).plain
        assert f"\n{line}\n" in tour, name


def test_index_links_every_page():
    index = {row[0] for row in table("docs/index.md", "page")}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    linked = {target for row in index for target in re.findall(r"\]\(([^)]+)\)", row)}
    assert pages <= linked
    assert {f"../{page.name}" for page in ROOT.glob("*.md")} <= linked
    readme = (ROOT / "README.md").read_text()
    assert "(docs/index.md)" in readme
    assert "(docs/glossary.md)" in readme


def test_tour_has_every_room():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(one for one in settings["contracts"] if one["containers"] == ["bitassay"])
    rooms = {name for layer in layers["layers"] for name in layer.split(" | ")}
    listed = {row[0].rstrip("/"): row[1] for row in table("docs/index.md", "folder")}
    assert listed.keys() == rooms
    for room in rooms:
        within = {path.parent.name for path in (ROOT / room).glob("*/__init__.py")}
        assert within == set(re.findall(r"\b(\w+)/", listed[room])), room


def test_glossary_is_in_order():
    terms = [row[0].lower() for row in table("docs/glossary.md", "term")]
    assert terms == sorted(terms)


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


def test_engine_page_has_every_option_of_run():
    rows = table("docs/engine.md", "option of run")
    listed = {name for row in rows for name in re.findall(r"--[\w-]+", row[0])}
    assert listed == options("run")


def test_store_page_has_every_option_of_the_engine():
    rows = table("docs/store.md", "option of the engine")
    listed = {name for row in rows for name in re.findall(r"--[\w-]+", row[0])}
    own = {name for flag in FLAGS.values() for name in flag.names.split("/")}
    assert listed == own | {"--sweep", "--seed"}
    assert own <= options("check")


def test_api_page_has_every_field_of_the_engine_configuration():
    page = (ROOT / "docs" / "api.md").read_text()
    known = ", ".join(f"{field.name}={field.default!r}" for field in fields(EngineConfig))
    assert f"`EngineConfig(*, {known})`" in page


def test_every_command_and_option_is_documented():
    text = "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    commands = get_command(app).commands
    assert not [name for name in commands if f"`bitassay {name}" not in text]
    known = {name for command in commands for name in options(command)}
    known |= {name for one in get_command(app).params for name in names(one)}
    documented = set(re.findall(r"--\w[\w-]*", text))
    assert sorted(known - documented) == []


def test_commands_that_pages_show_exist():
    """Every option in a line of `bitassay …` is one of that command."""
    unknown = []
    for page in (page for page in PAGES if page.name != "CHANGELOG.md"):
        for command, rest in re.findall(r"\bbitassay (\w+)((?: [^`\n#|]+)?)", page.read_text()):
            if command not in get_command(app).commands:
                continue
            given = re.findall(r"(?<= )--\w[\w-]*", rest)
            unknown += [f"{page.name}: {command} {n}" for n in given if n not in options(command)]
    assert not unknown


def test_every_nox_session_is_described():
    source = (ROOT / "noxfile.py").read_text()
    sessions = re.findall(r"^@nox\.session.*\ndef (\w+)", source, re.MULTILINE)
    assert len(sessions) == 7
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert not [name for name in sessions if f"nox -s {name}" not in text]


def test_files_that_pages_name_exist():
    missing = []
    for page in PAGES:
        named = re.findall(rf"(?<![\w/])((?:{FOLDERS})/[\w./-]+\.\w+)", page.read_text())
        missing += [f"{page.name}: {name}" for name in named if not (ROOT / name).exists()]
        linked = re.findall(r"\]\(((?!http|#)[^)#]+)", page.read_text())
        missing += [f"{page.name}: {name}" for name in linked if not (page.parent / name).exists()]
    assert not missing


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one).lower().replace(" ", "-") for one in headings}


def test_headings_that_pages_link_exist():
    missing = []
    for page in PAGES:
        for path, anchor in re.findall(r"\]\(((?!http)[^)#]*)#([^)]+)\)", page.read_text()):
            target = page.parent / path if path else page
            missing += [] if anchor in anchors(target.read_text()) else [f"{page.name}: {anchor}"]
    assert not missing


def test_modules_that_pages_name_exist():
    """`bitassay.room.module`, or a name in it; a test of its own compares docs/api.md."""
    missing = []
    for page in PAGES:
        for name in re.findall(r"\bbitassay((?:\.\w+)+)", page.read_text()):
            path = ROOT.joinpath(*name.split(".")[1:])
            holders = [path.parent.with_suffix(".py"), path.parent / "__init__.py"]
            defines = any(
                holder.exists() and re.search(rf"\b{path.name}\b", holder.read_text())
                for holder in holders
            )
            exists = path.is_dir() or path.with_suffix(".py").exists() or defines
            missing += [] if exists else [f"{page.name}: bitassay{name}"]
    assert not missing
