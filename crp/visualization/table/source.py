"""Source of loaded code as a syntax tree, which is the same under every version of Python; bytecode is not."""

from __future__ import annotations

import ast
import functools
import linecache
import types
from collections.abc import Iterator

#: Longest source that is compared, in characters.
_LONGEST = 2_000_000
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def syntax_of(code: types.CodeType) -> str | None:
    """Syntax tree of a function's code, without places, comments and layout.

    Returns
    -------
    str or None
        None where the source is not there, as of an interactive session, is no longer what was loaded, or holds several
        functions that cannot be told apart, as two lambdas on a line.
    """
    text = "".join(linecache.getlines(code.co_filename))
    if not text or len(text) > _LONGEST:
        return None
    compiled, trees = _parsed(text, code.co_filename)
    key = code.co_name, code.co_firstlineno
    same = [one for one in compiled.get(key, ()) if _content(one) == _content(code)]
    found = trees.get(key, ())
    return _written(found[0]) if same and len(found) == 1 else None


@functools.lru_cache(64)
def _parsed(
    text: str, name: str
) -> tuple[dict[tuple[str, int], list[types.CodeType]], dict[tuple[str, int], list[ast.AST]]]:
    """Code and syntax trees of the functions in a source, by name and first line."""
    compiled: dict[tuple[str, int], list[types.CodeType]] = {}
    trees: dict[tuple[str, int], list[ast.AST]] = {}
    try:
        module = ast.parse(text, name)
        for code in _codes(compile(text, name, "exec", dont_inherit=True)):
            compiled.setdefault((code.co_name, code.co_firstlineno), []).append(code)
    except (SyntaxError, ValueError, RecursionError):
        return {}, {}
    for node in ast.walk(module):
        if isinstance(node, _DEFINITIONS):
            lines = [one.lineno for one in (node, *getattr(node, "decorator_list", ()))]
            trees.setdefault((getattr(node, "name", "<lambda>"), min(lines)), []).append(node)
    return compiled, trees


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _content(code: types.CodeType) -> tuple[object, ...]:
    """What two codes of one version of Python have in common if they are of one source."""
    constants = [_content(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return code.co_code, code.co_names, code.co_freevars, code.co_cellvars, code.co_varnames, tuple(constants)


def _written(node: object) -> str:
    """Tree as text. Fields that are empty are left out, since newer versions of Python have more of them."""
    if isinstance(node, ast.AST):
        fields = [(name, getattr(node, name, None)) for name in node._fields if name not in ("type_comment", "kind")]
        kept = [f"{name}={_written(value)}" for name, value in fields if value is not None and value != []]
        return f"{type(node).__name__}({', '.join(kept)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_written, node))}]"
    return f"{type(node).__name__} {node!r}"
