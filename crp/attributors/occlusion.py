"""Occlusion: how the score falls when a window of the input is covered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.attributors.base import ROWS_FORWARD, Attributor
from crp.attributors.baselines import Baseline, single_baselines
from crp.attributors.target import Target
from crp.checks import check_number
from crp.engine.inputs import Inputs, Tensors
from crp.errors import InputError
from crp.flags import check_flags
from crp.notices import warn

_Lengths: TypeAlias = int | tuple[int, ...]


class Occlusion(Attributor):
    r"""Occlusion, :math:`f(x) - f(x_{\text{window covered}})`, averaged over the windows that cover a feature.

    Zeiler and Fergus, "Visualizing and understanding convolutional networks" (ECCV 2014), section 4.2, as a difference
    of scores, as in DeepExplain and captum. (zennit's `Occlusion` gives scores of the covered input.) Windows lie
    wholly inside the input, at every ``step``; features that none covers get 0, and a warning says how many. A
    composite has no effect on the result, as no gradient is used.

    Parameters
    ----------
    model, composite, attr_output, batch_size
        As in `Attributor`; a call covers 64 windows in one pass through the model by default.
    window_shape : int, tuple of int, or None
        Lengths of the window along the last axes of the input; axes that come before these are covered whole. A number
        is for every axis after the channels, (n, n) for images. None is one feature alone, as in DeepExplain. A list
        holds one for each of several inputs.
    step : int or tuple of int
        Distance between windows, along the same axes. A list holds one for each of several inputs.
    baseline : number, Tensor, callable or None
        What covers, as in `IntegratedGradients`, but one for each sample. None is 0.
    per_feature : bool
        Whether the difference is shared equally among the features of the window, as DeepExplain does.

    Raises
    ------
    ValueError, TypeError
        Before the model runs, if windows are larger than the input, or have more axes, or a baseline does not fit.

    Examples
    --------
    >>> net = nn.Linear(3, 1, bias=False).eval()
    >>> x = torch.ones(1, 3)
    >>> torch.allclose(Occlusion(net)(x, 0)[1], net.weight)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Any = None,
        *,
        window_shape: _Lengths | list[Any] | None = None,
        step: _Lengths | list[Any] = 1,
        baseline: Baseline = None,
        per_feature: bool = False,
        batch_size: int | None = None,
    ) -> None:
        check_flags(per_feature=per_feature)
        super().__init__(model, composite, attr_output, batch_size=batch_size)
        self.window_shape, self.step, self.baseline, self.per_feature = window_shape, step, baseline, per_feature

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output and differences of scores."""
        covers = single_baselines(self.baseline, inputs, self.model)
        explained = inputs.explained
        shapes, steps = _for_each(self.window_shape, explained), _for_each(self.step, explained)
        places = [windows(data.shape[1:], *given) for data, *given in zip(explained, shapes, steps, strict=True)]
        # (a long sum in half precision would stop growing, and a count of windows at 256)
        totals = [torch.zeros_like(data, dtype=torch.float64).flatten(1) for data in explained]
        with self.scoring(target) as score:
            whole = torch.cat([score(*part) for part in self.parts(inputs, target)])
            whole = whole.to(explained[0].device, torch.float64)
            for number, (data, cover) in enumerate(zip(explained, covers, strict=True)):
                starts, offsets = (part.to(data.device) for part in places[number])
                cover = cover.flatten(1)
                for sample, window in self.rows(len(data), len(starts), target, ROWS_FORWARD):
                    sample = sample.to(data.device)
                    place = starts[window.to(data.device)][:, None] + offsets  # (rows, features of the window)
                    seen = [other[sample.to(other.device)] for other in explained]
                    covered = seen[number].flatten(1).scatter(1, place, cover[sample].gather(1, place))
                    seen[number] = covered.view_as(seen[number])
                    rows = inputs.having(seen, sample)
                    fall = whole[sample] - score(rows, target.rows(sample)).to(whole)
                    index = sample[:, None].expand_as(place), place
                    totals[number].index_put_(index, fall[:, None].expand_as(place), accumulate=True)
        counts = [_cover_count(data[0], *part) for data, part in zip(explained, places, strict=True)]
        _tell_uncovered(counts)
        results = []
        for data, total, count, (_, offsets) in zip(explained, totals, counts, places, strict=True):
            shared = count * len(offsets) if self.per_feature else count
            results.append(torch.where(count > 0, total / shared, 0).view_as(data).to(data.dtype))
        return self.output(inputs, target.select), tuple(results)


def windows(shape: Sequence[int], window: _Lengths | None = None, step: _Lengths = 1) -> tuple[Tensor, Tensor]:
    """Windows that lie wholly in an input of this shape, without the batch axis.

    Returns
    -------
    starts : Tensor of shape (windows,)
        First feature of each window, counted in the flattened input.
    offsets : Tensor of shape (features of a window,)
        What to add to the first feature for each feature of the window.

    Raises
    ------
    ValueError
        If the window is larger than the input, has more axes, or a length is not positive.

    Examples
    --------
    >>> windows((2, 5), (2,), 3)
    (tensor([0, 3]), tensor([0, 1, 5, 6]))
    """
    n_axes = len(shape) if window is None else max(1, len(shape) - 1)  # (that a single number is for)
    lengths = _lengths("window_shape", 1 if window is None else window, shape, n_axes)
    steps = _lengths("step", step, shape, n_axes)
    # Axes before those of the window are covered whole.
    lengths = (*shape[: len(shape) - len(lengths)], *lengths)
    steps = (*[1] * (len(shape) - len(steps)), *steps)
    if any(length > size for length, size in zip(lengths, shape, strict=True)):
        raise InputError(f"window_shape {window!r} is larger than the input, which has the shape {tuple(shape)}")
    starts, offsets = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for size, length, stride in zip(shape, lengths, steps, strict=True):
        starts = (starts[:, None] * size + torch.arange(0, size - length + 1, stride)).flatten()
        offsets = (offsets[:, None] * size + torch.arange(length)).flatten()
    return starts, offsets


def _cover_count(sample: Tensor, starts: Tensor, offsets: Tensor) -> Tensor:
    """How many windows cover each feature, (features,)."""
    count = sample.new_zeros(sample.numel(), dtype=torch.int64)
    for part in torch.split(starts.to(sample.device), ROWS_FORWARD):
        place = (part[:, None] + offsets.to(sample.device)).flatten()
        count.index_add_(0, place, torch.ones_like(place))
    return count


def _lengths(name: str, given: Any, shape: Sequence[int], n_axes: int) -> tuple[int, ...]:
    """Lengths along the last axes of an input, one for each; a single number is for ``n_axes`` of them."""
    if not isinstance(given, tuple):
        given = (given,) * n_axes
    if not 0 < len(given) <= len(shape):
        raise InputError(f"{name} {given!r} has {len(given)} axes; the input has {len(shape)}, {tuple(shape)}")
    return tuple(check_number(name, n, 1, whole=True) for n in given)


def _for_each(given: Any, inputs: Tensors) -> list[Any]:
    """Setting of each input."""
    if not isinstance(given, list):
        return [given] * len(inputs)
    if len(given) != len(inputs):
        raise InputError(
            f"{given!r} has settings for {len(given)} inputs, and there are {len(inputs)}; lengths along the axes of "
            "one are a tuple"
        )
    return given


def _tell_uncovered(counts: list[Tensor]) -> None:
    if missed := sum(int((count == 0).sum()) for count in counts):
        total = sum(count.numel() for count in counts)
        warn(
            f"no window covers {missed} of {total} features, which get 0; choose window_shape and step so that windows "
            "end at the input's edge"
        )
