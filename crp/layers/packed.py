"""Weights that are packed into a few bits: tensors of classes that unpack themselves, as torchao's and quanto's."""

from __future__ import annotations

from torch import Tensor, nn


def is_packed(weight: Tensor) -> bool:
    """Whether a tensor is of such a class."""
    kind = type(weight)
    return kind is not Tensor and kind is not nn.Parameter and kind.dequantize is not Tensor.dequantize


def unpacked(weight: Tensor) -> Tensor:
    """Weight as numbers in memory, to be taken apart."""
    return weight.dequantize() if is_packed(weight) else weight
