"""Parts of which a rule is the sum."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Term(NamedTuple):
    """One part of a rule: relevance is sent back through ``z`` in proportion to ``weight / denominator``.

    Attributes
    ----------
    z : Tensor of shape (batch, *output shape)
        Surrogate of the layer, differentiable in its input; without what is ``added``.
    weight : float or Tensor
        Share of the relevance that this term distributes.
    denominator : Tensor or None
        What the contributions are divided by; ``z`` by default.
    sign : int
        1 or -1 if the denominator is known not to be negative or positive; 0 otherwise.
    outputs : int
        1 or -1 if only positive or negative outputs hand relevance on through this term; 0 for all.
    added : Tensor or None
        Part of the surrogate that does not depend on the input: a bias, along one axis of ``z``.
    """

    z: Tensor
    weight: float | Tensor = 1.0
    denominator: Tensor | None = None
    sign: int = 0
    outputs: int = 0
    added: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        """The surrogate, with what is added."""
        return self.z if self.added is None else self.z + self.added
