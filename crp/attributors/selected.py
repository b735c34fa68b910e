"""Targets of models that return more than a tensor: in what a function takes from a dict, or from boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from crp.attributors.target import Target
from crp.errors import InputTypeError
from crp.notices import kind_of
from crp.types import MaskFn


class Selected(Target):
    """A target in what a function takes from the model's output, where the model returns a dict or boxes, say.

    Parameters
    ----------
    target : Target
    output : callable
        From what the model returns to the tensor that ``target`` scores, as ``output`` of `CondAttribution`. Where it
        has an attribute ``exclusive`` that is False, no softmax belongs to the scores.
    """

    def __init__(self, target: Target, output: Callable[[Any], Any]) -> None:
        self.target, self.output = target, output
        self.layer, self.joint = target.layer, target.joint

    def select(self, returned: Any) -> Tensor:
        """Tensor that the function takes; a `TypeError` if it is none, or several."""
        chosen = self.output(returned)
        if isinstance(chosen, list | tuple):
            raise InputTypeError(
                f"output returned {kind_of(chosen)}, such as of boxes in any number; here it must return one "
                "tensor, (samples, classes, ...): name a box, as in crp.outputs.detection(box=0)"
            )
        if not isinstance(chosen, Tensor):
            raise InputTypeError(f"output must return the tensor to explain; it returned {kind_of(chosen)}")
        if chosen.dim() == 0:
            raise InputTypeError("output must return a tensor with a row for each sample; it returned one of shape ()")
        return chosen

    def score(self, output: Tensor) -> Tensor:
        """Score of the target."""
        return self.target.score(output)

    def weights(self, output: Tensor) -> Tensor:
        """Gradient of the target's score."""
        return self.target.weights(output)

    def keep(self, row: int, ids: Any, layer: str) -> MaskFn:
        """Mask of the target."""
        return self.target.keep(row, ids, layer)

    def check(self, n_samples: int) -> None:
        """Raise what the target raises."""
        self.target.check(n_samples)

    def rows(self, index: Tensor) -> Target:
        """Target of some samples."""
        return Selected(self.target.rows(index), self.output)
