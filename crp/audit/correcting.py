r"""Correction of a model by a direction or a concept: projected out, penalised in training, or pruned.

:math:`a' = a - v\,(v \cdot a) + z\,v` with a unit vector :math:`v` sets the part of an activation along :math:`v` to
:math:`z`, at every position. Anders et al., "Finding and removing Clever Hans: Using explanation methods to debug and
improve deep models", Information Fusion 77 (2022), P-ClArC; Dreyer et al., "From Hope to Safety: Unlearning Biases of
Deep Models via Gradient Penalization in Latent Space", AAAI (2024); Yeom et al., "Pruning by explaining", Pattern
Recognition 115 (2021).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.audit.asked import _check_asked, _named_concepts, _one_for_each
from crp.checks import check_number
from crp.concepts import Concept
from crp.concepts.ids import as_direction, as_numbers, check_axis, in_range
from crp.concepts.reading import LayerValues, relevance_sums
from crp.errors import InputError, InputTypeError, StateError
from crp.flags import check_function
from crp.layers import ByChainRule, Followed, find_layers, put_behind
from crp.layers.interrupts import atomic
from crp.notices import kind_of


@atomic
def project(
    model: nn.Module,
    layer: str,
    direction: Any,
    *,
    at: float | Tensor = 0.0,
    when: Callable[[Tensor], Tensor] | None = None,
    axis: int = 1,
) -> Iterator[None]:
    """Set the part of a layer's output along a direction to a constant, inside of the context.

    No rule of a composite acts on the correction: relevance passes by the ordinary chain rule.

    Parameters
    ----------
    model : nn.Module
    layer : str
    direction : array or Tensor of shape (channels,)
        Of any length.
    at : float, or Tensor with one entry
        Coefficient along the direction, such as the mean over samples without the shortcut.
    when : callable, optional
        Function of the layer's output that says, in a boolean tensor of shape (samples,), which samples are corrected:
        a reactive correction. By default all are.
    axis : int
        Axis of the channels: 1, or -1 for tokens.

    Examples
    --------
    A channel is such a part, too, and is switched off, or set to its mean, inside of the context:

    >>> net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(5, 3)
    >>> with project(net, "1", torch.eye(4)[2], at=net[:2](x)[:, 2].mean()):
    ...     changed = net(x)
    """
    vector = torch.from_numpy(as_direction(direction))
    check_axis(axis)
    constant = at.item() if isinstance(at, Tensor) and at.numel() == 1 else at
    check_number("at", constant)
    check_function("when", when, "the layer's output")
    correction = _Projection(vector / vector.norm(), float(constant), when, axis)
    with put_behind(model, layer, partial(_After, correction=correction)):
        yield


@atomic
def prune(
    model: nn.Module, scores: Mapping[str, Any], share: float, *, axis: int = 1
) -> Iterator[dict[str, list[int]]]:
    """Let the channels with the least scores, over all layers, be 0, inside of the context.

    Parameters
    ----------
    model : nn.Module
    scores : mapping of layer name to array or Tensor of shape (channels,)
        Such as relevance summed over samples.
    share : float
        Share of the channels that is pruned.
    axis : int
        Axis of the channels: 1, or -1 for tokens.

    Yields
    ------
    dict of str to list of int
        The channels that are pruned.
    """
    check_number("share", share, 0)
    if share > 1:
        raise InputError(f"share must be between 0 and 1, not {share}")
    if not isinstance(scores, Mapping):
        raise InputTypeError(f"scores must be given by layer, as in {{'features.3': scores}}, not in {kind_of(scores)}")
    check_axis(axis)
    arrays = {layer: as_numbers(f"scores[{layer!r}]", values).reshape(-1) for layer, values in scores.items()}
    ranked = sorted((value, layer, i) for layer, values in arrays.items() for i, value in enumerate(values.tolist()))
    pruned: dict[str, list[int]] = {layer: [] for layer in arrays}
    for _, layer, i in ranked[: round(share * len(ranked))]:
        pruned[layer].append(i)
    with ExitStack() as stack:
        for layer, values in arrays.items():
            keep = torch.ones(len(values))
            keep[pruned[layer]] = 0
            stack.enter_context(put_behind(model, layer, partial(_After, correction=_Keep(keep, axis))))
        yield {layer: sorted(ids) for layer, ids in pruned.items()}


@atomic
def penalty(model: nn.Module, layer: str, direction: Any, *, axis: int = 1) -> Iterator[Callable[[Tensor], Tensor]]:
    r"""Penalty of a model's sensitivity to a direction, for a training loop (right for the right reasons).

    Parameters
    ----------
    model : nn.Module
    layer : str
    direction : array or Tensor of shape (channels,)
    axis : int
        Axis of the channels: 1, or -1 for tokens.

    Yields
    ------
    callable
        Function of an output of the model's last forward pass, such as the logits of the samples' labels, that gives
        the mean over samples of :math:`(v \cdot \nabla_a y)^2`, with gradients summed over positions, and over all
        calls of a layer that the model calls several times.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> with penalty(net, "0", [1.0, 0, 0, 0]) as term:
    ...     output = net(torch.ones(5, 3))
    ...     term(output[:, 1]).backward()
    """
    vector = torch.from_numpy(as_direction(direction))
    check_axis(axis)
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append(output)

    def begin(_module: nn.Module, _args: Any) -> None:
        outputs.clear()

    def term(output: Tensor) -> Tensor:
        if not outputs:
            raise StateError(f"layer {layer!r} has not run inside of the context; call the model first")
        for activation in outputs:
            _check_channels(activation, len(vector), axis, "the direction has {} channels")
        if not outputs[-1].requires_grad or not output.requires_grad:
            raise StateError("the penalty is a gradient: call the model with gradients enabled, not under no_grad")
        reached = torch.autograd.grad(output.sum(), outputs, create_graph=True, allow_unused=True)
        along = [g.movedim(axis, -1) @ vector.to(g) for g in reached if g is not None]
        if not along:
            raise StateError(f"this output is none of the last forward pass through layer {layer!r}")
        of_samples = torch.stack([part.reshape(len(part), -1).sum(1) for part in along]).sum(0)
        return (of_samples**2).mean()

    handles = [find_layers(model, [layer])[layer].register_forward_hook(keep)]
    handles.append(model.register_forward_pre_hook(begin))
    try:
        yield term
    finally:
        for handle in handles:
            handle.remove()


class Effect(NamedTuple):
    """What a correction changes: accuracy, and share of a class's relevance that concepts have, before and after.

    Attributes
    ----------
    accuracy : (float, float)
    share : (float, float)
        Mean over samples of the concepts' share of the absolute relevance of the layer's concepts.
    """

    accuracy: tuple[float, float]
    share: tuple[float, float]


def effect(
    attribution: CondAttribution,
    data: Tensor,
    labels: Sequence[int],
    composite: Composite | None,
    correction: AbstractContextManager[Any] | CondAttribution,
    layer: str,
    concept: Concept,
    concept_ids: Sequence[int],
) -> Effect:
    """Measure a model before and after a correction.

    Parameters
    ----------
    attribution : CondAttribution
    data : Tensor of shape (samples, ...)
    labels : sequence of int
    composite : zennit Composite, or None for the plain gradient
    correction : context, or CondAttribution
        Such as ``project(...)``; or the attribution of the model after a correction by training, as with `penalty`.
        The model before it must be another object: ``copy.deepcopy(model)``.
    layer : str
        Whose concepts are looked at, in the relevance of each sample's label.
    concept : Concept
    concept_ids : sequence of int

    Returns
    -------
    Effect

    Raises
    ------
    ValueError
        If a corrected model is the model itself.

    Warns
    -----
    UserWarning
        If a correction changes neither predictions nor relevance, as one on another model.
    """
    _check_asked(attribution, data, concept)
    classes, ids = _one_for_each(labels, len(data), "labels"), _named_concepts(concept_ids, layer)
    predictions = []

    def measure(one: CondAttribution) -> tuple[float, float]:
        result = one(data, [{one.MODEL_OUTPUT_NAME: label} for label in classes], composite, [layer])
        if result.prediction.dim() != 2:
            raise InputError(f"accuracy is of (samples, classes); the output is {tuple(result.prediction.shape)}")
        predictions.append(result.prediction)
        n_classes = result.prediction.shape[1]
        right = result.prediction.argmax(1).cpu() == torch.tensor(classes) % n_classes
        sums = relevance_sums(concept, LayerValues.of(result, layer), layer).abs()
        chosen = {i % sums.shape[1] for i in in_range(ids, sums.shape[1], layer, "concept")}
        return right.double().mean().item(), sums[:, sorted(chosen)].sum(1).mean().item()

    if isinstance(correction, CondAttribution):
        if correction.model is attribution.model:
            raise InputError(
                "the corrected model is the model itself, of which nothing before the training is left; keep a copy of "
                "it, such as copy.deepcopy(model)"
            )
        before, after = measure(attribution), measure(correction)
    elif not isinstance(correction, AbstractContextManager):
        raise InputTypeError(f"correction must be a context, as of project, or a CondAttribution, not {correction!r}")
    else:
        before = measure(attribution)
        with correction:
            after = measure(attribution)
    if before == after and torch.equal(*predictions):
        warnings.warn("the correction changes nothing here: is it on another model?", stacklevel=2)
    return Effect(*zip(before, after, strict=True))


def _check_channels(output: Any, n: int, axis: int, given: str) -> None:
    """Raise an error unless a layer's output has ``n`` channels along an axis."""
    if not isinstance(output, Tensor):
        raise InputTypeError(f"the layer returns {kind_of(output)}, and no tensor that has channels")
    if not -output.dim() <= axis < output.dim() or output.shape[axis] != n:
        raise InputError(
            f"{given.format(n)}; the layer's output is {tuple(output.shape)}, with channels on axis {axis}"
        )


class _After(Followed):
    """A layer with a correction behind it."""

    def after(self, output: Tensor, *args: Any) -> Tensor:
        """Output, corrected."""
        return cast(Tensor, self.correction(output))


class _Projection(ByChainRule):
    def __init__(self, vector: Tensor, at: float, when: Callable[[Tensor], Tensor] | None, axis: int) -> None:
        super().__init__()
        self.vector, self.at, self.when, self.axis = vector, at, when, axis

    def forward(self, output: Tensor) -> Tensor:
        """Activation with another coefficient along the direction."""
        _check_channels(output, len(self.vector), self.axis, "the direction has {} channels")
        vector, values = self.vector.to(output), output.movedim(self.axis, -1)
        change = (self.at - values @ vector)[..., None] * vector
        if self.when is not None:
            chosen = self.when(output.detach())
            if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != output.shape[:1]:
                is_tensor = isinstance(chosen, Tensor)
                found = f"{chosen.dtype} of shape {tuple(chosen.shape)}" if is_tensor else kind_of(chosen)
                raise InputError(
                    f"when must return a boolean tensor of shape ({len(output)},), which says of each sample whether "
                    f"it is corrected; it returned {found}"
                )
            change = change * chosen.reshape(-1, *[1] * (change.dim() - 1)).to(change)
        return (values + change).movedim(-1, self.axis)


class _Keep(ByChainRule):
    def __init__(self, keep: Tensor, axis: int) -> None:
        super().__init__()
        self.keep, self.axis = keep, axis

    def forward(self, output: Tensor) -> Tensor:
        """Activation without the channels that are pruned."""
        _check_channels(output, len(self.keep), self.axis, "there are {} scores")
        return (output.movedim(self.axis, -1) * self.keep.to(output)).movedim(-1, self.axis)
