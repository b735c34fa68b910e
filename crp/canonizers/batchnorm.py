r"""Merging batch norm into the linear layer before it.

In evaluation mode batch norm is affine, :math:`y = s \odot (x - \mu) + \beta` with :math:`s = \gamma / \sqrt{\sigma^2
+ \epsilon}`, so that a linear layer before it can take it in: :math:`w' = s \odot w,\; b' = s \odot (b - \mu) +
\beta`. Rules then see the weights that data really meet. The merge is exact (the batch norm is not executed while
merged), follows the order of execution, and is undone by putting the very same parameters back.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from zennit.canonizers import Canonizer
from zennit.core import RemovableHandleList
from zennit.types import BatchNorm, Convolution, ConvolutionTranspose

from crp.graph import adjacent_pairs, trace, tracing


@dataclass(frozen=True)
class _Plan:
    """Which layers belong together, for one structure of a model."""

    structure: tuple[int, ...]
    pairs: tuple[tuple[nn.Module, nn.Module], ...]
    left: dict[str, str]


_plans: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()
_merged: WeakIdKeyDictionary = WeakIdKeyDictionary()


class MergeBatchNorm(Canonizer):  # type: ignore[misc]
    """Merge every batch norm into the linear or convolutional layer whose output it alone reads.

    Which layers these are is found by one traced forward pass, at the first call of the model; the answer is kept for
    the model. Batch norms without such a layer, in training mode, or without running statistics are left alone.

    Attributes
    ----------
    left : dict of str to str
        Batch norms that were left alone, and why; known after the first call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, str] = {}
        self._undo: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
        self._bypassed: list[nn.Module] = []
        self._handles = RemovableHandleList()

    def apply(self, root_module: nn.Module) -> list[MergeBatchNorm]:
        """Merge now where the plan is known, otherwise at the model's first call.

        Parameters
        ----------
        root_module : nn.Module

        Returns
        -------
        list of one MergeBatchNorm
        """
        instance = self.copy()
        if any(isinstance(module, BatchNorm) for module in root_module.modules()):
            instance.register(root_module)
        return [instance]

    def register(self, root_module: nn.Module) -> None:
        """Merge, or arrange for it."""
        plan = _plans.get(root_module)
        if plan is not None and plan.structure == _structure(root_module):
            self._merge(plan)
        else:
            hook = root_module.register_forward_pre_hook(self._at_first_call, with_kwargs=True, prepend=True)
            self._handles.append(hook)

    def remove(self) -> None:
        """Put the parameters back that were there."""
        self._handles.remove()
        for module, parameters in self._undo:
            module._parameters.update(parameters)
        for module in self._bypassed:
            del module.forward
        self._undo.clear()
        self._bypassed.clear()

    def copy(self) -> MergeBatchNorm:
        """Return a new instance."""
        return type(self)()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _at_first_call(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if tracing():
            return
        self._handles.remove()
        plan = _plans[root] = _find_pairs(root, args, kwargs)
        self._merge(plan)

    def _merge(self, plan: _Plan) -> None:
        self.left = dict(plan.left)
        for linear, norm in plan.pairs:
            weight, bias = _merged_parameters(linear, norm)
            self._undo.append((linear, {name: linear._parameters[name] for name in ("weight", "bias")}))
            linear._parameters.update(weight=weight, bias=bias)
            norm.forward = _identity
            self._bypassed.append(norm)


def _identity(input: Tensor) -> Tensor:
    return input


def _structure(root: nn.Module) -> tuple[int, ...]:
    """Changes whenever a module is replaced, or switched between training and evaluation."""
    return tuple(id(module) * 2 + module.training for module in root.modules())


def _find_pairs(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Plan:
    structure = _structure(root)
    dims: dict[nn.Module, int] = {}
    handles = [
        module.register_forward_hook(lambda m, _, out: dims.__setitem__(m, out.dim()))
        for module in root.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        found = adjacent_pairs(trace(root, *args, **kwargs), (Convolution, nn.Linear), (BatchNorm,))
    finally:
        for handle in handles:
            handle.remove()
    pairs, left = [], {}
    names = {module: name for name, module in root.named_modules()}
    for pair in found.pairs:
        reason = _obstacle(pair.first, pair.second, dims)
        if reason is None:
            pairs.append((pair.first, pair.second))
        else:
            left[pair.second_name] = reason
    left |= {
        name: why
        for name, why in found.unpaired.items()
        if any(isinstance(m, BatchNorm) and n == name for m, n in names.items())
    }
    return _Plan(structure, tuple(pairs), left)


def _obstacle(linear: nn.Module, norm: Any, dims: dict[nn.Module, int]) -> str | None:
    if "forward" in vars(norm):
        return "its forward is replaced"
    if norm.training:
        return "it is in training mode"
    if norm.running_mean is None:
        return "it has no running statistics"
    if linear._parameters.get("weight") is None:
        return f"the weight of the {type(linear).__name__} before it is computed, not stored"
    if dims.get(linear, 2) != 2:
        return "it normalizes another axis than the output features of the Linear before it"
    return None


def _merged_parameters(linear: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Parameters of the linear layer with batch norm in it; computed again only when a parameter has changed."""
    # (training steps change running statistics without counting it; they do count the batches)
    sources = [linear.weight, linear.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    sources.append(norm.num_batches_tracked)
    state = (
        id(norm),
        norm.eps,
        *((t.data_ptr(), t._version, t.dtype, t.device) if t is not None else None for t in sources),
    )
    known = _merged.get(linear)  # type: ignore[no-untyped-call]
    if known is None or known[0] != state:
        known = _merged[linear] = (state, *_compute(linear, norm))
    return known[1], known[2]


@torch.no_grad()
def _compute(linear: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    weight = linear.weight
    precise = torch.promote_types(weight.dtype, torch.float32)
    mean, var = norm.running_mean.to(precise), norm.running_var.to(precise)
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(precise)
    bias = (0 if linear.bias is None else linear.bias.to(precise)) - mean
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.to(precise)
    merged = (_output_channels_first(linear, weight.to(precise)) * scale.reshape(_scale_shape(linear, weight))).reshape(
        weight.shape
    )
    return tuple(nn.Parameter(t.to(weight.dtype), requires_grad=False) for t in (merged, bias))  # type: ignore[return-value]


def _output_channels_first(linear: Any, weight: Tensor) -> Tensor:
    """Weight of a transposed convolution as (groups, in / groups, out / groups, *kernel); others as they are."""
    if isinstance(linear, ConvolutionTranspose):
        return weight.reshape(linear.groups, -1, *weight.shape[1:])
    return weight


def _scale_shape(linear: Any, weight: Tensor) -> tuple[int, ...]:
    if isinstance(linear, ConvolutionTranspose):
        return (linear.groups, 1, weight.shape[1], *(1,) * (weight.dim() - 2))
    return (-1, *(1,) * (weight.dim() - 1))
