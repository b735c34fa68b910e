"""Concepts of layers, by the words of ``--layers``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crp.commands.errors import CommandError

if TYPE_CHECKING:
    from torch import nn

    from crp.concepts import Concept


def _read_word(word: str, *, any_axis: bool = True) -> tuple[str, Concept | None]:
    """Pattern of layers that a word of ``--layers`` names, and their concept, if it says one behind a colon.

    ``"NAME:heads=12"`` has one for each of 12 equal groups of the last axis, and ``"NAME:axis=1"`` one for each place
    of axis 1, such as the tokens; ``any_axis`` says whether there may be such a word.

    Raises
    ------
    CommandError
        If something else is behind the colon.
    """
    from crp.concepts import AxisConcept

    pattern, colon, how = word.partition(":")
    if not colon:
        return pattern, None
    if matched := re.fullmatch(r"heads=([1-9]\d{0,5})", how):
        return pattern, AxisConcept(-1, int(matched[1]))
    if any_axis and (matched := re.fullmatch(r"axis=(-?[1-9]\d?)", how)):
        return pattern, AxisConcept(int(matched[1]))
    other = ", or axis=N" if any_axis else ""
    raise CommandError(f"--layers {word}: behind the colon must be heads=N, such as heads=12{other}")


def concepts_of_layers(model: nn.Module, words: Mapping[str, Sequence[str]], sample: Any) -> dict[str, Concept]:
    """Concepts of the layers that each word names: what `_read_word` says, or channels along the axis where they are.

    ``sample`` is what `first_sample` gives.
    """
    from crp.concepts import ChannelConcept
    from crp.visualization.mining.axes import concepts_of_channels
    from crp.visualization.mining.selection import check_called_once

    found: dict[str, Concept] = {}
    open_ones: list[str] = []
    for word, layers in words.items():
        _, concept = _read_word(word)
        if concept is None:
            open_ones += layers
        else:
            found |= dict.fromkeys(layers, concept)
    open_ones = [layer for layer in dict.fromkeys(open_ones) if layer not in found]
    if sample is None:
        return found | {layer: ChannelConcept() for layer in open_ones}  # mining will tell why
    check_called_once(model, sample, [*found, *open_ones])
    return found | concepts_of_channels(model, sample, open_ones)


def first_sample(dataset: Any, preprocess: Any) -> Any:
    """First sample of a dataset that can be read, as the model takes it; None where there is none among the first."""
    from crp.visualization.mining.datasets import read

    sample = next((one for one in (read(dataset, i) for i in range(min(len(dataset), 100))) if not one.problem), None)
    if sample is None:
        return None
    return sample.data[None] if preprocess is None else preprocess(sample.data[None])
