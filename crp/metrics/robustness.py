r"""Continuity and local Lipschitz: whether nearly the same inputs get nearly the same explanation.

Montavon, Samek and Müller, "Methods for interpreting and understanding deep neural networks", Digital Signal Processing
73 (2018), section 7.1: :math:`\max_{x \neq x'} \lVert R(x) - R(x') \rVert_1 / \lVert x - x' \rVert_2`, over the points
of a path. Alvarez-Melis and Jaakkola, "On the robustness of interpretability methods" (2018), eq. 4: the same with
:math:`\ell_2` above, over the neighbourhood of one input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crp.checks import check_number
from crp.engine.door import check_seed
from crp.engine.inputs import check_data
from crp.errors import InputError
from crp.flags import check_flags
from crp.metrics.explaining import Method, _check_method, _relevance_by
from crp.metrics.scoring import Labels, Output, Scorer


def translations(sample: Tensor, offsets: Sequence[int], axis: int = -1, fill: float = 0.0) -> Tensor:
    """Sample moved along an axis, as a path: values that leave on one side are lost, ``fill`` enters on the other.

    Parameters
    ----------
    sample : Tensor of shape (*input shape)
        Without a batch axis.
    offsets : sequence of int
    axis : int
    fill : float

    Returns
    -------
    Tensor of shape (offsets, *input shape)

    Examples
    --------
    >>> translations(torch.tensor([1.0, 2.0, 3.0]), [-1, 0, 2])
    tensor([[2., 3., 0.],
            [1., 2., 3.],
            [0., 0., 1.]])
    """
    if not isinstance(sample, Tensor) or type(axis) is not int or not -sample.dim() <= axis < sample.dim():
        raise InputError(f"a sample must be a tensor with the axis {axis!r}, not {sample!r:.60}")
    if not isinstance(offsets, Sequence) or not offsets or not all(type(one) is int for one in offsets):
        raise InputError(f"offsets must be whole numbers, and at least one, not {offsets!r:.60}")
    check_number("fill", fill)
    size = sample.shape[axis]
    position = torch.arange(size, device=sample.device)
    moved = []
    for offset in offsets:
        source = position - offset
        inside = ((source >= 0) & (source < size)).view(-1, *[1] * (sample.dim() - 1 - axis % sample.dim()))
        moved.append(sample.index_select(axis, source.clamp(0, size - 1)).where(inside, fill))
    return torch.stack(moved)


def continuity(
    model: nn.Module,
    path: Tensor,
    target: Labels,
    explain_func: Method,
    *,
    neighbours: bool = False,
    batch_size: int = 64,
    output: Output = None,
) -> Tensor:
    r"""Greatest change of an explanation per change of input, :math:`\lVert R - R' \rVert_1 / \lVert x - x' \rVert_2`.

    Parameters
    ----------
    model : nn.Module
    path : Tensor of shape (points, *input shape)
        Such as the `translations` of an image. Equal points are passed over.
    target : int, sequence of int, Tensor or None
        Class that is explained, of all points or of each; None for what the model predicts for the first point.
    explain_func : method
        A function in the form of Quantus, a composite, an attributor's class or a name.
    neighbours : bool
        Whether to compare only points that follow each other, or all pairs.
    batch_size : int
        Points per explanation.
    output : callable, optional
        Takes the scores of classes from what the model returns, as for `crp.explain`.

    Returns
    -------
    Tensor of shape ()

    Raises
    ------
    ValueError
        If all points are the same.
    """
    check_flags(neighbours=neighbours)
    check_data(path)
    _check_method(explain_func)
    first = Scorer(model, path if target is not None else path[:1], target, "output", batch_size, output)
    classes = first.classes.expand(len(path))
    relevance = _relevance_by(explain_func, model, path, classes, output, batch_size)
    relevance, points = (values.flatten(1).double() for values in (relevance, path.detach()))
    if neighbours:
        change, way = relevance.diff(dim=0).abs().sum(1), points.diff(dim=0).norm(dim=1)
    else:
        change = torch.cdist(relevance, relevance, p=1)
        way = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    if not (way > 0).any():
        raise InputError("all points of the path are the same; continuity needs at least two that differ")
    greatest: Tensor = (change / way)[way > 0].max()
    return greatest


def local_lipschitz(
    model: nn.Module,
    data: Tensor,
    target: Labels,
    explain_func: Method,
    *,
    noise: float | Tensor = 0.1,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    output: Output = None,
) -> Tensor:
    r"""Greatest change of an explanation near an input, :math:`\max \lVert R - R' \rVert_2 / \lVert x - x' \rVert_2`.

    Parameters
    ----------
    model : nn.Module
    data : Tensor of shape (batch, *input shape)
    target, explain_func
        As in `continuity`; None for what is predicted for each sample. The class stays that of the sample itself.
    noise : float, or Tensor of shape (samples, batch, *input shape)
        Standard deviation of Gaussian noise, or what is added itself (an axis of length 1 is for all).
    samples : int
        Neighbours of each input; those of a noise tensor are counted instead.
    seed : int
        Of the noise, of which every input gets the same draws.
    batch_size : int
        Inputs per explanation.
    output : callable, optional
        As in `continuity`.

    Returns
    -------
    Tensor of shape (batch,)
    """
    _check_method(explain_func)
    scorer = Scorer(model, data, target, "output", batch_size, output)
    if not isinstance(noise, Tensor):
        check_number("noise", noise, 0)
        check_number("samples", samples, 1, whole=True)
        check_seed(seed)
        if noise == 0:
            raise InputError("noise must be greater than 0: a neighbour must differ from the input")
        generator = torch.Generator().manual_seed(seed)
        noise = noise * torch.randn((samples, 1, *data.shape[1:]), generator=generator, dtype=data.dtype)
    if noise.dim() != data.dim() + 1 or noise.shape[2:] != data.shape[1:] or noise.shape[1] not in (1, len(data)):
        raise InputError(
            f"noise has shape {tuple(noise.shape)}; it must be (samples, {len(data)} or 1, *{tuple(data.shape[1:])})"
        )
    moved = data.detach() + noise.to(data)
    every = torch.cat([data.detach()[None], moved]).flatten(0, 1)
    classes = scorer.classes.repeat(len(moved) + 1)
    relevance = _relevance_by(explain_func, model, every, classes, output, batch_size)
    relevance = relevance.view(len(moved) + 1, len(data), -1)
    change = (relevance[1:] - relevance[0]).norm(dim=2, dtype=torch.float64)
    way = (moved.double() - data.detach()).flatten(2).norm(dim=2)
    if (way == 0).any():
        raise InputError("noise is 0 for some neighbours: they must differ from the input")
    return torch.amax(change / way, 0)
