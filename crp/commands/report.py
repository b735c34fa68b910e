"""``crp report``: a page of what a table has found."""

from __future__ import annotations

from pathlib import Path

import click

from crp.commands.errors import CommandError
from crp.commands.mine import _make_composite
from crp.commands.table import _plain


@click.command("report")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Page; report.html in FOLDER by default.")
@click.option("--concepts", type=click.IntRange(1), default=4, show_default=True, help="For each class and layer.")
@click.option("--references", type=click.IntRange(1), default=6, show_default=True, help="Samples for each concept.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def report_command(folder: Path, out: Path | None, concepts: int, references: int, quiet: bool) -> None:
    """Write a page of what a table has found, with nothing but its FOLDER.

    Model and data are loaded as for the crp mine that made it; modules of your own that it names are imported.
    """
    from crp.visualization.feature import FeatureVisualization
    from crp.visualization.opening import open_recipe
    from crp.visualization.report.write import write_report
    from crp.visualization.table.store import Table

    try:
        recipe = Table.open(folder).header.recipe
        opened, command = open_recipe(recipe), recipe["command"]
        fv = FeatureVisualization.open(
            folder,
            model=opened.model,
            dataset=opened.dataset,
            layer_map=opened.layer_map,
            preprocess_fn=opened.preprocess,
        )
        page = write_report(
            fv,
            _make_composite(command["rules"], command["settings"]),
            out or folder / "report.html",
            class_names=recipe.get("class_names"),
            n_concepts=concepts,
            n_references=references,
            verbose=not quiet,
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise CommandError(_plain(str(error))) from error
    click.echo(f"wrote {_plain(str(page))}")
