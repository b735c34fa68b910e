"""SmoothGrad and its relatives: the gradient under noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.attributors.base import ROWS_BACKWARD, Attributor
from crp.attributors.target import Target
from crp.checks import check_choice, check_number
from crp.concepts import ChannelConcept
from crp.engine.conditions import MaskMap
from crp.engine.door import check_seed
from crp.engine.inputs import Inputs, Tensors
from crp.errors import InputError, InputTypeError
from crp.wording import shortened

Statistic = Literal["mean", "squared", "variance"]


class SmoothGrad(Attributor):
    r"""SmoothGrad, :math:`\frac{1}{n} \sum_{k=1}^{n} \nabla f(x + \epsilon_k)`, with Gaussian noise :math:`\epsilon_k`.

    Smilkov, Thorat, Kim, Viégas and Wattenberg, "SmoothGrad: removing noise by adding noise" (2017), section 3. The
    standard deviation of the noise is ``noise_level`` times the range of values of each sample (of each input, where
    there are several). All n gradients are noisy; zennit leaves out the noise in one of them.

    Parameters
    ----------
    model, composite, attr_output, condition, mask_map, batch_size
        As in `Attributor`. With a composite, what it gives in place of the gradient is averaged.
    n : int
        Number of noisy copies of each sample.
    noise_level : float
        Standard deviation in units of the range ``max - min`` of each sample.
    noise : Tensor of shape (n, *data shape), or tuple of them, optional
        Noise to add in place of random noise, in units of the data. Axes of size 1 are shared.
    statistic : "mean", "squared" or "variance"
        Mean of the gradients, of their squares (Hooker et al., "A benchmark for interpretability methods", NeurIPS
        2019), or variance over the n (VarGrad: Adebayo et al., "Local explanation methods for deep neural networks
        lack sensitivity to parameter values", ICLR workshop 2018), divided by n.
    seed : int or None
        Of the noise; None takes torch's global generator.

    Raises
    ------
    ValueError, TypeError
        If a setting has a wrong type or value; before the model runs, if noise does not have the shape of the data.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Any = None,
        *,
        n: int = 50,
        noise_level: float = 0.1,
        noise: Tensor | Sequence[Tensor] | None = None,
        statistic: Statistic = "mean",
        seed: int | None = 0,
        condition: Mapping[str, Any] | None = None,
        mask_map: MaskMap = ChannelConcept.mask,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(
            model, composite, attr_output, condition=condition, mask_map=mask_map, batch_size=batch_size
        )  # fmt: skip
        check_number("n", n, 1, whole=True)
        check_number("noise_level", noise_level, 0)
        check_choice("statistic", statistic, Statistic)
        if seed is not None:
            check_seed(seed)
        self.n, self.noise_level, self.noise, self.statistic, self.seed = n, noise_level, noise, statistic, seed

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output and smoothed gradient."""
        explained = inputs.explained
        given = None if self.noise is None else _fitting(self.noise, explained)
        n_copies = self.n if given is None else len(given[0])
        draws = self._draws(explained) if given is None else []
        spreads = [self.noise_level * _range(data) for data in explained]
        # (differences of large sums would lose digits in single precision)
        sums = [torch.zeros_like(data, dtype=torch.float64) for data in explained]
        squares = [torch.zeros_like(data, dtype=torch.float64) for data in explained]
        with self.differentiating(target, relevance=True) as gradients_of:
            for sample, copy in self.rows(len(inputs), n_copies, target, ROWS_BACKWARD):
                noisy = []
                for number, data in enumerate(explained):
                    rows, copies = sample.to(data.device), copy.to(data.device)
                    own = (
                        draws[number][copies] * spreads[number][rows] if given is None else given[number][copies, rows]
                    )
                    noisy.append(data[rows] + own)
                for number, result in enumerate(gradients_of(inputs.having(noisy, sample), target.rows(sample))):
                    rows, gradient = sample.to(explained[number].device), result.to(sums[number])
                    sums[number].index_add_(0, rows, gradient)
                    squares[number].index_add_(0, rows, gradient.square())
        results = []
        for data, total, square in zip(explained, sums, squares, strict=True):
            mean, mean_square = total / n_copies, square / n_copies
            chosen = {"mean": mean, "squared": mean_square, "variance": (mean_square - mean.square()).clamp(min=0)}
            results.append(chosen[self.statistic].to(data.dtype))
        return self.output(inputs, target.select), tuple(results)

    def _draws(self, inputs: Tensors) -> list[Tensor]:
        """Standard normal noise for each input, of shape (n, *input shape), on the CPU's generator."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        return [
            torch.randn(self.n, *data.shape[1:], generator=generator, dtype=data.dtype).to(data.device)
            for data in inputs
        ]


def _range(data: Tensor) -> Tensor:
    flat = data.flatten(1)
    return (flat.amax(1) - flat.amin(1)).reshape(-1, *[1] * (data.dim() - 1))


def _fitting(noise: Tensor | Sequence[Tensor], inputs: Tensors) -> list[Tensor]:
    """Noise for each input, of shape (n, *data shape)."""
    given: list[Any] = [*noise] if isinstance(noise, list | tuple) else [noise]
    if wrong := [one for one in given if not isinstance(one, Tensor)]:
        raise InputTypeError(
            f"noise must be a tensor for each input, not {shortened(wrong[0])}; its size is noise_level"
        )
    for tensor in given:
        if tensor.is_complex() or not torch.isfinite(tensor).all():
            raise InputError(f"noise must be real numbers, and finite; it is {shortened(tensor)}")
    if len(given) != len(inputs):
        raise InputError(f"there is noise for {len(given)} inputs of {len(inputs)}; give one tensor for each")
    widths = []
    for tensor, data in zip(given, inputs, strict=True):
        try:
            if tensor.dim() != data.dim() + 1 or len(tensor) == 0:
                raise RuntimeError
            widths.append(tensor.to(data).expand(len(tensor), *data.shape))
        except RuntimeError:
            raise InputError(
                f"noise has shape {tuple(tensor.shape)}; for data of shape {tuple(data.shape)} it must be "
                f"(n, {', '.join(map(str, data.shape))}), or broadcast to it"
            ) from None
    if len({len(tensor) for tensor in widths}) > 1:
        raise InputError(f"noise is given {[len(tensor) for tensor in widths]} times; as often for each input")
    return widths
