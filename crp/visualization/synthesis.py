r"""Activation maximization: an image that is made up so that a class, a unit or a concept responds most.

Simonyan, Vedaldi and Zisserman, "Deep inside convolutional networks" (ICLR workshop 2014); in code space, Nguyen et
al., "Synthesizing the preferred inputs for neurons in neural networks via deep generator networks" (NeurIPS 2016). As
in Montavon, Samek and Müller, "Methods for interpreting and understanding deep neural networks" (Digital Signal
Processing 73, 2018), section 3, in pixel space (eq. 1 and 3) and in code space (eq. 4):

.. math:: \max_x \log p(\omega_c \mid x) - \tfrac{\lambda}{2} \lVert x - \bar x \rVert^2, \qquad
    \max_z \log p(\omega_c \mid g(z)) - \tfrac{\lambda}{2} \lVert z - \bar z \rVert^2 .

What is maximized is an `Objective`. Objectives add up: ``channel("features.28", 3) - 0.5 * logit(7)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from tqdm import tqdm
from zennit.core import Composite

from crp.checks import check_number
from crp.concepts import as_ids
from crp.engine.attached import check_composite, put_on
from crp.engine.door import check_seed
from crp.engine.forward import ForwardPass, tensor_in
from crp.engine.independence import check_independent
from crp.engine.inputs import Inputs, check_data
from crp.engine.taps import check_layers
from crp.errors import InputError, InputTypeError
from crp.flags import check_flags, check_function
from crp.kinds import check_kind
from crp.layers import unwrap
from crp.notices import kind_of, warn
from crp.visualization.objectives import OUTPUT as OUTPUT
from crp.visualization.objectives import Objective as Objective
from crp.visualization.objectives import channel as channel
from crp.visualization.objectives import concept as concept
from crp.visualization.objectives import direction as direction
from crp.visualization.objectives import log_probability as log_probability
from crp.visualization.objectives import logit as logit
from crp.visualization.objectives import unit as unit

if TYPE_CHECKING:
    from typing_extensions import Unpack

MakeOptimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]


class Synthesis(NamedTuple):
    """What `maximize` finds.

    Attributes
    ----------
    images : Tensor of shape (images, *image shape)
    codes : Tensor of shape (images, *code shape)
        What the images were decoded from; without a decoder, the images.
    scores : Tensor of shape (images, steps + 1)
        Objective before each step, without penalties, with that step's jitter; in the end without jitter.
    """

    images: Tensor
    codes: Tensor
    scores: Tensor


class SynthesisKeywords(TypedDict, total=False):
    """Settings of `maximize`; `SynthesisSettings` says what they mean."""

    l2: float
    mean: Tensor | float
    tv: float
    beta: float
    jitter: int
    bounds: tuple[Tensor | float, Tensor | float] | None
    optimizer: MakeOptimizer | None
    learning_rate: float
    steps: int


@dataclass(frozen=True)
class SynthesisSettings:
    r"""How images are made up.

    Attributes
    ----------
    l2 : float
        Weight of half the squared distance from ``mean``.
    mean : Tensor or float
        Of a class's images, or codes; broadcasts to their shape.
    tv : float
        Weight of the images' total variation, the sum over neighbours of :math:`|x_i - x_j|^\beta`.
    beta : float
        At least 1.
    jitter : int
        Images are rolled by up to this many pixels per axis in each step.
    bounds : (low, high), optional
        Images, or codes, are clamped after each step. Numbers, or tensors that broadcast to the shape, as for channels
        that are normalised differently.
    optimizer : callable, optional
        From a list of tensors to an optimizer of torch, which may need a closure (LBFGS); Adam by default.
    learning_rate : float
        Of the default optimizer.
    steps : int
    """

    l2: float = 0.1
    mean: Tensor | float = 0.0
    tv: float = 0.0
    beta: float = 2.0
    jitter: int = 0
    bounds: tuple[Tensor | float, Tensor | float] | None = None
    optimizer: MakeOptimizer | None = None
    learning_rate: float = 0.05
    steps: int = 500

    def __post_init__(self) -> None:
        for name, least in (("l2", 0), ("tv", 0), ("beta", 1), ("learning_rate", 0)):
            check_number(name, getattr(self, name), least)
        for name, least in (("steps", 1), ("jitter", 0)):
            check_number(name, getattr(self, name), least, whole=True)
        check_function("optimizer", self.optimizer, "a list of tensors")
        if not isinstance(self.mean, Tensor):
            check_number("mean", self.mean)
        bounds: Any = self.bounds
        if bounds is not None and not (isinstance(bounds, tuple) and len(bounds) == 2 and _is_below(*bounds)):
            raise InputError(f"bounds must be (low, high) with low below high, not {bounds!r}")

    def penalty(self, images: Tensor, codes: Tensor, centre: Tensor) -> Tensor:
        """What is subtracted from the objective of each image."""
        variation = _variation(images, _axes(images), self.beta)
        return 0.5 * self.l2 * (codes - centre).square().flatten(1).sum(1) + self.tv * variation


def maximize(
    model: nn.Module,
    objective: Objective,
    shape: Sequence[int],
    *,
    decoder: Callable[[Tensor], Tensor] | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    composite: Composite | None = None,
    verbose: bool = False,
    desc: str | None = None,
    **settings: Unpack[SynthesisKeywords],
) -> Synthesis:
    """Make up images for which an objective is large.

    Each image has a penalty of its own, and shares only the jitter with the others; with an optimizer that treats each
    value alone (SGD, Adam), images of a batch do not influence each other.

    Parameters
    ----------
    model : nn.Module
    objective : Objective
    shape : sequence of int
        (images, *image shape); with a decoder (images, *code shape).
    decoder : callable, optional
        From codes to images, differentiable; a module is left in the mode it is in.
    start : Tensor, optional
        Broadcasts to ``shape``; by default zeros, and for codes standard normal numbers.
    seed : int
        Of the starting codes and of the jitter.
    composite : zennit.core.Composite, optional
        Changes the gradients that are followed, such as `GuidedBackprop`; None for the gradient itself.
    verbose : bool
        Whether to show a progress bar.
    desc : str, optional
        What stands before the bar.
    **settings
        As the attributes of `SynthesisSettings`, such as ``steps=100``.

    Raises
    ------
    KeyError
        If a layer is not in the model.
    IndexError
        If it has no such channel or position.
    ValueError, TypeError
        If another setting is wrong; the message names it.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 3)).eval()
    >>> maximize(net, log_probability([0, 1, 2]), (3, 4), steps=10).images.shape
    torch.Size([3, 4])
    """
    check_flags(verbose=verbose)
    check_function("decoder", decoder, "codes")
    _check(model, objective, shape, composite, seed)
    if unknown := [name for name in settings if name not in SynthesisKeywords.__annotations__]:
        raise InputTypeError(
            f"there is no setting {unknown[0]!r}; there are {', '.join(SynthesisKeywords.__annotations__)}"
        )
    how, model = SynthesisSettings(**settings), unwrap(model)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(seed)
    if start is None:
        start = torch.zeros(1) if decoder is None else torch.randn(tuple(shape), generator=generator, dtype=like.dtype)
    codes = _spread("start", start, shape, like).clone().requires_grad_()
    centre = _spread("mean", how.mean, shape, like)
    bounds = None if how.bounds is None else [_spread("bounds", bound, shape, like) for bound in how.bounds]
    opt = torch.optim.Adam([codes], lr=how.learning_rate) if how.optimizer is None else how.optimizer([codes])
    if not isinstance(opt, torch.optim.Optimizer):
        raise InputTypeError(f"optimizer must give an optimizer of torch, not {kind_of(opt)}")
    decode: Callable[[Tensor], Tensor] = (lambda codes: codes) if decoder is None else decoder
    check_independent(model, Inputs.single(decode(codes).detach()), [range(len(codes))])
    scores: list[Tensor] = []

    with put_on(composite, model) as modified, torch.enable_grad():
        rate = partial(_rate, modified, objective, composite)

        def loss(offset: list[int], values_of_step: list[Tensor]) -> float:
            images = decode(codes)
            axes = _axes(images)
            moved = images.roll(offset[: len(axes)], axes) if any(offset) else images
            values, gradient = rate(moved)
            if not scores and not values_of_step:
                _warn_of_silence(gradient)
            penalty = how.penalty(images, codes, centre)
            (codes.grad,) = torch.autograd.grad(
                [moved, penalty.sum()], codes, [-gradient, None], materialize_grads=True
            )
            values_of_step.append(values)
            return float(penalty.detach().sum() - values.sum())

        for _ in tqdm(range(how.steps), desc=desc, disable=not verbose, dynamic_ncols=True):
            values_of_step: list[Tensor] = []
            offset = torch.randint(-how.jitter, how.jitter + 1, (2,), generator=generator).tolist()
            opt.step(partial(loss, offset, values_of_step))
            with torch.no_grad():
                if bounds is not None:
                    codes.clamp_(*bounds)
            scores.append(values_of_step[0])
        images = decode(codes).detach()
        scores.append(rate(images)[0])
    return Synthesis(images, codes.detach(), torch.stack(scores, 1))


def _is_below(low: object, high: object) -> bool:
    if not all(isinstance(bound, Tensor | int | float) for bound in (low, high)):
        return False
    try:
        return bool((torch.as_tensor(low) < torch.as_tensor(high)).all())
    except RuntimeError:  # of shapes that do not fit each other
        return False


def _rate(model: nn.Module, objective: Objective, composite: Composite | None, images: Tensor) -> tuple[Tensor, Tensor]:
    """Objective of each image, and its gradient."""
    roles = dict.fromkeys(objective.layers - {OUTPUT}, "condition")
    # (an output may be a dict, or boxes, where the objective is about layers alone)
    select: Callable[[Any], Any] = tensor_in if OUTPUT in objective.layers else lambda returned: None
    found = ForwardPass.run(model, Inputs.single(images), roles, select, composite)
    outputs = {OUTPUT: found.output, **found.layers}
    values = objective(outputs)
    if values.shape != images.shape[:1]:
        raise InputError(f"the objective must give one value for each of {len(images)} images, not {values.shape}")
    if not values.isfinite().all():
        wrong = (~values.isfinite()).nonzero().flatten().tolist()
        raise InputError(f"the objective is NaN or infinite for images {wrong}; use a smaller learning rate or bounds")
    (gradient,) = torch.autograd.grad(values.sum(), found.inputs.explained)
    return values.detach(), gradient


def _warn_of_silence(gradient: Tensor) -> None:
    """Warn where the objective does not depend on the images that are begun with, as behind a ReLU that is silent."""
    silent = (gradient == 0).flatten(1).all(1).nonzero().flatten().tolist()
    if silent:
        warn(
            f"the objective has no gradient at the start of images {silent}, as behind a ReLU that is 0 there, so that "
            "nothing draws them from it; start from noise: start=torch.randn(shape)"
        )


def _axes(images: Tensor) -> tuple[int, ...]:
    """The last two axes of images, where there are so many."""
    return tuple(range(max(1, images.dim() - 2), images.dim()))


def _variation(images: Tensor, axes: tuple[int, ...], beta: float) -> Tensor:
    parts = [images.diff(dim=axis).abs().pow(beta).flatten(1).sum(1) for axis in axes]
    return torch.stack(parts).sum(0)


def _check(model: nn.Module, objective: object, shape: object, composite: object, seed: object) -> None:
    if not isinstance(objective, Objective):
        raise InputTypeError(f"objective must be an Objective, such as log_probability(3), not {objective!r}")
    if len(sizes := as_ids(shape, what="shape")) < 2 or any(n < 1 for n in sizes):
        raise InputError(f"shape must be (images, *shape of an image or code), not {shape!r}")
    check_composite(composite)
    check_layers(unwrap(model), sorted(objective.layers - {OUTPUT}), "layer")
    check_seed(seed)


def _spread(name: str, value: Tensor | float, shape: Sequence[int], like: Tensor) -> Tensor:
    # (a number is not rounded to torch's default dtype first)
    check_kind(name, value, (Tensor, int, float), "a number or a tensor")
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    check_data(tensor[None])
    try:
        return tensor.expand(*shape)
    except RuntimeError:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to {tuple(shape)}"
        ) from None
