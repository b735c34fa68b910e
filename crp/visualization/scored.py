"""What is explained of what a model returns, from words: an entry, a segmentation, boxes, or one's own function."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from torch import nn

from crp.errors import InputError, InputTypeError, LoadingError
from crp.layers import nearest
from crp.visualization.models import imported

#: Functions of `crp.outputs` that a word may name.
_KINDS = ("entry", "segmentation", "detection")
_FORMS = "entry:key=NAME, segmentation, detection, or package.module:function"


def load_output(word: str) -> Callable[[Any], Any]:
    """Function that takes what is explained from what a model returns, as ``--output`` names it.

    Parameters
    ----------
    word : str
        ``"entry"``, ``"segmentation"`` or ``"detection"``, those of `crp.outputs`, with their settings behind a colon:
        ``"segmentation:where=all,key=none"``; or ``"package.module:function"``.

    Raises
    ------
    LoadingError
        If it is none of these; the message says what there is.
    """
    kind, _, rest = word.partition(":")
    if kind in _KINDS and (not rest or "=" in rest):
        return _made(word, kind, [setting for setting in rest.split(",") if setting])
    if ":" not in word:
        raise LoadingError(f"--output {word} must be {_FORMS}{nearest(word, _KINDS)}")
    found = imported(word)
    if not callable(found) or isinstance(found, type | nn.Module):
        raise LoadingError(f"--output {word} must be a function of what the model returns, not {found!r}")
    checked: Callable[[Any], Any] = found
    return checked


def _made(word: str, kind: str, settings: list[str]) -> Callable[[Any], Any]:
    """Function of `crp.outputs` with its settings."""
    make: Callable[..., Callable[[Any], Any]] = imported(f"crp.outputs:{kind}")
    known = inspect.signature(make).parameters
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in known:
            raise LoadingError(
                f"--output {word}: {setting!r} must be NAME=VALUE of {', '.join(known)}{nearest(name, known)}"
            )
        if name in given:
            raise LoadingError(f"--output {word}: {name} is given twice")
        given[name] = _value(value)
    if kind == "entry" and "key" not in given:
        raise LoadingError(f"--output {word} must say which: entry:key=NAME, or the place in a tuple, entry:key=0")
    if given.get("box") == "all":
        raise LoadingError(f"--output {word}: of all boxes, no class can be explained; name one, box=0, or box=best")
    try:
        return make(**given)
    except (InputError, InputTypeError) as error:
        raise LoadingError(f"--output {word}: {error}") from error


def _value(word: str) -> Any:
    """A number, true, false or none, or else the word itself."""
    try:
        read = json.loads(word.lower() if word.lower() in ("true", "false") else word)
    except json.JSONDecodeError:
        return None if word.lower() == "none" else word
    return read if isinstance(read, bool | int) else word
