"""Options of commands that load a model: which one, with which weights, and how pictures are prepared for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crp.commands.errors import LARGEST, CommandError
from crp.commands.values import _split_numbers

if TYPE_CHECKING:
    from crp.visualization.models import Loaded

#: A file, and a folder, that are there.
EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def _together(*options: Callable[..., Any]) -> Callable[..., Any]:
    """One decorator of several options of a command, which stand in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


#: Options about a model's weights, and those about pictures and their classes.
_weight_options = _together(
    click.option("--weights", help="Of torchvision, such as DEFAULT; they may be downloaded."),
    click.option("--checkpoint", type=EXISTING, help="State dict."),
)
_picture_options = _together(
    click.option("--size", type=click.IntRange(1, LARGEST), help="Pixels on a side, in place of the weights' own."),
    click.option(
        "--mean", multiple=True, callback=_split_numbers, help="For the normalisation: 0.5,0.5,0.5, for example."
    ),
    click.option("--std", multiple=True, callback=_split_numbers, help="As --mean."),
    click.option("--classes", type=EXISTING, help="Names of the classes, one per line."),
)


def _load(named: str, output: str | None, **options: Any) -> Loaded:
    """Model of a command: its name, what is explained of what it returns, and the options above."""
    from crp.visualization.models import load_model
    from crp.visualization.scored import load_output

    return load_model(named, **options, output=None if output is None else load_output(output))


def _has_random_weights(model: str, weights: str | None, checkpoint: Path | None) -> bool:
    """Whether a model of torchvision is as it is before training."""
    return ":" not in model and not (weights or checkpoint)


def _find_layers(loaded: Loaded, wanted: Sequence[str]) -> list[str]:
    """Layers that ``--layers`` names; ``auto`` are those that ``crp layers`` suggests."""
    from crp.visualization.mining.selection import list_layers, select_layers

    if "auto" not in wanted or any(name == "auto" for name, _ in loaded.model.named_modules()):
        return select_layers(loaded.model, wanted)
    if not (suggested := [one.name for one in list_layers(loaded.model, loaded.example()) if one.suggested]):
        raise CommandError("--layers auto finds no feature maps, and no tokens; crp layers MODEL lists all layers")
    return select_layers(loaded.model, [*suggested, *(name for name in wanted if name != "auto")])
