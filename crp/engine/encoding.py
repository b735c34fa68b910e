"""What flows backward under a composite, and how relevance is read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from zennit.core import Composite

from crp.types import AttributionResults


@dataclass(frozen=True)
class Encoding:
    """What a composite says of itself; composites of zennit, and None, say nothing.

    Attributes
    ----------
    multiplier : bool
        Whether relevance divided by activation flows, and not relevance itself.
    as_multiplier : bool
        Whether results hold what flows, as for gradients, and not its product with the activation.
    from_one : bool
        Whether the initial relevance of a target is 1 by default, and not the output's value.
    """

    multiplier: bool
    as_multiplier: bool = False
    from_one: bool = False

    @classmethod
    def of(cls, composite: Composite | None) -> Encoding:
        """Encoding of a composite."""
        return cls(
            getattr(composite, "encoding", None) == "multiplier",
            getattr(composite, "readout", None) == "multiplier",
            getattr(composite, "initial", None) == "one",
        )

    @property
    def name(self) -> Literal["multiplier", "relevance"]:
        """What flows."""
        return "multiplier" if self.multiplier else "relevance"

    @property
    def starts_from_one(self) -> bool:
        """Whether what starts at a target by default is 1, whatever its value."""
        return self.multiplier and (self.as_multiplier or not self.from_one)

    def start(self, initial: Tensor, value: Tensor) -> Tensor:
        """What starts at the root for the initial relevance of an output of this ``value``."""
        if not self.multiplier or self.as_multiplier:
            return initial
        # An output of exactly 0 has nothing to distribute.
        return torch.where(value == 0, 0, initial / value)

    def read(self, found: Tensor, activation: Tensor) -> Tensor:
        """Relevance in what arrived at a layer of this ``activation`` (less that of the reference, if there is one)."""
        return activation * found if self.multiplier and not self.as_multiplier else found


def average(found: Sequence[tuple[AttributionResults, list[Tensor]]]) -> tuple[AttributionResults, list[Tensor]]:
    """Mean of several results of the same rows, each with the relevance of the inputs."""
    if len(found) == 1:
        return found[0]
    results = [result for result, _ in found]
    first = results[0]
    result = AttributionResults(
        _mean([result.heatmap for result in results]),
        first.activations,
        _mean([result.relevances for result in results]),
        first.prediction,
        encoding=first.encoding,
    )
    return result, [_mean(of_input) for of_input in zip(*(relevance for _, relevance in found), strict=True)]


def _mean(found: Sequence[Any]) -> Any:
    """Mean of tensors, or of what holds them in the same way."""
    first = found[0]
    if isinstance(first, dict):
        return {name: _mean([each[name] for each in found]) for name in first}
    if isinstance(first, tuple):
        return tuple(_mean(each) for each in zip(*found, strict=True))
    return None if first is None else torch.stack(list(found)).mean(0)
