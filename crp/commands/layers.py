"""``crp layers``: the layers of a model, with their shapes, and which of them are suggested."""

from __future__ import annotations

import json
from pathlib import Path

import click

from crp.commands.errors import CommandError

_EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("layers")
@click.argument("model")
@click.option("--weights", help="Of torchvision, such as DEFAULT; they may be downloaded.")
@click.option("--checkpoint", type=_EXISTING, help="State dict.")
@click.option("--size", type=click.IntRange(min=1), help="Pixels on a side, in place of the weights' own.")
@click.option("--json", "as_json", is_flag=True, help="For machines: a list of JSON objects.")
def layers_command(model: str, weights: str | None, checkpoint: Path | None, size: int | None, as_json: bool) -> None:
    """List the layers of MODEL: name, type, shape for one picture, and a * where --layers auto takes them.

    crp layers resnet18
    """
    from crp.visualization.mining.selection import list_layers
    from crp.visualization.models import load_model

    try:
        loaded = load_model(model, weights, checkpoint, size=size)
        found = list_layers(loaded.model, loaded.example())
    except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise CommandError(f"{error}; --size says how large pictures are" if size is None else str(error)) from error
    if as_json:
        click.echo(json.dumps([one._asdict() for one in found]))
        return
    widths = [max((len(getattr(one, name)) for one in found), default=0) for name in ("name", "kind")]
    for one in found:
        mark = "*" if one.suggested else " "
        click.echo(f"{mark} {one.name:{widths[0]}}  {one.kind:{widths[1]}}  {' x '.join(map(str, one.shape))}")
    click.echo("* --layers auto; concepts are channels, the first number, or the last one behind dense layers")
