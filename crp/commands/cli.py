"""The command line, ``crp``. What a command needs is imported when it runs, so that ``crp --help`` is instant."""

from __future__ import annotations

import time
from pathlib import Path

import click

from crp import __version__
from crp.commands.attribute import attribute, methods_command
from crp.commands.check import check_command
from crp.commands.classes import audit_command, clusters_command, prototypes_command
from crp.commands.compare import compare_command
from crp.commands.group import Commands, _saying_on_interrupt
from crp.commands.layers import layers_command
from crp.commands.mine import mine_command
from crp.commands.report import report_command
from crp.commands.table import merge_command, status


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Completion in bash: eval "$(_CRP_COMPLETE=bash_source crp)"',
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show where an error comes from.")
@click.version_option(__version__, prog_name="crp")
def cli() -> None:
    """Relevance propagation for PyTorch models."""


@cli.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="crp-demo",
    show_default=True,
    help="Folder for the network, the index and the atlas.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=15, show_default=True, help="Passes over the data.")
@click.option("--seed", type=click.IntRange(0, 2**32), default=0, show_default=True, help="Of split and training.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images per step.")
@click.option("--overwrite", is_flag=True, help="Discard an earlier demo in the folder.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(out: Path, epochs: int, seed: int, batch_size: int, overwrite: bool, quiet: bool) -> None:
    """Find a planted shortcut in a network. Offline, in less than a minute.

    Trains a small network on real handwritten digits of which one class carries a mark, mines what every concept of
    the network was relevant for, and writes OUT/atlas/index.html, which names the concept that lives on the mark. After
    an interruption, the same command goes on where it stopped.
    """
    start = time.perf_counter()
    again = "the same command without --overwrite" if overwrite else "the same command"
    with _saying_on_interrupt(f"What is done is kept in {out}; {again} goes on from there."):
        from crp.demo.run import run_demo

        figures = run_demo(out, epochs=epochs, seed=seed, batch_size=batch_size, overwrite=overwrite, verbose=not quiet)
    click.echo(str(figures._replace(seconds=time.perf_counter() - start)))  # with the time of the imports


for _command in (
    methods_command, attribute, layers_command, check_command, mine_command, status, merge_command, prototypes_command,
    audit_command, clusters_command, compare_command, report_command,
):  # fmt: skip
    cli.add_command(_command)


def main() -> None:
    """Entry point of the command ``crp``."""
    cli(prog_name="crp")
