"""What the tests of canonizers share: statistics that are not trivial, and one check of everything at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from crp.canonizers import MergeBatchNorm
from crp.canonizers.norms import is_batch_norm


def randomize(model: nn.Module) -> nn.Module:
    """Give every batch norm in a model statistics and parameters that do something; returns the model."""
    with torch.no_grad():
        for norm in filter(is_batch_norm, model.modules()):
            for tensor, low, high in (
                (norm.weight, 0.5, 1.5),
                (norm.bias, -1, 1),
                (norm.running_mean, -1, 1),
                (norm.running_var, 0.5, 1.5),
            ):
                if tensor is not None:
                    tensor.uniform_(low, high)
    return model


def ready(model: nn.Module) -> nn.Module:
    return randomize(model).double().eval()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layer_and_norms(
    draw: Callable[[Any], Any], bias: bool, mode: str, **of_norm: Any
) -> tuple[nn.Module, tuple[nn.Module, nn.Module], Tensor, bool]:
    """A layer with this mode of padding, batch norms for before and after it, and an input.

    Also whether what is added to the input reaches all outputs alike, at borders too.
    """
    kind, axes = draw(st.sampled_from([("conv", 1), ("conv", 2), ("transposed", 1), ("transposed", 2), ("linear", 0)]))
    groups = draw(st.sampled_from([1, 2, 4])) if kind != "linear" else 1
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, stride, dilation = (draw(st.integers(1, 3)) for _ in range(3))
    padding = draw(st.integers(0, kernel // 2))
    if kind == "linear":
        layer, exact = nn.Linear(inputs, outputs, bias=bias), True
    elif kind == "conv":
        layer = (nn.Conv1d, nn.Conv2d)[axes - 1](
            inputs, outputs, kernel, stride, padding, dilation, groups, bias, padding_mode=mode
        )
        exact = mode == "replicate" or padding == 0
    else:
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d)[axes - 1](
            inputs, outputs, kernel, stride, padding, 0, groups, bias, dilation
        )
        exact = kernel == stride == dilation == 1
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[axes]
    return layer, (norm(inputs, **of_norm), norm(outputs, **of_norm)), random(2, inputs, *(8,) * axes), exact


class Merged:
    """Context in which a model's batch norms are merged after its first call."""

    def __init__(self, model: nn.Module, data: Tensor):
        self.model, self.data = model, data

    def __enter__(self):
        (self.canonizer,) = MergeBatchNorm().apply(self.model)
        try:
            self.output = self.model(self.data)
        except BaseException:
            self.canonizer.remove()
            raise
        return self

    def __exit__(self, *_):
        self.canonizer.remove()


def check(
    model: nn.Module,
    data: Tensor,
    merged: Mapping[str, str],
    left: Mapping[str, str] = {},
    tolerance: float = 1e-12,
) -> MergeBatchNorm:
    """Assert what is merged and what is left (reasons in part), and that predictions are those of before."""
    reference = model(data).detach()
    with Merged(model, data) as run:
        pass
    assert run.canonizer.merged == merged
    assert run.canonizer.left.keys() == left.keys()
    for name, reason in left.items():
        found = run.canonizer.left[name]
        assert reason in found
        assert len(set(found.split("; "))) == len(found.split("; "))
    assert run.output.dtype == reference.dtype
    assert (run.output - reference).abs().max() <= tolerance * reference.abs().max()
    assert torch.equal(model(data), reference)
    return run.canonizer
