"""Concepts of layers, by the words of ``--layers``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crp.commands.errors import CommandError

if TYPE_CHECKING:
    from torch import nn

    from crp.concepts import Concept


def concepts_of_layers(model: nn.Module, words: Mapping[str, Sequence[str]], sample: Any) -> dict[str, Concept]:
    """Concepts of the layers that each word names.

    ``"blocks.*.mlp.act"`` has a concept for each channel, along the axis where these are;
    ``"blocks.*.attn.proj.input:heads=12"`` one for each of 12 equal groups of the last axis, and ``"blocks.*:axis=1"``
    one for each place of axis 1, such as the tokens. ``sample`` is what `first_sample` gives.
    """
    from crp.concepts import AxisConcept, ChannelConcept
    from crp.visualization.mining.axes import concepts_of_channels

    found: dict[str, Concept] = {}
    open_ones: list[str] = []
    for word, layers in words.items():
        _, colon, how = word.partition(":")
        if not colon:
            open_ones += layers
        elif matched := re.fullmatch(r"heads=([1-9]\d{0,5})", how):
            found |= {layer: AxisConcept(-1, int(matched[1])) for layer in layers}
        elif matched := re.fullmatch(r"axis=(-?[1-9]\d?)", how):
            found |= {layer: AxisConcept(int(matched[1])) for layer in layers}
        else:
            raise CommandError(f"--layers {word}: behind the colon must be heads=N, such as heads=12, or axis=N")
    open_ones = [layer for layer in dict.fromkeys(open_ones) if layer not in found]
    if sample is None:
        return found | {layer: ChannelConcept() for layer in open_ones}  # mining will tell why
    return found | concepts_of_channels(model, sample, open_ones)


def first_sample(dataset: Any, preprocess: Any) -> Any:
    """First sample of a dataset that can be read, as the model takes it; None where there is none among the first."""
    from crp.visualization.mining.datasets import read

    sample = next((one for one in (read(dataset, i) for i in range(min(len(dataset), 100))) if not one.problem), None)
    if sample is None:
        return None
    return sample.data[None] if preprocess is None else preprocess(sample.data[None])
