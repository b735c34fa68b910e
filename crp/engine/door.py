"""What is checked at the door: culprit and remedy."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from math import inf, isfinite
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from zennit.core import Composite

from crp.errors import InputError, InputTypeError
from crp.layers.devices import MOVING
from crp.layers.nested import tensors_in
from crp.layers.packed import is_packed
from crp.notices import kind_of, warn
from crp.wording import first_few

#: The least number of float16 that has all its digits.
_LEAST = torch.finfo(torch.float16).smallest_normal
#: A tensor with its version and memory; None in place of both if it is no plain array of floating-point numbers.
_Mark = tuple[weakref.ref[Tensor], tuple[int, int] | None]
#: Marks of each model's parameters, which were finite when they were last looked at.
_finite: weakref.WeakKeyDictionary[nn.Module, list[_Mark]] = weakref.WeakKeyDictionary()


def _as_kind(value: object) -> str:
    """What kind of value is no floating-point tensor, and what would make one of it."""
    kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
    if isinstance(value, np.ndarray):
        return f"{kind} (torch.from_numpy makes a tensor of it)"
    if (isinstance(value, Tensor) and value.dtype == torch.uint8) or type(value).__module__.startswith("PIL."):
        return f"{kind} (prepare pictures as in training, such as by torchvision's transforms)"
    return kind


def check_attribution(attribution: object) -> None:
    """Raise a `TypeError` if this is a model, or anything else that attributes nothing."""
    if isinstance(attribution, nn.Module | type) or not hasattr(attribution, "generate"):
        raise InputTypeError(f"attribution must be CondAttribution(model), not {kind_of(attribution)}")


def check_device(device: Any, name: str) -> torch.device | None:
    """Device that is named, which must be there; None for None.

    Raises
    ------
    InputTypeError, InputError
        If it is no device, or none of this machine.
    """
    if device is None:
        return None
    if isinstance(device, bool) or not isinstance(device, str | torch.device | int):
        raise InputTypeError(f'{name} must be a device, such as "cpu" or "cuda:0", not {device!r}')
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f'{name} is {device!r}, which is no device of this machine, such as "cpu"') from error
    return found


def check_weights(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Raise an `InputError` that names the parameters with NaN or infinite values, or those that cannot be used.

    They are looked at again only if they have changed.
    """
    # (layers that are offloaded get theirs when they are called)
    here = [module for module in modules if MOVING not in module.__dict__]
    tensors = [p for module in here for p in module._parameters.values() if p is not None]
    if any(map(is_lazy, tensors)):
        named = [*model.named_parameters(), *model.named_buffers()]
        lazy = _listed([name for name, tensor in named if is_lazy(tensor)])
        raise InputError(f"{lazy}: no call has given these a shape; call the model once, model(data), first")
    marks = _finite.get(model, [])
    if len(marks) == len(tensors) and all(map(_is_as_marked, marks, tensors)):
        return
    if any(p.is_meta for p in tensors):
        raise InputError("parameters of the model are on the meta device, where tensors have no values; load them")
    if any(p.is_inference() for p in tensors):
        raise InputError(
            "parameters of the model were made in torch.inference_mode(), and autograd cannot use them; make the model "
            "outside of it, or explain copy.deepcopy(model)"
        )
    if names := _not_finite(dict(model.named_parameters())):
        raise InputError(
            f"{_listed(names)} of the model {'has' if len(names) == 1 else 'have'} NaN or infinite values, and "
            "relevance would have, too; load weights that are finite"
        )
    _finite[model] = [(weakref.ref(p), (p._version, p.data_ptr()) if _has_numbers(p) else None) for p in tensors]


def _check_merged(composite: Composite, modules: Mapping[str, nn.Module]) -> None:
    """Raise an `InputError` where a canonizer of zennit has merged batch norm into a weight that is computed again."""
    merged = {linear for canonizer in composite.handles for linear in getattr(canonizer, "linears", ())}
    for name, module in modules.items():
        if module in merged and "weight" in vars(module):
            raise InputError(
                f"a canonizer of zennit merges batch norm into {name!r}, whose weight is computed at each call: the "
                "model would predict something else. Store it first, such as by torch.nn.utils.prune.remove or "
                "torch.nn.utils.remove_weight_norm"
            )


def _is_as_marked(mark: _Mark, tensor: Tensor) -> bool:
    """Whether this is the tensor that was marked, and nobody has written to it since."""
    known, state = mark
    if known() is not tensor:
        return False
    return not _has_numbers(tensor) if state is None else state == (tensor._version, tensor.data_ptr())


def _has_numbers(tensor: Tensor) -> bool:
    if is_lazy(tensor) or is_packed(tensor):  # (of packed ones, not all functions are there)
        return False
    return not tensor.is_meta and tensor.is_floating_point() and tensor.layout is torch.strided


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of those that have NaN or infinite values."""
    return [name for name, tensor in tensors.items() if _has_numbers(tensor) and not is_finite(tensor)]


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite."""
    if tensor.is_meta:
        return True
    tensor = tensor.detach()
    # (one pass; a sum that overflows says nothing)
    return isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def check_result(model: nn.Module, heatmap: object, prediction: object, shares: object = ()) -> None:
    """Raise an `InputError`, or warn, where a heatmap is not finite, too small for float16, or nothing but rounding.

    Weights or buffers that are not finite are named; otherwise numbers have become too large on the way. ``shares`` of
    what is predicted, if they are that, are what the heatmap is the sum of.
    """
    parts = [*tensors_in(shares)]
    sizes = [0.0 if one.is_meta else torch.linalg.vector_norm(one.detach(), 1).item() for one in parts]
    if (sizes and all(map(isfinite, sizes))) or _all_finite(heatmap):
        if any(is_lost_in_float16(part, part.dtype) for part in tensors_in(heatmap)):
            warn(
                f"relevance is below {_LEAST:.0e} everywhere in some rows, where float16 has few digits left, or none: "
                "compute in bfloat16 or float32, or start with more, such as init_rel=1000"
            )
        if any(_is_rounding(*one, prediction) for one in zip(parts, sizes, strict=True)):
            warn(
                "relevance is of either sign, and so large that rounding alone is as much as what the model predicts: "
                "the heatmap tells nothing. Values close to 0 were divided by, as those that a sigmoid reads; try "
                'gates="signal", or Epsilon(0.1), Gamma() or ZPlus() on layers that have LRP-0 or a small ε'
            )
        return
    if names := _not_finite({**dict(model.named_parameters()), **dict(model.named_buffers())}):
        raise InputError(f"the heatmap is not finite, as {_listed(names)} of the model has NaN or infinite values")
    where = "as the model's output is" if not _all_finite(prediction) else "though the model's output is"
    warn(f"the heatmap has NaN or infinite values, {where}: numbers became too large, or were divided by 0, on the way")


def _is_rounding(relevance: Tensor, size: float, prediction: object) -> bool:
    """Whether rounding, as random as it is, is as large as predictions in relevance of this sum of absolute values."""
    eps = torch.finfo(relevance.dtype).eps
    of_row = float(size / (relevance.numel() * len(relevance)) ** 0.5)  # (at most the Euclidean norm)
    if not eps**-0.5 < of_row < inf:  # (rows that predict next to nothing may have any)
        return False
    return of_row * eps > max(float(one.detach().abs().amax()) for one in tensors_in(prediction))


def _all_finite(result: object) -> bool:
    return all(map(is_finite, tensors_in(result)))


def is_lost_in_float16(relevance: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether relevance that was computed in float16, as dtypes or autocast say, is too small for it in some row."""
    casts = [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if torch.float16 not in (*dtypes, *casts) or relevance.is_meta:
        return False
    return bool((relevance.detach().reshape(len(relevance), -1).abs().amax(1) < _LEAST).any())


def _listed(names: list[str]) -> str:
    return first_few([repr(name) for name in names], 5)


def check_seed(seed: object) -> None:
    """Raise a `ValueError` if ``seed`` is none of a generator of torch."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= int(seed) < 2**64:
        raise InputError(f"seed must be a whole number of 64 bits, such as 0, not {seed!r}")
