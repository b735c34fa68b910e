"""What a composite says of itself to the engine, and how relevance is therefore written and read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from zennit.core import Composite

from crp.errors import InputError
from crp.types import Sinks

_WORDS = {"encoding": ("relevance", "multiplier"), "readout": ("relevance", "multiplier"), "initial": ("output", "one")}


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

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        _check_words(cls.__name__, vars(cls))

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
    _check_words(type(composite).__name__, vars(propagation))
    return propagation


def _check_words(owner: str, said: Mapping[str, Any]) -> None:
    """Raise an `InputError` where a composite says another word than there are."""
    for name, words in _WORDS.items():
        if isinstance(word := said.get(name), str) and word not in words:
            raise InputError(f"{owner}.{name} is {word!r}; it must be {' or '.join(map(repr, words))}")


_ASKED = [name for name in vars(Propagation) if not name.startswith("_")]


def is_product(asked: Propagation) -> bool:
    """Whether results hold the product of what flows with the activation."""
    return asked.encoding == "multiplier" and asked.readout != "multiplier"


def starts_at_one(asked: Propagation) -> bool:
    """Whether 1 flows from a target by default, whatever the output's value."""
    return asked.encoding == "multiplier" and (asked.readout == "multiplier" or asked.initial != "one")


def write(asked: Propagation, relevance: Tensor, activation: Tensor) -> Tensor:
    """What flows where this is the relevance; an activation of exactly 0 has nothing to distribute."""
    return torch.where(activation == 0, 0, relevance / activation) if is_product(asked) else relevance


def _read(asked: Propagation, arrived: Tensor, activation: Tensor) -> Tensor:
    """Relevance in what arrived at a layer of this ``activation`` (less that of the reference, if there is one)."""
    return activation * arrived if is_product(asked) else arrived
