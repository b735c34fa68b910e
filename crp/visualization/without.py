"""What a model predicts where a part of a layer's output is switched off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crp.attribution import CondAttribution
from crp.engine.attached import put_on
from crp.engine.masks import apply_masks
from crp.engine.taps import changed_at
from crp.engine.tokens import scored_at

#: Functions of a layer's multipliers, each of which keeps in one row what is to be switched off.
_Masks = Sequence[Callable[[Tensor], Tensor]]


class _NoRowsError(Exception):
    """The first axis of a layer's output is not that of the rows."""


def kept_part(masks: _Masks, activation: Tensor) -> Tensor:
    """Part of an activation that belongs to what masks keep: channels themselves, or ``(e·a) d`` of a direction.

    It is what the masks do to multipliers, which become ``(d·m) e``, the other way round: for every multiplier, the
    product with it is what the masks let through.
    """
    with torch.enable_grad():
        multiplier = torch.zeros_like(activation).requires_grad_()
        (part,) = torch.autograd.grad(apply_masks(list(masks), multiplier), multiplier, activation.detach())
    return part


@torch.no_grad()
def predict_without(
    attribution: CondAttribution,
    data: Any,
    layer: str,
    masks: _Masks,
    positions: Sequence[int] | None = None,
    *,
    scale: float = 0.0,
) -> Any:
    """Prediction of each row where a layer's output lacks what the row's mask keeps, in evaluation mode.

    Parameters
    ----------
    attribution : CondAttribution
    data : Tensor of shape (rows, *input shape), or dict of them
        One sample stands for all rows. What is below the layer is then computed once, where the model allows it.
    layer : str
    masks : sequence of callable
        One for each row, in which it changes nothing but its own.
    positions : sequence of int, optional
        Of a language model, the only position of each row whose scores are wanted.
    scale : float
        What a mask keeps is multiplied by this, in place of being left out.

    Returns
    -------
    Tensor of shape (rows, *output shape), or (rows, vocabulary) at positions; or None
        None for a layer that is not called, or several times unless its name says which call is meant; and for one
        whose output has not one entry for each row.
    """
    fields = list(data.values()) if isinstance(data, Mapping) else [data]
    with put_on(None, attribution.model):
        if len(masks) > 1 and all(isinstance(field, Tensor) and len(field) == 1 for field in fields):
            found = _shared(attribution, data, layer, masks, positions, scale)
            if found is not None:
                return found
            data = _copies(data, len(masks))
        try:
            return _at(_predict(attribution, data, layer, masks, scale), positions)
        except _NoRowsError:
            return None


def _at(prediction: Any, positions: Sequence[int] | None) -> Any:
    """Scores of each row at its position; all of them where there are none."""
    if positions is None or not isinstance(prediction, Tensor) or prediction.dim() != 3:
        return prediction
    return prediction[list(range(len(prediction))), list(positions)]


def _shared(
    attribution: CondAttribution, data: Any, layer: str, masks: _Masks, positions: Sequence[int] | None, scale: float
) -> Tensor | None:
    """Prediction of all rows of one sample, which part at the layer; None where a model cannot take that.

    A model may have counted its rows below the layer, and then fail, or mix them up: so the first row is computed alone
    as well, with scores of all positions, and must be the same.
    """
    try:
        own = type(attribution).select_output is not CondAttribution.select_output or attribution.output is not None
        if positions is None or own:
            found = _at(_predict(attribution, data, layer, masks, scale), positions)
        else:
            with scored_at(attribution.model, positions) as done:
                found = _predict(attribution, data, layer, masks, scale)
            found = _at(found, [0] * len(masks) if done else positions)
    except Exception:  # (whatever a model raises; its rows then part at its input, where a true error is raised again)
        return None
    if not isinstance(found, Tensor) or found.shape[:1] != (len(masks),) or not found.is_floating_point():
        return None
    alone = _at(_predict(attribution, data, layer, masks[:1], scale), positions and positions[:1])
    close = torch.finfo(found.dtype).eps ** 0.5
    if found.shape[1:] != alone.shape[1:]:
        return None
    same = torch.allclose(found[:1], alone, rtol=close, atol=close * float(alone.abs().max()))
    return found if same else None


def _predict(attribution: CondAttribution, data: Any, layer: str, masks: _Masks, scale: float) -> Any:
    def change(output: Tensor) -> Tensor:
        if output.dim() and len(output) == 1 < len(masks):
            output = output.expand(len(masks), *output.shape[1:])
        if not output.dim() or len(output) != len(masks):
            raise _NoRowsError
        return output - (1 - scale) * kept_part(masks, output)

    model = attribution.model
    with changed_at(model, layer, change) as calls:
        prediction = attribution.select_output(model(**data) if isinstance(data, Mapping) else model(data))
    return prediction if sum(calls) == 1 else None


def _copies(data: Any, n: int) -> Any:
    """One sample so many times."""
    if isinstance(data, Mapping):
        return {name: _copies(field, n) for name, field in data.items()}
    return data.expand(n, *data.shape[1:]).clone(memory_format=torch.contiguous_format)
