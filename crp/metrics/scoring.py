"""What metrics share: data and classes that are checked, scores in batches, areas under curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from crp.attributors.scores import ScoreName, check_exclusive, explaining, known_target, score_of, target_of
from crp.attributors.selected import Selected
from crp.attributors.target import AtPlaces, Classes
from crp.checks import check_choice, check_number
from crp.engine.forward import tensor_in
from crp.engine.inputs import Data, Inputs, check_data
from crp.engine.probabilities import are_shares
from crp.engine.targets import Element, Pixels, Position
from crp.errors import InputError, InputTypeError
from crp.flags import check_function

#: One class for all samples, one for each, or None for what the model predicts.
Labels: TypeAlias = int | Sequence[int] | Tensor | None
#: The same, or tokens at a position of texts, or other places in a dense output.
Places: TypeAlias = Labels | Position | Pixels | Element | Sequence[Position | Pixels | Element]
#: Takes what is explained from what a model returns.
Output: TypeAlias = Callable[[Any], Any] | None


class Scorer:
    """Scores of changed samples, in batches.

    Parameters
    ----------
    model : nn.Module
    data : Tensor of shape (batch, *input shape), or Inputs that are checked
    target : int, sequence of int, Tensor or None; or places
    score : "softmax", "log_softmax" or "output"
    batch_size : int
        Inputs per forward pass.
    output : callable, optional
        Takes the scores of classes, of shape (samples, classes), from what the model returns.

    Attributes
    ----------
    inputs : Inputs
    target : Target
        For each sample.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Tensor | Inputs,
        target: Places,
        score: ScoreName,
        batch_size: int,
        output: Output = None,
    ) -> None:
        if not isinstance(data, Inputs):
            check_data(data)
        self.inputs = inputs = Inputs.of(data)
        check_choice("score", score, ScoreName)
        batch_size = check_number("batch_size", batch_size, 1, whole=True)
        asked = target_of(target, len(inputs))
        if asked is not None and not isinstance(asked, Classes | AtPlaces):
            raise InputTypeError(f"target must be a class, one per sample, or None for those predicted, not {target!r}")
        if isinstance(asked, AtPlaces) and score != "output":
            raise InputError(f"score={score!r} is of classes; that of places in the output is 'output'")
        check_function("output", output, "what the model returns")
        self.model, self.score, self.batch_size, self.output = model, score, batch_size, output
        check_exclusive(score, output)
        with self._running() as run, torch.no_grad():
            rows = torch.arange(len(inputs) if asked is None else 1)
            scores = torch.cat([run(inputs.select(part.tolist())) for part in torch.split(rows, self.batch_size)])
        if isinstance(asked, Classes):
            asked.score(scores)  # raises if there is no such class
            asked = Classes(asked.ids.expand(len(inputs)).remainder(scores.shape[1]))
        self.target = known_target(asked, scores)
        # (those of changed data may look like probabilities by chance)
        self._shares = score != "output" and are_shares(scores)

    @property
    def classes(self) -> Tensor:
        """Class of each sample, of shape (batch,); a `TypeError` where places are scored."""
        if not isinstance(self.target, Classes):
            raise InputTypeError("target must be a class, one per sample, or None for those predicted, not a place")
        return self.target.ids.to(self.inputs.explained[0].device)

    def _running(self) -> AbstractContextManager[Callable[[Data], Tensor]]:
        select = tensor_in if self.output is None else Selected(Classes(0), self.output).select

        def scores(returned: Any) -> Tensor:
            if not (found := select(returned)).is_floating_point():
                raise InputTypeError(f"scores of classes must be real numbers, not {found.dtype}")
            return found

        return explaining(self.model, select=scores)

    def rate(self, make: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
        """Score of changed inputs, which are made batch by batch.

        Parameters
        ----------
        make : callable
            From indices of shape (k,) into ``samples`` to what is in place of the input that is explained, of shape
            (k, *input shape).
        samples : Tensor of shape (n,)
            Which sample each input was made from.

        Returns
        -------
        Tensor of shape (n,)
        """
        scores = []
        with self._running() as run, torch.no_grad():
            for index in torch.split(torch.arange(len(samples), device=samples.device), self.batch_size):
                inputs = self.inputs.having([make(index)], samples[index])
                scores.append(score_of(run(inputs), self.target.rows(samples[index]), self.score, self._shares))
        return torch.cat(scores)


def area(curve: Tensor) -> Tensor:
    """Area under each curve, by the trapezoidal rule, where the whole curve is one unit long.

    Parameters
    ----------
    curve : Tensor of shape (..., points)

    Returns
    -------
    Tensor of shape (...)

    Examples
    --------
    >>> area(torch.tensor([1.0, 0.5, 0.0]))
    tensor(0.5000)
    """
    if not isinstance(curve, Tensor) or curve.dim() == 0 or curve.shape[-1] < 2:
        raise InputError(f"a curve must be a tensor with at least two points on its last axis, not {curve!r:.60}")
    return torch.trapezoid(curve, dx=1 / (curve.shape[-1] - 1), dim=-1)
