"""``crp layers``: the layers of a model, with their shapes, and which of them are suggested."""

from __future__ import annotations

import json
from typing import Any

import click

from crp.commands.errors import CommandError
from crp.commands.loading import _load, _weight_options


@click.command("layers")
@click.argument("model")
@_weight_options
@click.option("--size", type=click.IntRange(min=1), help="Pixels on a side, in place of the weights' own.")
@click.option("--json", "as_json", is_flag=True, help="For machines: a list of JSON objects.")
def layers_command(model: str, size: int | None, as_json: bool, **weights: Any) -> None:
    """List the layers of MODEL. Name, type, shape for a sample (a text of 5 tokens), a * where --layers auto takes it.

    crp layers resnet18
    """
    from crp.visualization.mining.selection import list_layers

    hint = ""
    try:
        loaded = _load(model, None, size=size, **weights)
        sample = loaded.example()
        hint = "; --size says how large pictures are" if size is None and not loaded.reads_tokens else ""
        found = list_layers(loaded.model, sample)
    except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise CommandError(f"{error}{hint}") from error
    if as_json:
        click.echo(json.dumps([one._asdict() for one in found]))
        return
    widths = [max((len(getattr(one, name)) for one in found), default=0) for name in ("name", "kind")]
    for one in found:
        named = f"{'*' if one.suggested else ' '} {one.name:{widths[0]}}  {one.kind:{widths[1]}}"
        click.echo(f"{named}  {' x '.join(map(str, one.shape))}")
    click.echo("* --layers auto; concepts are channels, the first number, or the last one behind dense layers")
