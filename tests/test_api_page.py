"""docs/api.md names what the modules have, with the parameters and defaults of the code."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from support.paths import ROOT

ROOMS = ("reference", "emulator", "kernels", "engine", "golden", "cli")
# `name`, `name(parameters)`, `Class.method(parameters)` or `.member(parameters)`.
NAMED = re.compile(r"`([A-Za-z_]\w*)?(?:\.(\w+))?(\([^`]*\))?`")
_ELLIPSIS = "UNSAID"  # stands for a default written as …


@cache
def module(room: str, name: str) -> dict[str, ast.AST]:
    """Return what a module defines or imports, nothing if it does not exist; it is only read."""
    where = ROOT.joinpath(room, *name.split("."))
    path = where.with_suffix(".py")
    if not path.exists():  # the room itself, or a room within it
        path = (ROOT / room if name == room else where) / "__init__.py"
    found: dict[str, ast.AST] = {}
    if not path.exists():
        return found
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                found |= {n.id: node for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def class_named(room: str, name: str) -> ast.ClassDef | None:
    """Return the class of a name, wherever in the room it is."""
    for path in sorted((ROOT / room).rglob("*.py")):
        parts = path.relative_to(ROOT / room).with_suffix("").parts
        dotted = ".".join(part for part in parts if part != "__init__") or room
        if isinstance(node := module(room, dotted).get(name), ast.ClassDef):
            return node
    return None


def members(room: str, name: str) -> dict[str, ast.AST]:
    """Return methods, fields and attributes of a class and its bases."""
    node = class_named(room, name)
    if node is None:
        return {}
    found: dict[str, ast.AST] = {}
    for base in node.bases:
        found |= members(room, base.id) if isinstance(base, ast.Name) else {}
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            found[part.attr] = part
    for part in node.body:
        if isinstance(part, ast.FunctionDef):
            found[part.name] = part
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found[part.target.id] = part
    return found


def parameters(function: ast.FunctionDef) -> dict[str, tuple[bool, str | None]]:
    """Return for each parameter whether it goes by keyword alone, and its default."""
    given, own = function.args, {}
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    for one, default in zip(positional, defaults, strict=True):
        own[one.arg] = (False, default and ast.unparse(default))
    for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        own[one.arg] = (True, default and ast.unparse(default))
    return {name: value for name, value in own.items() if name not in ("self", "cls")}


def difference(written: str, code: ast.FunctionDef) -> str:
    """Return how a written signature is unlike the code's; what has a default may be omitted."""
    (said,) = ast.parse(f"def f{written.replace('…', _ELLIPSIS)}: ...").body
    assert isinstance(said, ast.FunctionDef)
    mine, own = parameters(said), parameters(code)
    if list(mine) != [name for name in own if name in mine]:
        return f"the code has {list(own)}"
    for name, value in own.items():
        if name not in mine:
            if value[1] is None:
                return f"{name} is left out and has no default"
        elif mine[name] != (value[0], _ELLIPSIS) and mine[name] != value:
            return f"{name} is {value} in the code"
    return ""


def rows(room: str) -> Iterator[tuple[list[str], str]]:
    """Yield the modules of each row of a room's table, and what is said of them."""
    page = (ROOT / "docs" / "api.md").read_text()
    (section,) = re.findall(rf"^## `bitassay\.{room}`.*?(?=^## |\Z)", page, re.M | re.S)
    for names, said in re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.MULTILINE):
        yield re.findall(r"`([\w.]+)`", names), said


def wrong_in(room: str, modules: list[str], said: str) -> Iterator[str]:
    """Yield what a row says that the code does not."""
    known: dict[str, ast.AST] = {}
    for name in modules:
        known |= module(room, name)
    classes: list[str] = []  # those named so far: `.member` is of one of them
    for name, member, written in NAMED.findall(said):
        if name in modules and member:  # `norm.add`: of the module
            name, member = member, ""
        label = f"{name}{'.' if member else ''}{member}{written}"
        if name:
            node = known.get(name)
            if class_named(room, name) is not None and name in known:
                classes.append(name)
        if member:
            of = [name] if name else reversed(classes)
            node = next((m[member] for c in of if member in (m := members(room, c))), None)
        elif written and isinstance(node, ast.ClassDef):
            node = members(room, name).get("__init__", node)
        if node is None:
            yield f"{label}: not in {', '.join(modules)}"
        elif written and isinstance(node, ast.FunctionDef) and (why := difference(written, node)):
            yield f"{label}: {why}"


@pytest.mark.parametrize("room", ROOMS)
def test_api_page_has_names_and_signatures_of_the_code(room):
    found = [line for modules, said in rows(room) for line in wrong_in(room, modules, said)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("room", ROOMS)
def test_modules_of_the_api_page_exist(room):
    named = [name for modules, _ in rows(room) for name in modules]
    assert named
    assert not [name for name in named if not module(room, name)]


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("(x, *, y, z=1)", ""),
        ("(x, *, y)", ""),
        ("(x, *, y=…)", ""),
        ("(x, y)", "y is (True, None) in the code"),
        ("(x, *, z=1)", "y is left out and has no default"),
        ("(x, *, y, z=2)", "z is (True, '1') in the code"),
        ("(w, *, y)", "the code has ['x', 'y', 'z']"),
    ],
)
def test_signatures_are_told_apart(written, why):
    (code,) = ast.parse("def f(self, x, *, y, z=1): ...").body
    assert difference(written, code) == why
