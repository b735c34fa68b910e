"""Metrics of models that return a dict, a segmentation or boxes: ``output=`` takes the scores of classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attributor_cases import METRICS, InDict
from torch import Tensor, nn

from crp.attributors import Occlusion
from crp.composites import EpsilonPlus
from crp.metrics import pixel_flipping, quantus_explain
from crp.outputs import entry, segmentation

F64 = {"dtype": torch.float64}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)
    return nn.Sequential(*layers).double().eval()


def data() -> Tensor:
    return torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(1), **F64)


def values(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [*found.values()] if isinstance(found, dict) else [*found]


@pytest.mark.parametrize("method", ["epsilon_plus", EpsilonPlus(), Occlusion], ids=["name", "composite", "class"])
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("target", [None, 2])
def test_metrics_of_what_is_taken_from_a_dict_are_those_of_the_net(name, method, target, untouched):
    metric, model = METRICS[name], InDict(net()).eval()
    with untouched(model):
        found = metric(model, data(), target, method, output=entry("scores"))
    for one, expected in zip(values(found), values(metric(net(), data(), target, method)), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-12)


def test_pixels_of_a_segmentation_are_flipped_by_the_sum_of_their_logits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False)).double().eval()
    output = segmentation(None, where="all", positive=False)
    settings: dict[str, Any] = {"score": "output", "output": output}
    found = pixel_flipping(model, data(), 1, "gradient_x_input", step=5, **settings)
    relevance = (model[0].weight[1, :, 0, 0][None, :, None, None] * data()).sum(1).flatten(1)
    ordered = relevance.sort(1, descending=True).values
    gone = torch.stack([ordered[:, : 5 * k].sum(1) for k in range(5)], 1)
    torch.testing.assert_close(found.most, ordered.sum(1, keepdim=True) - gone)
    with pytest.raises(ValueError, match=r"score='softmax' is of classes that exclude each other.*give 'output'"):
        pixel_flipping(model, data(), 1, "gradient_x_input", output=output)


def test_options_of_quantus_may_name_the_output():
    wanted = quantus_explain("epsilon_plus", output=entry("scores"))
    model, inputs = InDict(net()).eval(), data().numpy()
    found = quantus_explain("epsilon_plus")(model, inputs, [0, 1, 2], output=entry("scores"))
    assert (found == wanted(model, inputs, [0, 1, 2])).all() and abs(found).sum() > 0


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("scores", TypeError, "output must be a function of what the model returns, or None; not 'scores'"),
        (None, TypeError, "the model returns a dict"),
        (entry("logits"), KeyError, "and not 'logits'"),
        (lambda returned: [returned], TypeError, "output returned a list"),
        (lambda returned: returned["scores"].sum(), TypeError, "a row for each sample"),
    ],
    ids=["no function", "none", "no entry", "list", "number"],
)
def test_what_is_no_output_is_refused(name, output, error, message, untouched):
    model = InDict(net()).eval()
    with untouched(model), pytest.raises(error, match=message):
        METRICS[name](model, data(), 1, "epsilon_plus", output=output)
