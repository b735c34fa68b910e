"""The rule of what is held constant."""

from __future__ import annotations

from typing import Any, ClassVar

from crp.layers.nested import changed
from crp.rules.base import Rule
from crp.rules.functions import Function
from crp.rules.layer import Layer


class Constant(Rule):
    """What an operation or a layer gives is held constant: nothing flows into it, and other factors take all.

    Examples
    --------
    MambaLRP (Jafari et al., NeurIPS 2024) holds what parametrizes a state space constant, and halves gates:

    >>> from crp.composites import RelP
    >>> composite = RelP(layer_map=[("*.x_proj", Constant())])
    """

    settings: ClassVar[tuple[str, ...]] = ()
    shares = True

    def __init__(self) -> None:
        super().__init__(0.0)

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Whatever is inside the module."""
        return True

    def operate(self, layer: Layer) -> Any:
        """Return the output, as if it did not depend on the model's input."""
        return changed(layer.output, lambda tensor: tensor.detach())
