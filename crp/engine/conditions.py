"""Conditions and their targets, checked before the model runs.

A condition is a dict ``{layer name: concept ids, "y": targets}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from crp.notices import warn
from crp.types import Condition


def check_conditions(
    conditions: Sequence[Condition], output_name: str, start_layer: str | None = None, has_init: bool = False
) -> list[Condition]:
    """Conditions as a list, or an error that names the one that is wrong.

    Parameters
    ----------
    conditions : sequence of mappings
    output_name : str
        Key of the targets, ``"y"`` by default.
    start_layer : str, optional
        Where the backward pass begins instead of the output.
    has_init : bool
        Whether an initial relevance is given.

    Raises
    ------
    TypeError
        If ``conditions`` is no sequence of mappings of strings, or targets are no integers.
    ValueError
        If it is empty, a target list is empty, or nothing says where relevance starts.
    """
    if isinstance(conditions, Mapping) or not isinstance(conditions, Sequence):
        raise TypeError(f"conditions must be a list of dicts, not {type(conditions).__name__}; put the dict in a list")
    if not conditions:
        raise ValueError(f"conditions is empty; give at least one, such as [{{{output_name!r}: [0]}}]")
    for i, condition in enumerate(conditions):
        if not isinstance(condition, Mapping):
            raise TypeError(f"conditions[{i}] must be a dict, not {type(condition).__name__}: {condition!r}")
        for layer in condition:
            if not isinstance(layer, str):
                raise TypeError(f"conditions[{i}]: layers are named by strings, not {layer!r}")
        targets = condition.get(output_name)
        if targets is not None:
            _check_target(targets, f"conditions[{i}][{output_name!r}]")
        if targets is None and start_layer is None and not has_init:
            raise ValueError(
                f"Either {output_name} in 'conditions' or 'start_layer' or 'init_rel' must be defined; "
                f"conditions[{i}] is {dict(condition)!r}"
            )
    if start_layer is not None and any(output_name in condition for condition in conditions):
        warn(f"{output_name!r} has no effect in conditions: the backward pass begins at start_layer {start_layer!r}")
    return list(conditions)


def _check_target(targets: Any, what: str) -> None:
    ids, elements = target_ids(targets)
    if ids.size == 0 and not elements:
        raise ValueError(f"{what} is empty; name at least one output, or leave it out")
    if ids.size and ids.dtype.kind not in "iu" and (ids.dtype.kind, ids.ndim) != ("b", 1):
        raise TypeError(f"{what} must be an int, or a list, array or tensor of int, not {targets!r}")
    for place in elements:
        if not place or not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in place):
            raise TypeError(f"{what} names the element {place!r}; it must be a tuple of int: (class, row, column)")


def target_ids(targets: Any) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    """Targets as an array of int, or of bool for a mask of the outputs, and elements: the tuples in a list of targets.

    The array is of another kind if they are neither.
    """
    elements: list[tuple[Any, ...]] = []
    if isinstance(targets, list | tuple):
        elements = [target for target in targets if isinstance(target, tuple)]
        targets = [_plain(target) for target in targets if not isinstance(target, tuple)]
    try:
        ids = np.asarray(_plain(targets))
    except ValueError:  # ragged
        ids = np.asarray(None)
    return (np.zeros(0, int) if elements and ids.size == 0 else ids), elements


def _plain(ids: Any) -> Any:
    return ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids
