"""Pixel flipping and selectivity: whether the prediction falls when the most relevant features are removed.

Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance propagation", PLoS
ONE 10 (2015); Samek et al., "Evaluating the visualization of what a deep neural network has learned", IEEE TNNLS 28
(2017). Features are removed most relevant first (MoRF: the score should fall fast) or least relevant first (LeRF: it
should stay). The area between the two curves is large for a good explanation (Achtibat et al., "AttnLRP", ICML 2024).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from crp.attributors.backgrounds import Background, make_background
from crp.attributors.baselines import are_ids, single_baselines
from crp.attributors.scores import ScoreName
from crp.attributors.target import Target
from crp.checks import check_choice, check_number
from crp.engine.door import check_seed
from crp.engine.inputs import Data, Inputs, check_data
from crp.errors import InputError
from crp.flags import check_flags
from crp.metrics.explaining import Array, Method, _check_method, _check_relevance, _relevance_by, _relevance_of
from crp.metrics.scoring import Labels, Output, Places, Scorer, area


class Flipping(NamedTuple):
    """Result of `pixel_flipping`.

    Attributes
    ----------
    fraction : Tensor of shape (steps + 1,)
        How much is replaced, from 0 to 1; the last step may be a smaller one.
    most, least : Tensor of shape (batch, steps + 1)
        Score with the most, or the least, relevant part replaced.
    """

    fraction: Tensor
    most: Tensor
    least: Tensor

    @property
    def area_most(self) -> Tensor:
        """Area under the curve, most relevant first, of shape (batch,); small is good."""
        return torch.trapezoid(self.most, self.fraction)

    @property
    def area_least(self) -> Tensor:
        """Area under the curve, least relevant first, of shape (batch,); large is good."""
        return torch.trapezoid(self.least, self.fraction)

    @property
    def area_between(self) -> Tensor:
        """Area between the curves, of shape (batch,); large is good, and a random order gives 0 on average."""
        return self.area_least - self.area_most


class Selectivity(NamedTuple):
    """Result of `selectivity`.

    Attributes
    ----------
    curve : Tensor of shape (batch, steps + 1)
        Score with 0, 1, ... patches removed.
    removed : Tensor of shape (batch, *space)
        At which step (from 1) a position was removed; 0 for those that are left.
    """

    curve: Tensor
    removed: Tensor

    @property
    def area(self) -> Tensor:
        """Area under each curve, of shape (batch,), which is one unit long; small is good."""
        return area(self.curve)


def pixel_flipping(
    model: nn.Module,
    data: Data,
    target: Places = None,
    explain_func: Method | None = None,
    *,
    relevance: Tensor | Array | None = None,
    patch: int = 1,
    step: int = 1,
    channels: Literal["together", "apart"] = "together",
    replacement: Background = 0.0,
    sigma: float = 10.0,
    score: ScoreName = "softmax",
    batch_size: int = 256,
    seed: int = 0,
    output: Output = None,
) -> Flipping:
    """Score of a class while more and more of the input is replaced, most and least relevant first.

    Parameters
    ----------
    model : nn.Module
    data : Tensor of shape (batch, channels, *space) or (batch, features), or tuple or dict of inputs
        Token ids, of shape (batch, tokens), have a feature for each token, which their embeddings are replaced for. Of
        several inputs, the one that is explained by default is flipped.
    target : int, sequence of int, Tensor or None
        One class for all samples or one for each; None for what the model predicts. With ``score="output"``, also what
        `crp.outputs` has, such as ``Position(-1, token)``.
    explain_func : method, optional
        A function in the form of Quantus, a composite, an attributor's class or a name. Of token ids or several inputs,
        a function gets data and target as they are.
    relevance : Tensor or array, optional
        In place of ``explain_func``: of the data's shape, or heatmaps of shape (batch, *space).
    patch : int
        Positions are replaced in patches of this length per axis, side by side; those at the end may be smaller. A
        patch's relevance is the sum.
    step : int
        Patches per step.
    channels : "together" or "apart"
        Whether a position is replaced in all channels, or each value counts for itself.
    replacement : str, float, Tensor or callable
        ``"mean"``, ``"blur"``, a number, a function of the data and so on, see
        `crp.attributors.backgrounds.make_background`. Of token ids, whole numbers are ids, such as that of a mask.
    sigma : float
        Of the blur, in pixels.
    score : "softmax", "log_softmax" or "output"
    batch_size : int
        Inputs per forward pass, of all samples and steps: twice for each step of a sample, so that a picture of 224
        pixels with ``patch=8`` takes 1570.
    seed : int
        Of ``"noise"``.
    output : callable, optional
        Takes the scores of classes from what the model returns, as for `crp.explain`: ``crp.outputs.segmentation()``,
        say, with ``score="output"``. A function in the form of Quantus does so itself.

    Returns
    -------
    Flipping
        Ties are broken by position: in each order, the first one goes first.

    Raises
    ------
    ValueError
        If neither or both of ``explain_func`` and ``relevance`` are given, or shapes do not fit.
    """
    for name, value in (("patch", patch), ("step", step)):
        check_number(name, value, 1, whole=True)
    check_choice("channels", channels, Literal["together", "apart"])
    check_seed(seed)
    if (explain_func is None) == (relevance is None):
        raise InputError("give either explain_func or relevance")
    if isinstance(data, list):
        check_data(cast(Tensor, data))
    inputs = Inputs.of(data, None, model)
    inputs.check()
    if len(inputs.names) > 1:
        raise InputError(
            f"one input can be flipped, and {', '.join(map(repr, inputs.names))} are floating-point tensors"
        )
    (original,) = inputs.explained
    given = None if relevance is None else _check_relevance(relevance, original)
    if explain_func is not None:
        _check_method(explain_func)
    scorer = Scorer(model, inputs, target, score, batch_size, output)
    if explain_func is not None:
        is_tensor = inputs.form == "tensor" and not inputs.embedded
        asked: tuple[Data, Tensor | Target] = (original, scorer.classes) if is_tensor else (data, scorer.target)
        given = _relevance_of(explain_func, model, *asked, output, original)
    if inputs.embedded and are_ids(replacement):
        (filled,) = single_baselines(replacement, inputs, model)
    else:
        filled = make_background(replacement, original, sigma, torch.Generator().manual_seed(seed))
    return _flip(scorer, original, filled, cast(Tensor, given), patch, step, channels)


def _flip(
    scorer: Scorer, data: Tensor, filled: Tensor, relevance: Tensor, patch: int, step: int, channels: str
) -> Flipping:
    place, values = _features(relevance, data, patch, channels)
    count = values.shape[1]
    steps = -(-count // step)
    curves = [_curve(scorer, data, filled, place, ascending, step, steps) for ascending in (-values, values)]
    fraction = (torch.arange(steps + 1, device=data.device, dtype=torch.float64) * step).clamp(max=count) / count
    return Flipping(fraction.to(curves[0].dtype), *curves)


def selectivity(
    model: nn.Module,
    data: Tensor,
    target: Labels,
    explain_func: Method,
    *,
    patch: int = 4,
    steps: int = 20,
    replacement: Background = 0.0,
    sigma: float = 10.0,
    recompute: bool = True,
    score: ScoreName = "softmax",
    batch_size: int = 256,
    output: Output = None,
) -> Selectivity:
    """Score of a class while the most relevant patch is removed, step by step, and relevance is computed anew.

    Montavon, Samek and Müller, "Methods for interpreting and understanding deep neural networks", Digital Signal
    Processing 73 (2018), section 7.2. A patch may lie anywhere, but not over one that was removed. Where no such place
    is left, a curve stays at its last score.

    Parameters
    ----------
    model, data, target, explain_func, replacement, sigma, score, batch_size, output
        As in `pixel_flipping`; noise is always the same.
    patch : int
        Length of a patch in each axis of space.
    steps : int
        Patches to remove.
    recompute : bool
        Whether relevance is computed anew after each removal, or once for the whole input.

    Returns
    -------
    Selectivity
    """
    check_flags(recompute=recompute)
    _check_method(explain_func)
    check_number("patch", patch, 1, whole=True)
    check_number("steps", steps, 1, whole=True)
    check_data(data)
    space = data.shape[2:] if data.dim() > 2 else data.shape[1:]
    if min(space, default=0) < patch:
        raise InputError(f"a patch of {patch} per axis does not fit into data of shape {tuple(data.shape)}")
    scorer = Scorer(model, data, target, score, batch_size, output)
    filled = make_background(replacement, data, sigma, torch.Generator().manual_seed(0))
    left, every = data.detach().clone(), torch.arange(len(data), device=data.device)
    removed = torch.zeros((len(data), *space), dtype=torch.int64, device=data.device)
    curve = [scorer.rate(left.__getitem__, every)]
    for step in range(1, steps + 1):
        if step == 1 or recompute:
            relevance = _relevance_by(explain_func, model, left, scorer.classes, output)
            relevance = relevance.sum(1) if data.dim() > 2 else relevance  # of positions
        spot = _best_patch(relevance.masked_fill(removed > 0, -torch.inf), patch)
        removed = torch.where(spot & (removed == 0), step, removed)
        left = torch.where(spot.view(len(data), *[1] * (data.dim() - 1 - len(space)), *space), filled, left)
        curve.append(scorer.rate(left.__getitem__, every))
    return Selectivity(torch.stack(curve, 1), removed)


def _features(relevance: Tensor, data: Tensor, patch: int, channels: str) -> tuple[Tensor, Tensor]:
    """Which feature each value of a sample belongs to, and the relevance of features, of shape (batch, features)."""
    shape = data.shape[1:]
    apart = channels == "apart" or data.dim() == 2
    space = shape if data.dim() == 2 else shape[1:]
    number = torch.zeros((), dtype=torch.int64, device=data.device)
    for size in space:
        blocks = torch.arange(size, device=data.device) // patch
        number = number[..., None] * (-(-size // patch)) + blocks
    if data.dim() > 2:
        count = int(number.max()) + 1
        shift = torch.arange(shape[0], device=data.device) * (count if apart else 0)
        number = number + shift.view(-1, *[1] * len(space))
        relevance = relevance.expand(data.shape) if apart else relevance.sum(1, keepdim=True)
    index = (number if apart else number[:1]).flatten().expand(len(data), -1)
    values = relevance.new_zeros(len(data), int(number.max()) + 1).scatter_add_(1, index, relevance.flatten(1))
    return number, values


def _curve(
    scorer: Scorer, data: Tensor, filled: Tensor, place: Tensor, values: Tensor, step: int, steps: int
) -> Tensor:
    """Scores of shape (batch, steps + 1), while features go in the order of ascending values."""
    rank = values.argsort(dim=1, stable=True).argsort(1)
    samples = torch.arange(len(data), device=data.device).repeat_interleave(steps + 1)
    gone = torch.arange(steps + 1, device=data.device).repeat(len(data)) * step

    def make(index: Tensor) -> Tensor:
        sample = samples[index]
        replaced = (rank[sample] < gone[index, None])[:, place]
        return torch.where(replaced, filled[sample], data[sample])

    return scorer.rate(make, samples).view(len(data), steps + 1)


def _best_patch(relevance: Tensor, patch: int) -> Tensor:
    """Mask of the patch with the greatest sum in each sample, of shape (batch, *space); none if all sums are -inf."""
    sums = relevance
    for axis in range(1, relevance.dim()):
        sums = sums.unfold(axis, patch, 1).sum(-1)
    flat = sums.flatten(1)
    best, at = flat.max(1)
    mask = torch.isfinite(best).view(-1, *[1] * (relevance.dim() - 1)).expand_as(relevance)
    for axis in reversed(range(1, relevance.dim())):
        start = at % sums.shape[axis]
        at = at // sums.shape[axis]
        position = torch.arange(relevance.shape[axis], device=relevance.device)
        inside = (position >= start[:, None]) & (position < start[:, None] + patch)
        mask = mask & inside.view(len(relevance), *[-1 if a == axis else 1 for a in range(1, relevance.dim())])
    return mask
