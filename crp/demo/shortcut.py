"""Find the concept that lives on a known place of the image, as the planted mark is, in test images alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.demo.data import Box
from crp.layers import hooked
from crp.layers.interrupts import atomic


class Shortcut(NamedTuple):
    """A concept that lives on a place of the image.

    Attributes
    ----------
    layer : str
    concept : int
        Channel of the layer.
    relevance_share : float
        Its share of the class's relevance in the layer, mean over the images.
    box_share : float
        Share of the concept's own relevance, in the input, that falls into the box; mean over the images.
    """

    layer: str
    concept: int
    relevance_share: float
    box_share: float

    def __str__(self) -> str:
        return f"{self.layer}:{self.concept}"


def rank_by_box(
    attribution: CondAttribution,
    images: Tensor,
    target: int,
    box: Box,
    layers: Sequence[str],
    composite: Composite | None,
) -> list[Shortcut]:
    """Rank channels by how much of a class's relevance they carry from a box of the image.

    A channel's share of the class's relevance says how much it matters; its conditional heatmap says where it looks.
    Channels are ranked by the product of that share and the heatmap's share in the box.

    Parameters
    ----------
    attribution : CondAttribution
    images : Tensor of shape (images, channels, height, width)
    target : int
        Class whose relevance is looked at.
    box : Box
    layers : sequence of str
    composite : zennit Composite, or None for the plain gradient

    Returns
    -------
    list of Shortcut
        All channels of all layers, best first.
    """
    output = attribution.MODEL_OUTPUT_NAME
    whole = attribution(images, [{output: [target]}], composite, record_layer=layers)
    ranked = []
    for layer in layers:
        relevance_share = ChannelConcept().attribute(whole.relevances[layer], layer_name=layer).mean(0)
        conditions = [{output: [target], layer: [channel]} for channel in range(len(relevance_share))]
        box_share = box.share(attribution(images, conditions, composite).heatmap)
        box_share = box_share.reshape(len(images), -1).mean(0)
        ranked += [
            Shortcut(layer, channel, *pair)
            for channel, pair in enumerate(zip(relevance_share.tolist(), box_share.tolist(), strict=True))
        ]
    return sorted(ranked, key=lambda found: -found.relevance_share * found.box_share)


@atomic
def switched_off(model: nn.Module, layer: str, channel: int) -> Iterator[None]:
    """Let a channel of a layer be 0 for all images, inside of the context."""

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, channel] = 0
        return output

    with hooked({model.get_submodule(layer): hook}):
        yield
