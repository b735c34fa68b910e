"""Probabilities of classes in what a model returns, whether it ends in a softmax or not."""

from __future__ import annotations

import torch
from torch import Tensor


def are_shares(output: Tensor) -> bool:
    """Whether all rows of an output of shape (rows, classes, ...) are shares already: not negative, with the sum 1."""
    values, tolerance = output.detach(), max(1e-5, 8 * torch.finfo(output.dtype).eps)
    return bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() < tolerance).all())


def probabilities(output: Tensor, shares: bool | None = None) -> Tensor:
    """Probability of each class.

    Parameters
    ----------
    output : Tensor of shape (rows, classes, ...)
    shares : bool, optional
        Whether they are shares, where other rows of the model have told; scores of a few may look like some by chance.

    Returns
    -------
    Tensor of the same shape
        The output itself if its rows are shares, as those of a model that ends in a softmax; the sigmoid of a single
        output; the softmax of others.
    """
    if output.shape[1] == 1:
        return output.sigmoid()
    return output if (are_shares(output) if shares is None else shares) else output.softmax(1)


def log_probabilities(output: Tensor, shares: bool | None = None) -> Tensor:
    """Logarithms of `probabilities`."""
    if output.shape[1] > 1 and (are_shares(output) if shares is None else shares):
        return output.clamp(min=torch.finfo(output.dtype).tiny).log()
    return output.log_softmax(1) if output.shape[1] > 1 else torch.nn.functional.logsigmoid(output)
