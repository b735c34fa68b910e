r"""Rules for the first layer, whose inputs are pixels: flat, w² and zᴮ.

An input of zero, a black pixel say, may get relevance by these rules, which no multiplier can express. They therefore
belong on the first layer, where they hand out relevance itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from crp.errors import InputError, InputTypeError
from crp.layers.devices import can_be_read, send_to
from crp.layers.marks import TensorMark
from crp.notices import warn
from crp.rules.layer import Layer, _ones, _square, negative, positive
from crp.rules.lrp import LRPRule, Names
from crp.rules.stabilizer import Stabilize
from crp.rules.terms import Term
from crp.wording import percent, shortened

Bound = float | Tensor | Sequence[Any]
#: Share of an input beyond the bounds, from which on they cannot be meant: random noise has a few such values.
_BEYOND = 0.1
#: What values may be beyond them by rounding, relative to the distance of the bounds.
_ROUNDING = 1e-2


class WSquare(LRPRule):
    r"""w² rule, :math:`R_i = \sum_j \frac{w_{ij}^2}{\sum_{i'} w_{i'j}^2 + b_j^2} R_j`.

    Montavon et al., Pattern Recognition 65 (2017), eq. 12. For the first layer, where inputs are unbounded. Conserves
    relevance without bias; with one, :math:`b^2` stands in the denominator as in zennit. The paper's nets have none:
    ``zero_params="bias"``.

    Parameters
    ----------
    stabilizer : float or callable
    zero_params : str or sequence of str, optional
    norm_scale : bool
    """

    at_input = True

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the sum of the squared weights."""
        return layer(a, _square)


class Flat(LRPRule):
    r"""Flat rule, :math:`R_i = \sum_j \frac{1}{\sum_{i'} 1} R_j`: the same for every input in reach.

    Lapuschkin et al., Nature Communications 10 (2019), supplementary note 2. For the first layer, where it trades
    detail for robustness. An output at the border shares among the pixels that there are, not the zeros around them;
    a pixel that padding repeats counts each time it is read. Conserves relevance.

    Parameters
    ----------
    stabilizer : float or callable
    norm_scale : bool
    """

    at_input = True
    settings: ClassVar[tuple[str, ...]] = ("stabilizer", "norm_scale")

    def __init__(self, stabilizer: Stabilize = 1e-6, *, norm_scale: bool = False) -> None:
        super().__init__(stabilizer, norm_scale=norm_scale)

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the number of inputs in reach."""
        return layer(a, _ones, bias=False)

    def terms(self, layer: Layer, a: Tensor, y: Tensor) -> Sequence[Term]:
        """Number of inputs in reach; one convolution of one channel serves where all channels read the same."""
        operands = layer.operands
        assert operands is not None
        if not operands.space and layer.copied is not None:
            _check_distinct(layer.inputs[0], layer.copied.inputs(), layer)
        channels = -operands.space - 1
        if not operands.convolves or a.shape[channels] != operands.weight.shape[1]:  # (several groups of channels)
            return [Term(self.surrogate(layer, a), sign=1)]
        kernel = torch.ones(1, 1, *operands.weight.shape[2:], dtype=y.dtype, device=y.device)
        with layer.precision():
            reached = operands.run(a.sum(channels, keepdim=True), kernel, None)
        return [Term(reached.expand(y.shape), denominator=reached, sign=1)]


class ZBox(LRPRule):
    r"""zᴮ rule, for inputs between bounds :math:`l` and :math:`h`.

    .. math:: R_i = \sum_j \frac{a_i w_{ij} - l_i w_{ij}^+ - h_i w_{ij}^-}{\sum_{i'} (\cdot)} R_j

    Montavon et al. (2017), eq. 14. For the first layer of a model of pixels. Conserves relevance; the bias takes no
    part.

    Parameters
    ----------
    low, high : float, Tensor or nested list
        Smallest and largest value an input can have, after preprocessing. Shapes broadcast to the layer's input as
        everywhere in torch, from the right: (channels, 1, 1) or (1, channels, 1, 1) for images, (features,) for
        vectors. Bounds that are the same for all samples of a batch serve for batches of any size.
    stabilizer : float or callable
    zero_params : str or sequence of str, optional
    norm_scale : bool

    Raises
    ------
    ValueError
        If ``low`` is not below ``high`` everywhere, or a bound is not finite; when the model runs, if a bound does not
        broadcast to the layer's input.

    Warns
    -----
    UserWarning
        If over a tenth of the values of the first input are not between the bounds, such as normalised pixels where
        the bounds are those of pixels: relevance is then not what the rule is for.
    """

    at_input = True
    settings: ClassVar[tuple[str, ...]] = ("low", "high", "stabilizer", "zero_params", "norm_scale")

    def __init__(
        self,
        low: Bound,
        high: Bound,
        stabilizer: Stabilize = 1e-6,
        zero_params: Names = None,
        *,
        norm_scale: bool = False,
    ) -> None:
        super().__init__(stabilizer, zero_params, norm_scale=norm_scale)
        self.low, self.high = _bound("low", low), _bound("high", high)
        below, above = torch.as_tensor(self.low).cpu(), torch.as_tensor(self.high).cpu()
        try:
            ordered = bool((below < above).all() and below.isfinite().all() and above.isfinite().all())
        except RuntimeError:
            raise InputError(
                f"low and high do not broadcast against each other: {tuple(below.shape)} and {tuple(above.shape)}"
            ) from None
        if not ordered:
            raise InputError(f"low must be below high everywhere, and both finite; got low={low} and high={high}")
        self._looked = list[bool]()  # (copies share it)

    @classmethod
    def from_normalization(
        cls,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        low: float = 0.0,
        high: float = 1.0,
        **keywords: Any,
    ) -> ZBox:
        """Rule for images with pixels from ``low`` to ``high``, prepared by torchvision's ``Normalize(mean, std)``.

        Parameters
        ----------
        mean, std : float or sequence of float
            One value for all channels, or one per channel.
        low, high : float
            Smallest and largest pixel value before the normalisation.
        **keywords
            Further arguments of `ZBox`.

        Returns
        -------
        ZBox
            With bounds ``(low - mean) / std`` and ``(high - mean) / std`` of shape (1, channels, 1, 1).

        Raises
        ------
        ValueError
            If ``std`` is not positive, or ``mean`` and ``std`` have different lengths.
        """
        means, stds = (torch.as_tensor(values, dtype=torch.float64).reshape(-1) for values in (mean, std))
        if not (stds > 0).all():
            raise InputError(f"std must be positive, got {std}")
        if len(means) != len(stds) and 1 not in (len(means), len(stds)):
            raise InputError(f"mean and std must have one value per channel each, got {len(means)} and {len(stds)}")
        lowest, highest = (((bound - means) / stds).reshape(1, -1, 1, 1) for bound in (low, high))
        return cls(lowest, highest, **keywords)

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the contributions beyond those of the bounds."""
        value = layer.input
        low, high = (_fitted(name, bound, value, layer) for name, bound in (("low", self.low), ("high", self.high)))
        # a w - l w⁺ - h w⁻ = (a - l) w⁺ + (a - h) w⁻, of which nothing is negative between the bounds.
        above, below = value - low, value - high
        if not self._looked and value.numel() and can_be_read(value):
            self._looked.append(True)
            margin = _ROUNDING * (high - low)  # (black pixels have the bound itself, but for rounding)
            _check_between(value.detach(), (above < -margin) | (below > margin))
        return layer(a * above, positive, bias=False) + layer(a * below, negative, bias=False)


def _check_distinct(a: Tensor, inputs: Sequence[Tensor], layer: Layer) -> None:
    """Warn where all that a sample consists of is read by every output of a dense layer."""
    of_each = [tensor.numel() // max(len(tensor), 1) for tensor in inputs]
    if a.dim() == 2 and a.shape[1] == sum(of_each) > 1 and all(len(tensor) == len(a) for tensor in inputs):
        warn(
            f"Flat gives all {a.shape[1]} inputs of {layer} the same relevance, as each of its outputs reads all of "
            "them. Give dense layers another rule, as in first_map=[(torch.nn.Linear, Epsilon())]"
        )


def _check_between(value: Tensor, is_beyond: Tensor) -> None:
    """Warn where bounds cannot be those of an input, such as bounds of pixels of what is normalised."""
    share = float(is_beyond.double().mean())
    if share > _BEYOND:
        warn(
            f"ZBox: {percent(share)} of the input are not between low and high, which must be the smallest and largest "
            f"value that an input can have after preprocessing; this one has {float(value.min()):.3g} to "
            f"{float(value.max()):.3g}. ZBox.from_normalization(mean, std) has the bounds of normalised pixels"
        )


def _bound(name: str, bound: Bound) -> float | Tensor:
    try:
        tensor = torch.as_tensor(bound)
        is_number = tensor.dtype != torch.bool and not tensor.is_complex()
    except (TypeError, ValueError, RuntimeError):
        is_number = False
    if not is_number:
        raise InputTypeError(f"{name} must be a number, a tensor or a nested list of numbers, not {shortened(bound)}")
    return torch.tensor(bound, dtype=torch.float64) if isinstance(bound, Sequence) else bound


#: Bounds where they were needed last, so that they are not copied to a device at each call.
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _placed(bound: Tensor, value: Tensor) -> Tensor:
    """Bound in the dtype and on the device of a value."""
    known: tuple[TensorMark, Tensor] | None = _copies.get(bound)  # type: ignore[no-untyped-call]
    if known is not None and known[0].is_of(bound) and (known[1].dtype, known[1].device) == (value.dtype, value.device):
        return known[1]
    copy = send_to(value.device, bound.detach().to(value.dtype))
    _copies[bound] = TensorMark(bound), copy
    return copy


def _fitted(name: str, bound: float | Tensor, value: Tensor, layer: Layer) -> Tensor:
    """Bound in the shape of the layer's input."""
    values = _placed(bound, value) if isinstance(bound, Tensor) else value.new_full((), bound)
    batch = len(values) if values.ndim == value.ndim else 1
    if batch not in (1, len(value)) and (values == values[:1]).all():
        values = values[:1]
    try:
        return values.expand(value.shape)
    except RuntimeError:
        if layer.copied is not None and values.dim():  # bounds of pixels, which padding and the like have moved
            with contextlib.suppress(RuntimeError):
                return layer.copied.of(lambda leaf: values.expand(leaf.shape)).detach()
        raise InputError(
            f"ZBox: {name} has the shape {tuple(values.shape)}, which does not broadcast to the layer's input of shape "
            f"{tuple(value.shape)}; bounds per channel of an image have the shape (channels, 1, 1)"
        ) from None
