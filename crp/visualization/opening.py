"""What a table was mined of, loaded again from its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from crp.concepts import AxisConcept, ChannelConcept, Concept
from crp.errors import LoadingError
from crp.visualization.models import load_model
from crp.visualization.sources import load_source, open_source

_CHANNELS, _AXES = "crp.concepts.channels.ChannelConcept", "crp.concepts.axes.AxisConcept"


class Opened(NamedTuple):
    """Model and dataset of a table, how samples are prepared, and the layers' concepts."""

    model: nn.Module
    dataset: Any
    preprocess: Callable[[Tensor], Tensor] | None
    layer_map: dict[str, Concept]


def open_recipe(recipe: Mapping[str, Any], data: str | None = None) -> Opened:
    """Load what ``crp mine`` was given, from the recipe of its table.

    Modules of the user's own that the recipe names are imported, as ``crp mine`` did: it is for tables that one trusts.

    Parameters
    ----------
    recipe : mapping
    data : str, optional
        Other data, prepared as the table's were; without labels.

    Raises
    ------
    LoadingError
        If the table was mined by Python code, whose objects no words can make again, or if something is gone.
    """
    command = recipe.get("command")
    if not isinstance(command, Mapping):
        raise LoadingError(
            "the table was not mined by crp mine, so that model and dataset cannot be loaded from its recipe; give them"
        )
    try:
        source = open_source(str(command["data"]) if data is None else data)
        checkpoint, classes = (
            None if command[name] is None else Path(command[name]) for name in ("checkpoint", "classes")
        )
        pictures = {name: command[name] for name in ("size", "mean", "std")}
        loaded = load_model(str(command["model"]), command["weights"], checkpoint, classes=classes, **pictures)
        fields = [field for field in str(command["fields"]).split(",") if field]
        by_label = data is None and command["targets"] == "label"
        if isinstance(source, Path) and data is not None:
            fields = []
        dataset, preprocess = load_source(source, fields, loaded, by_label=by_label)
    except (KeyError, TypeError, AttributeError) as error:
        raise LoadingError(f"the recipe of the table lacks or garbles what crp mine was given: {error!r}") from error
    return Opened(loaded.model, dataset, preprocess, make_layer_map(recipe))


def make_layer_map(recipe: Mapping[str, Any]) -> dict[str, Concept]:
    """Concepts of the layers; only channels, and places along an axis, can be made of words."""
    layers = recipe.get("layers")
    found: dict[str, Concept] = {}
    for layer, about in layers.items() if isinstance(layers, Mapping) else ():
        if not isinstance(about, Mapping) or about.get("concept") not in (_CHANNELS, _AXES):
            raise LoadingError(f"layer {layer!r} was mined with concepts that no words can make again; give layer_map")
        found[layer] = ChannelConcept() if about["concept"] == _CHANNELS else _along_axis(layer, about.get("settings"))
    return found


def _along_axis(layer: str, settings: Any) -> AxisConcept:
    try:
        return AxisConcept(settings["axis"], settings["groups"])
    except (KeyError, TypeError, ValueError) as error:
        raise LoadingError(f"the table garbles the concepts of layer {layer!r}: {error!r}") from error
