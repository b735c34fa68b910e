"""Initial relevance: what a backward pass starts with at the model's output, or at a layer."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.engine.conditions import target_ids


def check_targets_exist(
    targets: Sequence[Any] | None, prediction: Tensor, output_name: str, places: Sequence[int] | None = None
) -> None:
    """Raise an `IndexError` if a row's target is not among the outputs; it names the place in the caller's order."""
    for row, target in zip(places or range(len(prediction)), targets or (), strict=False):
        if target is None:
            continue
        if prediction.dim() < 2:
            raise ValueError(
                f"the model's output has shape {tuple(prediction.shape)}; {output_name!r} needs (batch, outputs, ...). "
                "Leave it out and give init_rel instead."
            )
        (ids, elements), size = target_ids(target), prediction.shape[1]
        if ids.shape != (size,) if ids.dtype.kind == "b" else ((ids < -size) | (ids >= size)).any():
            raise IndexError(f"row {row}: {output_name!r} is {target!r}, but the model has outputs 0 to {size - 1}")
        shape = tuple(prediction.shape[1:])
        for place in elements:
            if len(place) > len(shape) or not all(-n <= i < n for i, n in zip(place, shape, strict=False)):
                raise IndexError(
                    f"row {row}: {output_name!r} names the element {place}, but the model's output has the shape "
                    f"{shape} for each sample"
                )


def init_of_rows(init_rel: Any, places: Sequence[int], prediction: Tensor, lengths: Sequence[int]) -> Any:
    """``init_rel`` for rows at these places: a tensor with an entry for each row is cut, anything else is as it is.

    ``lengths`` are those of a tensor that is cut: the number of all rows, or that of a part, which serves every part.
    """
    if not isinstance(init_rel, Tensor) or init_rel.dim() != prediction.dim() or len(init_rel) not in lengths:
        return init_rel
    chosen = [place % len(init_rel) for place in places]
    return init_rel if chosen == list(range(len(init_rel))) else init_rel[chosen]


def initial_relevance(prediction: Tensor, target_list: Sequence[Any] | None, init_rel: Any) -> Tensor:
    """What relevance starts with; see `CondAttribution.relevance_init`."""
    given = init_rel(prediction) if callable(init_rel) and not isinstance(init_rel, Tensor) else init_rel
    if init_rel is None:
        selection = prediction
    elif isinstance(given, Tensor):
        selection = given
    elif isinstance(given, Real):
        selection = torch.full_like(prediction, float(given))
    elif callable(init_rel):
        raise TypeError(f"init_rel is a function that gives a {type(given).__name__}, not a tensor or a number")
    else:
        raise TypeError(f"init_rel must be a tensor, a number or a function, not {type(given).__name__}")
    if init_rel is not None and not torch.isfinite(selection).all():
        raise ValueError("init_rel has NaN or infinite values")
    try:
        selection = selection.to(prediction).expand_as(prediction)
    except RuntimeError:
        raise ValueError(
            f"init_rel has shape {tuple(selection.shape)}; it must broadcast to (rows, *output shape) = "
            f"{tuple(prediction.shape)}"
        ) from None
    if not target_list:
        return selection
    chosen = [target_ids(targets) for targets in target_list]
    whole = not any(elements for _, elements in chosen)
    shape = tuple(prediction.shape)
    kept = np.zeros(shape[:2] + (1,) * (len(shape) - 2) if whole else shape, dtype=bool)
    for row, (ids, elements) in enumerate(chosen):
        kept[row, ... if target_list[row] is None else ids] = True
        for place in elements:
            kept[row][place] = True
    return torch.where(torch.from_numpy(kept).to(selection.device), selection, 0)


def check_start(start: Any, prediction: Tensor) -> None:
    """Raise a `ValueError` if initial relevance has not the shape of the prediction."""
    if getattr(start, "shape", None) != prediction.shape:
        got = f"the shape {tuple(start.shape)}" if isinstance(start, Tensor) else f"the type {type(start).__name__}"
        raise ValueError(
            f"the initial relevance has {got}; it must be a tensor of (rows, *output shape) = {tuple(prediction.shape)}"
        )
