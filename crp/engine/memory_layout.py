"""Channels last in memory, where that is faster. Numbers are the same up to rounding.

torch's kernels take either layout. On a CPU, depthwise convolutions and what is around them are faster with the
channels last, and most other nets are not. The units of a GPU that multiply matrices read the channels last, and of
data in the usual layout cuDNN makes a copy before and after each convolution. The benchmarks have tables. Only the data
changes its layout: layers follow their input, and the model's parameters stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from crp.engine.backward import lacks_memory
from crp.engine.forward import ForwardPass
from crp.engine.independence import _deviation, _row, _run, _tolerance
from crp.engine.inputs import Inputs
from crp.layers import modules_of

#: Share of depthwise ones among a model's convolutions that decides: MobileNet has 0.33, EfficientNet 0.2.
_DEPTHWISE = 1 / 6
#: Share of depthwise ones among a model's convolutions; None where it has none.
_shares: weakref.WeakKeyDictionary[nn.Module, float | None] = weakref.WeakKeyDictionary()
#: Whether a model gives the same with the channels last, by the shape of a sample.
_same: weakref.WeakKeyDictionary[nn.Module, dict[torch.Size, bool]] = weakref.WeakKeyDictionary()


def is_faster_channels_last(model: nn.Module, inputs: Inputs) -> bool:
    """Whether to try a model's forward pass with the channels last; the answer does not depend on any clock."""
    data = inputs.data
    if not isinstance(data, Tensor) or data.dim() != 4:
        return False
    if data.device.type == "cpu":
        if data.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
    elif data.device.type != "cuda" or not _multiplies_matrices(data):
        return False
    if model not in _shares:
        convolutions = [module for module in modules_of(model).values() if isinstance(module, nn.Conv2d)]
        n_depthwise = sum(1 < module.groups == module.in_channels for module in convolutions)
        _shares[model] = n_depthwise / len(convolutions) if convolutions else None
    share = _shares[model]
    return share is not None and (share >= _DEPTHWISE) == (data.device.type == "cpu")


def _multiplies_matrices(data: Tensor) -> bool:
    """Whether convolutions on a GPU run on its units for products of matrices, which are for short numbers."""
    if torch.is_autocast_enabled("cuda") or data.dtype in (torch.float16, torch.bfloat16):
        return torch.cuda.get_device_capability(data.device) >= (7, 0)
    exact = data.dtype != torch.float32 or not torch.backends.cudnn.allow_tf32
    return not exact and torch.cuda.get_device_capability(data.device) >= (8, 0)


def _is_same_channels_last(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model predicts the same with the channels last, which is seen once for each shape of a sample.

    It runs for two samples in either layout, and is as it was afterwards.
    """
    shape, known = inputs.explained[0].shape[1:], _same.setdefault(model, {})
    if shape not in known:
        few = inputs.select([*range(min(len(inputs), 2))])
        try:
            pair = [_row(_run(model, samples), None, 0) for samples in (few, _laid_out(few))]
            known[shape] = _deviation(*pair) <= _tolerance(inputs)
        except Exception as error:  # such as that of a `view`, which needs the usual layout
            _note_error(error, model, shape)
    return known.get(shape, False)


def _run_channels_last(run: Callable[[Inputs], ForwardPass], model: nn.Module, inputs: Inputs) -> ForwardPass | None:
    """Forward pass of a tensor of (samples, channels, height, width), the channels last; None where rules cannot."""
    try:
        return run(_laid_out(inputs))
    except Exception as error:
        _note_error(error, model, inputs.explained[0].shape[1:])
        return None


def _laid_out(inputs: Inputs) -> Inputs:
    return inputs.each(lambda data: data.contiguous(memory_format=torch.channels_last))


def _note_error(error: Exception, model: nn.Module, shape: torch.Size) -> None:
    if not lacks_memory(error):
        _same.setdefault(model, {})[shape] = False
