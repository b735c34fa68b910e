"""Masks of conditions: which functions of the gradient act at a layer, and how they are applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crp.engine.conditions import MaskMap
from crp.engine.door import is_finite
from crp.errors import InputError, InputTypeError, NameNotFoundError
from crp.types import Condition, MaskFn
from crp.wording import shortened


def row_masks(
    rows: Mapping[int, Condition], layer: str, mask_map: MaskMap, multiplies: bool = True, n_entries: int = 1
) -> list[MaskFn]:
    """Mask functions of one layer, each for one row of a gradient of shape (rows, ...), from the rows' conditions.

    Where rows have several entries each, (rows * entries, ...), every entry is masked as the condition of its row says.
    ``multiplies`` says whether a gradient or multipliers flow, and not relevance itself.

    Raises
    ------
    TypeError
        If one is no function, or needs multipliers where relevance itself flows.
    """
    make = mask_factory(mask_map, layer)
    masks = [
        make(row * n_entries + i, condition[layer], layer)
        for row, condition in rows.items()
        if layer in condition
        for i in range(n_entries)
    ]
    for mask in masks:
        if not callable(mask):
            raise InputTypeError(f"mask_map must give a function of the gradient; for {layer!r} it gives {mask!r}")
    if not multiplies and any(map(needs_multiplier, [make, *masks])):
        raise InputTypeError(
            f"the mask of layer {layer!r} needs multipliers (needs_multiplier), and the composite propagates relevance "
            "itself, as those of zennit do; use one of crp.composites"
        )
    return masks


def needs_multiplier(mask: object) -> bool:
    """Whether a mask, or what it is a method of, says that it is right for multipliers only.

    Selecting entries is right for relevance and multipliers alike; projecting on a direction is not.
    """
    owners = [mask, getattr(mask, "__self__", None)]
    needs = any(getattr(owner, "needs_multiplier", False) for owner in owners)
    return needs or (isinstance(mask, partial) and needs_multiplier(mask.func))


def _check_channels(model: nn.Module, layer: str, output: Tensor) -> None:
    """Raise an `InputError` where channels are looked for along axis 1 of a layer whose channels come last.

    They do where the last axis is as long as a bias, or another vector of the model, and axis 1 has the length of no
    side of a weight: it is an axis of tokens, or of rows. Tables are left out, as there may be a row for each token.
    """
    modules = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    shapes = [p.shape for module in modules for p in module._parameters.values() if p is not None and p.dim()]
    vectors = {shape[0] for shape in shapes if len(shape) == 1}
    # (what is learned for each position is of shape (1, positions, channels))
    sides = {side for shape in shapes if shape[0] != 1 or len(shape) > 3 for side in shape[:2]}
    if output.dim() > 2 and output.shape[-1] in vectors and output.shape[1] not in sides:
        raise InputError(
            f"layer {layer!r} puts out {(1, *output.shape[1:])}, whose channels come last, and ChannelConcept masks "
            "axis 1; give mask_map=AxisConcept(-1).mask for these, or AxisConcept(1).mask for tokens along axis 1"
        )


def mask_factory(mask_map: MaskMap, layer: str) -> Callable[..., MaskFn]:
    """Mask factory of one layer, or an error that says what ``mask_map`` lacks."""
    if isinstance(mask_map, Mapping):
        if layer not in mask_map:
            raise NameNotFoundError(f"mask_map has no entry for layer {layer!r}; it has {sorted(mask_map)}")
        if not _makes_masks(mask_map[layer]):
            given = shortened(mask_map[layer])
            raise InputTypeError(f"mask_map[{layer!r}] must be a function such as concept.mask, not {given}")
        return mask_map[layer]
    if not _makes_masks(mask_map):
        kind = mask_map.__name__ if isinstance(mask_map, type) else type(mask_map).__name__
        raise InputError(f"<mask_map> must be a dictionary or callable function, such as concept.mask, not {kind}")
    return mask_map


def _makes_masks(given: object) -> bool:
    """Whether it can be called for a mask; a concept's class would make a concept."""
    return callable(given) and not (isinstance(given, type) and hasattr(given, "mask"))


def apply_masks(functions: list[MaskFn], grad: Tensor) -> Tensor:
    """Apply mask functions in order to a copy: other branches may share ``grad``, and it may be an expanded tensor."""
    if functions:
        grad = grad.clone(memory_format=torch.contiguous_format)
    kind: Any = type(functions[0]) if functions else None
    if len(functions) > 1 and hasattr(kind, "together") and all(type(function) is kind for function in functions):
        functions = [kind.together(functions)]  # (a mask for each row would be several kernels for each row)
    for function in functions:
        # (a selection makes nothing that is not finite, and reading values would wait for the device)
        before = None if selects(function) else is_finite(grad)
        masked = function(grad)
        if not isinstance(masked, Tensor) or masked.shape != grad.shape:
            got = tuple(masked.shape) if isinstance(masked, Tensor) else type(masked).__name__
            raise InputTypeError(
                f"the mask function {function!r} must return a gradient of {tuple(grad.shape)}, not {got}"
            )
        if masked.is_complex() or masked.device != grad.device:
            raise InputTypeError(
                f"the mask function {function!r} must return real numbers on {grad.device}, not {masked.dtype} on "
                f"{masked.device}"
            )
        if before and not is_finite(masked):
            raise InputError(f"the mask function {function!r} returns NaN or infinite values")
        grad = masked
    return grad


def selects(function: object) -> bool:
    """Whether a mask function is known to do nothing but select entries."""
    return hasattr(function, "together") or getattr(function, "selects_channels", False)


@dataclass(frozen=True)
class _Selection:
    """Mask function that keeps the entries where ``kept`` is true."""

    kept: Tensor
    selects_channels: ClassVar[bool] = True

    def __call__(self, gradient: Tensor) -> Tensor:
        """Gradient, 0 where it is not kept."""
        return torch.where(self.kept, gradient, 0)


@dataclass(frozen=True)
class Given:
    """What starts and what is masked in a backward pass, as tensors.

    Attributes
    ----------
    start : Tensor of shape (rows, *output shape)
    masks : dict of str to Tensor
        What is kept at each conditioned layer, (rows, channels, 1, ...).
    shared : bool
        Whether all slots start alike.
    """

    start: Tensor
    masks: Mapping[str, Tensor]
    shared: bool

    def make_masks(self, rows: Mapping[int, Condition], layer: str, n_entries: int = 1) -> list[MaskFn]:
        """Mask function of a layer, for all rows together."""
        return [_Selection(self.masks[layer])]
