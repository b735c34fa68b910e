"""What is wrong with a command, in words for whoever typed it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import click

#: Most pixels on a side that a picture is enlarged to.
LARGEST = 4096


class CommandError(click.ClickException):
    """An error that is shown without a traceback."""


def _nearest(name: str, known: Iterable[str]) -> str:
    """``"; nearest: a, b"``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""
