"""The rules of the house: floors, links, light imports, tidy files, a README that runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "crp"
README = ROOT / "README.md"

#: The floor of every room. Imports run downward, or stay on their floor.
FLOORS = {
    **dict.fromkeys(("errors", "image", "layers", "notices", "types"), 0),
    **dict.fromkeys(("concepts", "trace"), 1),
    **dict.fromkeys(("attribution", "canonizers", "concept_graph", "engine", "rules"), 2),
    "composites": 3,
    "attributors": 4,
    **dict.fromkeys(("explain", "metrics", "visualization", "compat"), 5),
    **dict.fromkeys(("cache", "graph", "helper", "hooks", "maximization", "statistics"), 6),
    **dict.fromkeys(("demo", "commands", "__main__"), 7),
}
#: What is imported only by the functions that need it.
HEAVY = {"matplotlib", "sklearn", "torchvision", "distributed", "jinja2"}

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of everything that is imported, anywhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    found = set()
    for name in imports(TREES[path]):
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        if name in MODULES and name != "crp":
            found.add(name)
    return found


def room(module: str) -> str:
    return module.split(".")[1]


# --- floors ---------------------------------------------------------------------------------------------------------


def test_every_room_has_a_floor():
    rooms = {room(module) for module in MODULES if module != "crp"}
    assert rooms - set(FLOORS) == set(), "give each new room a floor in FLOORS"


def test_imports_run_downward():
    upward = [
        f"{module} (floor {FLOORS[room(module)]}) imports {other} (floor {FLOORS[room(other)]})"
        for module, path in MODULES.items()
        for other in modules_imported(path)
        if module != "crp" and FLOORS[room(other)] > FLOORS[room(module)]
    ]
    assert upward == []


def test_the_package_itself_imports_nothing_of_its_own():
    assert modules_imported(PACKAGE / "__init__.py") == set()


def test_the_engine_knows_no_rule_composite_or_canonizer():
    known, todo = set(), ["crp.attribution"]
    while todo:
        module = todo.pop()
        if module not in known:
            known.add(module)
            todo.extend(modules_imported(MODULES[module]))
    assert {"crp.engine.conditions", "crp.concepts"} <= known
    assert {room(module) for module in known} & {"rules", "composites", "canonizers"} == set()


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


# --- README ---------------------------------------------------------------------------------------------------------


def readme() -> str:
    return README.read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(readme().splitlines()) <= 150


def test_readme_has_the_two_commands():
    assert 'python -m pip install ".[demo]" && crp demo' in readme()
    assert 'python -m pip install -e ".[test]" && python -m pytest' in readme()


def test_readme_shows_a_picture_and_links_to_what_exists():
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)#]+)[^)]*\)|(?:src|href)=\"([^\"#]+)", readme())
    local = [markdown or html for _, markdown, html in targets if not re.match(r"\w+:", markdown or html)]
    assert [target for target in local if not (ROOT / target).exists()] == []
    assert any(target.endswith((".png", ".jpg", ".svg", ".gif")) for target in local)


def test_readme_code_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [(match.start(1), match[1]) for match in re.finditer(r"^```python\n(.*?)^```", readme(), re.M | re.S)]
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for start, source in blocks:
        lines = "\n" * readme()[:start].count("\n")  # so that errors name the line of the README
        exec(compile(lines + source, str(README), "exec"), namespace)


@pytest.mark.skipif(not (ROOT / ".ci" / "run").exists(), reason="not a checkout of the repository")
def test_ci_runs_the_commands_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    text = script.read_text(encoding="utf-8")
    for command in ('python -m pip install -e ".[test]"', "python -m pytest", "ruff check", "mypy", "crp demo"):
        assert command in text
    assert "set -euo pipefail" in text


def test_the_page_of_methods_has_every_preset():
    from crp.composites.registry import classes

    rows = (ROOT / "tutorials" / "methods.md").read_text(encoding="utf-8").splitlines()
    found = {row.split("`")[1]: row.split("`")[3] for row in rows if row.startswith("| `")}
    assert found == {name: kind.__name__ for name, kind in classes().items()}


# --- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_a_page_names_files_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(re.findall(r"`([\w/.]+\.(?:py|md|toml)|[\w/]+/)`", text)) | set(re.findall(r"\]\(([^)#:]+)", text))
    assert names
    assert [name for name in names if not (ROOT / name).exists() and not (PACKAGE / name).exists()] == []


def test_the_page_of_the_architecture_has_every_room():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = {room(module) for module in MODULES if module != "crp"} - {"__main__"}
    assert [name for name in rooms if f"`{name}`" not in text and f"`{name}/`" not in text] == []


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 50


def test_the_citation_has_the_version():
    from crp import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
