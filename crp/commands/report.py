"""``crp report``: the concept atlas of a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from crp.commands.attribute import _check_writable
from crp.commands.errors import CommandError
from crp.commands.group import _saying_on_interrupt
from crp.commands.loading import FOLDER
from crp.commands.mine import _check_outside, _make_composite
from crp.commands.processes import _part
from crp.commands.values import _plain, split_names

#: Options, and what `write_report` calls them.
_OPTIONS = {
    "concepts": "n_concepts",
    "references": "n_references",
    "active": "n_active",
    "negative": "n_negative",
    "batch_size": "batch_size",
    "maximize": "n_maximized",
    "steps": "steps",
    "seed": "seed",
}


@click.command("report")
@click.argument("folder", type=FOLDER)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the pages; FOLDER/atlas by default.")
@click.option("--single-file", is_flag=True, help="One file with all pages and pictures, for small tables.")
@click.option("--layers", multiple=True, callback=split_names, help="Layers to show; all by default.")
@click.option("--concepts", type=click.IntRange(1), default=8, show_default=True, help="Of a layer, on a class page.")
@click.option("--references", type=click.IntRange(1), default=8, show_default=True, help="Most relevant of a concept.")
@click.option("--active", type=click.IntRange(0), help="Most active samples of a concept; as --references by default.")
@click.option("--negative", type=click.IntRange(0), help="Most negative of a concept; half of --references by default.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Heatmaps at once.")
@click.option(
    "--maximize", type=click.IntRange(1), help="Make up pictures of so many concepts of each layer. See below."
)
@click.option("--steps", type=click.IntRange(1), help="Of --maximize, for each picture; 500 by default.")
@click.option("--seed", type=click.IntRange(0, 2**31), help="Of --maximize; 0 by default.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that draw.")
@click.option("--part", metavar="I/N", help="Only draw part I of N, counted from 0, and write no page.")
@click.option("--title", default="What the model looks at", show_default=True, help="Of the first page.")
@click.option("--open", "opened", is_flag=True, help="Show the pages in the browser.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")
def report_command(
    folder: Path,
    out: Path | None,
    single_file: bool,
    workers: int,
    part: str | None,
    opened: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Write pages that show what a table has found. Nothing but its FOLDER is needed.

    An overview, a page for every class, layer, concept and reference sample, suspects, and a search. They open from
    disk. Only what is missing is drawn, so that the same command goes on after an interruption. Model and data are
    loaded as for the crp mine that made the table; modules of your own that it names are imported.

        crp report atlas/ --open

    --maximize N makes up a picture for each of the N concepts of a layer that have the largest shares of relevance, in
    which it is as active as can be. They are kept in FOLDER, and shown on the pages of their concepts.

    --workers draw at the same time. So do several machines that share the folder, each with its --part; the same
    command without it then writes the pages.
    """
    from crp.visualization.report.addresses import is_one_file

    path = out or folder / ("atlas.html" if single_file else "atlas")
    is_file = is_one_file(path)
    if single_file and not is_file:
        raise CommandError(f"--out {path} must end in .html with --single-file")
    if is_file and (workers > 1 or part):
        raise CommandError(f"--workers and --part draw into a folder, and {path} is one file, for small tables")
    if part and (opened or workers > 1):
        raise CommandError("--part writes no page that --open could show, and is drawn by one process, not --workers")
    if unused := [f"--{name}" for name in ("steps", "seed") if given[name] is not None and given["maximize"] is None]:
        raise CommandError(f"{' and '.join(unused)} say how --maximize makes up pictures; give it, too")
    share = None if part is None else _part(part, {}, "--part")
    given["quiet"] = given["quiet"] or as_json
    kept = f"What is drawn is kept in {path}; the same command goes on from there."
    if is_file:
        kept = f"{path} is written as a whole, and not yet; pages in a folder go on after an interruption."
    with _saying_on_interrupt(kept):
        page = _write(folder, path, path.parent if is_file else path, workers, share, given)
    if share is not None:
        done = {"part": part, "folder": str(page)}
        click.echo(json.dumps(done) if as_json else f"drew part {part} into {_plain(str(page))}")
        return
    click.echo(json.dumps({"page": str(page)}) if as_json else f"wrote {_plain(str(page))}")
    if opened:
        click.launch(page.resolve().as_uri())


def _write(
    folder: Path, path: Path, written_into: Path, workers: int, share: tuple[int, int] | None, given: dict[str, Any]
) -> Path:
    """Open the table, have its pictures drawn by several processes if need be, and write the pages."""
    from crp.visualization.feature import FeatureVisualization
    from crp.visualization.opening import open_recipe
    from crp.visualization.report.write import write_report
    from crp.visualization.table.store import Table

    table = Table.open(folder)
    recipe = table.header.recipe
    if isinstance(recipe.get("command"), dict):
        _check_outside(path, str(recipe["command"].get("data")))
    _check_writable(written_into, path)
    found, command = open_recipe(recipe), recipe["command"]
    fv = FeatureVisualization.open(
        folder,
        model=found.model,
        dataset=found.dataset,
        layer_map=found.layer_map,
        preprocess_fn=found.preprocess,
        output=found.output,
        **({} if "sum" in table.kinds else {"max_target": table.kinds[0]}),
    )
    composite = _make_composite(command["rules"], command["settings"])
    options: dict[str, Any] = {name: given[option] for option, name in _OPTIONS.items() if given[option] is not None}
    options |= {"layers": list(given["layers"]) or None, "title": given["title"], "verbose": not given["quiet"]}
    drawers: list[subprocess.Popen[bytes]] = []
    try:
        if workers > 1 and share is None:
            drawers = _start_drawers(workers, folder, path, given)
            write_report(fv, composite, path, part=(0, workers), **options)
            for drawer in drawers:
                if drawer.wait():
                    click.echo(
                        f"A process ended with status {drawer.returncode}; its part is drawn by this one.", err=True
                    )
        return write_report(fv, composite, path, part=share, **options)
    finally:
        for drawer in drawers:
            drawer.terminate()


def _start_drawers(n: int, folder: Path, out: Path, given: Mapping[str, Any]) -> list[subprocess.Popen[bytes]]:
    """Start processes 1 to n - 1, each of which draws its part; they share the processor's threads."""
    import torch

    arguments = [sys.executable, "-m", "crp", "report", str(folder), "--out", str(out), "--quiet"]
    for layer in given["layers"]:
        arguments += ["--layers", layer]
    for option in _OPTIONS:
        if given[option] is not None:
            arguments += [f"--{option.replace('_', '-')}", str(given[option])]
    threads = max(1, torch.get_num_threads() // n)
    torch.set_num_threads(threads)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return [
        subprocess.Popen([*arguments, "--part", f"{i}/{n}"], env=environment, stdout=subprocess.DEVNULL)
        for i in range(1, n)
    ]
