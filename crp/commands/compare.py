"""``crp compare``: what two models make of the same samples, told from their tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crp.commands.classes import _describe
from crp.commands.loading import FOLDER
from crp.commands.values import _plain, split_names
from crp.wording import counted, percent

if TYPE_CHECKING:
    from crp.audit import Comparison


@click.command("compare")
@click.argument("before", type=FOLDER)
@click.argument("after", type=FOLDER)
@click.option("--layers", multiple=True, callback=split_names, help="All that both tables have by default.")
@click.option(
    "--mode",
    type=click.Choice(["relevance", "activation"]),
    default="relevance",
    show_default=True,
    help="What shares and references are of.",
)
@click.option("--references", type=click.IntRange(1), default=8, show_default=True, help="Compared of each concept.")
@click.option("--concepts", "k", type=click.IntRange(1), default=10, show_default=True, help="Listed of each layer.")
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")
def compare_command(
    before: Path, after: Path, layers: tuple[str, ...], mode: Any, references: int, k: int, as_json: bool
) -> None:
    """Compare two models by tables of the same data.

    BEFORE and AFTER may be of two checkpoints. It tells which concepts have other references and shares; those of which
    the fewest references are the same come first. Each comes with the concept AFTER whose values go together with its
    own most: those of models that were trained apart have no common numbers.

        crp compare atlas/ corrected/
    """
    from crp.audit import compare
    from crp.visualization.table.store import Table

    table = Table.open(before)
    found = compare(table, after, list(layers) or None, mode=mode, n_references=references)
    rows = {layer: list(_rows(found, layer, len(one.partner) if as_json else k)) for layer, one in found.layers.items()}
    if as_json:
        facts = {"samples": len(found.sample), "rows": found.n_rows, "mode": mode, "accuracy": found.accuracy}
        click.echo(json.dumps(facts | {"other_prediction": found.sample[found.moved].tolist(), "layers": rows}))
        return
    of = counted(table.n_samples, "sample")
    click.echo(f"{len(found.sample)} of {of} and {counted(found.n_rows, 'row')} in both")
    right = "" if found.accuracy is None else "{} right before, {} after; ".format(*map(percent, found.accuracy))
    click.echo(_plain(f"{right}another class is predicted for {counted(int(found.moved.sum()), 'sample')}"))
    for layer, one in found.layers.items():
        describe = _describe(table, layer)
        click.echo(
            _plain(
                f"{layer}: {one.kept} of {counted(len(one.partner), 'concept')} most like the same number after; "
                f"{one.common.mean():.1f} of {counted(one.n_references, 'reference')} the same on average"
            )
        )
        for row in rows[layer]:
            shares = f"{percent(row['share_before'])} → {percent(row['share_after'])}"
            like = f"most like {describe(row['partner'])} ({row['partner_correlation']:.2f})"
            same = f"{row['common']} of {one.n_references} references the same"
            click.echo(_plain(f"  {describe(row['concept'])}  share {shares}, {same}; {like}"))


def _rows(found: Comparison, layer: str, k: int) -> Iterator[dict[str, Any]]:
    """Concepts of a layer, most changed first."""
    one = found.layers[layer]
    for i in one.changed[:k].tolist():
        yield {
            "concept": i,
            "share_before": float(one.share[0, i]),
            "share_after": float(one.share[1, i]),
            "common": int(one.common[i]),
            "correlation": float(one.correlation[i]),
            "partner": int(one.partner[i]),
            "partner_correlation": float(one.partner_correlation[i]),
        }
