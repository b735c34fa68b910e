"""Parts of a table's recipe in words, as messages, ``crp status`` and reports tell them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from crp.wording import first_few

#: Of a part that is a mapping: the entries that name it, and those of which the first does where it has no name.
_NAMES = {
    "model": (("named", "weights", "checkpoint"), ("class",)),
    "dataset": (("named",), ("folder", "class")),
    "output": (("named",), ("function",)),
}


def tell_part(recipe: Mapping[str, Any], part: str) -> str:
    """A part of a recipe in words; nothing where the recipe does not say it."""
    about = recipe.get(part)
    if not isinstance(about, Mapping):
        absent = {"composite": "the plain gradient", "preprocess": "none"}
        return (absent.get(part, "") if part in recipe else "") if about is None else str(about)
    if part == "composite":
        given = about.get("keywords")
        settings = [f"{key}={value}" for key, value in given.items()] if isinstance(given, Mapping) else []
        return f"{about.get('name') or about.get('class')}({', '.join(settings)})"
    if part == "layers":
        return first_few(list(about), 5, "layers")
    names, others = ([str(about[key]) for key in keys if about.get(key)] for keys in _NAMES.get(part, ((), ())))
    return ", ".join(names or others[:1])


def _tell_others(parts: Iterable[str]) -> str:
    """Parts of a recipe that another one has otherwise: ``"another model and other layers"``."""
    return " and ".join(f"{'other' if part.endswith(('layers', 'targets')) else 'another'} {part}" for part in parts)


def _tell_changes(parts: Iterable[str], *sides: tuple[Mapping[str, Any], Mapping[str, str]]) -> str:
    """How parts of two recipes differ, there and here: in words where these differ, else by their fingerprints."""
    changes = []
    for part in parts:
        short = [marks.get(part, "none")[:8] for _, marks in sides]
        words = [tell_part(recipe, part) or mark for (recipe, _), mark in zip(sides, short, strict=True)]
        there, here = words if words[0] != words[1] else short
        changes.append(f"{part} {there} there, {here} here")
    return "; ".join(changes)
