"""Integrated gradients: the gradient along a straight path from a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.attributors.base import ROWS_BACKWARD, Attributor
from crp.attributors.baselines import Baseline, _baselines
from crp.attributors.target import Target
from crp.checks import check_choice, check_number
from crp.concepts import ChannelConcept
from crp.engine.conditions import MaskMap
from crp.engine.inputs import Inputs, Tensors
from crp.errors import InputError

Quadrature = Literal["right", "left", "middle", "trapezoid", "gauss_legendre"]


class IntegratedGradients(Attributor):
    r"""Integrated gradients, :math:`(x - x_0) \odot \int_0^1 \nabla f(x_0 + \alpha (x - x_0)) \, d\alpha`.

    Sundararajan, Taly and Yan, "Axiomatic attribution for deep networks" (ICML 2017), eq. 1. Complete: the result sums
    to :math:`f(x) - f(x_0)` (proposition 1) up to the error of the quadrature. By default, the integral is the right
    Riemann sum of eq. 3, :math:`\frac{1}{n} \sum_{k=1}^{n} \nabla f(x_0 + \frac{k}{n} (x - x_0))`, as in DeepExplain
    and zennit; its error is of order 1/n. (captum's default is ``"gauss_legendre"`` with 50 steps; its trapezoid of n
    points is divided by n in place of n - 1, and so is not complete.)

    Parameters
    ----------
    model, composite, attr_output, mask_map, batch_size
        As in `Attributor`. With a composite, what it gives in place of the gradient is integrated.
    steps : int
        Number n of points on the path.
    baseline : number, Tensor, callable or None
        :math:`x_0`: a constant; a tensor for all samples (with a batch axis of 1, or without), or for each; a function
        of the data; a tuple of these for several inputs. None is 0. Of token ids, floats are values of the embeddings,
        and whole numbers are ids: ``tokenizer.pad_token_id``, or a tensor of ids.
    quadrature : "right", "left", "middle", "trapezoid" or "gauss_legendre"
        Riemann sums of n intervals with a point at the right or left end or in the middle of each; the trapezoidal rule
        of n points, both ends of the path among them; or Gauss-Legendre quadrature.
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
        condition: Mapping[str, Any] | None = None,
        mask_map: MaskMap = ChannelConcept.mask,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(
            model, composite, attr_output, condition=condition, mask_map=mask_map, batch_size=batch_size
        )  # fmt: skip
        check_number("steps", steps, 1, whole=True)
        self.steps, self.baseline, self.quadrature = steps, baseline, quadrature
        self.points, self.weights = nodes(quadrature, steps)

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output and integrated gradients."""
        starts = _baselines(self.baseline, inputs, self.model)
        ways = tuple(data - start for data, start in zip(inputs.explained, starts, strict=True))
        # (a sum of many steps in half precision would lose the last ones)
        totals = tuple(torch.zeros_like(data, dtype=torch.float64) for data in inputs.explained)
        with self.differentiating(inputs, target) as gradients_of:
            for sample, step in self.rows(len(inputs), self.steps, target, ROWS_BACKWARD):
                points = []
                for start, way in zip(starts, ways, strict=True):
                    rows, alpha = sample.to(way.device), self.points[step].to(way)
                    points.append(start[rows] + alpha.reshape(-1, *[1] * (way.dim() - 1)) * way[rows])
                slopes = gradients_of(inputs.having(points, sample), target.rows(sample))
                for total, gradient in zip(totals, slopes, strict=True):
                    weight = self.weights[step].to(total).reshape(-1, *[1] * (total.dim() - 1))
                    total.index_add_(0, sample.to(total.device), weight * gradient.to(total))
        results = tuple((total * way).to(way.dtype) for total, way in zip(totals, ways, strict=True))
        return self.output(inputs, target.select), results


def nodes(quadrature: Quadrature, steps: int) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and weights of a quadrature, each of shape (steps,), in float64.

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
    offset = {"right": 1.0, "middle": 0.5, "left": 0.0}[quadrature]
    points = (torch.arange(steps, dtype=torch.float64) + offset) / steps
    return points, torch.full((steps,), 1 / steps, dtype=torch.float64)
