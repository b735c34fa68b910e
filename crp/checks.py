"""Checks of settings, whose errors say what would be right."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from crp.errors import InputError


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise a `ValueError` if ``value`` is none of the values of a `Literal`."""
    if not isinstance(value, str) or value not in get_args(choices):
        raise InputError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, not {value!r}")


def check_number(name: str, value: Any, least: float = -float("inf"), whole: bool = False) -> Any:
    """The number, an int if it is to be ``whole``; a `ValueError` if it is not finite, or smaller than ``least``."""
    kinds = int | np.integer if whole else int | float | np.integer | np.floating
    is_number = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < np.inf
    if not is_number or value < least:
        what = f"number of at least {least}" if least > -float("inf") else "number" if whole else "finite number"
        raise InputError(f"{name} must be a {'whole ' * whole}{what}, not {value!r}")
    return int(value) if whole else value  # (of numpy's numbers, torch makes no parts)
