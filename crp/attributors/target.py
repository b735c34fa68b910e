"""What is explained: a score of each sample, computed from the model's output or from a layer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.concepts import as_ids
from crp.engine.forward import tensor_in
from crp.engine.targets import (
    ONE_SCORE,
    Element,
    Pixels,
    Position,
    axes_told,
    check_target,
    check_targets_exist,
    initial_relevance,
)
from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.notices import kind_of
from crp.types import MaskFn
from crp.values import check_form
from crp.wording import shortened

_PLACES = (Position, Pixels, Element)


class Target:
    """A score of each sample; subclasses say which.

    Attributes
    ----------
    layer : str or None
        Layer whose output is scored; None for the model's.
    """

    layer: str | None = None
    #: Whether it is a function of the user's, which may need all samples at once.
    joint: bool = False

    def select(self, returned: Any) -> Tensor:
        """Tensor of shape (rows, *output shape) that is scored, in what the model returns."""
        return tensor_in(returned)

    def score(self, output: Tensor) -> Tensor:
        """Score of each row.

        Parameters
        ----------
        output : Tensor of shape (rows, *output shape)

        Returns
        -------
        Tensor of shape (rows,)
        """
        raise NotImplementedError

    def weights(self, output: Tensor) -> Tensor:
        """Gradient of the score with respect to the output, of shape (rows, *output shape)."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.score(leaf).sum(), leaf)
        return gradient

    def keep(self, row: int, ids: Any, layer: str) -> MaskFn:
        """Mask, in the protocol of `crp.types.MaskFactory`, that keeps the part of `layer` that is scored."""
        raise NotImplementedError

    def check(self, n_samples: int) -> None:
        """Raise a `ValueError` if the target is given for another number of samples."""

    def rows(self, index: Tensor) -> Target:
        """Target of some of the samples, of which each may be there several times."""
        return self

    @staticmethod
    def of(value: Any) -> Target:
        """Target from what a user gives: a class, a mask or a function.

        Parameters
        ----------
        value : Target, int, Position, Pixels, Element, sequence of these, Tensor, ndarray or callable
            One class for all samples, or one for each, or what `crp.outputs` has in place of a class; a float mask in
            the output's shape, whose product with the output is summed; or a function of the output that returns one
            score per row.

        Raises
        ------
        TypeError
            If it is anything else.
        """
        if isinstance(value, Target):
            return value
        if isinstance(value, _PLACES) or (
            isinstance(value, list | tuple) and value and all(isinstance(one, _PLACES) for one in value)
        ):
            return AtPlaces([value] if isinstance(value, _PLACES) else value)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(value.copy())  # (torch takes none that is read backward)
        if isinstance(value, Tensor) and value.is_floating_point():
            return Mask(value)
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            return Mask(value.to(torch.get_default_dtype()))
        if callable(value) and not isinstance(value, Tensor):
            return Score(value)
        try:
            return Classes(value)
        except TypeError:
            raise InputTypeError(
                "target must be a class, a list or tensor of classes (one for each sample), a float mask of the "
                "output's shape, a function of the output, a Neuron, or one of crp.outputs, such as "
                f"Element((class, row, column)); not {shortened(value)}"
            ) from None


def _check_one_or_each(n: int, what: str, n_samples: int) -> None:
    if n not in (1, n_samples):
        raise InputError(f"target has {n} {what} for {n_samples} samples; give one for all, or one for each")


class Classes(Target):
    """Output of one class, or of one for each sample; over further axes of the output it is summed.

    Parameters
    ----------
    ids : int, sequence or tensor of int
        Negative ones count from the end.
    """

    def __init__(self, ids: int | Sequence[int] | Tensor) -> None:
        if isinstance(ids, Tensor | np.ndarray) and ids.ndim > 1:
            raise InputTypeError(f"classes are given as one axis, not {tuple(ids.shape)}")
        self.ids = torch.tensor(as_ids(ids), dtype=torch.int64)

    def check(self, n_samples: int) -> None:
        """Raise a `ValueError` if there is not one class, or one for each sample."""
        _check_one_or_each(len(self.ids), "classes", n_samples)

    def score(self, output: Tensor) -> Tensor:
        """Output of the class."""
        if output.dim() < 2:
            raise InputError(
                f"the model's output has shape {tuple(output.shape)}, which has no axis of classes; "
                f"{ONE_SCORE}. Or give a function of the output as target"
            )
        size = output.shape[1]
        wrong = self.ids[(self.ids < -size) | (self.ids >= size)]
        if len(wrong):
            raise OutOfRangeError(
                f"target {int(wrong[0])} is out of range: the model has outputs 0 to {size - 1}" + axes_told(output)
            )
        rows = torch.arange(len(output), device=output.device)
        return output[rows, self.ids.to(output.device)].reshape(len(output), -1).sum(1)

    def rows(self, index: Tensor) -> Target:
        """Classes of some samples."""
        return self if len(self.ids) == 1 else Classes(self.ids[index.cpu()])


class AtPlaces(Target):
    """Places in a dense output: tokens at a position of a text, less others; pixels of a class; one element.

    Parameters
    ----------
    places : sequence of Position, Pixels or Element
        One for all samples, or one for each.
    """

    def __init__(self, places: Sequence[Position | Pixels | Element]) -> None:
        for place in places:
            check_target(place, "target")
        self.places = list(places)

    def check(self, n_samples: int) -> None:
        """Raise a `ValueError` if there is not one place, or one for each sample."""
        _check_one_or_each(len(self.places), "places", n_samples)

    def score(self, output: Tensor) -> Tensor:
        """Sum of the output there, with the signs of tokens."""
        return (self.weights(output) * output).flatten(1).sum(1)

    def weights(self, output: Tensor) -> Tensor:
        """1 at what is explained, -1 at the tokens that others are explained against."""
        targets = self.places * (len(output) if len(self.places) == 1 else 1)
        check_targets_exist(targets, output, "target")
        return initial_relevance(torch.ones_like(output), targets, None)

    def rows(self, index: Tensor) -> Target:
        """Places of some samples."""
        return self if len(self.places) == 1 else AtPlaces([self.places[i] for i in index.tolist()])


class Mask(Target):
    """Weighted sum of the outputs, such as a probability distribution over them.

    Parameters
    ----------
    mask : Tensor of shape (samples or 1, *output shape), or (outputs,)
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dim() == 0:
            raise InputTypeError("a mask of the outputs has their shape, not ()")
        check_form(mask, "the target, a mask of the outputs,")
        if not torch.isfinite(mask).all():
            raise InputError("the target, a mask of the outputs, has NaN or infinite values")
        self.mask = mask.detach()[None] if mask.dim() == 1 else mask.detach()

    def check(self, n_samples: int) -> None:
        """Raise a `ValueError` if there is not one mask, or one for each sample."""
        if len(self.mask) not in (1, n_samples):
            raise InputError(
                f"the target, a mask of shape {tuple(self.mask.shape)}, is for {len(self.mask)} samples; there are "
                f"{n_samples}. Give it the output's shape, or a first axis of 1"
            )

    def score(self, output: Tensor) -> Tensor:
        """Sum of the product of mask and output."""
        return (self.weights(output) * output).flatten(1).sum(1)

    def weights(self, output: Tensor) -> Tensor:
        """Return the mask."""
        mask = self.mask.to(output)
        if mask.shape[1:] != output.shape[1:]:
            raise InputError(
                f"the target, a mask of shape {tuple(mask.shape)}, does not fit the output of shape "
                f"{tuple(output.shape)}; all axes but the first must agree"
            )
        return mask.expand(output.shape)

    def rows(self, index: Tensor) -> Target:
        """Masks of some samples."""
        return self if len(self.mask) == 1 else Mask(self.mask[index.to(self.mask.device)])


class Score(Target):
    """Any differentiable function of the output.

    Parameters
    ----------
    function : callable
        From (rows, *output shape) to (rows,).
    """

    joint = True

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def score(self, output: Tensor) -> Tensor:
        """Value of the function."""
        scores = self.function(output)
        if not isinstance(scores, Tensor) or scores.shape != output.shape[:1]:
            raise InputError(
                f"the target, a function, returned {kind_of(scores)} for an output of {tuple(output.shape)}; it must "
                f"return one score for each row, ({len(output)},); with batch_size, rows are some of the samples"
            )
        return scores


class Neuron(Target):
    """A unit inside the model.

    Parameters
    ----------
    layer : str
        Name of a layer; ``"name#1"`` is its second call.
    index : int or tuple of int
        Place in the layer's output, without the batch axis. A shorter index, such as a channel, means all places in it.

    Examples
    --------
    >>> Neuron("features.3", (2, 0, 0)).index
    (2, 0, 0)
    """

    def __init__(self, layer: str, index: int | tuple[int, ...]) -> None:
        if not isinstance(layer, str) or not layer:
            raise InputTypeError(f"layer must be the name of the layer that the neuron is in, not {layer!r}")
        self.layer = layer
        self.index = tuple(as_ids(index, layer))
        if not self.index:
            raise InputError(f"layer {layer!r}: the neuron has no index; give at least one")

    def score(self, output: Tensor) -> Tensor:
        """Output of the neuron, summed over axes that the index does not name."""
        return output[self._place(output)].reshape(len(output), -1).sum(1)

    def keep(self, row: int, ids: Any, layer: str) -> MaskFn:
        """Mask that keeps the neuron alone."""

        def mask(grad: Tensor) -> Tensor:
            place = (row, *self._place(grad)[1:])
            kept = grad[place].clone()
            grad[row] = 0
            grad[place] = kept
            return grad

        return mask

    def _place(self, output: Tensor) -> tuple[Any, ...]:
        shape = output.shape[1:]
        if len(self.index) > len(shape) or any(
            not -size <= i < size for i, size in zip(self.index, shape, strict=False)
        ):
            raise OutOfRangeError(
                f"neuron {self.index} is not in layer {self.layer!r}, whose output has shape {tuple(shape)} "
                "for each sample"
            )
        return (slice(None), *self.index)


class Start(Target):
    """Initial relevance as zennit's attributors take it: a tensor, or a function of the output that returns one.

    Parameters
    ----------
    attr_output : Tensor or callable
        In the output's shape. Where scores are needed, this is the sum of its product with the output for a tensor, and
        the sum of what it returns for a function.
    """

    def __init__(self, attr_output: Tensor | Callable[[Tensor], Tensor]) -> None:
        self.attr_output = attr_output
        self.joint = not isinstance(attr_output, Tensor)

    def score(self, output: Tensor) -> Tensor:
        """Sum of output times tensor, or sum of what the function returns."""
        given = self.weights(output)
        return (given * output if isinstance(self.attr_output, Tensor) else given).flatten(1).sum(1)

    def weights(self, output: Tensor) -> Tensor:
        """Return the initial relevance."""
        given = self.attr_output
        factors = given.to(output) if isinstance(given, Tensor) else given(output)
        try:
            return factors.expand_as(output)
        except (AttributeError, RuntimeError):
            raise InputError(
                f"attr_output gives {kind_of(factors)} for an output of {tuple(output.shape)}; these must agree"
            ) from None

    def rows(self, index: Tensor) -> Target:
        """Initial relevance of some samples."""
        given = self.attr_output
        if not isinstance(given, Tensor) or given.dim() < 2 or len(given) == 1:
            return self
        return Start(given[index.to(given.device)])

    def check(self, n_samples: int) -> None:
        """Raise a `ValueError` if a tensor is for another number of samples."""
        given = self.attr_output
        if isinstance(given, Tensor) and given.dim() > 1 and len(given) not in (1, n_samples):
            raise InputError(f"attr_output of shape {tuple(given.shape)} is for other than the {n_samples} samples")
