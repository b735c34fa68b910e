"""Canonizers: reversible changes of a model that let rules see what it computes."""

from torch import nn
from zennit.canonizers import Canonizer

from crp.canonizers.batchnorm import MergeBatchNorm

__all__ = ["Canonizer", "MergeBatchNorm", "for_model"]


def for_model(model: nn.Module) -> list[Canonizer]:
    """Canonizers that a model needs; what ``canonizers="auto"`` means.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    list of Canonizer
    """
    return [MergeBatchNorm()]
