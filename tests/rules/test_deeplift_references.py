"""References of DeepLIFT: constants, tensors, functions, distributions; which samples they belong to; and bad ones."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from deeplift_cases import relevance, sum_error
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.composites import DeepLift, get

CONDITIONS = [{"y": [1]}]


def blurred(data: Tensor) -> Tensor:
    return data.mean((2, 3), keepdim=True).expand_as(data)


@pytest.fixture
def model() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(16, 3))
    return layers.double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x0() -> Tensor:
    return torch.randn(4, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def heatmap(model: nn.Module, data: Tensor, reference: object, **keywords) -> Tensor:
    composite = DeepLift(reference=reference)
    return CondAttribution(model)(data.clone().requires_grad_(), CONDITIONS, composite, **keywords).heatmap


def test_references_of_every_kind_say_the_same(model: nn.Module, x: Tensor) -> None:
    one = torch.full((2, 7, 7), 0.25)
    expected = relevance(model, x, DeepLift(reference=0.25))
    for reference in (one, one[None], one.expand(4, -1, -1, -1), one.tolist(), one.half(), lambda data: one.to(data)):
        assert torch.equal(relevance(model, x, DeepLift(reference=reference)), expected)
    assert sum_error(model, x, one.to(x), expected) < 1e-13
    for nothing in (None, 0):
        assert torch.equal(relevance(model, x, DeepLift(reference=nothing)), relevance(model, x, DeepLift()))


def test_a_function_sees_the_data_it_is_for(model: nn.Module, x: Tensor) -> None:
    found = relevance(model, x, DeepLift(reference=blurred))
    assert sum_error(model, x, blurred(x), found) < 1e-13


def test_samples_do_not_depend_on_their_batch(model: nn.Module, x: Tensor, x0: Tensor) -> None:
    for reference in (x0[0], blurred):
        whole = relevance(model, x, DeepLift(reference=reference))
        alone = torch.cat([relevance(model, x[i : i + 1], DeepLift(reference=reference)) for i in range(4)])
        torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-13)
    each = [relevance(model, x[i : i + 1], DeepLift(reference=x0[i])) for i in range(4)]
    torch.testing.assert_close(relevance(model, x, DeepLift(reference=x0)), torch.cat(each), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("variant", ["rescale", "reveal_cancel"])
def test_data_as_its_own_reference_has_no_relevance(model: nn.Module, x: Tensor, variant: str) -> None:
    found = relevance(model, x, DeepLift(reference=x, variant=variant))
    assert torch.equal(found, torch.zeros_like(x))


def test_multiplier_of_no_difference_is_the_gradient(model: nn.Module, x: Tensor) -> None:
    found = relevance(model, x, DeepLift(reference=x - 1e-13))
    data = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(data)[:, 0].sum(), data)
    torch.testing.assert_close(found / (x - (x - 1e-13)), gradient, rtol=1e-2, atol=1e-3)


def test_distributions_give_the_mean(model: nn.Module, x: Tensor, x0: Tensor) -> None:
    expected = torch.stack([heatmap(model, x, reference) for reference in (x0[:1], x0[1:2], 0.5)]).mean(0)
    found = heatmap(model, x, [x0[:1], x0[1:2], 0.5])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    stacked = torch.stack([x0[:1], x0[1:2], torch.full_like(x0[:1], 0.5)])
    assert torch.equal(heatmap(model, x, stacked), found) and torch.equal(heatmap(model, x, stacked.tolist()), found)
    one_each = torch.stack([x0, x0.flip(0)])
    expected = (heatmap(model, x, x0) + heatmap(model, x, x0.flip(0))) / 2
    torch.testing.assert_close(heatmap(model, x, one_each), expected, rtol=1e-12, atol=1e-13)


def test_a_distribution_is_averaged_in_recorded_layers_and_parts_too(model: nn.Module, x: Tensor, x0: Tensor) -> None:
    composite, attribution = DeepLift(reference=[x0[:1], blurred]), CondAttribution(model)
    data = x.clone().requires_grad_()
    whole = attribution(data, CONDITIONS, composite, record_layer=["0"])
    delta = model(x)[:, 1] - (model(x0[:1])[:, 1] + model(blurred(x))[:, 1]) / 2
    torch.testing.assert_close(whole.relevances["0"].flatten(1).sum(1), delta.detach(), rtol=1e-11, atol=1e-12)
    parts = attribution.generate(data, CONDITIONS * 4, composite, batch_size=3, verbose=False)
    torch.testing.assert_close(torch.cat([part.heatmap for part in parts]), whole.heatmap, rtol=1e-11, atol=1e-12)


def test_parts_take_their_own_of_references_that_are_given_per_sample(model: nn.Module, x: Tensor, x0: Tensor) -> None:
    attribution, data = CondAttribution(model), x.clone().requires_grad_()
    parts = attribution.generate(data, CONDITIONS * 4, DeepLift(reference=x0), batch_size=3, verbose=False)
    found = torch.cat([part.heatmap for part in parts])
    torch.testing.assert_close(found, heatmap(model, x, x0), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reference", [0.5, torch.full((2, 7, 7), 0.5)])
def test_inputs_that_are_not_explained_stay_as_they_are(x: Tensor, reference: float | Tensor) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor, factor: Tensor) -> Tensor:
            return (x.tanh() * mask.relu() * factor.exp()).flatten(1).sum(1, keepdim=True)

    given, mask, factor = x.clone().requires_grad_(), torch.rand_like(x), torch.rand_like(x)
    with DeepLift(reference=reference).context(Masked()) as model:
        (found,) = torch.autograd.grad(model(given, mask, factor=factor).sum(), given)
    torch.testing.assert_close(found, (x.tanh() - torch.tensor(0.5).to(x).tanh()) * mask * factor.exp())


def test_two_inputs_are_explained_together(x: Tensor) -> None:
    class Sum(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return (left.tanh() + right.sigmoid()).flatten(1).sum(1)

    left, right = x.clone().requires_grad_(), (2 * x).requires_grad_()
    with DeepLift(reference=lambda data: data * 0.5).context(Sum()) as model:
        found = torch.autograd.grad(model(left, right=right).sum(), (left, right))
    torch.testing.assert_close(found[0], x.tanh() - (x / 2).tanh())
    torch.testing.assert_close(found[1], (2 * x).sigmoid() - x.sigmoid())


def test_preprocessing_in_place_leaves_data_and_reference_alone(x: Tensor, x0: Tensor) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sub_(1).tanh().flatten(1).sum(1, keepdim=True)

    kept = x0.clone()
    found = relevance(Shifted(), x, DeepLift(reference=x0[0]))
    torch.testing.assert_close(found, (x - 1).tanh() - (x0[0] - 1).tanh())
    assert torch.equal(x0, kept) and not x0.requires_grad


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (torch.zeros(3, 7, 7), r"reference of shape \(3, 7, 7\) for data of shape \(4, 2, 7, 7\): it must have that"),
        (torch.zeros(7, 7), r"reference of shape \(7, 7\) for data"),
        (torch.zeros(3, 2, 7, 7), r"\(3, 2, 7, 7\) .* for any part of the samples, give one reference for all, or a f"),
        (lambda data: data[:2], r"the reference function returned shape \(2, 2, 7, 7\) for data of \(4, 2, 7, 7\)"),
        ([0.0, torch.zeros(1, 2, 7, 7)], r"has 2 references, whose results CondAttribution averages"),
        (torch.zeros(5, 1, 2, 7, 7), r"has 5 references, whose results CondAttribution averages"),
        (torch.full((2, 7, 7), torch.nan), "the reference has NaN, infinite or complex values"),
        (torch.zeros(2, 7, 7) + 1j, "the reference has NaN, infinite or complex values"),
        (lambda data: data / 0, "the reference has NaN, infinite or complex values"),
    ],
)
def test_references_that_do_not_fit(model: nn.Module, x: Tensor, reference: object, message: str) -> None:
    ran = []
    model[0].register_forward_pre_hook(lambda *_: ran.append(True))
    with pytest.raises(ValueError, match=message):
        relevance(model, x, DeepLift(reference=reference))
    assert not ran


def test_references_in_a_list_need_a_batch_axis(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"references in a list have a batch axis; give .*\(1, 2, 7, 7\)"):
        heatmap(model, x, [torch.zeros(2, 7, 7), 0.0])


def test_keywords_are_checked() -> None:
    with pytest.raises(ValueError, match="variant must be one of 'rescale', 'reveal_cancel', not 'shap'"):
        DeepLift(variant="shap")
    for wrong in ("zero", [], {}, object()):
        with pytest.raises(TypeError, match="a reference is a number, a tensor, a function of the data, or a list"):
            DeepLift(reference=wrong)
    with pytest.raises(ValueError, match="the reference must be a finite number, not nan"):
        DeepLift(reference=float("nan"))
    with pytest.raises(TypeError, match="the reference function must return a tensor, not 0"):
        relevance(nn.Linear(2, 2), torch.ones(1, 2), DeepLift(reference=lambda data: 0))


def test_paths_that_depend_on_values_are_refused(x: Tensor) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.tanh() if x.sum() != 0 else x.sigmoid()).flatten(1)

    with pytest.raises(RuntimeError, match=r"the model ran tanh.* for the data, but sigmoid.* for the reference"):
        relevance(Branch(), x, DeepLift())


def test_a_call_on_no_samples_of_the_reference_is_compared_with_none_of_the_data(x: Tensor) -> None:
    class Expert(nn.Module):
        """Only samples with something in them go through the layer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(x[0].numel(), 2).double()

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            busy = x.abs().sum(1) > 0
            return x.new_zeros(len(x), 2).index_put((busy,), self.layer(x[busy]).tanh())

    with pytest.raises(RuntimeError, match=r"the model ran tanh.* on .* but tanh.* on \[\(0, .* for the reference"):
        relevance(Expert(), x.double(), DeepLift())


@pytest.mark.parametrize(
    "reference", [0.5, torch.rand(2, 7, 7), [torch.rand(1, 2, 7, 7), 0.0], torch.rand(2, 1, 2, 7, 7)]
)
def test_description_repr_and_pickle_rebuild_it(model: nn.Module, x: Tensor, reference: object) -> None:
    composite = DeepLift(reference=reference, variant="reveal_cancel")
    described = json.loads(json.dumps(composite.describe()))
    again = get(described["name"], **described["keywords"])
    expected = CondAttribution(model)(x.requires_grad_(), CONDITIONS, composite).heatmap
    for other in (again, pickle.loads(pickle.dumps(composite))):
        assert torch.equal(CondAttribution(model)(x, CONDITIONS, other).heatmap, expected)
    assert repr(DeepLift(reference=0.5, variant="reveal_cancel")) == "DeepLift(reference=0.5, variant='reveal_cancel')"


def test_a_model_that_does_more_for_the_reference_is_refused(x: Tensor) -> None:
    class Deciding(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            scores = torch.relu(value).flatten(1)
            return scores if value.any() else torch.relu(scores)

    with pytest.raises(RuntimeError, match=r"the model ran relu.* for the reference, but not for the data"):
        heatmap(Deciding().eval(), x, 0.0)
