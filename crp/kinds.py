"""Checks of what kind of thing a value is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from crp.errors import InputTypeError
from crp.notices import kind_of


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """Raise a `TypeError` if a value is of none of these types; ``what`` says in words what it must be."""
    if not isinstance(value, kinds):
        raise InputTypeError(f"{name} must be {what}, not {kind_of(value)}")


def as_path(name: str, value: Any) -> Path:
    """The path; a `TypeError` if it is none."""
    check_kind(name, value, (str, os.PathLike), "a path, such as 'results'")
    return Path(value)
