"""The package around the rooms: one version, links, pinned dependencies, a lean reference."""

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bitassay
from support.paths import ROOT

ROOMS = ("cli", "integrations", "golden", "engine", "kernels", "emulator", "reference")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def normal(requirement: str) -> str:
    """Return a requirement's project name as package indexes spell it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def sessions() -> dict[str, bool]:
    """Return the nox sessions by name, and whether plain `nox` runs them; nothing is imported."""
    found = {}
    for node in ast.parse((ROOT / "noxfile.py").read_text()).body:
        for decorator in getattr(node, "decorator_list", ()):
            text = ast.unparse(decorator)
            if text.startswith("nox.session"):
                found[node.name] = "default=False" not in text
    return found


def test_version_is_the_same_everywhere():
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation
    assert changes
    assert [citation[1], changes[1]] == [bitassay.__version__] * 2


def test_installed_version_is_this_one():
    try:
        installed = importlib.metadata.version("bitassay")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("bitassay is imported from PYTHONPATH and not installed")
    assert installed == bitassay.__version__


def test_package_is_links_to_the_rooms_and_nothing_else():
    package = ROOT / "src" / "bitassay"
    names = {path.name for path in package.iterdir()} - {"__pycache__"}
    assert names == {"__init__.py", "__main__.py", "py.typed", *ROOMS}
    for room in ROOMS:
        assert os.readlink(package / room) == f"../../{room}"
        assert (package / room / "__init__.py").is_file()
    assert Path(bitassay.__file__).parent == package


def test_a_good_tree_is_built():
    setup = runpy.run_path(str(ROOT / "setup.py"))
    assert setup["ROOMS"] == ROOMS
    setup["check_rooms"](ROOT / "src" / "bitassay")


@pytest.mark.parametrize("lost", ["left out", "small files"])
def test_a_tree_that_lost_its_links_is_not_built(lost, tmp_path):
    """As an unpacked zip of the repository is, and a checkout without symbolic links."""
    package = tmp_path / "src" / "bitassay"
    package.mkdir(parents=True)
    for room in ROOMS if lost == "small files" else ():
        (package / room).write_text(f"../../{room}")
    shutil.copy(ROOT / "setup.py", tmp_path)
    command = [sys.executable, "setup.py", "bdist_wheel"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"bitassay: expected symbolic links to {', '.join(ROOMS)} in ")
    assert "git clone -c core.symlinks=true" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_tests_are_no_package():
    """But for what they share, whose package is on their path by a folder of its own."""
    shared = ROOT / "tests" / "lib"
    packages = [p for p in (ROOT / "tests").rglob("__init__.py") if shared not in p.parents]
    assert not packages


def test_everything_required_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {normal(line): line for line in lines if line and not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins.values())
    wanted = [*PROJECT["project"]["dependencies"]]
    for group in PROJECT["dependency-groups"].values():
        wanted += [requirement for requirement in group if isinstance(requirement, str)]
    assert not {normal(requirement) for requirement in wanted} - pins.keys()
    assert (pins["torch"], pins["triton"]) == ("torch==2.13.0", "triton==3.7.1")


def test_what_the_wheel_is_asked_for_is_there():
    (holds,) = [
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "noxfile.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WHEEL_HOLDS"
    ]
    package = ROOT / "src" / "bitassay"
    assert not [pattern for pattern in holds if not any(package.glob(pattern))]
    assert {pattern.partition("/")[0] for pattern in holds} == {"py.typed", *ROOMS}


def test_plain_nox_runs_lint_types_and_tests():
    assert sessions() == {
        "lint": True,
        "types": True,
        "tests": True,
        "golden": False,
        "gpu": False,
        "bench": False,
        "wheel": False,
    }


def test_ci_runs_sessions_that_exist():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    matrix = re.search(r"session: \[(.*)\]", workflow)
    assert matrix
    assert set(matrix[1].split(", ")) == {"lint", "types", "tests", "golden", "wheel"}
    run = (ROOT / ".ci" / "run").read_text()
    called = re.findall(r"^run ([a-z ]+)", run, re.MULTILINE)
    assert " ".join(called).split() == ["lint", "types", "golden", "tests"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_no_index_is_named_where_a_closed_network_would_meet_it():
    for name in ("noxfile.py", "pyproject.toml", "constraints.txt", ".ci/run"):
        assert "download.pytorch.org" not in (ROOT / name).read_text(), name


def test_reference_needs_neither_triton_nor_the_golden_room_s_libraries(fresh_python):
    blocked = ("filelock", "rich", "tokenizers", "triton", "typer", "zarr", "bitassay.kernels")
    modules = sorted(path.stem for path in (ROOT / "reference").glob("*.py"))
    assert len(modules) > 5
    imports = "".join(f"import bitassay.reference.{name}\n" for name in modules)
    # torch first: what torch itself imports is not ours to forbid.
    code = f"import sys, torch\nfor name in {blocked}: sys.modules[name] = None\n{imports}"
    done = fresh_python.run(code)
    assert done.returncode == 0, done.stderr
