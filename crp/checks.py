"""Checks of settings, whose errors say what would be right."""

from __future__ import annotations

from typing import get_args

import numpy as np

from crp.errors import InputError


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise a `ValueError` if ``value`` is none of the values of a `Literal`."""
    if not isinstance(value, str) or value not in get_args(choices):
        raise InputError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, not {value!r}")


def check_number(name: str, value: object, least: float, whole: bool = False) -> None:
    """Raise a `ValueError` if ``value`` is no finite number, or smaller than ``least``."""
    kinds = int | np.integer if whole else int | float | np.number
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < float("inf"):
        raise InputError(f"{name} must be a {'whole ' * whole}number of at least {least}, not {value!r}")
