"""Activation maximization: stationary points in closed form, objectives that add up, images on their own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import NameMapComposite
from zennit.rules import Epsilon

from crp.composites import GuidedBackprop
from crp.concepts import ChannelConcept
from crp.visualization.synthesis import (
    Objective,
    channel,
    concept,
    direction,
    log_probability,
    logit,
    maximize,
    unit,
)

NEWTON = partial(
    torch.optim.LBFGS, max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-14, tolerance_change=0.0
)
F64 = {"dtype": torch.float64}


@pytest.fixture
def softmax_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double().eval()


def outputs_of(model: nn.Module, data: Tensor, layer: str) -> Tensor:
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    model(data)
    handle.remove()
    return seen[0].detach()


# --- closed forms ---------------------------------------------------------------------------------------------------


def test_stationary_in_pixel_space(softmax_model):
    # lambda (X - mean) = d log p / dX = w_c - sum_k p_k w_k
    mean = torch.randn(3, 1, 3, 4, **F64)
    found = maximize(
        softmax_model, log_probability([0, 1, 2]), mean.shape, mean=mean, l2=0.1, optimizer=NEWTON, steps=3
    )
    weight = softmax_model[1].weight.detach()
    expected = weight - softmax_model(found.images).softmax(1).detach() @ weight
    assert (0.1 * (found.images - mean).flatten(1) - expected).abs().max() < 1e-8
    assert found.images.std() > 0.1
    assert torch.equal(found.images, found.codes)


def test_stationary_with_the_default_optimizer(softmax_model):
    found = maximize(softmax_model, log_probability(2), (1, 1, 3, 4), l2=0.1, steps=2000)
    weight = softmax_model[1].weight.detach()
    expected = weight[2:] - softmax_model(found.images).softmax(1).detach() @ weight
    assert (0.1 * found.images.flatten(1) - expected).abs().max() < 1e-6


def test_stationary_in_code_space(softmax_model):
    # lambda (z - mean) = G^T d log p / dX for a linear decoder G
    decoder = nn.Sequential(nn.Linear(5, 12), nn.Unflatten(1, (1, 3, 4))).double()
    mean = torch.randn(5, **F64)
    found = maximize(
        softmax_model, log_probability([2, 0]), (2, 5), decoder=decoder, mean=mean, l2=0.3, optimizer=NEWTON, steps=3
    )
    weight = softmax_model[1].weight.detach()
    pixels = weight[[2, 0]] - softmax_model(found.images).softmax(1).detach() @ weight
    assert (0.3 * (found.codes - mean) - pixels @ decoder[0].weight.detach()).abs().max() < 1e-8
    assert found.codes.shape == (2, 5)
    assert torch.allclose(found.images, decoder(found.codes))
    assert decoder[0].weight.grad is None


def test_total_variation(softmax_model):
    # a linear objective with quadratic penalties: (l2 + 2 tv L) x = w, where x' L x sums the squared differences
    found = maximize(softmax_model, logit(1), (1, 1, 3, 4), l2=0.5, tv=0.7, beta=2.0, optimizer=NEWTON, steps=3)
    laplacian = torch.zeros(12, 12, **F64)
    for row in range(3):
        for column in range(4):
            for other in ((row + 1, column), (row, column + 1)):
                if other[0] < 3 and other[1] < 4:
                    step = torch.zeros(12, **F64)
                    step[row * 4 + column], step[other[0] * 4 + other[1]] = 1, -1
                    laplacian += step[:, None] * step
    expected = torch.linalg.solve(0.5 * torch.eye(12, **F64) + 2 * 0.7 * laplacian, softmax_model[1].weight[1].detach())
    assert torch.allclose(found.images.flatten(), expected, atol=1e-8)


def test_scores_are_the_objective_without_penalties(softmax_model):
    found = maximize(softmax_model, log_probability([0, 2]), (2, 1, 3, 4), steps=30, tv=0.1)
    assert found.scores.shape == (2, 31)
    start = softmax_model(torch.zeros(2, 1, 3, 4, **F64)).log_softmax(1)
    end = softmax_model(found.images).log_softmax(1)
    assert torch.allclose(found.scores[:, 0], torch.stack([start[0, 0], start[1, 2]]))
    assert torch.allclose(found.scores[:, -1], torch.stack([end[0, 0], end[1, 2]]))
    assert (found.scores[:, -1] > found.scores[:, 0]).all()


# --- objectives -----------------------------------------------------------------------------------------------------

LAYER = "features.3"  # (n, 6, 16, 16), before a ReLU in place
VECTOR = torch.arange(6.0) - 2
CASES = {
    "unit in the middle": (unit(LAYER, 4), lambda a: a[:, 4, 8, 8]),
    "unit of each image": (unit(LAYER, [0, 1, -1, 2], (3, 15)), lambda a: a[range(4), [0, 1, 5, 2], 3, 15]),
    "channel": (channel(LAYER, 4), lambda a: a[:, 4].mean((1, 2))),
    "channels jointly": (channel(LAYER, 1) + channel(LAYER, 2), lambda a: a[:, 1:3].mean((2, 3)).sum(1)),
    "weighted": (channel(LAYER, 1) - 0.5 * channel(LAYER, 2), lambda a: (a[:, 1] - a[:, 2] / 2).mean((1, 2))),
    "minus": (-channel(LAYER, 1) * 2, lambda a: -2 * a[:, 1].mean((1, 2))),
    "direction": (direction(LAYER, VECTOR), lambda a: (a.mean((2, 3)) * VECTOR).sum(1)),
    "direction in space": (
        direction(LAYER, VECTOR[:, None, None].expand(6, 16, 16)),
        lambda a: (a * VECTOR[:, None, None]).sum((1, 2, 3)),
    ),
    "concept": (concept(LAYER, 3), lambda a: a[:, 3].sum((1, 2))),
    "concept of a kind": (concept(LAYER, "c", kind=type("Named", (ChannelConcept,), {"column": lambda *_: 2})()),
                          lambda a: a[:, 2].sum((1, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_objective(vgg_bn, images, untouched, name):
    objective, expected = CASES[name]
    with untouched(vgg_bn):
        found = maximize(vgg_bn, objective, images.shape, start=images, steps=1)
    assert torch.allclose(found.scores[:, 0], expected(outputs_of(vgg_bn, images, LAYER)), rtol=1e-10)


def test_layers_and_outputs_jointly(vgg_bn, images):
    objective = log_probability(3) + channel("features.7", 2) + logit([0, 1, 2, -1])
    found = maximize(vgg_bn, objective, images.shape, start=images, steps=1)
    expected = vgg_bn(images).log_softmax(1)[:, 3] + vgg_bn(images)[range(4), [0, 1, 2, 4]]
    expected = expected + outputs_of(vgg_bn, images, "features.7")[:, 2].mean((1, 2))
    assert torch.allclose(found.scores[:, 0], expected)


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"jitter": 2, "tv": 0.01}, {"optimizer": partial(torch.optim.SGD, lr=0.1)}])
def test_an_image_is_the_same_in_a_batch_as_alone(vgg_bn, images, options):
    together = maximize(vgg_bn, logit([0, 1, 2, 3]), images.shape, start=images, steps=5, **options)
    for i in range(4):
        alone = maximize(vgg_bn, logit(i), images[:1].shape, start=images[i], steps=5, **options)
        assert torch.allclose(alone.images[0], together.images[i], atol=1e-9)
        assert torch.allclose(alone.scores[0], together.scores[i], atol=1e-9)


def test_the_seed_decides(softmax_model):
    decoder = nn.Sequential(nn.Linear(5, 12), nn.Unflatten(1, (1, 3, 4))).double()
    run = partial(maximize, softmax_model, logit(0), (2, 5), decoder=decoder, steps=3, jitter=1)
    state = torch.get_rng_state()
    assert torch.equal(run(seed=1).codes, run(seed=1).codes)
    assert not torch.equal(run(seed=1).codes, run(seed=2).codes)
    assert torch.equal(state, torch.get_rng_state())


def test_jitter_rolls_what_the_model_sees(softmax_model):
    seen = []
    handle = softmax_model.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    start = torch.arange(12, **F64).view(1, 1, 3, 4)
    found = maximize(softmax_model, logit(0), (1, 1, 3, 4), start=start, jitter=2, learning_rate=0.0, steps=30)
    handle.remove()
    assert torch.equal(found.images, start)
    assert all(torch.equal(x.flatten().sort().values, start.flatten()) for x in seen)
    rolled = {tuple(divmod(int((x == 0).flatten().nonzero()), 4)) for x in seen[:-1]}
    assert len(rolled) > 6
    assert torch.equal(seen[-1], start)


def test_bounds(softmax_model):
    found = maximize(softmax_model, logit(0), (1, 1, 3, 4), bounds=(-0.01, 0.02), l2=0.0, steps=5)
    assert found.images.min() == -0.01
    assert found.images.max() == 0.02


def test_a_rule_of_zennit_changes_the_gradient_of_every_step(softmax_model):
    """Each step is a pass of its own, and is told as such: no layer is called twice before relevance goes back."""
    composite = NameMapComposite([(["1"], Epsilon(epsilon=0.0))])
    start, rate = torch.rand(2, 1, 3, 4, **F64), 0.01
    made = maximize(
        softmax_model, logit(1), start.shape, start=start, l2=0.0, steps=3, composite=composite,
        optimizer=partial(torch.optim.SGD, lr=rate),
    )  # fmt: skip
    images, weight = start.flatten(1), softmax_model[1].weight[1].detach()
    for _ in range(3):  # R = a w / z of the one output, in place of the gradient
        images = images + rate * images * weight / softmax_model[1](images)[:, 1:2].detach()
    assert (made.images.flatten(1) - images).abs().max() < 1e-10


def test_a_composite_changes_the_gradients(vgg_bn, images):
    plain = maximize(vgg_bn, logit(0), images.shape, start=images, steps=2)
    guided = maximize(vgg_bn, logit(0), images.shape, start=images, steps=2, composite=GuidedBackprop())
    assert torch.allclose(plain.scores[:, 0], guided.scores[:, 0])
    assert not torch.allclose(plain.images, guided.images)


def test_works_without_gradients_around_it(softmax_model):
    with torch.no_grad():
        assert maximize(softmax_model, logit(0), (1, 1, 3, 4), steps=2).images.abs().min() > 0


def test_progress_is_shown_on_demand(softmax_model, capsys):
    maximize(softmax_model, logit(0), (1, 1, 3, 4), steps=7)
    assert capsys.readouterr().err == ""
    maximize(softmax_model, logit(0), (1, 1, 3, 4), steps=7, verbose=True)
    assert "7/7" in capsys.readouterr().err


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        ("logit", TypeError, r"must be an Objective, such as log_probability\(3\), not 'logit'"),
        (channel("feature.3", 0), KeyError, "nearest: 'features.3'"),
        (channel(LAYER, 6), IndexError, "layer 'features.3' has channels 0 to 5; there is no 6"),
        (logit(5), IndexError, "the model's output has channels 0 to 4; there is no 5"),
        (logit([0, 1]), ValueError, "one for each of 4 images, not 2"),
        (unit(LAYER, 0, (16, 0)), IndexError, r"positions in \(16, 16\); there is no \(16, 0\)"),
        (unit(LAYER, 0, 3), IndexError, "there is no 3"),
        (direction(LAYER, [1.0, 2.0]), ValueError, r"vector has shape \(2,\); layer 'features.3' needs \(6,\)"),
        (Objective(frozenset({""}), lambda o: o[""]), ValueError, "must give one value for each of 4 images"),
        (
            Objective(frozenset({""}), lambda o: o[""][:, 0] / 0),
            ValueError,
            r"NaN or infinite for images \[0, 1, 2, 3\]",
        ),
    ],
)
def test_objectives_are_checked(vgg_bn, images, untouched, objective, error, message):
    with untouched(vgg_bn), pytest.raises(error, match=message):
        maximize(vgg_bn, objective, images.shape, steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"jitter": -1}, "jitter must be"),
        ({"l2": -0.1}, "l2 must be a number of at least 0, not -0.1"),
        ({"tv": float("inf")}, "tv must be"),
        ({"beta": 0.0}, "beta must be"),
        ({"bounds": (1.0, 0.0)}, r"bounds must be \(low, high\)"),
        ({"mean": torch.zeros(7)}, r"mean has shape \(7,\), which does not broadcast to \(1, 1, 3, 4\)"),
        ({"start": torch.zeros(7)}, "start has shape"),
        ({"start": torch.tensor(float("nan"))}, "NaN"),
        ({"shape": (3,)}, r"shape must be \(images, \*shape of an image or code\), not \(3,\)"),
        ({"shape": 3}, "shape must be"),
    ],
    ids=str,
)
def test_settings_are_checked(softmax_model, options, message):
    with pytest.raises(ValueError, match=message):
        maximize(softmax_model, logit(0), **{"shape": (1, 1, 3, 4), **options})


def test_models_are_checked():
    with pytest.raises(TypeError, match="model must be"):
        maximize(lambda x: x, logit(0), (1, 3))
    with pytest.raises(TypeError, match="composite must be None"):
        maximize(nn.Linear(3, 2).eval(), logit(0), (1, 3), composite="guided")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: direction(LAYER, [0.0] * 6), ValueError, "vector must be other than 0"),
        (lambda: direction(LAYER, [float("nan")] * 6), ValueError, "vector must be finite"),
        (lambda: direction(LAYER, torch.ones(6) * 1j), TypeError, "vector must be real numbers, not of complex64"),
        (lambda: direction(LAYER, "up"), TypeError, "vector must be real numbers"),
        (lambda: logit(1) * float("nan"), ValueError, "an objective's factor must be a finite number, not nan"),
        (lambda: logit(1) * logit(2), ValueError, "an objective's factor must be a finite number, not Objective"),
        (lambda: logit(1) + 1, TypeError, "unsupported operand"),
    ],
    ids=["zero", "nan", "complex", "word", "factor", "product", "sum"],
)
def test_what_is_no_objective(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_start_that_nothing_draws_away_from_is_told():
    """A ReLU that is silent at the start has no gradient there, for ever."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).double().eval()
    nn.init.constant_(model[0].bias, -1.0)
    with pytest.warns(UserWarning, match=r"no gradient at the start of images \[0, 1\].*start from noise: start=torch"):
        found = maximize(model, channel("1", 0), (2, 1, 5, 5), steps=3)
    assert (found.images == 0).all()
    start = torch.full((1, 5, 5), 9.0) * model[0].weight[0].detach().sign().mean()
    maximize(model, channel("0", 0), (2, 1, 5, 5), steps=1, start=start)


@pytest.mark.parametrize("form", [lambda t: t, lambda t: t[None]], ids=["one image", "a batch"])
def test_bounds_of_each_channel(form):
    """Of a linear score, the optimum within bounds is a corner of them."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    low, high = -mean / std, (1 - mean) / std
    found = maximize(model, logit(1), (2, 3, 2, 2), l2=0.0, steps=300, bounds=(form(low), form(high)))
    corner = torch.where(model[1].weight[1].view(3, 2, 2) > 0, high, low)
    assert torch.equal(found.images, corner.expand(2, 3, 2, 2))
    for wrong in ((high, low), (low, low), (low, "1"), (low[0], torch.ones(7))):
        with pytest.raises(ValueError, match=r"bounds must be \(low, high\)|bounds has shape"):
            maximize(model, logit(1), (2, 3, 2, 2), bounds=wrong)
