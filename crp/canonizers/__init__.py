"""Canonizers: reversible changes of a model that let rules see what it computes."""

from torch import nn
from zennit.canonizers import Canonizer

from crp.canonizers.base import Reporting
from crp.canonizers.batchnorm import MergeBatchNorm
from crp.canonizers.norms import _has_batch_norm
from crp.kinds import check_kind

__all__ = ["Canonizer", "MergeBatchNorm", "Reporting", "for_model"]


def for_model(model: nn.Module) -> list[Canonizer]:
    """Canonizers that a model needs; what ``canonizers="auto"`` means.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    list of Canonizer
        `MergeBatchNorm` where there is any batch norm, frozen ones included; otherwise none. Everything else that
        models do (shortcuts, gates, layer norm, functional layers) is a matter of rules.

    Examples
    --------
    >>> for_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    [MergeBatchNorm()]
    >>> for_model(nn.Linear(3, 4))
    []
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    return [MergeBatchNorm()] if _has_batch_norm(model) else []
