r"""Kinds of batch norm, and the affine map that each is in evaluation mode.

:math:`y = s \odot (x - \mu) + \beta` with :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` (Ioffe and Szegedy 2015,
section 3.1). Two kinds come from elsewhere and are known by their looks: frozen batch norm, whose parameters are
buffers and which has no training mode, and batch norm with dropout and activation behind it inside one module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_PLAIN_FORWARDS = {_BatchNorm.forward, nn.SyncBatchNorm.forward}
_WITH_ACTIVATION = {"BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"}
_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


class _Affine(NamedTuple):
    """The map ``scale * (x - mean) + offset``, each of shape (channels,)."""

    scale: Tensor
    mean: Tensor
    offset: Tensor

    @property
    def shift(self) -> Tensor:
        """What 0 becomes."""
        return self.offset - self.mean * self.scale


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm of torch, one derived from it, or a frozen one."""
    return isinstance(module, _BatchNorm) or _is_frozen(module)


def _has_batch_norm(model: nn.Module) -> bool:
    """Whether any part of a model is a batch norm, or has the statistics of one; it looks no further than the first."""
    seen: set[nn.Module | None] = {None}
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is None or module in seen:
            continue
        if is_batch_norm(module) or getattr(module, "running_var", None) is not None:
            return True
        seen.add(module)
        todo += reversed(module._modules.values())
    return False


def _affine(norm: Any, dtype: torch.dtype) -> _Affine:
    """Map of a batch norm that has running statistics."""
    mean = norm.running_mean.to(dtype)
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    offset = torch.zeros_like(mean) if norm.bias is None else norm.bias.to(dtype)
    return _Affine(scale, mean, offset)


def _sources(norm: Any) -> list[Tensor | None]:
    """Tensors that the map depends on."""
    # (training steps change running statistics without counting it; they do count the batches)
    counter = getattr(norm, "num_batches_tracked", None)
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var, counter]


def obstacle(norm: Any) -> str | None:
    """Reason why a module is no fixed affine map (an activation may follow the map); None if it is one."""
    if "forward" in vars(norm):
        return "its forward is replaced"
    if norm.training and not _is_frozen(norm):
        return "it is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if not hasattr(norm, "eps"):
        return "its epsilon is not an attribute"
    if not (_is_frozen(norm) or _has_activation(norm) or type(norm).forward in _PLAIN_FORWARDS):
        return f"the forward of {type(norm).__name__} is not that of torch"
    return None


def _is_affine_only(norm: nn.Module) -> bool:
    """Whether nothing comes after the affine map."""
    return all(isinstance(part, nn.Identity) for part in _tail(norm))


def _rest_of(norm: nn.Module) -> Callable[..., Any]:
    """The module's forward without the affine map."""
    return partial(_apply, _tail(norm))


def _apply(tail: tuple[nn.Module, ...], *args: Any, **kwargs: Any) -> Any:
    (value,) = (*args, *kwargs.values())
    for module in tail:
        value = module(value)
    return value


def _tail(norm: nn.Module) -> tuple[nn.Module, ...]:
    if not _has_activation(norm):
        return ()
    parts = (norm._modules.get(name) for name in ("drop", "act"))
    return tuple(part for part in parts if part is not None)


def _has_activation(norm: nn.Module) -> bool:
    return type(norm).__name__ in _WITH_ACTIVATION


def _is_frozen(module: nn.Module) -> bool:
    return "FrozenBatchNorm" in type(module).__name__ and module._buffers.keys() >= _FROZEN_BUFFERS
