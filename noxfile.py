"""What can be run with `nox -s <session>`; `nox -l` lists it.

CPU sessions make their own environment with pip and constraints.txt. The sessions `gpu` and
`bench` run in the environment of the Python that runs nox, because a GPU machine brings its own
torch and Triton. No index is named here: pip's settings and environment choose it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")

# A CPU session sees no GPU, and never imports ./kernels in place of a package of that name.
# Triton's interpreter is switched on where it is wanted, not here: the kernel tests' conftest.
CPU = {"CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}

# Ranks of data parallelism that are tested: as many of these as the machine has GPUs.
DATA_PARALLEL = (1, 2, 4)

# Fewer, and mypy has not found the rooms: it succeeds on nothing too.
TYPED_FILES = 151

BENCHMARKS = ("oracle", "linear", "attention", "layer", "capture", "engine")

# What the installed wheel must and must not hold, relative to site-packages/bitassay.
WHEEL_HOLDS = (
    "py.typed",
    "reference/tensor_core.py",
    "kernels/linear.py",
    "engine/models/causal_lm.py",
    "emulator/interpreted/builder.py",
    "cli/app.py",
    "integrations/__init__.py",
    "golden/storage/store.py",
    "golden/models/context-lm/config.json",
    "golden/models/context-lm/model.safetensors",
    "golden/models/context-lm/tokenizer.json",
    "golden/models/llama-pico/config.json",
    "golden/models/llama-pico/model.safetensors",
    "golden/models/llama-pico/tokenizer.json",
    "golden/models/eagle-pico/config.json",
    "golden/models/eagle-pico/model.safetensors",
    "golden/prompts/*",
    "golden/store/manifest.jsonl",
    "golden/store/context-lm/sm_89/*/zarr.json",
    "golden/store/context-lm/sm_90/*/zarr.json",
    "golden/store/llama-pico/sm_89/*/zarr.json",
    "golden/store/llama-pico/sm_90/*/zarr.json",
    "golden/store/eagle-pico/sm_89/*/zarr.json",
    "golden/store/eagle-pico/sm_90/*/zarr.json",
)
WHEEL_LACKS = ("golden/store/.tmp-*", "tests", "**/test_*.py")


def groups(*names: str) -> list[str]:
    """Return the requirements of pyproject.toml's dependency groups."""
    return list(nox.project.dependency_groups(PROJECT, *names))


def install(session: nox.Session, *arguments: str) -> None:
    """Install with the versions of constraints.txt."""
    session.install("-c", str(ROOT / "constraints.txt"), *arguments)


def own_python(session: nox.Session, *needed: str) -> dict[str, str]:
    """Return the environment for running the checkout with the Python that runs nox.

    Ends the session, naming them, when modules are missing: nothing is installed there.
    """
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        session.error(
            f"{sys.executable} lacks {', '.join(missing)}. This session installs nothing, so that "
            "the machine's own torch and Triton are measured: install what is missing there"
        )
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Compiled kernels: where this is not set, the kernel tests choose the interpreter.
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "TRITON_INTERPRET": "0",
    }


def gpus() -> int:
    """Return how many GPUs this machine has."""
    import torch

    return torch.cuda.device_count()


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting (ruff) and which folder may import which (import-linter)."""
    install(session, *groups("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    # Imports are read, never run: torch is not installed here.
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": "src", **CPU})


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy, strict wherever it can be."""
    install(session, *groups("types"), "-e", ".")
    said = str(session.run("mypy", env=CPU, silent=True)).strip()
    session.log(said)
    checked = re.search(r"in (\d+) source files", said)
    if checked is None or int(checked[1]) < TYPED_FILES:
        session.error(
            f"expected mypy to check at least {TYPED_FILES} files: see mypy_path in pyproject.toml"
        )


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test that needs no GPU, the Triton kernels interpreted."""
    install(session, *groups("test"), "-e", ".")
    # One process a core: each interprets with one thread.
    parallel = ("-n", "auto", "--dist", "worksteal")
    # More threads would only wait for each other.
    env = {**CPU, "OMP_NUM_THREADS": "1"}
    # What takes long is named, and the CPU time of all: see CONTRIBUTING.md for how much it may be.
    slowest = ("--durations", "25", "--durations-min", "1")
    session.run("pytest", "-m", "not gpu", *parallel, *slowest, *session.posargs, env=env)


@nox.session(default=False)
def golden(session: nox.Session) -> None:
    """Regenerate every golden with the reference and compare it with the store.

    `-- --accept` publishes; `-- --sequential` generates one token at a time instead of replaying;
    `-- --prompts 8` is the quick form.
    """
    install(session, "-e", ".")
    session.run("bitassay", "record", "--all", *session.posargs, env=CPU)


@nox.session(default=False, venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Run the GPU tests and check every golden on this machine's GPU, or GPUs."""
    env = own_python(
        session,
        *("hypothesis", "numpy", "pytest", "rich", "safetensors"),
        *("tokenizers", "torch", "triton", "typer", "zarr"),
    )
    python = (sys.executable, "-m")
    options = {"env": env, "external": True}
    session.run(*python, "pytest", "-m", "gpu", *(session.posargs or ("tests",)), **options)
    session.run(*python, "bitassay", "check", "--all", "--with", "gpu", **options)
    # The last one runs EAGLE on as many ranks as there are GPUs for: 1, 2 and 4.
    for sweep in ("linear", "attention", "model", "eagle"):
        session.run(sys.executable, f"tools/hardware/{sweep}_sweep.py", **options)
    test = ("-v", "-s", "-m", "gpu", "tests/distributed/test_eagle_dp.py")
    for dp in (dp for dp in DATA_PARALLEL if dp <= gpus()):
        sizes = {"TP_SIZE": "1", "DP_SIZE": str(dp)}
        session.run(*python, "pytest", *test, env={**env, **sizes}, external=True)


@nox.session(default=False, venv_backend="none")
def bench(session: nox.Session) -> None:
    """Run the benchmarks, or the one named first with its options: `-- oracle --help`."""
    env = own_python(session, "rich", "torch", "triton")
    folder = ROOT / "benchmarks"
    # What the scripts share, with each other and with the tests.
    env["PYTHONPATH"] += f"{os.pathsep}{folder}{os.pathsep}{ROOT / 'tests' / 'lib'}"
    name, *options = session.posargs or [""]
    named = (folder / f"{name}.py").is_file()
    for script in [name] if named else BENCHMARKS:
        arguments = options if named else session.posargs
        path = str(folder / f"{script}.py")
        session.run(sys.executable, path, *arguments, env=env, external=True)


@nox.session(default=False)
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it alone, and use it outside the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        # From a copy: files left in build/ by an earlier version would end up in the wheel.
        source = Path(folder, "source")
        ignored = shutil.ignore_patterns(".git", ".nox", ".venv", "venv", "build", "*.egg-info")
        shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
        session.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(source))
        (built,) = Path(folder).glob("bitassay-*.whl")
        install(session, "--force-reinstall", str(built))
        shutil.rmtree(source)
        session.chdir(folder)
        use_installed(session, built.name)


def use_installed(session: nox.Session, name: str) -> None:
    """Check what the installed wheel holds and that its command reads the packaged store."""
    env = {**CPU, "BITASSAY_STORE": None, "PYTHONPATH": None}
    modules = (
        *("reference.tensor_core", "kernels.linear", "emulator", "engine.models.causal_lm"),
        *("golden.check", "integrations", "cli.app"),
    )
    imports = "".join(f"import bitassay.{module}; " for module in modules)
    where = f"{imports}print(bitassay.__path__[0])"
    found = session.run("python", "-c", where, env=env, silent=True)
    package = Path(str(found).strip().splitlines()[-1])
    if Path(session.virtualenv.location).resolve() not in package.resolve().parents:
        session.error(f"expected bitassay from the wheel, found {package}")
    for pattern in WHEEL_HOLDS:
        if not any(package.glob(pattern)):
            session.error(f"{name} lacks bitassay/{pattern}: see package-data in pyproject.toml")
    for pattern in WHEEL_LACKS:
        for path in package.glob(pattern):
            session.error(f"{name} holds {path.relative_to(package.parent)}")
    session.run("bitassay", "--help", env=env)
    session.run("bitassay", "list", "--verify", env=env)
