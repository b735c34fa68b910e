"""``crp report``: the concept atlas of a table."""

from __future__ import annotations

import json
from pathlib import Path

import click

from crp.commands.errors import CommandError
from crp.commands.mine import _make_composite
from crp.commands.table import _plain

INTERRUPTED = 130


@click.command("report")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the pages; FOLDER/atlas by default.")
@click.option("--single-file", is_flag=True, help="One file with all pages and pictures, for small tables.")
@click.option("--layers", multiple=True, help="A layer to show; may be given again. All by default.")
@click.option("--concepts", type=click.IntRange(1), default=8, show_default=True, help="For each class and layer.")
@click.option("--references", type=click.IntRange(1), default=8, show_default=True, help="Most relevant of a concept.")
@click.option("--active", type=click.IntRange(0), help="Most active samples of a concept; as --references by default.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Heatmaps at once.")
@click.option("--title", default="What the model looks at", show_default=True, help="Of the first page.")
@click.option("--open", "opened", is_flag=True, help="Show the pages in the browser.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")
def report_command(
    folder: Path,
    out: Path | None,
    single_file: bool,
    layers: tuple[str, ...],
    concepts: int,
    references: int,
    active: int | None,
    batch_size: int,
    title: str,
    opened: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write pages that show what a table has found, with nothing but its FOLDER.

    An overview, a page for every class, layer, concept and reference sample, suspects, and a search. They open from
    disk. Only what is missing is drawn, so that the same command goes on after an interruption. Model and data are
    loaded as for the crp mine that made the table; modules of your own that it names are imported.

        crp report atlas/ --open
    """
    from crp.visualization.feature import FeatureVisualization
    from crp.visualization.opening import open_recipe
    from crp.visualization.report.write import write_report
    from crp.visualization.table.store import Table

    path = out or folder / ("atlas.html" if single_file else "atlas")
    if single_file and path.suffix.lower() not in (".html", ".htm"):
        raise CommandError(f"--out {path} must end in .html with --single-file")
    try:
        recipe = Table.open(folder).header.recipe
        found, command = open_recipe(recipe), recipe["command"]
        fv = FeatureVisualization.open(
            folder,
            model=found.model,
            dataset=found.dataset,
            layer_map=found.layer_map,
            preprocess_fn=found.preprocess,
        )
        page = write_report(
            fv,
            _make_composite(command["rules"], command["settings"]),
            path,
            layers=list(layers) or None,
            n_concepts=concepts,
            n_references=references,
            n_active=active,
            batch_size=batch_size,
            title=title,
            verbose=not quiet,
        )
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted. What is drawn is kept in {path}; the same command goes on from there.", err=True)
        raise SystemExit(INTERRUPTED) from None
    except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise CommandError(_plain(str(error))) from error
    click.echo(json.dumps({"page": str(page)}) if as_json else f"wrote {_plain(str(page))}")
    if opened:
        click.launch(page.resolve().as_uri())
