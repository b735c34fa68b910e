"""The folder of an atlas: nothing of anyone else's is in it, and nothing of earlier reports is left in it."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path

from crp.errors import InputError
from crp.visualization.report.kept import PAGED
from crp.visualization.table.files import make_folder, write_atomic

MARKER = "atlas.json"
#: Folders that pages and pictures are in.
PARTS = ("class", "concept", "layer", "maps", "pictures", "sample", *PAGED)
#: Files that are in the folder itself.
SHARED = ("index.html", "suspects.html", "search.html", "atlas.css", "atlas.js", MARKER)
_SUFFIXES = frozenset({".html", ".json", ".npz", ".png", ".webp"})


def claim(folder: Path) -> None:
    """Make the folder of an atlas, or make sure that it is one.

    Raises
    ------
    ValueError
        If it cannot be a folder, or holds something else.
    """
    make_folder(folder)
    if not (folder / MARKER).is_file() and (foreign := next(iter(sorted(folder.iterdir())), None)):
        raise InputError(
            f"{folder} is not a folder of an atlas: it holds {foreign.name!r}, and no {MARKER}. Nothing was changed; "
            "give another folder"
        )
    write_atomic(folder / MARKER, json.dumps({"version": 1}).encode())


def discard(folder: Path) -> None:
    """Delete an atlas, if there is one in a folder, and nothing else."""
    if (folder / MARKER).is_file():
        remove_others(folder, frozenset())
        for name in SHARED:
            (folder / name).unlink(missing_ok=True)
        for place in sorted(folder.rglob("*"), reverse=True):
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
        if not any(folder.iterdir()):
            folder.rmdir()


def remove_others(folder: Path, kept: Set[str]) -> None:
    """Delete pages and pictures of earlier reports that are not among those ``kept``, and nothing else."""
    for part in PARTS:
        for file in sorted((folder / part).rglob("*")):
            if file.suffix in _SUFFIXES and file.is_file() and file.relative_to(folder).as_posix() not in kept:
                file.unlink()
