"""Model parameter randomization: an explanation that does not depend on the weights does not explain the model.

Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim, "Sanity checks for saliency maps", NeurIPS 2018: layers are
randomized from the output down, one more each time, and explanations compared with those of the trained model.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from crp.engine.checking import shuffle
from crp.engine.door import check_seed
from crp.errors import InputError
from crp.flags import check_flags
from crp.layers import unwrap
from crp.metrics.explaining import Method, _check_method, _relevance_by
from crp.metrics.scoring import Labels, Output, Scorer


def randomization(
    model: nn.Module,
    data: Tensor,
    target: Labels,
    explain_func: Method,
    *,
    absolute: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    output: Output = None,
) -> dict[str, Tensor]:
    """Rank correlation of explanations with those of the model, while its layers are randomized from the output down.

    The weights and biases of a layer are shuffled, which keeps their distribution. The model itself is left alone: a
    copy is changed.

    Parameters
    ----------
    model : nn.Module
    data : Tensor of shape (batch, *input shape)
    target : int, sequence of int, Tensor or None
        The class that is explained throughout; None for what the trained model predicts.
    explain_func : method
        A function in the form of Quantus, a composite, an attributor's class or a name.
    absolute : bool
        Whether absolute values are ranked, as in the paper's second variant.
    seed : int
    batch_size : int
        Inputs per explanation.
    output : callable, optional
        Takes the scores of classes from what the model returns, as for `crp.explain`.

    Returns
    -------
    dict of str to Tensor of shape (batch,)
        For each layer with parameters, from the last one that is registered: Spearman's rank correlation once it and
        all layers before it in this order are random. Near 0 is good; 0 for an explanation that is constant.

    Raises
    ------
    ValueError
        If no layer has parameters.
    """
    check_flags(absolute=absolute)
    _check_method(explain_func)
    check_seed(seed)
    classes = Scorer(model, data, target, "output", batch_size, output).classes
    changed = copy.deepcopy(unwrap(model)).eval()
    layers = {name: list(module.parameters(recurse=False)) for name, module in changed.named_modules()}
    if not (layers := {name: parameters for name, parameters in layers.items() if parameters}):
        raise InputError(f"{type(model).__name__} has no parameters that could be randomized")

    def relevance() -> Tensor:
        found = _relevance_by(explain_func, changed, data, classes, output, batch_size).flatten(1)
        return found.abs() if absolute else found

    generator = torch.Generator().manual_seed(seed)
    original, similarity = relevance(), {}
    for name in reversed(layers):
        for parameter in layers[name]:
            shuffle(parameter, generator)
        similarity[name] = rank_correlations(original, relevance())
    return similarity


def rank_correlations(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, of each row of two tensors (rows, n): the correlation of ranks; 0 where one row never varies."""
    a, b = (ranks - ranks.mean(1, keepdim=True) for ranks in map(_ranks, (a, b)))
    size = a.norm(dim=1) * b.norm(dim=1)
    correlation: Tensor = (a * b).sum(1) / size.where(size > 0, 1)
    return correlation


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row, of shape (batch, n); those that are equal share their mean rank."""
    ordered = values.sort(1).values
    below = torch.searchsorted(ordered, values.contiguous())
    upto = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + upto).double() / 2
