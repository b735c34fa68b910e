"""Values of options, as they are typed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from crp.commands.errors import CommandError
from crp.wording import percent

if TYPE_CHECKING:
    from torch import Tensor


def read_value(word: str) -> Any:
    """What is typed for a value: JSON (``0.1``, ``[1, 2]``, ``true``), True, False, None, or else the word itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(word, word))
    except json.JSONDecodeError:
        return word


def _read_settings(words: Iterable[str], option: str, form: str) -> dict[str, Any]:
    """Names and values of an option that may be given again; ``form`` says how each is typed."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise CommandError(f"{option} {word!r} must be {form}")
        found[name] = read_value(value)
    return found


def _values_of(scores: Tensor, exclusive: bool) -> tuple[Tensor, str, Callable[[float], str]]:
    """Probabilities of classes that exclude each other, or a score as it is; what they are called, and their words."""
    from crp.engine.probabilities import probabilities

    if exclusive and len(scores) > 1:  # (a single output may be of anything)
        return probabilities(scores[None])[0], "probability", percent
    return scores, "score", "score {:.4g}".format


def _plain(text: str) -> str:
    """Text without control characters, which a table from elsewhere may hold, and with spaces that can be typed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text.replace("\N{NO-BREAK SPACE}", " "))


def split_names(_context: click.Context, _parameter: click.Parameter, words: Iterable[str]) -> tuple[str, ...]:
    """Names of an option that may be given again, or has several with commas between; those of ``[1,2]`` part none."""
    return tuple(name.strip() for word in words for name in re.split(r",(?![^\[]*\])", word))


def _split_numbers(_context: click.Context, _parameter: click.Parameter, words: Iterable[str]) -> tuple[float, ...]:
    """Numbers of an option that may be given again, or has several with commas between."""
    try:
        return tuple(float(number) for word in words for number in word.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{error}; give a number for each channel, such as 0.5,0.5,0.5") from None
