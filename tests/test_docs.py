"""What README and docs/ state is what the code does."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from bitassay.golden.compare import compare
from bitassay.golden.store import find_store
from bitassay.golden.stream import ARRAYS
from bitassay.golden.suites import SUITES
from bitassay.reference.arch import ARCHES
from bitassay.reference.checkpoint import load_tokenizer
from bitassay.reference.contract import CONTRACT_VERSION, ORDERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table whose header row begins with `heading`, code marks removed."""
    lines = (ROOT / page).read_text().splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" `") for cell in line.strip("|").split(" | ")])
    return rows


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
    listed = {row[0]: (row[1], row[2]) for row in table("docs/store.md", "array")}
    known = {n: (spelled[dtype], f"[{', '.join(dims)}]") for n, (dtype, dims) in ARRAYS.items()}
    assert listed == known


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
    assert f"of these 64 streams, {apart} part ways" in readme


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
        named += re.findall(r"\]\(((?!http|#)[^)#]+)", page.read_text())
        missing += [f"{page.name}: {name}" for name in named if not (ROOT / name).exists()]
    assert not missing
