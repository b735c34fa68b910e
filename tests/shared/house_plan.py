"""The package as its files and imports show it: modules, rooms, faces, arrows, floors, circles, functions."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "crp"
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {path: path.read_text(encoding="utf-8") for path in FILES}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}

#: A file beside the rooms with at most so many lines is a face: other names for what stands in a room.
FACE = 25

Node = TypeVar("Node", bound=Hashable)


def name_of(path: Path) -> str:
    """Dotted name of a file's module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def room(module: str) -> str:
    """The folder of `crp` with the module, such as ``visualization.table``; or its own name, beside the folders."""
    inside = module.split(".")[1:]
    folders = inside if MODULES[module].name == "__init__.py" else inside[:-1]
    return ".".join(folders or inside)


LINES = Counter[str]()
for _name, _path in MODULES.items():
    LINES[room(_name)] += len(SOURCES[_path].splitlines())

#: The package itself and what is no longer than a face.
FACES = {name for name, length in LINES.items() if length <= FACE}
ROOMS = sorted(set(LINES) - FACES)


# --- imports --------------------------------------------------------------------------------------------------------


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of everything that is imported, anywhere in a module, also for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    modules = set()
    for name in imports(TREES[path]):
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        if name in MODULES and name != "crp":
            modules.add(name)
    return modules


IMPORTED = {name: modules_imported(path) - {name} for name, path in MODULES.items()}


def arrows() -> dict[str, set[str]]:
    """For each room the other rooms that it imports; faces are left out."""
    into: dict[str, set[str]] = {name: set() for name in ROOMS}
    for module, others in IMPORTED.items():
        if room(module) in into:
            into[room(module)] |= {room(other) for other in others} - FACES - {room(module)}
    return into


def circles(graph: Mapping[Node, Iterable[Node]]) -> list[set[Node]]:
    """Nodes from which the way along the arrows leads back to them, together with those that they meet on it."""
    reached: dict[Node, set[Node]] = {}
    for start in graph:
        seen, todo = set[Node](), list(graph[start])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo.extend(graph.get(node, ()))
        reached[start] = seen
    groups = {
        frozenset(other for other in reached[node] if node in reached.get(other, ()))
        for node in graph
        if node in reached[node]
    }
    return [set(group) for group in groups]


def floors() -> dict[str, int]:
    """The floor of each room: one above the highest that it imports. Rooms of one circle share theirs."""
    graph, height = arrows(), dict[str, int]()
    ring = {name: group for group in circles(graph) for name in group}

    def climb(name: str, below: frozenset[str]) -> int:
        if name not in height:
            around = ring.get(name, {name})
            others = {other for member in around for other in graph[member]} - around - below
            height.update(dict.fromkeys(around, 1 + max((climb(o, below | around) for o in others), default=0)))
        return height[name]

    return {name: climb(name, frozenset()) for name in graph}


# --- names and functions --------------------------------------------------------------------------------------------


def public_names() -> dict[str, set[str]]:
    """Every public class and function at the top of a module, with the modules that define it."""
    homes = defaultdict[str, set[str]](set)
    for module, path in MODULES.items():
        for node in TREES[path].body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes[node.name].add(module)
    return homes


class Function(NamedTuple):
    """A function or method: its full name, its lines of code, and its parameters without ``self`` and ``cls``."""

    name: str
    lines: int
    parameters: int


def code_lines(source: str, tree: ast.AST) -> set[int]:
    """Numbers of the lines that are no comment, docstring or blank."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def functions_in(tree: ast.AST, lines: set[int], prefix: str) -> Iterator[Function]:
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}.{node.name}" if hasattr(node, "name") and isinstance(node.name, str) else prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            positional = [one.arg for one in arguments.posonlyargs + arguments.args]
            own = positional[1:] if positional[:1] in (["self"], ["cls"]) else positional
            further = len(arguments.kwonlyargs) + (arguments.vararg is not None) + (arguments.kwarg is not None)
            inside = lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            yield Function(name, len(inside), len(own) + further)
        yield from functions_in(node, lines, name)


def functions() -> Iterator[Function]:
    """All functions of the package, methods and inner ones, too."""
    for module, path in MODULES.items():
        yield from functions_in(TREES[path], code_lines(SOURCES[path], TREES[path]), module)
