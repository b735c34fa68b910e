"""Metrics of explanations: closed forms, naive loops, and what batches and their size must not change."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import crp
from crp.attributors import MeaningfulPerturbation, Occlusion
from crp.composites import DeepTaylor, Gradient, GradientTimesInput, UniformZPlus
from crp.errors import InputTypeError
from crp.metrics import (
    area,
    continuity,
    local_lipschitz,
    pixel_flipping,
    quantus_explain,
    randomization,
    selectivity,
    translations,
)
from crp.rules.lrp import ZPlus

F64 = {"dtype": torch.float64}


@pytest.fixture
def linear() -> nn.Module:
    """(n, 2, 4, 5) -> (n, 3)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(40, 3)).double().eval()


@pytest.fixture
def small() -> Tensor:
    return torch.randn(3, 2, 4, 5, **F64)


@pytest.fixture
def largest() -> nn.Module:
    """max(x1, x2) of what is positive, as a ReLU net: ((x1 - x2)+ + (x2 - x1)+ + (x1 + x2)+) / 2."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double().eval()
    model[0].weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]], **F64)
    model[2].weight.data = torch.full((1, 3), 0.5, **F64)
    return model


#: z+ also at the input, which is not negative.
DEEP_TAYLOR = DeepTaylor(first_map=[(nn.Linear, ZPlus(0.0, "bias"))])


def gradient(model: nn.Module, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    data = torch.from_numpy(inputs).requires_grad_()
    return torch.autograd.grad(model(data)[range(len(data)), targets].sum(), data)[0].numpy()


def times_input(model: nn.Module, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Gradient x input, in the form of Quantus."""
    return gradient(model, inputs, targets) * inputs


def squared(model: nn.Module, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Sensitivity."""
    return gradient(model, inputs, targets) ** 2


# --- pixel flipping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["most", "least"])
@pytest.mark.parametrize("channels", ["together", "apart"])
@pytest.mark.parametrize(("patch", "step"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_flipping_of_a_linear_model(linear, small, order, channels, patch, step):
    # every feature takes its contribution with it: the curve is the output less a cumulative sum
    found = pixel_flipping(
        linear, small, [0, 1, 2], times_input, patch=patch, step=step, channels=channels, score="output", batch_size=7
    )
    contribution = linear[1].weight.detach().view(3, 2, 4, 5) * small
    blocks = contribution if channels == "apart" else contribution.sum(1, keepdim=True)
    blocks = nn.functional.pad(blocks, (0, -5 % patch, 0, -4 % patch))
    blocks = blocks.unfold(2, patch, patch).unfold(3, patch, patch).sum((4, 5)).flatten(1)
    ordered = blocks.sort(1, descending=order == "most").values
    output = linear(small).diagonal()[:, None].detach()
    curve = torch.cat([output, output - ordered.cumsum(1)], 1)
    points = list(range(0, curve.shape[1] - 1, step)) + [curve.shape[1] - 1]
    assert torch.allclose(getattr(found, order), curve[:, points], rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.fraction, torch.tensor(points, **F64) / (curve.shape[1] - 1), rtol=0, atol=1e-15)


def test_areas(linear, small):
    found = pixel_flipping(linear, small, 0, times_input, step=7, score="output")
    x, y = found.fraction.tolist(), found.most.tolist()
    for i in range(3):
        trapezes = [(x[k + 1] - x[k]) * (y[i][k] + y[i][k + 1]) / 2 for k in range(len(x) - 1)]
        assert math.isclose(found.area_most[i], sum(trapezes), rel_tol=1e-12)
    assert torch.allclose(found.area_between, found.area_least - found.area_most)
    assert (found.area_between > 0).all()
    reverse = pixel_flipping(
        linear, small, 0, relevance=-times_input(linear, small.numpy(), [0] * 3), step=7, score="output"
    )
    assert torch.allclose(reverse.most, found.least)
    assert torch.allclose(reverse.area_between, -found.area_between)
    assert torch.allclose(area(torch.tensor([[0.0, 1.0, 1.0]])), torch.tensor([0.75]))


@pytest.mark.parametrize("replacement", [0.5, "mean", "blur", "noise", torch.rand(2, 1, 1), torch.zeros_like])
def test_what_replaces_a_pixel(linear, small, replacement):
    heatmap = torch.rand(3, 4, 5)
    found = pixel_flipping(linear, small, 1, relevance=heatmap, replacement=replacement, score="softmax", sigma=1.0)
    assert found.most.shape == (3, 21)
    assert torch.allclose(found.most[:, 0], linear(small).softmax(1)[:, 1])
    assert torch.allclose(found.most[:, -1], found.least[:, -1])
    first = heatmap.flatten(1).argmax(1)
    filled = {0.5: torch.full_like(small, 0.5), "mean": small.mean((2, 3), keepdim=True).expand_as(small)}
    if isinstance(replacement, str | float) and replacement in filled:
        changed = small.clone()
        for i, at in enumerate(first):
            changed[i, :, at // 5, at % 5] = filled[replacement][i, :, at // 5, at % 5]
        assert torch.allclose(found.most[:, 1], linear(changed).softmax(1)[:, 1])


def test_features_without_space(mlp, vectors):
    found = pixel_flipping(mlp, vectors, 2, GradientTimesInput(), score="output")
    relevance = quantus_explain(GradientTimesInput())(mlp, vectors.numpy(), [2] * 4)
    changed = vectors.clone()
    for step, features in enumerate((-torch.from_numpy(relevance)).argsort(1).T, 1):
        changed[range(4), features] = 0
        assert torch.allclose(found.most[:, step], mlp(changed)[:, 2])


@pytest.mark.parametrize("metric", [pixel_flipping, partial(selectivity, steps=3, patch=5), local_lipschitz])
def test_samples_and_batches_do_not_matter(vgg_bn, images, metric, untouched):
    def first(found: object) -> Tensor:
        return found if isinstance(found, Tensor) else found[1] if len(found) == 3 else found[0]

    with untouched(vgg_bn):
        together = first(metric(vgg_bn, images, None, UniformZPlus(), batch_size=5))
        for i in range(4):
            alone = first(metric(vgg_bn, images[i : i + 1], None, UniformZPlus()))
            assert torch.allclose(alone[0], together[i], rtol=1e-9)


# --- selectivity ----------------------------------------------------------------------------------------------------


def naive_selectivity(model: nn.Module, image: Tensor, target: int, patch: int, steps: int, recompute: bool) -> list:
    image, gone, curve = image.clone(), np.zeros(image.shape[1:], bool), []
    relevance = times_input(model, image[None].numpy(), [target])[0].sum(0)
    for _ in range(steps):
        curve.append(model(image[None]).softmax(1)[0, target].item())
        if recompute:
            relevance = times_input(model, image[None].numpy(), [target])[0].sum(0)
        best, where = -math.inf, None
        for row in range(image.shape[1] - patch + 1):
            for column in range(image.shape[2] - patch + 1):
                inside = slice(row, row + patch), slice(column, column + patch)
                if not gone[inside].any() and relevance[inside].sum() > best:
                    best, where = relevance[inside].sum(), inside
        if where is not None:
            image[:, where[0], where[1]], gone[where] = 0, True
    return [*curve, model(image[None]).softmax(1)[0, target].item()]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("patch", "steps"), [(4, 5), (3, 40), (7, 6)])
def test_selectivity_as_a_loop(vgg_bn, images, patch, steps, recompute):
    targets = vgg_bn(images).argmax(1).tolist()
    found = selectivity(vgg_bn, images, None, times_input, patch=patch, steps=steps, recompute=recompute)
    for i, target in enumerate(targets):
        expected = naive_selectivity(vgg_bn, images[i], target, patch, steps, recompute)
        assert torch.allclose(found.curve[i], torch.tensor(expected, **F64), rtol=1e-10)
    assert found.removed.max() <= steps
    for step in range(1, 3):
        assert ((found.removed == step).flatten(1).sum(1) == patch * patch).all()
    assert torch.allclose(found.area, area(found.curve))


def test_selectivity_of_features(mlp, vectors):
    found = selectivity(mlp, vectors, 0, GradientTimesInput(), patch=1, steps=6, score="output")
    assert torch.allclose(found.curve[:, -1], mlp(torch.zeros_like(vectors))[:, 0])
    assert torch.equal(found.removed.sort(1).values, torch.arange(1, 7).expand(4, 6))


# --- continuity and local Lipschitz ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [(squared, 2.0), (times_input, 2 * 0.66), (DEEP_TAYLOR, 0.04)],
    ids=["sensitivity", "Taylor", "deep Taylor"],
)
def test_continuity_across_the_kink_of_max(largest, method, expected):
    # R = (1, 0) or (0, 1); (x1, 0) or (0, x2); ((x1 - x2)+ + x1, (x2 - x1)+ + x2) / 2
    path = torch.tensor([[0.66, 0.64], [0.64, 0.66]], **F64)
    found = continuity(largest, path, 0, method)
    assert torch.allclose(found, torch.tensor(expected / (0.02 * 2**0.5), **F64), rtol=1e-10)
    assert round(found.item(), 1 if expected > 1 else 2) == {2.0: 70.7, 1.32: 46.7, 0.04: 1.41}[expected]
    assert torch.allclose(continuity(largest, path, None, method, neighbours=True), found)


def test_deep_taylor_of_max(largest):
    x = torch.rand(5, 2, **F64)
    found = quantus_explain(DEEP_TAYLOR)(largest, x.numpy(), [0] * 5)
    expected = ((x - x.flip(1)).clamp(min=0) + x) / 2
    assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-12)


@pytest.mark.parametrize("neighbours", [True, False])
def test_continuity_as_a_loop(vgg_bn, images, neighbours):
    path = translations(images[0], range(-3, 4))
    relevance = times_input(vgg_bn, path.numpy(), [1] * 7)
    pairs = [(i, j) for i in range(7) for j in range(i) if j == i - 1 or not neighbours]
    expected = max(
        np.abs(relevance[i] - relevance[j]).sum() / np.linalg.norm((path[i] - path[j]).numpy()) for i, j in pairs
    )
    found = continuity(vgg_bn, path, 1, times_input, neighbours=neighbours, batch_size=3)
    assert math.isclose(found.item(), expected, rel_tol=1e-9)
    repeated = torch.cat([path, path])
    assert math.isclose(continuity(vgg_bn, repeated, 1, times_input).item(), continuity(vgg_bn, path, 1, times_input))


def test_continuity_explains_what_is_predicted_for_the_first_point(mlp, vectors):
    path = 4 * vectors
    predicted = mlp(path).argmax(1)
    assert len(predicted.unique()) > 1
    assert continuity(mlp, path, None, times_input) == continuity(mlp, path, int(predicted[0]), times_input)
    assert continuity(mlp, path, None, times_input) != continuity(mlp, path, predicted, times_input)


def test_every_point_of_a_path_is_checked(mlp, vectors):
    path = torch.cat([vectors, torch.full_like(vectors[:1], torch.nan)])
    with pytest.raises(ValueError, match=f"NaN or infinite values in samples \\[{len(vectors)}\\]"):
        continuity(mlp, path, None, lambda model, inputs, targets: np.nan_to_num(inputs))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_translations(axis):
    sample = torch.rand(2, 3, 5)
    for offset, moved in zip((-2, 0, 1), translations(sample, (-2, 0, 1), axis, fill=7.0), strict=True):
        size = sample.shape[axis]
        for i in range(size):
            inside = 0 <= i - offset < size
            expected = sample.select(axis, i - offset) if inside else torch.tensor(7.0)
            assert (moved.select(axis, i) == expected).all()


def test_local_lipschitz_of_a_linear_model(linear, small):
    # R = w x, thus the ratio is |w d| / |d|
    noise = torch.randn(5, 3, 2, 4, 5, **F64)
    found = local_lipschitz(linear, small, [0, 1, 2], times_input, noise=noise, batch_size=4)
    weight = linear[1].weight.detach().view(3, 2, 4, 5)
    expected = (weight * noise).flatten(2).norm(dim=2) / noise.flatten(2).norm(dim=2)
    assert torch.allclose(found, expected.amax(0), rtol=1e-6)
    one = local_lipschitz(linear, small, [0, 1, 2], times_input, noise=noise[:, :1])
    assert torch.allclose(
        one, ((weight * noise[:, :1]).flatten(2).norm(dim=2) / noise[:, :1].flatten(2).norm(dim=2)).amax(0)
    )


def test_the_seed_of_the_noise(vgg_bn, images):
    run = partial(local_lipschitz, vgg_bn, images, 0, times_input)
    assert torch.equal(run(seed=1), run(seed=1))
    assert not torch.equal(run(seed=1), run(seed=2))
    assert (run(samples=5) <= run(samples=10)).all()


# --- randomization --------------------------------------------------------------------------------------------------


def test_randomization(vgg_bn, images, untouched):
    def edges(model: nn.Module, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return inputs

    with untouched(vgg_bn):
        found = randomization(vgg_bn, images, None, edges)
        assert list(found) == [
            "classifier.4", "classifier.1", "features.8", "features.7", "features.4", "features.3", "features.1",
            "features.0",
        ]  # fmt: skip
        assert all(torch.allclose(value, torch.ones(4, **F64)) for value in found.values())
        gradient = randomization(vgg_bn, images, 0, times_input, seed=1)
    assert gradient["features.0"].abs().max() < 0.9
    again = randomization(vgg_bn, images, 0, times_input, seed=1)
    assert all(torch.equal(gradient[name], again[name]) for name in gradient)


def test_rank_correlation(linear, small):
    # layers are random from the last one on: here the only one, shuffled as its seed says
    found = randomization(linear, small, 1, squared, seed=4)["1"]
    order = torch.randperm(120, generator=torch.Generator().manual_seed(4))
    weight = linear[1].weight.detach()
    a, b = weight[1].square(), weight.flatten()[order].view(3, 40)[1].square()
    ranks = [(v[:, None] > v).sum(1).double() for v in (a, b)]
    expected = 1 - 6 * (ranks[0] - ranks[1]).square().sum() / (40 * (40**2 - 1))
    assert torch.allclose(found, expected.expand(3), rtol=1e-12)
    absolute = randomization(linear, small, 1, quantus_explain(Gradient()), seed=4, absolute=True)["1"]
    assert torch.allclose(found, absolute, rtol=1e-12)
    signed = randomization(linear, small, 1, quantus_explain(Gradient()), seed=4)["1"]
    assert not torch.allclose(signed, absolute, atol=0.01)


def test_ties_share_a_rank(linear):
    data = torch.tensor([1.0, 1.0, 2.0, 3.0], **F64).repeat(10).view(1, 2, 4, 5)

    def sometimes(model: nn.Module, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        same = torch.equal(model[1].weight, linear[1].weight)
        return inputs if same else np.where(inputs == 1, 5.0, inputs) if constant is None else constant * inputs

    constant = None
    a, b = np.array([0.5, 0.5, 2, 3]), np.array([2.5, 2.5, 0, 1])
    assert math.isclose(randomization(linear, data, 0, sometimes)["1"], np.corrcoef(a, b)[0, 1], rel_tol=1e-12)
    constant = 0.0
    assert randomization(linear, data, 0, sometimes)["1"] == 0


# --- methods in the form of Quantus ---------------------------------------------------------------------------------


def test_every_kind_of_method(vgg_bn, images, monkeypatch):
    targets = np.arange(4)
    inputs = images.numpy()
    by_composite = quantus_explain(GradientTimesInput())(vgg_bn, inputs, targets)
    assert by_composite.shape == inputs.shape
    assert np.allclose(by_composite, times_input(vgg_bn, inputs, targets), rtol=1e-10)
    settings = {"sigma": 2.0, "mask_size": 4, "mask_blur": 0.0, "jitter": 1}
    by_class = quantus_explain(MeaningfulPerturbation, steps=9, **settings)
    mask = by_class(model=vgg_bn, inputs=inputs, targets=targets, steps=2)
    expected = MeaningfulPerturbation(vgg_bn, steps=2, **settings)(images, targets.tolist()).heatmap
    assert torch.equal(torch.from_numpy(mask), expected[:, None])

    def explain(name: str, model: nn.Module, data: Tensor, target: Tensor, **options: float) -> Tensor:
        assert (name, options) == ("some_method", {"steps": 3})
        return data * target.view(-1, 1, 1, 1)

    monkeypatch.setattr(crp, "explain", explain, raising=False)
    by_name = quantus_explain("some_method", steps=3)(vgg_bn, inputs, targets)
    assert np.array_equal(by_name, inputs * targets[:, None, None, None])


#: Options of methods that need some, or that would take long.
OPTIONS = {
    "cam": {"layer": "features.9"},
    "meaningful_perturbation": {"steps": 2},
    "shapley_sampling": {"samples": 1, "sampling_dims": (1,)},
}


@pytest.mark.parametrize("method", crp.methods(), ids=lambda method: method.name)
def test_every_method_by_name(vgg_bn, images, method):
    gap = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = gap.double().eval() if method.name == "cam" else vgg_bn
    options = OPTIONS.get(method.name, {})
    if "layer" in method.options and method.options["layer"] is ...:
        options = {"layer": "1" if method.name == "cam" else "features.9"}
    bounds = {"low": -5.0, "high": 5.0} if method.options.get("low", 0) is ... else {}
    found = quantus_explain(method.name, **options, **bounds)(model, images[:2].numpy(), np.array([0, 3]))
    assert isinstance(found, np.ndarray)
    assert found.shape == (2, 3, 16, 16)
    data, target = images[:2], torch.tensor([0, 3])
    assert np.allclose(found, crp.explain(method.name, model, data, target, **options, **bounds).numpy(), rtol=1e-6)


def test_attributors_by_class(vgg_bn, images):
    found = quantus_explain(Occlusion, window_shape=(3, 4, 4), step=(3, 4, 4))(vgg_bn, images.numpy(), np.arange(4))
    attributor = Occlusion(vgg_bn, window_shape=(3, 4, 4), step=(3, 4, 4))
    assert np.array_equal(found, attributor(images, torch.arange(4))[1].numpy())


def test_arrays_become_what_the_model_takes(vgg_bn, images):
    model = vgg_bn.float()
    found = quantus_explain(UniformZPlus())(model, images.numpy(), np.zeros(4, np.int32))
    assert found.dtype == np.float32


# --- refusals -------------------------------------------------------------------------------------------------------


def test_targets_of_quantus_may_stand_in_a_column(vgg_bn, images):
    explain, classes = quantus_explain("gradient"), np.array([0, 1, 2, 0])
    found = [explain(vgg_bn, images.numpy(), targets) for targets in (classes, classes[:, None])]
    assert np.array_equal(*found)


@pytest.mark.parametrize("space", [(6,), (2, 3)], ids=["signal", "picture"])
def test_heatmaps_of_whole_numbers_are_relevance(space):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double().eval()
    data, order = torch.randn(3, 2, *space, **F64), torch.arange(6).reshape(space)
    for found in (
        [pixel_flipping(net, data, 0, relevance=heat.expand(3, *space)).most for heat in (order, order * 1.0)],
        [
            selectivity(
                net,
                data,
                0,
                lambda model, inputs, targets, heat=heat: heat.expand(3, *space),
                patch=min(space),
                steps=1,
            ).curve
            for heat in (order, order * 1.0)
        ],
    ):
        assert torch.equal(*found)


def test_what_a_method_gives_is_a_tensor(linear, small):
    class Texts:
        def __init__(self, model: nn.Module) -> None: ...

        def __call__(self, data: Tensor, target: Tensor) -> str:
            return "relevance"

    with pytest.raises(TypeError, match=r"Texts'> gives a str, not a tensor, or an object with a heatmap"):
        quantus_explain(Texts)(linear, small, [0, 1, 2])


def test_methods_are_checked(linear, small):
    with pytest.raises(TypeError, match="method must be a name, a composite or the class of an attributor, not 3"):
        quantus_explain(3)
    with pytest.raises(TypeError, match=r"no options here, got \['steps'\]; give them to UniformZPlus"):
        quantus_explain(UniformZPlus(), steps=3)
    for method, message in ((3, "explain_func must be a function .* not 3: "), (lambda m, x, y: x, "'model'|'m'")):
        with pytest.raises(InputTypeError, match=message):
            selectivity(linear, small, 0, method)
    for wrong, message in (
        (np.zeros((3, 4, 4)), r"relevance has shape \(3, 1, 4, 4\); it must have that of the data"),
        (np.zeros((2, 2, 4, 5)), "relevance has shape"),
        (np.full((3, 4, 5), np.nan), r"NaN or infinite for samples \[0, 1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pixel_flipping(linear, small, 0, relevance=wrong)
        with pytest.raises(ValueError, match=message):
            selectivity(linear, small, 0, lambda model, inputs, targets, wrong=wrong: wrong, patch=1)


@pytest.mark.parametrize(
    ("metric", "options", "error", "message"),
    [
        (pixel_flipping, {}, ValueError, "give either explain_func or relevance"),
        (pixel_flipping, {"explain_func": squared, "relevance": 0}, ValueError, "give either"),
        (pixel_flipping, {"explain_func": squared, "patch": 0}, ValueError, "patch must be a whole number"),
        (pixel_flipping, {"explain_func": squared, "step": 0}, ValueError, "step must be"),
        (
            pixel_flipping,
            {"explain_func": squared, "channels": "all"},
            ValueError,
            "channels must be one of 'together'",
        ),
        (pixel_flipping, {"explain_func": squared, "score": "logit"}, ValueError, "score must be one of"),
        (pixel_flipping, {"explain_func": squared, "batch_size": 0}, ValueError, "batch_size must be"),
        (pixel_flipping, {"explain_func": squared, "target": 3}, IndexError, "target 3 is out of range"),
        (pixel_flipping, {"explain_func": squared, "target": [0, 1]}, ValueError, "2 classes for 3 samples"),
        (pixel_flipping, {"explain_func": squared, "target": torch.sum}, TypeError, "target must be a class, one per"),
        (pixel_flipping, {"explain_func": squared, "replacement": "black"}, ValueError, "not 'black'"),
        (selectivity, {"explain_func": squared, "patch": 5}, ValueError, r"a patch of 5 .* shape \(3, 2, 4, 5\)"),
        (selectivity, {"explain_func": squared, "patch": 0}, ValueError, "patch must be"),
        (selectivity, {"explain_func": squared, "steps": 0}, ValueError, "steps must be"),
        (local_lipschitz, {"explain_func": squared, "noise": 0.0}, ValueError, "noise must be greater than 0"),
        (local_lipschitz, {"explain_func": squared, "noise": torch.zeros(2, 1, 2, 4, 5)}, ValueError, "must differ"),
        (local_lipschitz, {"explain_func": squared, "noise": torch.ones(2, 2, 4, 5)}, ValueError, "noise has shape"),
        (local_lipschitz, {"explain_func": squared, "noise": torch.ones(5, 2, 2, 4, 5)}, ValueError, "noise has shape"),
        (local_lipschitz, {"explain_func": squared, "noise": torch.ones(5, 1, 2, 5, 4)}, ValueError, "noise has shape"),
        (local_lipschitz, {"explain_func": squared, "noise": -1}, ValueError, "noise must be a number of at least 0"),
        (local_lipschitz, {"explain_func": squared, "samples": 0}, ValueError, "samples must be"),
    ],
)
def test_settings_are_checked(linear, small, untouched, metric, options, error, message):
    with untouched(linear), pytest.raises(error, match=message):
        metric(linear, small, **{"target": 0, **options})


def test_paths_need_points_that_differ(linear, small):
    with pytest.raises(ValueError, match="all points of the path are the same"):
        continuity(linear, small[:1].expand(4, -1, -1, -1), 0, squared)


def test_models_need_parameters(small):
    with pytest.raises(ValueError, match="Flatten has no parameters"):
        randomization(nn.Flatten().eval(), small, 0, lambda model, inputs, targets: inputs)
