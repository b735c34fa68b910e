"""What is wrong with a command, in words for whoever typed it."""

from __future__ import annotations

import click


class CommandError(click.ClickException):
    """An error that is shown without a traceback."""
