"""What a table was mined of, loaded again from its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from crp.concepts import Concept
from crp.errors import LoadingError
from crp.visualization.mining.recipe import make_concept
from crp.visualization.models import load_model
from crp.visualization.scored import load_output
from crp.visualization.sources import load_source, load_texts, open_source


class _Opened(NamedTuple):
    """Model and dataset of a table, how samples are prepared, the layers' concepts, and what is explained."""

    model: nn.Module
    dataset: Any
    preprocess: Callable[[Tensor], Tensor] | None
    layer_map: dict[str, Concept]
    output: Callable[[Any], Any] | None


def open_recipe(recipe: Mapping[str, Any], data: str | None = None) -> _Opened:
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
            "the table was not mined by crp mine, so that model and dataset cannot be loaded from its recipe; give "
            "them, as in FeatureVisualization.open(folder, model=..., dataset=...).report(...)"
        )
    for name in ("checkpoint", "classes", "tokenizer", *(["data"] if data is None else [])):
        if (place := Path(str(command.get(name)))).is_absolute() and not place.exists():
            raise LoadingError(
                f"{place} is gone, the --{name} of the table; if it was moved, crp mine --out FOLDER --{name} PLACE "
                "says where it is, for the table in FOLDER"
            )
    try:
        source = open_source(str(command["data"]) if data is None else data)
        checkpoint, classes = (
            None if command[name] is None else Path(command[name]) for name in ("checkpoint", "classes")
        )
        pictures = {name: command[name] for name in ("size", "mean", "std")}
        output = None if command.get("output") is None else load_output(str(command["output"]))
        given = {**pictures, "classes": classes, "output": output}
        loaded = load_model(str(command["model"]), command["weights"], checkpoint, **given)
        fields = [field for field in str(command["fields"]).split(",") if field]
        by_label = data is None and command["targets"] == "label"
        if isinstance(source, Path) and data is not None:
            fields = []
        tokenizer, position = command.get("tokenizer"), command.get("position")
        dataset: Any = load_texts(source, tokenizer, position, ",".join(fields), str(command["model"]))
        preprocess = None
        if dataset is None:
            dataset, preprocess = load_source(
                source, fields, loaded, by_label=by_label, decode=command.get("decode", "host")
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise LoadingError(f"the recipe of the table lacks or garbles what crp mine was given: {error!r}") from error
    return _Opened(loaded.model, dataset, preprocess, make_layer_map(recipe), output)


def make_layer_map(recipe: Mapping[str, Any]) -> dict[str, Concept]:
    """Concepts of the layers; a `LoadingError` says what cannot be made again, and what to give."""
    layers = recipe.get("layers")
    if not isinstance(layers, Mapping) or not all(isinstance(words, Mapping) for words in layers.values()):
        raise LoadingError("the table does not say which concepts were mined; give layer_map")
    try:
        return {layer: make_concept(layer, words) for layer, words in layers.items()}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise LoadingError(f"the recipe of the table garbles its concepts: {error!r}; give layer_map") from error
