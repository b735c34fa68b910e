"""Conditions as data: checked, paired with samples, and turned into initial relevance and masks.

A condition is a dict ``{layer name: concept ids, "y": targets}``. With n samples and n conditions they are paired; with
other counts every sample meets every condition, samples first. Each (sample, condition) is a *row* of the result. Rows
are computed in a *grid* of slots x samples: the forward pass sees each sample once, and slot k holds the k-th condition
of every sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.flags import is_flag
from crp.layers.devices import send_to
from crp.notices import warn
from crp.outputs import Element as Element
from crp.outputs import Pixels as Pixels
from crp.outputs import Position as Position
from crp.types import Condition, MaskFactory

MaskMap = MaskFactory | Mapping[str, MaskFactory]


def check_conditions(
    conditions: Sequence[Condition], output_name: str, start_layer: str | None = None, has_init: bool = False
) -> list[Condition]:
    """Conditions as a list, or an error that names the one that is wrong.

    ``output_name`` is the key of the targets. Where neither a start layer nor an initial relevance is given, every
    condition must say where relevance starts.
    """
    if isinstance(conditions, Mapping) or not isinstance(conditions, Sequence):
        raise InputTypeError(
            f"conditions must be a list of dicts, not {type(conditions).__name__}; put the dict in a list"
        )
    if not conditions:
        raise InputError(f"conditions is empty; give at least one, such as [{{{output_name!r}: [0]}}]")
    for i, condition in enumerate(conditions):
        if not isinstance(condition, Mapping):
            raise InputTypeError(f"conditions[{i}] must be a dict, not {type(condition).__name__}: {condition!r}")
        for layer in condition:
            if not isinstance(layer, str):
                raise InputTypeError(f"conditions[{i}]: layers are named by strings, not {layer!r}")
        targets = condition.get(output_name)
        if targets is not None:
            check_target(targets, f"conditions[{i}][{output_name!r}]")
        if targets is None and start_layer is None and not has_init:
            alike = [f"; {name!r} is not {output_name!r}" for name in condition if name.lower() == output_name.lower()]
            raise InputError(
                f"Either {output_name} in 'conditions' or 'start_layer' or 'init_rel' must be defined; "
                f"conditions[{i}] is {dict(condition)!r}{''.join(alike) if output_name not in condition else ''}"
            )
    if start_layer is not None and any(output_name in condition for condition in conditions):
        warn(f"{output_name!r} has no effect in conditions: the backward pass begins at start_layer {start_layer!r}")
    return list(conditions)


def check_target(targets: Any, what: str) -> None:
    """Raise an error that begins with ``what`` unless targets are such as conditions have."""
    if _single_class(targets) is not None:
        return
    ids, elements = _target_ids(targets)
    if ids.size == 0 and not elements:
        raise InputError(f"{what} is empty; name at least one output, or leave it out")
    if ids.size and ids.dtype.kind not in "iu" and (ids.dtype.kind, ids.ndim) != ("b", 1):
        raise InputTypeError(f"{what} must be an int, or a list, array or tensor of int, not {targets!r}")
    for place in elements:
        if isinstance(place, Pixels):
            if not _is_whole(place.of_class) or _mask_of(place).dtype.kind != "b":
                raise InputTypeError(
                    f"{what} must have Pixels(class, mask) with an int and a boolean mask, not {place!r}"
                )
        elif isinstance(place, Position):
            place.check(what)
        elif not place or not all(map(_is_whole, place)):
            raise InputTypeError(f"{what} names the element {place!r}; it must be a tuple of int: (class, row, column)")
    _check_once(elements, what)


def _is_whole(number: object) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _check_once(elements: Sequence[Any], what: str, shape: tuple[int, ...] = ()) -> None:
    """Raise a `ValueError` if a token is named twice; negative numbers count from the end of an output's shape."""
    places = [at for element in elements if isinstance(element, Position) for at, _ in element.signed()]
    if shape:
        places = [(position % shape[0], token % shape[1]) for position, token in places]
    if len({*places}) < len(places):
        raise InputError(f"{what} names a token twice in {elements}; explain it once, and against others only")


def _mask_of(pixels: Pixels) -> np.ndarray:
    return np.asarray(_plain(pixels.mask))


def _target_ids(targets: Any) -> tuple[np.ndarray, list[Any]]:
    """Targets as an array of int, or of bool for a mask of the outputs, and elements: tuples, `Pixels`, `Position`.

    The array is of another kind if they are neither.
    """
    elements: list[Any] = []
    if isinstance(targets, Pixels | Element | Position):
        targets = [targets]
    if isinstance(targets, list | tuple):
        elements = [target for target in targets if isinstance(target, tuple | Pixels | Position)]
        targets = [_plain(target) for target in targets if not isinstance(target, tuple | Pixels | Position)]
    try:
        ids = np.asarray(_plain(targets))
    except ValueError:  # ragged
        ids = np.asarray(None)
    return (np.zeros(0, int) if elements and ids.size == 0 else ids), elements


def _single_class(targets: Any) -> int | None:
    """The class, where targets are one, as an int or in a list: the usual case, which needs no array."""
    target = targets[0] if type(targets) is list and len(targets) == 1 else targets
    return target if type(target) is int and abs(target) < 1 << 31 else None


def _classes_of_rows(targets: Sequence[Any] | None) -> np.ndarray | None:
    """Class of each row, where every row has one."""
    classes = [] if targets is None else list(map(_single_class, targets))
    return None if not classes or None in classes else np.array(classes)


def _plain(ids: Any) -> Any:
    return ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids


@dataclass(frozen=True)
class Rows:
    """Some rows of a result. Parts of them keep their samples and places: nothing is numbered anew.

    Attributes
    ----------
    samples : tuple of int
        Sample of each row, as the caller numbers them.
    conditions : tuple of mapping
        Condition of each row.
    places : tuple of int
        Place of each row among all rows, in the caller's order.
    """

    samples: tuple[int, ...]
    conditions: tuple[Condition, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, samples: Sequence[int], conditions: Sequence[Condition]) -> Rows:
        """All rows, in this order."""
        return cls(tuple(samples), tuple(conditions), tuple(range(len(samples))))

    @classmethod
    def broadcast(cls, n_samples: int, conditions: Sequence[Condition]) -> Rows:
        """Pair samples with conditions where they are equally many; otherwise every sample meets every condition."""
        if n_samples == len(conditions):
            return cls.of(range(n_samples), conditions)
        return cls.of([sample for sample in range(n_samples) for _ in conditions], list(conditions) * n_samples)

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, rows: Sequence[int]) -> Rows:
        """Some of these rows."""
        samples, places = (tuple(numbers[i] for i in rows) for numbers in (self.samples, self.places))
        return Rows(samples, tuple(self.conditions[i] for i in rows), places)

    def chunks(self, size: int) -> list[Rows]:
        """Consecutive parts of at most ``size`` rows."""
        if size >= len(self):
            return [self]
        return [self.part(range(i, min(i + size, len(self)))) for i in range(0, len(self), size)]

    def one_by_one(self, every_row: bool) -> list[Rows]:
        """The rows of each sample, or every row by itself."""
        if every_row:
            return self.chunks(1)
        rows_of: dict[int, list[int]] = {}
        for row, sample in enumerate(self.samples):
            rows_of.setdefault(sample, []).append(row)
        return [self.part(rows) for rows in rows_of.values()]

    def groups(self, output_name: str) -> list[list[int]]:
        """Which of these rows have the same conditioned layers in the same order."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, condition in enumerate(self.conditions):
            groups.setdefault(tuple(name for name in condition if name != output_name), []).append(row)
        return list(groups.values())

    def layers(self, output_name: str) -> list[str]:
        """Layers named by the conditions, in the order in which they are first named."""
        return list(dict.fromkeys(name for condition in self.conditions for name in condition if name != output_name))

    def targets(self, output_name: str) -> list[Any] | None:
        """Targets of each row (None where a row has none), or None if no row has any."""
        targets = [condition.get(output_name) for condition in self.conditions]
        return None if all(t is None for t in targets) else targets


class Grid:
    """Puts the values of rows, each with its column, into slots x columns of a forward pass; takes them out again."""

    def __init__(self, columns: Sequence[int], n_columns: int, device: torch.device) -> None:
        used = [0] * n_columns
        place = []
        for column in columns:
            place.append(used[column] * n_columns + column)
            used[column] += 1
        self.n_columns, self.n_slots = n_columns, max(used)
        # Row i in place i needs no moving: paired samples and conditions, or one sample.
        is_identity = place == list(range(self.n_slots * n_columns))
        self.places = place
        self._index = None if is_identity else send_to(device, torch.tensor(place))

    def scatter(self, rows: Tensor) -> Tensor:
        """(rows, ...) to (slots, columns, ...); places without a row are 0.

        With a single column, each row may have several entries: (rows * entries, ...) to (slots, entries, ...).
        """
        if self._index is not None:
            rows = rows.new_zeros(self.n_slots * self.n_columns, *rows.shape[1:]).index_copy(0, self._index, rows)
        return rows.reshape(self.n_slots, len(rows) // self.n_slots, *rows.shape[1:])

    def gather(self, grid: Tensor) -> Tensor:
        """(slots, columns, ...) to (rows, ...), or (slots, entries, ...) to (rows * entries, ...).

        Slots that share their values, (1, columns, ...), are repeated.
        """
        flat = grid.expand(self.n_slots, *grid.shape[1:]).flatten(0, 1)
        return flat if self._index is None else flat.index_select(0, self._index)


def row_index(rows: Sequence[int], n_entries: int) -> list[int]:
    """Entries of rows along the first axis of a layer that has several for each row."""
    return [row * n_entries + i for row in rows for i in range(n_entries)]


def check_targets_exist(
    targets: Sequence[Any] | None, prediction: Tensor, output_name: str, places: Sequence[int] | None = None
) -> None:
    """Raise an `IndexError` if a row's target is not among the outputs; it names the place in the caller's order."""
    classes = _classes_of_rows(targets) if prediction.dim() > 1 else None
    if classes is not None and classes.min() >= -prediction.shape[1] and classes.max() < prediction.shape[1]:
        return
    for row, target in zip(places or range(len(prediction)), targets or (), strict=False):
        if target is None:
            continue
        if prediction.dim() < 2:
            raise InputError(
                f"the model's output has shape {tuple(prediction.shape)}; {output_name!r} needs (batch, outputs, ...). "
                "Leave it out and give init_rel instead."
            )
        (ids, elements), size = _target_ids(target), prediction.shape[1]
        if ids.shape != (size,) if ids.dtype.kind == "b" else ((ids < -size) | (ids >= size)).any():
            raise OutOfRangeError(
                f"row {row}: {output_name!r} is {target!r}, but the model has outputs 0 to {size - 1}"
            )
        shape = tuple(prediction.shape[1:])
        for place in elements:
            if isinstance(place, Pixels):
                given = _mask_of(place).shape
                if not -size <= place.of_class < size or given != shape[1:]:
                    raise OutOfRangeError(
                        f"row {row}: {output_name!r} names pixels of class {place.of_class} by a mask of {given}, but "
                        f"the model's output has the shape {shape} for each sample"
                    )
            elif isinstance(place, Position):
                if len(shape) != 2 or not all(
                    -n <= i < n for at, _ in place.signed() for i, n in zip(at, shape, strict=True)
                ):
                    raise OutOfRangeError(
                        f"row {row}: {output_name!r} is {place}, but the model's output has the shape {shape} for each "
                        "sample; it must be (positions, vocabulary), and have them"
                    )
            elif len(place) > len(shape) or not all(-n <= i < n for i, n in zip(place, shape, strict=False)):
                raise OutOfRangeError(
                    f"row {row}: {output_name!r} names the element {place}, but the model's output has the shape "
                    f"{shape} for each sample"
                )
        _check_once(elements, f"row {row}: {output_name!r}", shape)


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
    elif isinstance(given, Real) and not is_flag(given):
        selection = torch.full_like(prediction, float(given))
    elif callable(init_rel):
        raise InputTypeError(f"init_rel is a function that gives a {type(given).__name__}, not a tensor or a number")
    else:
        raise InputTypeError(f"init_rel must be a tensor, a number or a function, not {type(given).__name__}")
    if selection.is_complex():
        raise InputTypeError(f"init_rel must be real numbers, not {selection.dtype}")
    if init_rel is not None and not torch.isfinite(selection).all():
        raise InputError("init_rel has NaN or infinite values")
    try:
        selection = selection.to(prediction).expand_as(prediction)
    except RuntimeError:
        raise InputError(
            f"init_rel has shape {tuple(selection.shape)}; it must broadcast to (rows, *output shape) = "
            f"{tuple(prediction.shape)}"
        ) from None
    if not target_list:
        return selection
    classes = _classes_of_rows(target_list)
    chosen = [_target_ids(targets) for targets in target_list] if classes is None else []
    if all_positions(target_list):
        return _at_positions(selection, [elements for _, elements in chosen])
    whole = not any(elements for _, elements in chosen)
    shape = tuple(prediction.shape)
    kept = np.zeros(shape[:2] + (1,) * (len(shape) - 2) if whole else shape, dtype=bool)
    if classes is not None:
        kept[np.arange(len(classes)), classes] = True
    signs: dict[tuple[int, int, int], int] = {}
    for row, (ids, elements) in enumerate(chosen):
        kept[row, ... if target_list[row] is None else ids] = True
        for place in elements:
            if isinstance(place, Pixels):
                kept[row, place.of_class] |= _mask_of(place)
            elif isinstance(place, Position):
                for at, sign in place.signed():
                    kept[row][at] = True
                    signs[row, at[0] % shape[1], at[1] % shape[2]] = sign
            else:
                kept[row][tuple(place)] = True
    start = torch.where(send_to(selection.device, torch.from_numpy(kept)), selection, 0)
    for place, sign in signs.items():
        if sign < 0:
            start[place] = -start[place]
    return start


def all_positions(targets: Sequence[Any] | None) -> bool:
    """Whether all targets are of tokens at positions, each of one or several."""
    each = [target if isinstance(target, list | tuple) else [target] for target in targets or ()]
    return bool(each) and all(several and all(isinstance(one, Position) for one in several) for several in each)


def _at_positions(selection: Tensor, positions: Sequence[Sequence[Position]]) -> Tensor:
    """Selection at positions of each row, with their signs, and 0 elsewhere: no mask as large as the output is made."""
    start = selection.new_zeros(selection.shape)
    for row, of_row in enumerate(positions):
        for position in of_row:
            for at, sign in position.signed():
                start[row][at] = sign * selection[row][at]
    return start


def check_start(start: Any, prediction: Tensor) -> None:
    """Raise a `ValueError` if initial relevance has not the shape of the prediction."""
    if getattr(start, "shape", None) != prediction.shape:
        got = f"the shape {tuple(start.shape)}" if isinstance(start, Tensor) else f"the type {type(start).__name__}"
        raise InputError(
            f"the initial relevance has {got}; it must be a tensor of (rows, *output shape) = {tuple(prediction.shape)}"
        )
