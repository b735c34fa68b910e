"""Checks of tensors that are to have values."""

from __future__ import annotations

import torch
from torch import Tensor

from crp.errors import InputTypeError


def check_form(tensor: Tensor, name: str) -> None:
    """Raise an `InputTypeError` for tensors that are no plain numbers in memory: sparse, nested, quantized or meta."""
    if tensor.is_nested:
        raise InputTypeError(f"{name} is a nested tensor; give samples of one shape in a plain tensor, or one by one")
    if tensor.layout is not torch.strided:
        raise InputTypeError(f"{name} is of layout {tensor.layout}; give a dense tensor, as by {name}.to_dense()")
    if tensor.is_quantized:
        raise InputTypeError(f"{name} is quantized ({tensor.dtype}); give floating-point numbers: {name}.dequantize()")
    if tensor.is_meta:
        raise InputTypeError(f"{name} is on the meta device, where tensors have no values")
