"""The rules of the house: links, light imports, tidy files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from house_plan import FILES, PACKAGE, ROOT, TREES, imports, name_of

#: What is imported only by the functions that need it.
HEAVY = {"matplotlib", "sklearn", "torchvision", "distributed", "jinja2"}


# --- light imports --------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing():
    code = "import sys, crp; assert not {'torch', 'numpy', 'zennit', 'click'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def runs_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module that run when it is imported."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        for part in ("body", "orelse", "finalbody"):
            yield from runs_at_import(getattr(node, part, []))


def test_heavy_libraries_are_imported_where_they_are_used():
    heavy = [
        f"{name_of(path)} imports {name} when it is imported"
        for path in FILES
        for statement in runs_at_import(TREES[path].body)
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for name in imports(statement)
        if name.split(".")[0] in HEAVY
    ]
    assert heavy == []


# --- tidy files -----------------------------------------------------------------------------------------------------


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Nodes of these kinds in the whole package, with their places."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '')}", node


def is_call_of(node: ast.AST | None, *names: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_library_code_does_not_print():
    assert [place for place, node in nodes(ast.Call) if is_call_of(node, "print")] == []


def test_library_code_is_not_left_for_later():
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert [name_of(path) for path in FILES if marks.search(path.read_text(encoding="utf-8"))] == []


def test_defaults_are_immutable():
    mutable = ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp
    found = [
        place
        for place, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        for default in [*node.args.defaults, *node.args.kw_defaults]
        if isinstance(default, mutable) or is_call_of(default, "list", "dict", "set")
    ]
    assert found == []


@pytest.mark.parametrize("name", ["composites", "canonizers", "visualization"])
def test_links_lead_into_the_package(name):
    link = ROOT / name
    if not link.is_symlink() and link.is_file():
        pytest.skip("this checkout has files in place of symbolic links")
    assert link.is_symlink()
    assert link.resolve() == PACKAGE / name
    assert not Path(link.readlink()).is_absolute()


def undocumented(function: ast.FunctionDef, text: str) -> list[str]:
    """Parameters that a docstring lists others, but not them, nor says where theirs are described."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", text, re.M | re.S)
    if section is None or re.search(r"parameters (of|are as in) `", text):
        return []
    entries = [line.partition(" : ")[0] for line in section[1].splitlines() if line[:1].strip()]
    listed = {name.strip(" *") for entry in entries for name in entry.split(",")}
    own = [
        one.arg
        for _, part in ast.iter_fields(function.args)
        for one in (part if isinstance(part, list) else [part])
        if isinstance(one, ast.arg)
    ]
    return [name for name in own if name not in {*listed, "self", "cls"} and name[0] != "_"]


def test_docstrings_that_list_parameters_list_them_all():
    missing = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            called = [node] if isinstance(node, ast.FunctionDef) else []
            if isinstance(node, ast.ClassDef):
                called = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
            for function in called:
                names = undocumented(function, ast.get_docstring(node) or "")
                missing += [f"{name_of(path)}.{node.name}: {name}" for name in names]
    assert missing == []


def test_every_file_is_linted():
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "--no-cache"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    missing = [name_of(path) for path in FILES if str(path) not in shown]
    assert not missing


def test_the_licence_is_there_and_the_package_is_typed():
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("BSD 3-Clause")
    assert (PACKAGE / "py.typed").exists()


def test_the_changelog_knows_the_version():
    from crp import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
