"""One form for all methods that are measured: the explanation function of Quantus.

``explain_func(model, inputs, targets, **options)`` takes and returns arrays. Metrics here take such a function, or a
composite, an attributor's class or the name of a method, which `quantus_explain` makes such a function of.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from zennit.core import Composite

import crp
from crp.attributors.base import Attributor
from crp.attributors.gradient import Gradient
from crp.attributors.perturbation import MeaningfulPerturbation
from crp.attributors.selected import Selected
from crp.attributors.target import Classes, Target
from crp.engine.inputs import Data
from crp.errors import InputError, InputTypeError
from crp.layers import unwrap
from crp.metrics.scoring import Output
from crp.notices import kind_of
from crp.wording import shortened

Array: TypeAlias = np.ndarray[Any, Any]
ExplainFunc: TypeAlias = Callable[..., Array | Tensor]
#: Name of a method, composite, class of an attributor, or function in the form of Quantus.
Method: TypeAlias = str | Composite | type | ExplainFunc


def quantus_explain(method: str | Composite | type, *, output: Output = None, **options: Any) -> Callable[..., Array]:
    """Method of this package in the form that Quantus calls.

    Parameters
    ----------
    method : str, Composite or class
        A name that `crp.explain` knows; a composite, of ours or of zennit; or a class that is made as
        ``method(model, **options)`` and called with data and target, such as `MeaningfulPerturbation`.
    output : callable, optional
        Takes what is explained from what the model returns, as for `crp.explain`; scores of shape (samples, classes).
    **options
        Of the method. Options that Quantus passes with a call (``explain_func_kwargs``) replace these.

    Returns
    -------
    callable
        ``(model, inputs, targets, **options) -> ndarray``, whose result has the axes of the inputs; in that of a
        heatmap without channels, the axis of channels has length 1.

    Raises
    ------
    TypeError
        If ``method`` is something else, or a composite is given options.

    Examples
    --------
    >>> from crp.composites import UniformZPlus
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    >>> explain_func = quantus_explain(UniformZPlus())
    >>> explain_func(net, np.ones((5, 4)), np.zeros(5, int)).shape
    (5, 4)
    """
    if isinstance(method, Composite) and options:
        raise InputTypeError(f"a composite has no options here, got {sorted(options)}; give them to {method!r}")
    is_kind = isinstance(method, type) and any("__call__" in vars(base) for base in method.__mro__)
    if not (is_kind or isinstance(method, str | Composite)):
        raise InputTypeError(f"method must be a name, a composite or the class of an attributor, not {method!r}")

    def explain_func(model: nn.Module, inputs: Any, targets: Any, **more: Any) -> Array:
        data, target = _tensors(model, inputs, targets)
        chosen = more.pop("output", output)
        relevance = _explain(method, model, data, target, chosen, {**options, **more})
        if relevance.dim() == data.dim() - 1:
            relevance = relevance.unsqueeze(1)
        return _as_array(relevance)

    return explain_func


def _check_method(method: Method) -> None:
    """Raise a `TypeError` if this is no method."""
    if isinstance(method, str | Composite | type):
        quantus_explain(method)  # (refuses a class that explains nothing)
    elif isinstance(method, Attributor | MeaningfulPerturbation):
        kind = type(method).__name__
        raise InputTypeError(f"{method!r} is made for one model; give the class {kind}, or quantus_explain({kind})")
    else:
        try:  # (a built-in function may not tell what it takes, by a ValueError)
            with contextlib.suppress(ValueError):
                inspect.signature(method).bind(model=None, inputs=None, targets=None)
        except TypeError as error:
            raise InputTypeError(
                "explain_func must be a function (model, inputs, targets) -> array, a composite, the class of an "
                f"attributor, or a name; not {shortened(method)}: {error}"
            ) from None


def _relevance_by(
    method: Method, model: nn.Module, data: Tensor, target: Tensor, output: Output, batch_size: int | None = None
) -> Tensor:
    """Relevance of data, (batch, *input shape) or (batch, 1, *space), computed for ``batch_size`` inputs at a time."""
    size = int(batch_size or len(data))
    parts = zip(torch.split(data, size), torch.split(target, size), strict=True)
    return torch.cat([_relevance_of(method, model, some, classes, output, some) for some, classes in parts])


def _relevance_of(
    method: Method, model: nn.Module, data: Data, target: Tensor | Target, output: Output, explained: Tensor
) -> Tensor:
    """Relevance in the shape of what is explained: of data that are a tensor, and of texts or one of several inputs.

    A function gets the former as arrays, in the form of Quantus, and the latter as they are; it chooses the output
    itself.
    """
    given: tuple[Any, Any] = data, target
    is_tensor = data is explained and isinstance(target, Tensor)
    if is_tensor:  # (what is the user's may write into what it gets)
        given = explained.clone(), given[1].clone()
    if isinstance(method, str | Composite | type):
        return _check_relevance(_explain(method, model, *given, output, {}), explained)
    inputs, targets = map(_as_array, given) if is_tensor else given
    return _check_relevance(method(model=model, inputs=inputs, targets=targets), explained)


def _as_array(tensor: Tensor) -> Array:
    """Array of the same numbers; numpy has no bfloat16."""
    tensor = tensor.detach().cpu()
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _as_tensor(values: Any) -> Tensor:
    """Tensor of an array, also of one that is read backward, as a flipped picture is."""
    return torch.as_tensor(values.copy() if isinstance(values, np.ndarray) else values).detach()


def _check_relevance(relevance: Array | Tensor, data: Tensor) -> Tensor:
    """Relevance as a tensor beside the data, with all axes of the data.

    Raises
    ------
    ValueError
        If it is of another shape, or not finite.
    """
    try:
        checked = _as_tensor(relevance).to(data.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"relevance must be an array or a tensor of numbers, not {relevance!r:.60}") from error
    if checked.is_complex():
        raise InputTypeError(f"relevance must be real numbers, not {checked.dtype}")
    dtype = checked.dtype if checked.is_floating_point() else data.dtype
    checked = checked.to(torch.promote_types(dtype, torch.float32))  # (sums in half precision would lose the order)
    if checked.dim() == data.dim() - 1:
        checked = checked.unsqueeze(1)
    if checked.shape != data.shape and (data.dim() < 3 or checked.shape != (len(data), 1, *data.shape[2:])):
        space = tuple(data.shape[2:])
        heatmaps = f", or that of heatmaps, {(len(data), *space)}" if space else ""
        raise InputError(
            f"relevance has shape {tuple(checked.shape)}; it must have that of the data, {tuple(data.shape)}{heatmaps}"
        )
    if not checked.isfinite().all():
        wrong = (~checked.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise InputError(f"relevance is NaN or infinite for samples {wrong}")
    return checked


def _tensors(model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    like = next((p for p in unwrap(model).parameters() if p.is_floating_point()), None)
    try:
        data = _as_tensor(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"inputs must be an array or a tensor of numbers: {error}") from error
    flat: Any = targets.reshape(-1) if isinstance(targets, Tensor | np.ndarray) else targets
    try:
        target = Classes(flat).ids
    except InputTypeError:
        raise InputTypeError(f"targets must be whole numbers, one for each input, not {shortened(targets)}") from None
    if like is not None:
        data = data.to(like.device, like.dtype)
    if len(target) not in (1, len(data)):
        raise InputError(f"there are {len(target)} targets for {len(data)} inputs; give one for each")
    return data, target.to(data.device)


def _explain(
    method: str | Composite | type,
    model: nn.Module,
    data: Data,
    target: Tensor | Target,
    output: Output,
    options: dict[str, Any],
) -> Tensor:
    result: Any
    if isinstance(method, str):
        chosen = {} if output is None else {"output": output}
        result = crp.explain(method, model, data, target, **chosen, **options)
    else:
        made = Gradient(model, method, **options) if isinstance(method, Composite) else method(model, **options)
        result = made(data, target if output is None else Selected(Target.of(target), output))
    # Attributors return (output, attribution), as those of zennit do.
    result = getattr(result, "heatmap", result[1] if type(result) is tuple and len(result) == 2 else result)
    if not isinstance(result, Tensor):
        raise InputTypeError(f"{method!r} gives {kind_of(result)}, not a tensor, or an object with a heatmap")
    return result
