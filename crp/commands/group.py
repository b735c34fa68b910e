"""What all commands share: errors in one line, interrupts, and ``--debug``."""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import click

from crp.commands.errors import CommandError
from crp.commands.values import _plain

#: Exit status of what was interrupted.
_INTERRUPTED = 130
#: Longest message of an error that is shown, in characters.
_LONGEST = 600


class Commands(click.Group):
    """Group of commands whose errors are one line, with exit status 1 or 2; ``--debug`` shows where they come from.

    A termination (SIGTERM) or a lost terminal (SIGHUP) is an interrupt, as Ctrl-C is.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take ``--debug`` from any place before ``--``."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta["crp.debug"] = "--debug" in args[:end]
        return super().parse_args(ctx, [a for i, a in enumerate(args) if a != "--debug" or i > end])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is meant, and refuse what is given it empty."""
        name, command, args = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            _refuse_empty(click.Context(command, ctx, name), args)
        return name, command, args

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            with _saying_on_interrupt(), _terminations_interrupt(), _warnings_in_a_line():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):  # (of the last, click ends without a word)
            raise
        except Exception as error:
            if ctx.meta["crp.debug"]:
                traceback.print_exc(file=sys.stderr)
            if isinstance(error, click.ClickException):
                raise
            raise CommandError(in_a_line(error)) from error


@contextmanager
def _saying_on_interrupt(what_is_kept: str = "") -> Iterator[None]:
    """End a command that is interrupted with the exit status of shells for that, and say what is kept of it."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted. {what_is_kept}".rstrip(), err=True)
        raise SystemExit(_INTERRUPTED) from None


def in_a_line(error: BaseException) -> str:
    """Message of an error, in one line of limited length, without control characters."""
    text = error.args[0] if isinstance(error, KeyError) and error.args and type(error) is KeyError else error
    line = _plain(" ".join(str(text).split()) or type(error).__name__)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}… (--debug shows all)"


def _refuse_empty(ctx: click.Context, args: list[str]) -> None:
    """Raise an error if a text is empty: a path would stand for the current folder, as a shell's unset variable does.

    An option whose default is the empty text may be given so.
    """
    typed, _, _ = ctx.command.make_parser(ctx).parse_args(list(args))
    for parameter in ctx.command.params:
        value = typed.get(parameter.name or "")
        if "" in (value if isinstance(value, list | tuple) else [value]) and parameter.default != "":
            is_folder = isinstance(parameter.type, click.Path) and parameter.type.dir_okay
            raise click.BadParameter(f"it is empty{'; . is the current folder' * is_folder}", ctx, parameter)


@contextmanager
def _terminations_interrupt() -> Iterator[None]:
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # (nohup ignores SIGHUP, and handlers can be set in the main thread only)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with suppress(ValueError):
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Show each warning in one line."""

    def shown(message: Warning | str, *_: object, **__: object) -> str:
        return f"Warning: {message}\n"

    plain = warnings.formatwarning
    warnings.formatwarning = cast(Any, shown)
    try:
        yield
    finally:
        warnings.formatwarning = plain
