"""Activation and multiplier vectors of a layer at single positions, from which directions are found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.audit.asked import _one_for_each
from crp.checks import check_number
from crp.concepts.ids import as_ids, check_axis
from crp.concepts.reading import LayerValues
from crp.engine.door import check_attribution
from crp.engine.taps import check_layers
from crp.errors import InputError, InputTypeError
from crp.flags import check_function
from crp.visualization.mining.datasets import indexed, read
from crp.wording import shortened


class Collected(NamedTuple):
    """Vectors of a layer.

    Attributes
    ----------
    activations, multipliers : Tensor of shape (vectors, channels)
        Relevance is their product. Activations are less those of the reference, where the composite has one.
    sample, target, position : ndarray of shape (vectors,), int64
        Which sample of the dataset, whose class's relevance, and where in the flattened space.
    """

    activations: Tensor
    multipliers: Tensor
    sample: np.ndarray
    target: np.ndarray
    position: np.ndarray


def collect(
    attribution: CondAttribution,
    dataset: Any,
    composite: Composite,
    layer: str,
    n: int = 5000,
    *,
    per_sample: int = 10,
    axis: int = 1,
    labels: Sequence[int] | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Collected:
    """Draw vectors of a layer, from equally many samples of each class and at random positions.

    Parameters
    ----------
    attribution : CondAttribution
    dataset : Dataset
        Gives pairs (tensor, class), read by index.
    composite : crp.composites.Composite
        One in multiplier encoding, whose relevance is the product of activation and multiplier.
    layer : str
    n : int
        Number of vectors, at most: less if the samples do not suffice.
    per_sample : int
        Positions drawn of each sample; all, where a layer has fewer.
    axis : int
        Axis of the channels in the layer's output: 1, or -1 for tokens.
    labels : sequence of int, optional
        Class of every sample. By default, the dataset's ``targets`` or ``labels``, or what reading every sample gives.
    preprocess : callable, optional
        Function of samples of shape (1, ...).
    batch_size : int
        Samples attributed at once.
    seed : int

    Returns
    -------
    Collected

    Raises
    ------
    ValueError
        If the number of labels is not that of the samples.
    TypeError
        If the composite has no multipliers whose product with activation is relevance.
    """
    check_attribution(attribution)
    for name, number in (("n", n), ("per_sample", per_sample), ("batch_size", batch_size)):
        check_number(name, number, 1, whole=True)
    check_number("seed", seed, 0, whole=True)
    check_axis(axis)
    check_function("preprocess", preprocess, "samples")
    check_layers(attribution.model, [layer], "layer")
    dataset = indexed(dataset)
    rng = np.random.default_rng(seed)
    classes = _classes(dataset, labels)
    left, n_found, drawn, parts = _in_turns(classes, rng), 0, per_sample, list[Any]()
    while left and n_found < n:
        size = min(batch_size, -(-(n - n_found) // drawn))
        chosen, left = left[:size], left[size:]
        each = _vectors(attribution, dataset, composite, layer, chosen, classes, preprocess, axis)
        n_places = each[0].shape[1]
        drawn = min(per_sample, n_places)
        places = np.stack([rng.permutation(n_places)[:drawn] for _ in chosen])
        index = torch.from_numpy(places)[..., None].expand(-1, -1, each[0].shape[2]).to(each[0].device)
        taken = [values.gather(1, index).flatten(0, 1) for values in each]
        parts.append((*taken, np.repeat(chosen, drawn), places.reshape(-1)))
        n_found += places.size
    activations, multipliers, samples, positions = zip(*parts, strict=True)
    sample = np.concatenate(samples)[:n]
    position = np.concatenate(positions)[:n]
    return Collected(torch.cat(activations)[:n], torch.cat(multipliers)[:n], sample, classes[sample], position)


def _classes(dataset: Any, labels: Sequence[int] | None) -> np.ndarray:
    """Class of every sample."""
    if labels is None:
        labels = next((getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)), None)
        change = getattr(dataset, "target_transform", None)
        labels = labels if labels is None or change is None else [change(label) for label in as_ids(labels)]
    if labels is None:
        labels = [read(dataset, i).label for i in range(len(dataset))]
    try:
        classes = np.array(_one_for_each(labels, len(dataset), "labels"), np.int64)
    except (TypeError, OverflowError):
        raise InputTypeError(f"labels must be one class for each sample; they are {shortened(labels)}") from None
    if not len(classes) or classes.min() < 0:
        found = f"sample {classes.argmin()} has {classes.min()}" if len(classes) else "there is no sample"
        raise InputError(f"labels must be classes, which count from 0; {found}")
    return classes


def _in_turns(classes: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Samples in a random order in which all classes take turns, as long as they have samples."""
    turn = defaultdict[int, int](int)
    keyed = []
    for sample in rng.permutation(len(classes)).tolist():
        label = int(classes[sample])
        keyed.append((turn[label], sample))
        turn[label] += 1
    return [sample for _, sample in sorted(keyed, key=lambda pair: pair[0])]


def _vectors(
    attribution: CondAttribution,
    dataset: Any,
    composite: Composite,
    layer: str,
    samples: Sequence[int],
    classes: np.ndarray,
    preprocess: Callable[[Tensor], Tensor] | None,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """What relevance counts and multipliers, each (samples, positions, channels)."""
    tensors = []
    for i in samples:
        sample = read(dataset, i)
        if sample.problem is not None:
            raise sample.problem.error or InputTypeError(f"sample {i}: {sample.problem.reason}")
        one = sample.data[None].to(attribution.device)
        tensors.append(one if preprocess is None else preprocess(one))
        if not tensors[-1].isfinite().all():
            raise InputError(f"sample {i}: its data is not finite")
        if tensors[-1].shape != tensors[0].shape:
            shapes = f"{tuple(tensors[-1].shape[1:])}, and sample {samples[0]} {tuple(tensors[0].shape[1:])}"
            raise InputError(f"sample {i} has shape {shapes}; samples of several shapes need batch_size=1")
    conditions = [{attribution.MODEL_OUTPUT_NAME: int(classes[i])} for i in samples]
    result = attribution(torch.cat(tensors), conditions, composite, [layer])
    values = LayerValues.of(result, layer)
    if values.counted is None or values.multiplier is None:
        raise InputTypeError(
            f"{composite!r} has no multipliers whose product with activation is relevance; use one of crp.composites, "
            "such as EpsilonPlus or GradientTimesInput"
        )
    if not -values.counted.dim() < axis < values.counted.dim():
        raise InputError(f"axis {axis} is none of channels in layer {layer!r}, of shape {tuple(values.counted.shape)}")
    counted, multiplier = (
        t.movedim(axis, -1).reshape(len(t), -1, t.shape[axis]) for t in (values.counted, values.multiplier)
    )
    return counted.detach(), multiplier.detach()
