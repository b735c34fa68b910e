"""``crp clusters`` and ``crp prototypes``: in how many ways a model predicts a class, told from a mined table alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from crp.commands.errors import CommandError

if TYPE_CHECKING:
    from crp.visualization.table.store import Table

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
#: Samples listed of each cluster, and concepts of each cluster and prototype.
_LISTED = 8


@click.command("clusters")
@click.argument("folder", type=_FOLDER)
@click.argument("layer")
@click.argument("of_class", metavar="CLASS", type=int)
@click.option("--what", type=click.Choice(["relevance", "activation"]), default="relevance", show_default=True)
@click.option("--n", type=click.IntRange(min=1), help="Number of clusters; that of the largest gap by default.")
@click.option("--export", type=click.Path(dir_okay=False, path_type=Path), help="New HDF5 file for ViRelAy.")
def clusters_command(folder: Path, layer: str, of_class: int, what: str, n: int | None, export: Path | None) -> None:
    """Cluster the explanations of a class (SpRAy): a class in several clusters is predicted for several reasons."""
    from crp.audit import clusters, export_corelay

    table = _open(folder)
    try:
        found = clusters(table, layer, of_class, what=what, n=n)
        if export is not None:
            export_corelay(export, found, name=f"class {of_class}")
    except (KeyError, ValueError, OSError, ImportError) as error:
        raise CommandError(_message(error)) from error
    click.echo(
        f"class {of_class}, layer {layer!r}: {len(found.label)} samples in {len(found.sizes)} clusters, separation "
        f"{found.separation:.2f}"
    )
    for i, size in enumerate(found.sizes):
        concepts = ", ".join(f"{concept} ({value:+.3f})" for concept, value in found.strongest(i, _LISTED))
        samples = ", ".join(map(str, found.members(i)[:_LISTED].tolist()))
        click.echo(f"cluster {i}  {size} samples, such as {samples}; more of concepts {concepts or 'none'}")


@click.command("prototypes")
@click.argument("folder", type=_FOLDER)
@click.argument("layer")
@click.argument("classes", nargs=-1, type=int)
@click.option("--n", type=click.IntRange(min=1), help="Prototypes of each class; that of the least BIC by default.")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="File to save them to (.safetensors).")
def prototypes_command(folder: Path, layer: str, classes: tuple[int, ...], n: int | None, save: Path | None) -> None:
    """Tell the prototypes of classes: the ways in which they are predicted, each with the sample that shows it."""
    from crp.audit import prototypes

    table = _open(folder)
    try:
        numbers = range(1, 7) if n is None else n
        found = prototypes(table, layer, numbers, classes=list(classes) or None)
        if save is not None:
            found.save(save)
    except (KeyError, ValueError, OSError, ImportError) as error:
        raise CommandError(_message(error)) from error
    for of_class, mixture in found.classes.items():
        rows = zip(mixture.weights.tolist(), mixture.sample.tolist(), mixture.means, strict=True)
        for i, (weight, sample, mean) in enumerate(rows):
            top = ", ".join(f"{concept} ({mean[concept]:+.3f})" for concept in (-mean).argsort()[:_LISTED].tolist())
            click.echo(f"class {of_class}, prototype {i}  {weight:.0%} of samples, as in {sample}; concepts {top}")


def _open(folder: Path) -> Table:
    from crp.visualization.table.manifest import TableError
    from crp.visualization.table.store import Table

    try:
        return Table.open(folder)
    except (TableError, OSError) as error:
        raise CommandError(_message(error)) from error


def _message(error: Exception) -> str:
    """Message of an error, which in a `KeyError` is quoted, without control characters."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
