"""What is wrong with a command, in words for whoever typed it, and what several commands allow."""

from __future__ import annotations

import click

#: Most pixels on a side that a picture is enlarged to.
LARGEST = 4096
#: Suffixes of figures that can be written.
FIGURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


class CommandError(click.ClickException):
    """An error that is shown without a traceback."""
