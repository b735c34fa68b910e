"""Checks of settings that are on or off, or functions."""

from __future__ import annotations

import numpy as np

from crp.errors import InputTypeError


def is_flag(value: object) -> bool:
    """Whether a value is True or False, which Python counts among the numbers."""
    return isinstance(value, bool | np.bool_)


def check_flags(**flags: object) -> None:
    """Raise a `TypeError` if a flag is neither True nor False; a word such as ``"no"`` would count as true."""
    for name, value in flags.items():
        if not is_flag(value):
            raise InputTypeError(f"{name} must be True or False, not {value!r}")


def check_function(name: str, value: object, of: str) -> None:
    """Raise a `TypeError` if ``value`` is neither a function nor None; ``of`` says what it is given."""
    if value is not None and not callable(value):
        raise InputTypeError(f"{name} must be a function of {of}, or None; not {value!r}")
