"""Max-pooling as sum-pooling, for methods that share relevance within a window, not only with its maximum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from crp.errors import InputTypeError
from crp.rules.base import Rule
from crp.rules.functions import Function
from crp.rules.layer import Layer
from crp.rules.stabilizer import Stabilize, stabilizing


class SumPool(Rule):
    r"""Max-pooling as if it were sum-pooling: in proportion to the inputs of a window.

    .. math:: R_i = \sum_{j:\, i \in W_j} \frac{a_i}{\sum_{i' \in W_j} a_{i'}} R_j

    The ordinary chain rule gives all relevance of a window :math:`W_j` to its maximum, and changes abruptly where
    another input becomes the maximum; here it changes continuously. Recommended with deep Taylor decomposition in
    Montavon, Samek and Müller, "Methods for interpreting and understanding deep neural networks", Digital Signal
    Processing 73 (2018). Conserves relevance. It is for inputs that are not negative, as behind a ReLU; with other
    signs a sum may be close to 0. Windows may overlap, and have stride, padding, dilation and ``ceil_mode``; padding
    gets no relevance.

    Parameters
    ----------
    stabilizer : float or callable
        Not needed where inputs are not negative.
    """

    settings: ClassVar[tuple[str, ...]] = ("stabilizer",)

    def __init__(self, stabilizer: Stabilize = 0.0) -> None:
        super().__init__(stabilizing(stabilizer))
        self.stabilizer = stabilizer

    def surrogate(self, layer: Layer, a: Tensor) -> Tensor:
        """Return the sums of the windows, up to a factor for each."""
        settings, dims = layer.arguments, int(layer.name.split("pool")[1][0])
        if "output_size" in settings:
            pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 1]
            return pool(a, settings["output_size"])
        return _window_sums(a, dims, settings)

    def operate(self, layer: Layer) -> Any:
        """Treat a max-pooling function; indices, if it gives them, stay as they are."""
        if not layer.known.has("maximum"):
            raise InputTypeError(f"SumPool treats max-pooling, not {layer}")
        if not isinstance(layer.output, tuple):
            return super().operate(layer)
        values, *others = layer.output
        return (super().operate(replace(layer, function=_values_of(layer.function), result=values)), *others)

    def treats(self, known: Function, kind: str, alone: bool) -> bool:
        """Max-pooling."""
        return known.has("maximum")


def _values_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pooling function without its indices."""

    @functools.wraps(function)
    def values(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)[0]

    return values


def _window_sums(a: Tensor, dims: int, settings: dict[str, Any]) -> Tensor:
    def per_axis(name: str, default: Any) -> list[int]:
        value = settings.get(name)
        value = default if value is None or value == [] or value == () else value
        return list(value) * (dims if len(value) == 1 else 1) if isinstance(value, list | tuple) else [value] * dims

    kernel = per_axis("kernel_size", None)
    stride, padding, dilation = per_axis("stride", kernel), per_axis("padding", 0), per_axis("dilation", 1)
    sizes = a.shape[-dims:]
    flat = a.reshape(-1, 1, *sizes)
    beyond = []
    for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True):
        span, room = d * (k - 1) + 1, size + 2 * p
        count = (room - span) // s + 1
        if settings.get("ceil_mode") and (room - span) % s and count * s < size + p:
            count += 1  # one more window, unless it would begin in the padding
        beyond += [max((count - 1) * s + span - size - p, 0), p]
    # (from the last axis to the first, as `pad` takes it)
    ones = a.new_ones(1, 1, *kernel)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    sums = convolution(F.pad(flat, beyond[::-1]), ones, None, stride, 0, dilation)
    return sums.reshape(*a.shape[:-dims], *sums.shape[-dims:])
