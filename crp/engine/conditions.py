"""Conditions as data: checked, broadcast over the samples and grouped, before the model runs.

A condition is a dict ``{layer name: concept ids, "y": targets}``. With n samples and n conditions they are paired;
with other counts every sample meets every condition, samples first. Each (sample, condition) is a *row* of the
result. Rows are computed in a *grid* of slots x samples: the forward pass sees each sample once, and slot k holds the
k-th condition of every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.notices import warn
from crp.types import Condition, MaskFactory, MaskFn


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


def check_data(data: Tensor, name: str = "data") -> None:
    """Raise a clear error, with this name, if relevance cannot be assigned to the data.

    Raises
    ------
    TypeError
        If it is no floating-point tensor.
    ValueError
        If it is empty, or has NaN or infinite values; the message names the samples.
    """
    if not isinstance(data, Tensor) or not data.is_floating_point():
        kind = data.dtype if isinstance(data, Tensor) else type(data).__name__
        raise TypeError(f"{name} must be a floating-point tensor, which relevance can be assigned to, not {kind}")
    if data.dim() == 0 or len(data) == 0:
        raise ValueError(f"{name} has shape {tuple(data.shape)}; it needs a batch axis with at least one sample")
    if torch.isfinite(data.detach().sum()):  # (one pass; a sum that overflows says nothing)
        return
    finite = torch.isfinite(data).reshape(len(data), -1).all(1)
    if not finite.all():
        wrong = (~finite).nonzero().flatten().tolist()
        passed_on = "" if name == "data" else "; an input that is only passed on may have them, see explain="
        raise ValueError(f"{name} has NaN or infinite values in samples {wrong}{passed_on}")


def check_targets(targets: list[Any] | None, prediction: Tensor, output_name: str) -> list[Any] | None:
    """Raise an `IndexError` if a row's target is not among the outputs."""
    for row, target in enumerate(targets or ()):
        if target is None:
            continue
        if prediction.dim() < 2:
            raise ValueError(
                f"the model's output has shape {tuple(prediction.shape)}; {output_name!r} needs (batch, outputs, ...). "
                "Leave it out and give init_rel instead."
            )
        (ids, elements), size = _target_ids(target), prediction.shape[1]
        if ids.shape != (size,) if ids.dtype.kind == "b" else ((ids < -size) | (ids >= size)).any():
            raise IndexError(f"row {row}: {output_name!r} is {target!r}, but the model has outputs 0 to {size - 1}")
        shape = tuple(prediction.shape[1:])
        for place in elements:
            if len(place) > len(shape) or not all(-n <= i < n for i, n in zip(place, shape, strict=False)):
                raise IndexError(
                    f"row {row}: {output_name!r} names the element {place}, but the model's output has the shape "
                    f"{shape} for each sample"
                )
    return targets


def _check_target(targets: Any, what: str) -> None:
    ids, elements = _target_ids(targets)
    if ids.size == 0 and not elements:
        raise ValueError(f"{what} is empty; name at least one output, or leave it out")
    if ids.size and ids.dtype.kind not in "iu" and (ids.dtype.kind, ids.ndim) != ("b", 1):
        raise TypeError(f"{what} must be an int, or a list, array or tensor of int, not {targets!r}")
    for place in elements:
        if not place or not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in place):
            raise TypeError(f"{what} names the element {place!r}; it must be a tuple of int: (class, row, column)")


def _target_ids(targets: Any) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
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
    chosen = [_target_ids(targets) for targets in target_list]
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


@dataclass(frozen=True)
class Settings:
    """The arguments of an attribution that do not depend on the row."""

    record: Sequence[str]
    mask_map: MaskMap
    start: str | None
    init_rel: Any
    on_device: torch.device | str | None
    exclude_parallel: bool
    explain: Any = None
    #: Whether results keep what arrived at layers beside its product with the activation.
    multipliers: bool = True
    #: First of the rows that are computed now, how many there are in a part, and in all parts.
    begin: int = 0
    batch_size: int = 0
    n_rows: int = 0

    def part(self, number: int, batch_size: int, n_rows: int) -> Settings:
        """The same for the part of the rows that begins at ``number * batch_size``."""
        return replace(self, begin=number * batch_size, batch_size=min(batch_size, n_rows), n_rows=n_rows)

    def initial(self, prediction: Tensor) -> Any:
        """``init_rel`` for these rows.

        A tensor with a row for each of all rows is cut; one for the rows of a part serves every part.
        """
        given = self.init_rel
        if not isinstance(given, Tensor) or given.dim() != prediction.dim():
            return given
        if len(given) not in (self.n_rows, self.batch_size):
            return given
        begin = self.begin if len(given) == self.n_rows else 0
        return given[begin : begin + len(prediction)]


@dataclass(frozen=True)
class Rows:
    """Which sample and which condition each row of the result has."""

    samples: tuple[int, ...]
    conditions: tuple[Condition, ...]

    @classmethod
    def broadcast(cls, n_samples: int, conditions: Sequence[Condition]) -> Rows:
        """Pair samples with conditions where they are equally many; otherwise every sample meets every condition."""
        if n_samples == len(conditions):
            return cls(tuple(range(n_samples)), tuple(conditions))
        samples = np.repeat(np.arange(n_samples), len(conditions))
        return cls(tuple(samples.tolist()), tuple(conditions) * n_samples)

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, rows: Sequence[int]) -> Rows:
        """Some of the rows."""
        return Rows(tuple(self.samples[i] for i in rows), tuple(self.conditions[i] for i in rows))

    def distinct(self, repeat: bool) -> tuple[list[int], Rows]:
        """Samples that these rows need, and the rows in terms of them.

        Parameters
        ----------
        repeat : bool
            Whether every row gets a sample of its own.
        """
        if repeat:
            return list(self.samples), Rows(tuple(range(len(self))), self.conditions)
        samples = sorted(set(self.samples))
        place = {sample: i for i, sample in enumerate(samples)}
        return samples, Rows(tuple(place[sample] for sample in self.samples), self.conditions)

    def select(self, samples: Tensor, copy: bool = False) -> Tensor:
        """(samples, ...) to (rows, ...), detached; where that is the same, a view, unless ``copy``."""
        samples = samples.detach()
        if self.samples == tuple(range(len(samples))):
            return samples.clone() if copy else samples
        return samples.index_select(0, torch.tensor(self.samples, device=samples.device))

    def chunks(self, size: int) -> list[Rows]:
        """Consecutive parts of at most ``size`` rows."""
        starts = range(0, len(self), size)
        return [Rows(self.samples[i : i + size], self.conditions[i : i + size]) for i in starts]

    def groups(self, output_name: str) -> list[list[int]]:
        """Row numbers, grouped by the conditioned layers in their order."""
        found: dict[tuple[str, ...], list[int]] = {}
        for row, condition in enumerate(self.conditions):
            found.setdefault(tuple(name for name in condition if name != output_name), []).append(row)
        return list(found.values())

    def layers(self, output_name: str) -> list[str]:
        """Layers named by the conditions, in the order in which they are first named."""
        return list(dict.fromkeys(name for condition in self.conditions for name in condition if name != output_name))

    def targets(self, output_name: str) -> list[Any] | None:
        """Targets of each row (None where a row has none), or None if no row has any."""
        targets = [condition.get(output_name) for condition in self.conditions]
        return None if all(t is None for t in targets) else targets


class Grid:
    """Places some rows in slots x samples, and back.

    Parameters
    ----------
    samples : sequence of int
        Sample of each row.
    n_samples : int
    device : torch.device
    """

    def __init__(self, samples: Sequence[int], n_samples: int, device: torch.device) -> None:
        used = [0] * n_samples
        place = []
        for sample in samples:
            place.append(used[sample] * n_samples + sample)
            used[sample] += 1
        self.n_samples, self.n_slots = n_samples, max(used)
        self.samples, self.place = list(samples), place
        # Row i in place i needs no moving: paired samples and conditions, or one sample.
        self._identity = place == list(range(self.n_slots * n_samples))
        self._index = torch.tensor(place, device=device)

    def scatter(self, rows: Tensor) -> Tensor:
        """(rows, ...) to (slots, samples, ...); places without a row are 0."""
        if not self._identity:
            rows = rows.new_zeros(self.n_slots * self.n_samples, *rows.shape[1:]).index_copy(0, self._index, rows)
        return rows.reshape(self.n_slots, self.n_samples, *rows.shape[1:])

    def gather(self, grid: Tensor) -> Tensor:
        """(slots, samples, ...) to (rows, ...)."""
        flat = grid.flatten(0, 1)
        return flat if self._identity else flat.index_select(0, self._index)


def row_masks(rows: Mapping[int, Condition], layer: str, mask_map: MaskMap, multiplies: bool = True) -> list[MaskFn]:
    """Mask functions of one layer, each for one row of a gradient of shape (rows, ...).

    Raises
    ------
    TypeError
        If one is no function, or needs multipliers where relevance itself flows, and not what ``multiplies``.
    """
    make = mask_factory(mask_map, layer)
    masks = [make(row, condition[layer], layer) for row, condition in rows.items() if layer in condition]
    for mask in masks:
        if not callable(mask):
            raise TypeError(f"mask_map must give a function of the gradient; for layer {layer!r} it gives {mask!r}")
    if not multiplies and any(map(needs_multiplier, [make, *masks])):
        raise TypeError(
            f"the mask of layer {layer!r} needs multipliers (needs_multiplier), and the composite propagates relevance "
            "itself, as those of zennit do; use one of crp.composites"
        )
    return masks


def needs_multiplier(mask: object) -> bool:
    """Whether a mask, or what it is a method of, says that it is right for multipliers only.

    Selecting entries is right for relevance and multipliers alike; projecting on a direction is not.
    """
    owners = [mask, getattr(mask, "__self__", None)]
    if any(getattr(owner, "needs_multiplier", False) for owner in owners):
        return True
    return isinstance(mask, partial) and needs_multiplier(mask.func)


MaskMap = MaskFactory | Mapping[str, MaskFactory]


def mask_factory(mask_map: MaskMap, layer: str) -> Callable[..., MaskFn]:
    """Mask factory of one layer, or an error that says what ``mask_map`` lacks."""
    if callable(mask_map):
        return mask_map
    if not isinstance(mask_map, Mapping):
        raise ValueError(f"<mask_map> must be a dictionary or callable function, not {type(mask_map).__name__}")
    if layer not in mask_map:
        raise KeyError(f"mask_map has no entry for layer {layer!r}; it has {sorted(mask_map)}")
    if not callable(mask_map[layer]):
        raise TypeError(f"mask_map[{layer!r}] must be a function such as concept.mask, not {mask_map[layer]!r}")
    return mask_map[layer]


def _plain(ids: Any) -> Any:
    return ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids
