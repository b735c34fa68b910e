"""Targets: which outputs are explained, checked, and where relevance starts.

A target is a class, several, a mask of the outputs, or *places* of a dense output, of `crp.outputs`: elements (plain
tuples mean the same), pixels of a class, and tokens at a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.engine.door import _as_kind
from crp.engine.inputs import Inputs
from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.flags import is_flag
from crp.layers.devices import send_to
from crp.notices import kind_of, warn
from crp.outputs import Element as Element
from crp.outputs import Pixels as Pixels
from crp.outputs import Position as Position
from crp.values import check_form
from crp.wording import shortened

#: What to write where a model has one score for each sample, and no axis of classes.
ONE_SCORE = "with output=lambda scores: scores[:, None], a single score of each sample is class 0"


def check_target(targets: Any, what: str) -> None:
    """Raise an error that begins with ``what`` unless targets are such as conditions have."""
    if _single_class(targets) is not None:
        return
    ids, places = _target_ids(targets)
    if ids.size == 0 and not places:
        raise InputError(f"{what} is empty; name at least one output, or leave it out")
    if ids.size and ids.dtype.kind not in "iu" and (ids.dtype.kind, ids.ndim) != ("b", 1):
        raise InputTypeError(f"{what} must be an int, or a list, array or tensor of int, not {targets!r}")
    for place in places:
        _check_place(place, what)
    _check_once(places, what)


def check_targets_exist(
    targets: Sequence[Any] | None, prediction: Tensor, output_name: str, rows: Sequence[int] | None = None
) -> None:
    """Raise an `IndexError` if a row's target is not among the outputs; it names the row as the caller counts them."""
    classes = _classes_of_rows(targets) if prediction.dim() > 1 else None
    if classes is not None and -prediction.shape[1] <= min(classes) and max(classes) < prediction.shape[1]:
        return
    for row, target in zip(rows or range(len(prediction)), targets or (), strict=False):
        if target is None:
            continue
        if prediction.dim() < 2:
            raise InputError(
                f"the model's output has shape {tuple(prediction.shape)}; {output_name!r} needs (batch, outputs, ...). "
                f"Leave it out and give init_rel instead, or choose the output: {ONE_SCORE}"
            )
        (ids, places), size = _target_ids(target), prediction.shape[1]
        if ids.shape != (size,) if ids.dtype.kind == "b" else ((ids < -size) | (ids >= size)).any():
            raise OutOfRangeError(
                f"row {row}: {output_name!r} is {target!r}, but the model has outputs 0 to {size - 1}"
                + axes_told(prediction)
            )
        for place in places:
            _check_exists(place, tuple(prediction.shape[1:]), f"row {row}: {output_name!r}")
        _check_once(places, f"row {row}: {output_name!r}", tuple(prediction.shape[1:]))


def warn_of_positions(targets: Sequence[Any] | None, prediction: Tensor, inputs: Inputs) -> None:
    """Warn where a class of a text is a position: axis 1 of the output is that of the tokens, all of it is summed."""
    n_tokens = [tuple(embedded.values.shape[2:]) for embedded in inputs.embedded.values()]
    if prediction.dim() != 3 or tuple(prediction.shape[1:2]) not in n_tokens:
        return
    numbers = [one for one in targets or () if one is not None and _target_ids(one)[0].size]
    if numbers:
        warn(
            f"the target {shortened(numbers[0])} is a position of the text, as the output is of shape "
            f"{tuple(prediction.shape[1:])} for each, and all of its {prediction.shape[2]} scores are summed; "
            "crp.outputs.Position(position, token) is one of them"
        )


def axes_told(prediction: Tensor) -> str:
    """What a message adds on an output with more axes than that of classes, which a class is then summed over."""
    if prediction.dim() != 3:
        return ""
    shape = tuple(prediction.shape[1:])
    return f", the first axis of {shape} for each sample; Position({shape[0] - 1}, token) is a token at a position"


def initial_relevance(prediction: Tensor, target_list: Sequence[Any] | None, init_rel: Any) -> Tensor:
    """What relevance starts with; see `CondAttribution.relevance_init`."""
    if prediction.is_complex():
        raise InputTypeError(
            f"the model puts out complex numbers, of {prediction.dtype}, which cannot be explained; name real ones "
            "that are made of them, as in CondAttribution(model, output=torch.abs)"
        )
    selection = prediction if init_rel is None else _given_relevance(prediction, init_rel)
    try:
        selection = selection.to(prediction).expand_as(prediction)
    except RuntimeError:
        raise InputError(
            f"init_rel has shape {tuple(selection.shape)}; it must broadcast to (rows, *output shape) = "
            f"{tuple(prediction.shape)}"
        ) from None
    return _at_targets(selection, target_list) if target_list else selection


def _check_initial(init_rel: Any) -> None:
    """Raise an error where relevance can start with no such thing, whatever is predicted; functions are not called."""
    if init_rel is not None and (isinstance(init_rel, Tensor) or not callable(init_rel)):
        _given_relevance(torch.zeros((), dtype=torch.float64), init_rel)


def _given_relevance(prediction: Tensor, init_rel: Any) -> Tensor:
    """Initial relevance that a user gives: a tensor, a number, or a function that returns one of these."""
    given = init_rel(prediction) if callable(init_rel) and not isinstance(init_rel, Tensor) else init_rel
    if isinstance(given, Real) and not is_flag(given):
        number = float(given)
        if torch.finfo(prediction.dtype).max < abs(number) < inf:
            raise InputError(f"init_rel is {number}, which is too large for {prediction.dtype}")
        given = torch.full_like(prediction, number)
    if not isinstance(given, Tensor):
        if callable(init_rel):
            raise InputTypeError(f"init_rel is a function that gives {kind_of(given)}, not a tensor or a number")
        raise InputTypeError(f"init_rel must be a tensor, a number or a function, not {_as_kind(given)}")
    check_form(given, "init_rel")
    if given.is_complex():
        raise InputTypeError(f"init_rel must be real numbers, not {given.dtype}")
    if not torch.isfinite(given).all():
        raise InputError("init_rel has NaN or infinite values")
    return given


def _at_targets(selection: Tensor, target_list: Sequence[Any]) -> Tensor:
    """Selection at the targets of each row, all of a row without any, with the signs of tokens; 0 elsewhere."""
    classes, shape = _classes_of_rows(target_list), tuple(selection.shape)
    chosen: list[Any] = [(one, []) for one in classes] if classes else list(map(_target_ids, target_list))
    of_classes = not any(places for _, places in chosen)
    if not of_classes and all_positions(target_list):
        return _at_positions(selection, [places for _, places in chosen])
    signs = np.zeros(shape[:2] + (1,) * (len(shape) - 2) if of_classes else shape, np.int8)
    for row, (ids, places) in enumerate(chosen):
        signs[row, ... if target_list[row] is None else ids] = 1
        for place in places:
            for at, sign in _signed(place):
                signs[row][at] = sign
    start = torch.where(send_to(selection.device, torch.from_numpy(signs != 0)), selection, 0)
    if not of_classes and (signs < 0).any():
        start = torch.where(send_to(selection.device, torch.from_numpy(signs < 0)), -start, start)
    return start


def _at_positions(selection: Tensor, positions: Sequence[Sequence[Position]]) -> Tensor:
    """The same for tokens at positions of each row: no mask as large as the output is made."""
    start = selection.new_zeros(selection.shape)
    for row, of_row in enumerate(positions):
        for position in of_row:
            for at, sign in position.signed():
                start[row][at] = sign * selection[row][at]
    return start


def all_positions(targets: Sequence[Any] | None) -> bool:
    """Whether all targets are of tokens at positions, each of one or several."""
    each = [target if isinstance(target, list | tuple) else [target] for target in targets or ()]
    return bool(each) and all(several and all(isinstance(one, Position) for one in several) for several in each)


def init_of_rows(init_rel: Any, rows: Sequence[int], prediction: Tensor, lengths: Sequence[int]) -> Any:
    """``init_rel`` for some of all rows: a tensor with an entry for each row is cut, anything else is as it is.

    ``lengths`` are those of a tensor that is cut: the number of all rows, or that of a part, which serves every part.
    """
    if not isinstance(init_rel, Tensor) or init_rel.dim() != prediction.dim() or len(init_rel) not in lengths:
        return init_rel
    chosen = [row % len(init_rel) for row in rows]
    return init_rel if chosen == list(range(len(init_rel))) else init_rel[chosen]


def check_start(start: Any, prediction: Tensor) -> None:
    """Raise a `ValueError` if initial relevance has not the shape of the prediction."""
    if getattr(start, "shape", None) != prediction.shape:
        got = f"the shape {tuple(start.shape)}" if isinstance(start, Tensor) else f"the type {type(start).__name__}"
        raise InputError(
            f"the initial relevance has {got}; it must be a tensor of (rows, *output shape) = {tuple(prediction.shape)}"
        )


# --- classes and places ---------------------------------------------------------------------------------------------


def _target_ids(targets: Any) -> tuple[np.ndarray, list[Any]]:
    """Targets as an array of int, or of bool for a mask of the outputs, and places: tuples, `Pixels`, `Position`.

    The array is of another kind if they are neither.
    """
    places: list[Any] = []
    if isinstance(targets, Pixels | Element | Position):
        targets = [targets]
    if isinstance(targets, list | tuple):
        places = [target for target in targets if isinstance(target, tuple | Pixels | Position)]
        targets = [_as_array(target) for target in targets if not isinstance(target, tuple | Pixels | Position)]
    try:
        ids = np.asarray(_as_array(targets))
    except ValueError:  # ragged
        ids = np.asarray(None)
    return (np.zeros(0, int) if places and ids.size == 0 else ids), places


def _single_class(targets: Any) -> int | None:
    """The class, where targets are one, as an int or in a list: the usual case, which needs no array."""
    target = targets[0] if type(targets) is list and len(targets) == 1 else targets
    return target if type(target) is int and abs(target) < 1 << 31 else None


def _classes_of_rows(targets: Sequence[Any] | None) -> list[int] | None:
    """Class of each row, where every row has one."""
    classes = [one for one in map(_single_class, targets or ()) if one is not None]
    return classes if targets and len(classes) == len(targets) else None


def _as_array(ids: Any) -> Any:
    if not isinstance(ids, Tensor):
        return ids
    check_form(ids, "what targets are")
    return ids.detach().cpu().numpy()


def _mask_of(pixels: Pixels) -> np.ndarray:
    return np.asarray(_as_array(pixels.mask))


def _signed(place: Pixels | Position | tuple[int, ...]) -> list[tuple[Any, int]]:
    """Indices of a place in the output of one sample, each with its sign."""
    if isinstance(place, Position):
        return [*place.signed()]
    return [((place.of_class, _mask_of(place)) if isinstance(place, Pixels) else tuple(place), 1)]


def _check_place(place: Pixels | Position | tuple[int, ...], what: str) -> None:
    """Raise an error that begins with ``what`` unless a place is made of whole numbers, and of a mask."""
    if isinstance(place, Pixels):
        if not _is_whole(place.of_class) or _mask_of(place).dtype.kind != "b":
            told = shortened(place)
            raise InputTypeError(f"{what} must have Pixels(class, mask) with an int and a boolean mask, not {told}")
    elif isinstance(place, Position):
        place.check(what)
    elif not place or not all(map(_is_whole, place)):
        raise InputTypeError(f"{what} names the element {place!r}; it must be a tuple of int: (class, row, column)")


def _is_whole(number: object) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _check_once(places: Sequence[Any], what: str, shape: tuple[int, ...] = ()) -> None:
    """Raise a `ValueError` if a token is named twice; negative numbers count from the end of an output's shape."""
    tokens = [at for place in places if isinstance(place, Position) for at, _ in place.signed()]
    if shape:
        tokens = [(position % shape[0], token % shape[1]) for position, token in tokens]
    if len({*tokens}) < len(tokens):
        raise InputError(f"{what} names a token twice in {places}; explain it once, and against others only")


def _check_exists(place: Pixels | Position | tuple[int, ...], shape: tuple[int, ...], what: str) -> None:
    """Raise an error that begins with ``what`` unless an output of this shape for each sample has a place."""
    if isinstance(place, Pixels):
        exists = -shape[0] <= place.of_class < shape[0] and _mask_of(place).shape == shape[1:]
        named = f"names pixels of class {place.of_class} by a mask of {_mask_of(place).shape}"
    elif isinstance(place, Position):
        exists = len(shape) == 2 and all(_is_inside(at, shape) for at, _ in place.signed())
        named = f"is {place}"
    else:
        exists, named = _is_inside(place, shape), f"names the element {place}"
    if not exists:
        hint = "; it must be (positions, vocabulary), and have them" if isinstance(place, Position) else ""
        raise OutOfRangeError(f"{what} {named}, but the model's output has the shape {shape} for each sample{hint}")


def _is_inside(place: Sequence[int], shape: Sequence[int]) -> bool:
    return len(place) <= len(shape) and all(-n <= i < n for i, n in zip(place, shape, strict=False))
