"""What the tests of canonizers share: statistics that are not trivial, and one check of everything at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
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
