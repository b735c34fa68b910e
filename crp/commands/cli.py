"""The command line, ``crp``. What a command needs is imported when it runs, so that ``crp --help`` is instant."""

from __future__ import annotations

import time
from pathlib import Path

import click

from crp import __version__
from crp.commands import attribute as attribute_commands
from crp.commands import check as check_commands
from crp.commands import classes as class_commands
from crp.commands import compare as compare_commands
from crp.commands import layers as layers_commands
from crp.commands import mine as mine_commands
from crp.commands import report as report_commands
from crp.commands import table as table_commands
from crp.commands.group import Commands, _saying_on_interrupt


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


cli.add_command(attribute_commands.methods_command)
cli.add_command(attribute_commands.attribute)
cli.add_command(layers_commands.layers_command)
cli.add_command(check_commands.check_command)
cli.add_command(mine_commands.mine_command)
cli.add_command(table_commands.status)
cli.add_command(table_commands.merge_command)
cli.add_command(class_commands.prototypes_command)
cli.add_command(class_commands.audit_command)
cli.add_command(class_commands.clusters_command)
cli.add_command(compare_commands.compare_command)
cli.add_command(report_commands.report_command)


def main() -> None:
    """Entry point of the command ``crp``."""
    cli(prog_name="crp")
