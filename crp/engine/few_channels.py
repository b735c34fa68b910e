"""A convolution whose output's gradient has few channels, as below a mask: it costs no more than these.

A condition leaves a row one channel of a layer, or a few. What is sent back through the layer then is almost all zeros,
and a convolution takes as long with zeros as with anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

#: Fewer channels of a row take as long, or longer, in the kernels of a CPU.
_AT_LEAST = 8
#: Multiplications of the whole convolution below which looking for channels does not pay.
_WORTH = 2**24


def below_convolution(root: Tensor, cotangent: Tensor, goals: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Where to go on from instead of ``root``: inputs of the convolutions that made it, and what arrives at each.

    From a cotangent of shape (slots, *root shape) to some of shape (slots, *input shape); the same to rounding as by
    the whole convolutions. Where that would be no faster, ``root`` and ``cotangent`` come back.
    """
    same = [root], [cotangent]
    if cotangent.device.type != "cpu" or any(goal.grad_fn is root.grad_fn for goal in goals):
        return same
    convolutions = _surrogates(root.grad_fn)
    n_made = cotangent[0, 0].numel() if convolutions and root.dim() == convolutions[0]._saved_weight.dim() else 0
    if len(cotangent) * len(root) * n_made * sum(of._saved_weight[0].numel() for of in convolutions) < _WORTH:
        return same
    edges = [GradientEdge(convolution, 0) for convolution in convolutions]
    grad: Callable[..., Any] = partial(torch.autograd.grad, root, edges, retain_graph=True, allow_unused=True)
    slots = grad(cotangent, is_grads_batched=True) if len(cotangent) > 1 else grad(cotangent[0])
    sources, sent = [], []
    for convolution, arrived in zip(convolutions, slots, strict=True):
        if arrived is None:  # (what the layer itself put out, past which the rule goes)
            continue
        source = convolution._saved_input
        gradient = _sent_back(convolution, arrived.reshape(-1, *root.shape[1:]), source)
        if gradient is None:
            return same
        sources.append(source)
        sent.append(gradient.reshape(*cotangent.shape[:2], *source.shape[1:]))
    return (sources, sent) if sources else same


def _surrogates(node: Any) -> list[Any]:
    """The convolutions, or sums of such, to which a rule redirects an output's gradient; none if it is not like that.

    A convolution without a rule may have hooks of others, which must see what arrives.
    """
    if not getattr(getattr(node, "_forward_cls", None), "only_scales", False):
        return []
    found: dict[Any, None] = {}  # (one may be there several times)
    todo = [node]
    while todo:
        for below, _ in todo.pop().next_functions:
            if below is None:
                continue
            if below.name() == "AddBackward0":
                todo.append(below)
            elif below.name() == "ConvolutionBackward0" and below._saved_groups == 1 and not below._saved_transposed:
                found[below] = None
            else:
                return []
    return list(found)


def _sent_back(convolution: Any, gradient: Tensor, source: Tensor) -> Tensor | None:
    """Gradient of a convolution's input from that of its output; None where too many channels are not zero."""
    rows, n_channels, *_ = gradient.shape
    alive = gradient.flatten(2).any(-1)
    most = max(_AT_LEAST, int(alive.sum(1).max()))
    if most > n_channels // 4:
        return None
    kept = alive.to(torch.uint8).topk(most, dim=1).indices
    picked = torch.take_along_dim(gradient, kept.reshape(rows, most, *(1,) * (gradient.dim() - 2)), 1)
    # Each row is a group of one convolution, as it has channels of its own.
    sent = torch.ops.aten.convolution_backward(
        picked.flatten(0, 1)[None],
        picked.new_empty(1).expand(1, rows * source.shape[1], *source.shape[2:]),
        convolution._saved_weight[kept.flatten()],
        None,
        convolution._saved_stride,
        convolution._saved_padding,
        convolution._saved_dilation,
        False,
        convolution._saved_output_padding,
        rows,
        (True, False, False),
    )
    return cast(Tensor, sent[0])
