"""The command line, run inside the test's own process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from crp.commands.cli import cli


def crp(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])
