"""Along which axis of a layer its concepts are: known from what made its output, or asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from crp.concepts import AxisConcept, ChannelConcept, Concept
from crp.engine.inputs import check_data
from crp.errors import InputError
from crp.layers.misfits import telling_misfits
from crp.trace.axes import ChannelAxis, channel_axes


def concepts_of_channels(model: nn.Module, data: Any, layers: Iterable[str]) -> dict[str, Concept]:
    """Channels of layers as concepts, along whichever axis they are.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    data : Tensor of shape (1, *input shape)
        A sample as the model takes it.
    layers : iterable of str

    Returns
    -------
    dict of str to Concept
        `ChannelConcept` where channels are axis 1, as behind a convolution; `AxisConcept` where they are the last, as
        behind a dense layer.

    Raises
    ------
    ValueError
        If it is not known which axis is that of the channels.
    """
    layers = list(layers)
    axes, found = channel_axes(model, data, layers), dict[str, Concept]()
    for layer in layers:
        about = axes.get(layer)  # (a layer that is not called is refused by mining, in words of its own)
        if about is not None and about.axis is None:
            raise InputError(_question(layer, about))
        found[layer] = ChannelConcept() if about is None or about.axis == 1 else AxisConcept(-1)
    return found


def check_axes(model: nn.Module, data: Any, layer_map: Mapping[str, Concept]) -> None:
    """Raise a ValueError where a `ChannelConcept` takes another axis for that of the channels, or cannot know."""
    layers = [layer for layer, concept in layer_map.items() if type(concept) is ChannelConcept]
    check_data(data, finite=False)  # (samples that are not finite may be skipped)
    with telling_misfits(model, [data], {0: data}):
        axes = channel_axes(model, data, layers)
    for layer, about in axes.items():
        if about.axis is None:
            raise InputError(_question(layer, about))
        if about.axis != 1:
            raise InputError(
                f"layer_map[{layer!r}] is ChannelConcept(), whose concepts are along axis 1; but layer {layer!r} puts "
                f"out {about.shape}, made by {about.maker}(), whose channels come last. Give AxisConcept(-1) for "
                "these, AxisConcept(1) for tokens or rows, or AxisConcept(-1, groups=n) for n heads"
            )


def _question(layer: str, about: ChannelAxis) -> str:
    maker = f"{about.maker}()" if about.maker else "nothing known"
    return (
        f"which axis of layer {layer!r} is that of its concepts? It puts out {about.shape}, made by {maker}, which "
        "does not tell. Say so: AxisConcept(1) or AxisConcept(-1), or LAYER:axis=1 or LAYER:axis=-1 on the command line"
    )
