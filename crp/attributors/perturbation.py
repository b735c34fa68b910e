r"""Meaningful perturbation: a learned mask that perturbs little of an image and changes the prediction much.

Fong and Vedaldi, "Interpretable explanations of black boxes by meaningful perturbation", ICCV 2017. A mask
:math:`m`, 1 where a pixel is kept and 0 where it is perturbed, plays the *deletion game* (eq. 3 and 4)

.. math:: \min_{m \in [0, 1]^\Lambda} \; \lambda_1 \lVert 1 - m \rVert_1 + \lambda_2 \sum_u \lVert \nabla m(u)
    \rVert_\beta^\beta + \mathbb{E}_\tau \, f_c\bigl(\Phi(x; m(\cdot - \tau))\bigr)

or the *preservation game*, where :math:`\lVert m \rVert_1` is small and :math:`f_c` is large. The mask is coarse, and
brought to the size of the image by :math:`M = g_{\sigma} * \mathrm{up}(m)`, so that it cannot draw an adversarial
pattern; jitter has the same purpose. :math:`\Phi` blurs (each pixel by its own width), or fades to a colour or noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from zennit.core import Composite

from crp.attributors.backgrounds import Background, _check_background, blur, make_background
from crp.attributors.scores import ScoreName, explaining, known_target, score_of, target_of
from crp.attributors.target import Target
from crp.checks import check_choice, check_number
from crp.concepts.ids import as_numbers
from crp.engine.attached import check_alone, check_composite
from crp.engine.forward import tensor_in
from crp.engine.inputs import check_data
from crp.engine.probabilities import are_shares
from crp.errors import InputError
from crp.flags import check_flags
from crp.layers import unwrap

_Game = Literal["deletion", "preservation"]
Upsampling = Literal["bilinear", "bicubic", "nearest"]
Reduction = Literal["sum", "mean"]
Start = Literal["circle", "ones", "zeros"]

#: Settings of the well-known implementation pytorch-explain-black-box, where they are not the paper's: it fades to a
#: median-filtered background, adds input noise, takes means in place of sums, and neither jitters nor blurs the mask.
#: (In it, unlike here, the first term has no gradient where the mask is exactly 1.)
BLACK_BOX: Mapping[str, Any] = MappingProxyType(
    {
        "background": "median",
        "levels": 1,
        "mask_blur": 0.0,
        "start": "ones",
        "l1": 0.01,
        "tv": 0.2,
        "reduction": "mean",
        "noise": 0.2,
        "jitter": 1,
        "steps": 500,
    }
)

#: How many circles are tried as the start of the mask.
_CIRCLES = 32


class Perturbation(NamedTuple):
    """Result of `MeaningfulPerturbation`.

    Attributes
    ----------
    heatmap : Tensor of shape (batch, height, width)
        In [0, 1]; 1 where a pixel matters: what the deletion game takes away, or the preservation game keeps.
    mask : Tensor of shape (batch, height, width)
        1 where a pixel is kept.
    scores : Tensor of shape (batch, steps + 1)
        Score of the perturbed image before each step, with that step's noise and jitter; in the end without.
    limits : Tensor of shape (batch, 2)
        Score of the image, and of the wholly perturbed one.
    target : Target
        What was explained; ``target.ids`` are the classes.
    """

    heatmap: Tensor
    mask: Tensor
    scores: Tensor
    limits: Tensor
    target: Target


class MeaningfulPerturbation:
    """Learn the smallest mask that takes the evidence for a class out of an image, or keeps it.

    The defaults are the paper's, which are for images of 224 x 224 pixels: widths and jitter are in pixels, and should
    be smaller for smaller images. Images of a batch do not influence each other: they share one draw of noise and
    jitter per step, which the seed decides.

    Parameters
    ----------
    model : nn.Module
    composite : zennit.core.Composite, optional
        Changes the gradients by which the mask is learned, such as `BetaSmooth`; None for the gradient itself.
    game : "deletion" or "preservation"
    background : "blur", "median", "mean", "noise", float, Tensor or callable
        What takes the place of a pixel, see `crp.attributors.backgrounds.make_background`.
    sigma : float
        Standard deviation of the strongest blur, in pixels.
    levels : int
        With ``"blur"``: strengths of blur from none to all, between which each pixel has its own. With 1, the image
        fades to the strongest blur.
    mask_size : int, (int, int) or None
        Resolution of the mask; None for that of the image.
    mask_blur : float
        Standard deviation of the blur of the enlarged mask, in pixels.
    upsampling : "bilinear", "bicubic" or "nearest"
    start : "circle", "ones", "zeros", float or Tensor
        Mask to start from. ``"circle"``: the smallest centred circle that takes the score 99 % of the way to that of
        the wholly perturbed image (in the preservation game: that keeps 99 %). A tensor broadcasts to
        (batch, 1, *mask size).
    l1, tv : float
        Weights of the mask's size and of its total variation.
    beta : float
        Exponent of the total variation, at least 1.
    reduction : "sum" or "mean"
        Over the pixels of the mask, in both.
    noise : float
        Standard deviation of Gaussian noise on the perturbed image.
    jitter : int
        The mask is moved by a whole number of pixels out of this many, per axis and step; 1 for none. The range is
        centred, so that the mask stays in place on average.
    learning_rate : float
        Of Adam; the mask is clamped to [0, 1] after each step.
    steps : int
    score : "softmax", "log_softmax" or "output"
        What is to fall or to stay.
    seed : int
    generator : torch.Generator, optional
        On the CPU, in place of the seed; each call goes on with it.
    verbose : bool
        Whether to show a progress bar.

    Raises
    ------
    ValueError, TypeError
        If a setting is none of those above; the message names it.

    Examples
    --------
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    >>> attributor = MeaningfulPerturbation(net, mask_size=4, mask_blur=0, sigma=2, jitter=1, steps=10)
    >>> attributor(torch.rand(3, 1, 8, 8), target=1).heatmap.shape
    torch.Size([3, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        *,
        game: _Game = "deletion",
        background: Background = "blur",
        sigma: float = 10.0,
        levels: int = 8,
        mask_size: int | tuple[int, int] | None = 28,
        mask_blur: float = 5.0,
        upsampling: Upsampling = "bilinear",
        start: Start | float | Tensor = "circle",
        l1: float = 1e-4,
        tv: float = 1e-2,
        beta: float = 3.0,
        reduction: Reduction = "sum",
        noise: float = 0.0,
        jitter: int = 4,
        learning_rate: float = 0.1,
        steps: int = 300,
        score: ScoreName = "softmax",
        seed: int = 0,
        generator: torch.Generator | None = None,
        verbose: bool = False,
    ) -> None:
        check_flags(verbose=verbose)
        unwrap(model)  # (refuses what is no model)
        check_composite(composite)
        for name, value, allowed in (
            ("game", game, _Game), ("upsampling", upsampling, Upsampling), ("reduction", reduction, Reduction),
            ("score", score, ScoreName),
        ):  # fmt: skip
            check_choice(name, value, allowed)
        _check_background(background)
        for name, number, least in (
            ("sigma", sigma, 0), ("mask_blur", mask_blur, 0), ("l1", l1, 0), ("tv", tv, 0), ("beta", beta, 1),
            ("noise", noise, 0), ("learning_rate", learning_rate, 0),
        ):  # fmt: skip
            check_number(name, number, least)
        for name, count in (("levels", levels), ("jitter", jitter), ("steps", steps)):
            check_number(name, count, 1, whole=True)
        if isinstance(start, Tensor):
            as_numbers("start", start)
        elif isinstance(start, int | float):
            check_number("start", start)
        else:
            check_choice("start", start, Start)
        check_number("seed", seed, 0, whole=True)
        if isinstance(mask_size, tuple) and len(mask_size) != 2:
            raise InputError(f"mask_size must be a number or (height, width), not {mask_size!r}")
        for side in mask_size if isinstance(mask_size, tuple) else () if mask_size is None else (mask_size,):
            check_number("mask_size", side, 1, whole=True)
        self.model, self.composite, self.game, self.background = model, composite, game, background
        self.sigma, self.levels, self.mask_size, self.mask_blur = sigma, levels, mask_size, mask_blur
        self.upsampling, self.start, self.l1, self.tv, self.beta = upsampling, start, l1, tv, beta
        self.reduction, self.noise, self.jitter, self.learning_rate = reduction, noise, jitter, learning_rate
        self.steps, self.score, self.seed, self.generator, self.verbose = steps, score, seed, generator, verbose

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, game={self.game!r}, background={self.background!r})"

    def __call__(self, data: Tensor, target: Any = None) -> Perturbation:
        """Learn a mask for each image.

        Parameters
        ----------
        data : Tensor of shape (batch, channels, height, width)
        target : int, sequence of int, Tensor, callable, Target or None
            One class for all images or one for each; a float mask of the outputs; a function of the output that returns
            one score per image; None for the class that the model predicts.

        Returns
        -------
        Perturbation

        Raises
        ------
        ValueError
            If the data are no images, or the model's scores are not finite.
        IndexError
            If there is no such class.
        """
        check_data(data)
        if data.dim() != 4:
            raise InputError(f"data must be images of shape (batch, channels, height, width), not {tuple(data.shape)}")
        check_alone(self.model, self.composite, type(self).__name__)
        asked = target_of(target, len(data))
        data = data.detach()
        generator = self.generator or torch.Generator().manual_seed(self.seed)
        select = tensor_in if asked is None else asked.select
        with explaining(self.model, select=select) as run, torch.no_grad():
            output = run(data)
        known, shares = known_target(asked, output), output.dim() > 1 and are_shares(output)
        with explaining(self.model, self.composite, select) as run, torch.enable_grad():
            images = self._pyramid(data, generator)

            def rate(image: Tensor) -> Tensor:
                return score_of(run(image), known, self.score, shares)

            with torch.no_grad():
                limits = torch.stack([score_of(output, known, self.score, shares), rate(images[0])], 1)
            if not limits.isfinite().all():
                wrong = (~limits.isfinite().all(1)).nonzero().flatten().tolist()
                raise InputError(f"the model's score is NaN or infinite for samples {wrong} or what they fade to")
            mask = self._start(images, rate, limits)
            # (in half precision, the squares of small gradients are 0, by which Adam divides)
            mask = mask.to(torch.promote_types(mask.dtype, torch.float32)).requires_grad_()
            scores = self._play(mask, images, rate, generator)
            with torch.no_grad():
                large = self._enlarge(mask, images).clamp(0, 1)
                scores.append(rate(mix(images, large)))
        kept = large[:, 0]
        heatmap = 1 - kept if self.game == "deletion" else kept.clone()
        return Perturbation(heatmap, kept, torch.stack(scores, 1), limits, known)

    def objective(self, mask: Tensor, scores: Tensor) -> Tensor:
        """Loss of each image, from its mask of shape (batch, 1, *mask size) and its score.

        Returns
        -------
        Tensor of shape (batch,)
        """
        deletes = self.game == "deletion"
        reduce = torch.sum if self.reduction == "sum" else torch.mean
        # No absolute value: the mask is in [0, 1], and at its ends torch's gradient of one would be 0.
        size = reduce((1 - mask if deletes else mask).flatten(1), 1)
        rows, columns = (mask.diff(dim=axis).abs().pow(self.beta).flatten(1) for axis in (-2, -1))
        # (The mean of no differences, of a mask of one row, would be NaN.)
        variation = sum((reduce(part, 1) for part in (rows, columns) if part.shape[1]), torch.zeros_like(size))
        return (scores if deletes else -scores) + self.l1 * size + self.tv * variation

    def _play(
        self, mask: Tensor, images: Tensor, rate: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        optimizer = torch.optim.Adam([mask], lr=self.learning_rate)
        scores = []
        for _ in tqdm(range(self.steps), disable=not self.verbose, dynamic_ncols=True):
            offset = torch.randint(self.jitter, (2,), generator=generator).tolist()
            perturbed = mix(images, self._enlarge(mask, images, offset))
            if self.noise:
                draw = torch.randn((1, *perturbed.shape[1:]), generator=generator, dtype=perturbed.dtype)
                perturbed = perturbed + self.noise * draw.to(perturbed.device)
            score = rate(perturbed)
            (mask.grad,) = torch.autograd.grad(self.objective(mask, score).sum(), mask)
            optimizer.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
            scores.append(score.detach())
        return scores

    def _pyramid(self, data: Tensor, generator: torch.Generator) -> Tensor:
        """Images from wholly perturbed to untouched, of shape (levels + 1, *data shape)."""
        if isinstance(self.background, str) and self.background == "blur":
            blurred = [blur(data, self.sigma * (1 - level / self.levels)) for level in range(self.levels)]
        else:
            blurred = [make_background(self.background, data, self.sigma, generator)]
        return torch.stack([*blurred, data])

    def _start(self, images: Tensor, rate: Callable[[Tensor], Tensor], limits: Tensor) -> Tensor:
        batch, size = images.shape[1], tuple(images.shape[3:])
        if self.mask_size is not None:
            size = self.mask_size if isinstance(self.mask_size, tuple) else (self.mask_size, self.mask_size)
        shape = (batch, 1, *size)
        if self.start == "circle" and isinstance(self.start, str):
            return self._circle(images, rate, limits, shape)
        value = {"ones": 1.0, "zeros": 0.0}[self.start] if isinstance(self.start, str) else self.start
        try:
            return torch.as_tensor(value).to(images).clamp(0, 1).expand(shape).clone()
        except RuntimeError:
            given = tuple(torch.as_tensor(value).shape)
            raise InputError(f"start has shape {given}, which does not broadcast to the masks' {shape}") from None

    @torch.no_grad()
    def _circle(
        self, images: Tensor, rate: Callable[[Tensor], Tensor], limits: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        """Mask of the smallest centred circle that is enough for each image."""
        row, column = (torch.linspace(-1, 1, n).to(images) if n > 1 else torch.zeros(1).to(images) for n in shape[2:])
        distance = torch.hypot(row[:, None], column).view(1, 1, *shape[2:])
        # from nothing to everything, corners included
        radii = torch.linspace(-1e-6, 2**0.5 + 1e-6, _CIRCLES).to(images)
        whole, nothing = limits.unbind(1)
        deletes = self.game == "deletion"
        chosen = torch.full((len(limits),), _CIRCLES - 1, device=images.device)
        for number in reversed(range(_CIRCLES)):
            inside = (distance <= radii[number]).to(images).expand(shape)
            score = rate(mix(images, self._enlarge(1 - inside if deletes else inside, images)))
            way = (whole - score) if deletes else (score - nothing)
            chosen = torch.where(way >= 0.99 * (whole - nothing), number, chosen)
        inside = (distance <= radii[chosen].view(-1, 1, 1, 1)).to(images)
        return 1 - inside if deletes else inside

    def _enlarge(self, mask: Tensor, images: Tensor, offset: list[int] | None = None) -> Tensor:
        """Mask of the size of the images, moved by ``offset``."""
        large = blur(F.interpolate(mask, images.shape[3:], mode=self.upsampling), self.mask_blur).to(images.dtype)
        if self.upsampling == "bicubic":  # (values overshoot; a clamp would have no gradient at masks of 0 or 1)
            large = large + (large.clamp(0, 1) - large).detach()
        if offset is None or self.jitter == 1:
            return large
        before, (height, width) = self.jitter // 2, images.shape[3:]
        row, column = (
            (torch.arange(n) + o - before).clamp(0, n - 1) for n, o in zip((height, width), offset, strict=True)
        )
        return large[..., row[:, None], column]


def mix(images: Tensor, mask: Tensor) -> Tensor:
    """Image in which each pixel lies as far up the pyramid as the mask says.

    Parameters
    ----------
    images : Tensor of shape (levels + 1, batch, channels, height, width)
        From wholly perturbed to untouched.
    mask : Tensor of shape (batch, 1, height, width)
        In [0, 1]; between levels, pixels are interpolated linearly.

    Returns
    -------
    Tensor of shape (batch, channels, height, width)
    """
    levels = len(images) - 1
    if levels == 1:
        return torch.lerp(images[0], images[1], mask.expand_as(images[0]))
    position = mask * levels
    below = position.detach().floor().clamp(0, levels - 1)
    index = below.long().expand_as(images[0])[None]
    low, high = images.gather(0, index)[0], images.gather(0, index + 1)[0]
    return torch.lerp(low, high, (position - below).expand_as(low))
