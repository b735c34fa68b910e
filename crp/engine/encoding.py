"""What a composite says of itself to the engine, and how relevance is therefore written and read."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from zennit.core import Composite

from crp.types import Sinks


class Propagation:
    """What the engine asks of a composite; the defaults hold for those of zennit, and for None.

    Attributes
    ----------
    encoding : "relevance" or "multiplier"
        What flows back: relevance itself, or relevance divided by activation.
    readout : "relevance" or "multiplier"
        What results hold: relevance, or what flows, as for gradients.
    initial : "output" or "one"
        Initial relevance of a target, if a call gives none: the output's value, or 1.
    isolates : bool
        Whether `register` itself runs the model uncompiled, keeps its parameters outside autograd, and knows every call
        of a module.
    """

    encoding: ClassVar[Literal["relevance", "multiplier"]] = "relevance"
    readout: ClassVar[Literal["relevance", "multiplier"]] = "relevance"
    initial: ClassVar[Literal["output", "one"]] = "output"
    isolates: ClassVar[bool] = False

    def shares_output(self) -> bool:
        """Whether results are shares of the model's output, where a call starts with that."""
        return self.encoding == "multiplier" and self.readout == "relevance" and self.initial == "output"

    def members_for(self, data: Tensor) -> list[Composite]:
        """Composites whose results are averaged, for methods with several references; empty for all others."""
        return []

    def expect(self, samples: list[int], total: int) -> None:
        """Take note of which of ``total`` samples the next forward pass has."""

    def accounting(self) -> AbstractContextManager[Sinks] | None:
        """Context in which what layers keep is accounted for; None if the composite keeps no account."""
        return None


def propagation_of(composite: Composite | None) -> Propagation:
    """What a composite says of itself; the defaults, for all that it does not say."""
    if isinstance(composite, Propagation):
        return composite
    propagation = Propagation()
    vars(propagation).update({name: getattr(composite, name) for name in _ASKED if hasattr(composite, name)})
    return propagation


_ASKED = [name for name in vars(Propagation) if not name.startswith("_")]


@dataclass(frozen=True)
class Encoding:
    """How relevance is written in what flows backward, and read from it, by what a composite says of itself.

    Attributes
    ----------
    multiplier : bool
        Whether relevance divided by activation flows, and not relevance itself.
    as_multiplier : bool
        Whether results hold what flows, as for gradients.
    from_one : bool
        Whether the initial relevance of a target is 1 by default, and not the output's value.
    """

    multiplier: bool
    as_multiplier: bool = False
    from_one: bool = False

    @classmethod
    def of(cls, composite: Composite | None) -> Encoding:
        """Encoding of a composite."""
        asked = propagation_of(composite)
        return cls(asked.encoding == "multiplier", asked.readout == "multiplier", asked.initial == "one")

    @property
    def name(self) -> Literal["multiplier", "relevance"]:
        """What flows."""
        return "multiplier" if self.multiplier else "relevance"

    @property
    def is_product(self) -> bool:
        """Whether results hold the product of what flows with the activation."""
        return self.multiplier and not self.as_multiplier

    @property
    def starts_from_one(self) -> bool:
        """Whether what starts at a target by default is 1, whatever its value."""
        return self.multiplier and (self.as_multiplier or not self.from_one)

    def write(self, relevance: Tensor, activation: Tensor) -> Tensor:
        """What flows where this is the relevance; an activation of exactly 0 has nothing to distribute."""
        return torch.where(activation == 0, 0, relevance / activation) if self.is_product else relevance

    def read(self, arrived: Tensor, activation: Tensor) -> Tensor:
        """Relevance in what arrived at a layer of this ``activation`` (less that of the reference, if there is one)."""
        return activation * arrived if self.is_product else arrived
