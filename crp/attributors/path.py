"""Integrated gradients: the gradient along straight paths from baselines, at the input or at a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.attributors.base import ROWS_BACKWARD, Attributor
from crp.attributors.baselines import Baseline, _all_baselines
from crp.attributors.target import Target
from crp.checks import check_choice, check_number
from crp.concepts import ChannelConcept
from crp.engine.conditions import MaskMap
from crp.engine.door import check_seed
from crp.engine.inputs import Inputs, Tensors
from crp.errors import InputError

Quadrature = Literal["right", "left", "middle", "trapezoid", "gauss_legendre", "random"]


class IntegratedGradients(Attributor):
    r"""Integrated gradients, :math:`(x - x_0) \odot \int_0^1 \nabla f(x_0 + \alpha (x - x_0)) \, d\alpha`.

    Sundararajan, Taly and Yan, "Axiomatic attribution for deep networks" (ICML 2017), eq. 1. Complete: the result sums
    to :math:`f(x) - f(x_0)` (proposition 1) up to the error of the quadrature. By default, the integral is the right
    Riemann sum of eq. 3, :math:`\frac{1}{n} \sum_{k=1}^{n} \nabla f(x_0 + \frac{k}{n} (x - x_0))`, as in DeepExplain
    and zennit; its error is of order 1/n. (captum's default is ``"gauss_legendre"`` with 50 steps; its trapezoid of n
    points is divided by n in place of n - 1, and so is not complete.)

    Several baselines are a distribution: the result is the mean over them, and sums to the difference from the mean of
    :math:`f(x_0)`. With ``quadrature="random"``, it is the estimate of that mean by expected gradients (Erion et al.,
    "Improving performance of deep learning models with axiomatic attribution priors and expected gradients", Nature
    Machine Intelligence 3, 2021; shap's GradientExplainer, captum's GradientShap without noise): each of n draws
    takes one of the baselines and one point of its path, which all samples share. It is complete in the mean.

    With a layer, the path is one of the layer's outputs, from what it gives for the baseline to what it gives for the
    data (captum: LayerIntegratedGradients). The result sums to what the score falls by where the layer gives what it
    gives for the baseline; what passes it by has the values of the data. Conductance and internal influence are other
    methods: they follow what the layer gives while the data are on their path.

    Parameters
    ----------
    model, composite, attr_output, mask_map, batch_size
        As in `Attributor`. With a composite, what it gives in place of the gradient is integrated.
    steps : int
        Number n of points on the path; of draws, where these are random.
    baseline : number, Tensor, callable or None
        :math:`x_0`: a constant; a tensor for all samples (with a batch axis of 1, or without), or for each; several, as
        a tensor with one more axis in front, such as ``images[:50, None]``; a function of the data; a tuple of these
        for several inputs, whose baselines are taken together. None is 0. Of token ids, floats are values of the
        embeddings, and whole numbers are ids: ``tokenizer.pad_token_id``, or a tensor of ids.
    quadrature : "right", "left", "middle", "trapezoid", "gauss_legendre" or "random"
        Riemann sums of n intervals with a point at the right or left end or in the middle of each; the trapezoidal rule
        of n points, both ends of the path among them; Gauss-Legendre quadrature; or the mean over random points. All
        but the last take n points for each baseline.
    seed : int or None
        Of random points and baselines; None takes torch's global generator.
    layer : str, optional
        Layer that is explained in place of the input.
    condition : mapping of str to concept ids, optional
        Only the gradient through these concepts is integrated. Results of all concepts of a layer add up to the whole.

    Raises
    ------
    ValueError
        If ``steps`` or ``quadrature`` is no such value, or, before the model runs, a baseline does not fit the data.

    Examples
    --------
    >>> net = nn.Linear(2, 1, bias=False).eval()
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> torch.allclose(IntegratedGradients(net, steps=4)(x, 0)[1].sum(), net(x))
    True
    >>> background = torch.rand(10, 1, 2)
    >>> found = IntegratedGradients(net, baseline=background, steps=2)(x, 0)[1]
    >>> torch.allclose(found.sum(), net(x) - net(background).mean())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Any = None,
        *,
        steps: int = 100,
        baseline: Baseline = None,
        quadrature: Quadrature = "right",
        seed: int | None = 0,
        layer: str | None = None,
        condition: Mapping[str, Any] | None = None,
        mask_map: MaskMap = ChannelConcept.mask,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(
            model, composite, attr_output, condition=condition, mask_map=mask_map, batch_size=batch_size
        )  # fmt: skip
        check_number("steps", steps, 1, whole=True)
        if seed is not None:
            check_seed(seed)
        nodes(quadrature, steps, torch.Generator())  # (refuses what is none)
        self.steps, self.baseline, self.quadrature = steps, baseline, quadrature
        self.seed, self.layer = seed, layer

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output and integrated gradients."""
        baselines = _all_baselines(self.baseline, inputs, self.model)
        chosen, points, weights = self._draws(len(baselines[0]))
        ends = inputs.explained
        if self.layer is not None:
            ends = (torch.cat([self.layer_output(part, self.layer) for part, _ in self.parts(inputs, target)]),)
        # (a sum of many steps in half precision would lose the last ones)
        totals = tuple(torch.zeros_like(end, dtype=torch.float64) for end in ends)
        with self.differentiating(target, layer=self.layer) as gradients_of:
            for sample, step in self.rows(len(inputs), len(points), target, ROWS_BACKWARD):
                starts = self._starts(baselines, inputs, sample, chosen[step])
                ways = [end[sample.to(end.device)] - start for start, end in zip(starts, ends, strict=True)]
                here = [a + _for_rows(points[step], a) * way for a, way in zip(starts, ways, strict=True)]
                rows = inputs.having(here, sample) if self.layer is None else inputs.select(sample)
                slopes = gradients_of(rows, target.rows(sample), *here if self.layer is not None else ())
                for total, way, slope in zip(totals, ways, slopes, strict=True):
                    part = _for_rows(weights[step], total) * way.to(total) * slope.to(total)
                    total.index_add_(0, sample.to(total.device), part)
        results = tuple(total.to(end.dtype) for total, end in zip(totals, ends, strict=True))
        return self.output(inputs, target.select), results

    def _draws(self, n_baselines: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which baseline, point on its path and weight each step has, of shape (all steps,)."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        points, weights = nodes(self.quadrature, self.steps, generator)
        if self.quadrature == "random":
            return torch.randint(n_baselines, (self.steps,), generator=generator), points, weights
        chosen = torch.arange(n_baselines).repeat_interleave(self.steps)
        return chosen, points.repeat(n_baselines), weights.repeat(n_baselines) / n_baselines

    def _starts(self, baselines: Tensors, inputs: Inputs, sample: Tensor, number: Tensor) -> Tensors:
        """Where the paths of rows of these samples begin, of the baselines of these numbers."""
        if self.layer is None:
            return tuple(each[number.to(each.device), sample.to(each.device)] for each in baselines)
        # (rows that share sample and baseline begin at the same place)
        pairs, place = torch.unique(torch.stack([number, sample]), dim=1, return_inverse=True)
        starts = [each[pairs[0].to(each.device), pairs[1].to(each.device)] for each in baselines]
        output = self.layer_output(inputs.having(starts, pairs[1]), self.layer)
        return (output[place.to(output.device)],)


def _for_rows(numbers: Tensor, like: Tensor) -> Tensor:
    """One number for each row, that multiplies a tensor of (rows, ...)."""
    return numbers.to(like).reshape(-1, *[1] * (like.dim() - 1))


def nodes(quadrature: Quadrature, steps: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and weights of a quadrature, each of shape (steps,), in float64; random ones are drawn.

    Raises
    ------
    ValueError
        If there is no such quadrature, or a trapezoid has fewer than 2 points.

    Examples
    --------
    >>> nodes("right", 4)[0]
    tensor([0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    check_choice("quadrature", quadrature, Quadrature)
    if quadrature == "gauss_legendre":
        roots, shares = np.polynomial.legendre.leggauss(steps)
        return torch.from_numpy((roots + 1) / 2), torch.from_numpy(shares / 2)
    if quadrature == "trapezoid":
        if steps < 2:
            raise InputError(f"a trapezoid has at least 2 points; steps is {steps}")
        weights = torch.full((steps,), 1 / (steps - 1), dtype=torch.float64)
        weights[[0, -1]] /= 2
        return torch.linspace(0, 1, steps, dtype=torch.float64), weights
    if quadrature == "random":
        points = torch.rand(steps, generator=generator, dtype=torch.float64)
    else:
        offset = {"right": 1.0, "middle": 0.5, "left": 0.0}[quadrature]
        points = (torch.arange(steps, dtype=torch.float64) + offset) / steps
    return points, torch.full((steps,), 1 / steps, dtype=torch.float64)
