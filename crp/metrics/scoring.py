"""What metrics share: data and classes that are checked, scores in batches, areas under curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from crp.attributors.scores import ScoreName, explaining, known_target, score_of, target_of
from crp.attributors.target import Classes
from crp.checks import check_choice, check_number
from crp.engine.inputs import check_data
from crp.errors import InputTypeError

#: One class for all samples, one for each, or None for what the model predicts.
Labels: TypeAlias = int | Sequence[int] | Tensor | None


class Scorer:
    """Scores of changed samples, in batches.

    Parameters
    ----------
    model : nn.Module
    data : Tensor of shape (batch, *input shape)
    target : int, sequence of int, Tensor or None
    score : "softmax", "log_softmax" or "output"
    batch_size : int
        Inputs per forward pass.

    Attributes
    ----------
    classes : Tensor of shape (batch,), int64
    """

    def __init__(self, model: nn.Module, data: Tensor, target: Labels, score: ScoreName, batch_size: int) -> None:
        check_data(data)
        check_choice("score", score, ScoreName)
        check_number("batch_size", batch_size, 1, whole=True)
        asked = target_of(target, len(data))
        if asked is not None and not isinstance(asked, Classes):
            raise InputTypeError(
                f"target must be a class, one per sample, or None for what is predicted, not {target!r}"
            )
        self.model, self.score, self.batch_size = model, score, batch_size
        with explaining(model) as run, torch.no_grad():
            if asked is None:
                known = [known_target(None, run(part)) for part in torch.split(data, batch_size)]
                ids = torch.cat([part.ids for part in known if isinstance(part, Classes)])
            else:
                output = run(data[:1])
                for label in set(asked.ids.tolist()):
                    Classes(label).score(output)  # raises if there is no such class
                ids = asked.ids.expand(len(data)).remainder(output.shape[1])
        self.classes = ids.to(data.device)

    def rate(self, make: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
        """Score of changed inputs, which are made batch by batch.

        Parameters
        ----------
        make : callable
            From indices of shape (k,) into ``samples`` to inputs of shape (k, *input shape).
        samples : Tensor of shape (n,)
            Which sample each input was made from.

        Returns
        -------
        Tensor of shape (n,)
        """
        scores = []
        with explaining(self.model) as run, torch.no_grad():
            for index in torch.split(torch.arange(len(samples), device=samples.device), self.batch_size):
                scores.append(score_of(run(make(index)), Classes(self.classes[samples[index]]), self.score))
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
    return torch.trapezoid(curve, dx=1 / (curve.shape[-1] - 1), dim=-1)
