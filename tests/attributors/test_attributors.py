"""Gradients, paths and noise: closed forms, laws, targets of every kind, and a model that is left as it was."""

import functools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import zennit.attribution
import zennit.composites
from attributor_cases import Call, TwoInputs, close, gap_net, gradient, images, two_inputs
from core_cases import Maps
from hypothesis import given, settings
from torch import nn

import crp.composites as composites
from crp.attribution import CondAttribution
from crp.attributors import (
    Classes,
    Gradient,
    IntegratedGradients,
    Mask,
    Neuron,
    Saliency,
    Score,
    Sensitivity,
    SimpleTaylor,
    SmoothGrad,
    Target,
)
from crp.attributors.path import nodes
from crp.engine.independence import check_independent
from crp.engine.inputs import Inputs

few = settings(max_examples=20, deadline=None)
EVERY = [Gradient, Saliency, Sensitivity, SimpleTaylor, IntegratedGradients, SmoothGrad]


def quick(kind, model, **options):
    sizes = {IntegratedGradients: {"steps": 7}, SmoothGrad: {"n": 7}}
    return kind(model, **{**sizes.get(kind, {}), **options})


# --- what the methods are ---------------------------------------------------------------------------------------------


def test_gradients_and_what_is_made_of_them():
    model, x, classes = gap_net(), images(), [0, 3, 1]
    expected = gradient(model, x, classes)
    forms = {
        Gradient: expected, Saliency: expected.abs(), Sensitivity: expected**2, SimpleTaylor: x * expected,
    }  # fmt: skip
    for kind, wanted in forms.items():
        output, found = kind(model)(x, classes)
        close(found, wanted)
        close(output, model(x).detach())


def test_simple_taylor_is_exact_without_biases():
    model, x = gap_net(bias=False), images()
    close(SimpleTaylor(model)(x, 2)[1].flatten(1).sum(1), model(x)[:, 2].detach())


@pytest.mark.parametrize("quadrature", ["right", "left", "middle", "trapezoid", "gauss_legendre"])
def test_integrated_gradients_of_a_square_by_each_quadrature(quadrature):
    x, x0 = torch.tensor([[3.0, -2.0]]).double(), torch.tensor([[1.0, 1.0]]).double()
    model = Call(lambda v: (v**2).sum(1, keepdim=True))
    _, found = IntegratedGradients(model, steps=4, baseline=x0, quadrature=quadrature)(x, 0)
    mean = {"right": 5 / 8, "left": 3 / 8}.get(quadrature, 1 / 2)  # of alpha over the points
    close(found, (x - x0) * 2 * (x0 + mean * (x - x0)))


def test_gauss_legendre_is_exact_for_polynomials():
    """Of degree 2n - 1: with 3 points, a gradient of degree 5."""
    x, x0 = torch.tensor([[3.0, -2.0]]).double(), torch.tensor([[1.0, 1.0]]).double()
    model = Call(lambda v: (v**6).sum(1, keepdim=True))
    found = IntegratedGradients(model, steps=3, baseline=x0, quadrature="gauss_legendre")(x, 0)[1]
    close(found, x**6 - x0**6)
    found = IntegratedGradients(model, steps=2, baseline=x0, quadrature="gauss_legendre")(x, 0)[1]
    assert not torch.allclose(found, x**6 - x0**6, rtol=1e-3)


def test_riemann_sum_is_written_out():
    model, x = gap_net(), images()
    x0 = torch.rand_like(x)
    expected = sum(gradient(model, x0 + k / 6 * (x - x0), 1) for k in range(1, 7)) / 6 * (x - x0)
    close(IntegratedGradients(model, steps=6, baseline=x0)(x, 1)[1], expected)


def test_result_is_that_of_zennit_for_its_quadrature():
    model, x = gap_net(), images()
    start = torch.eye(4).double()[[2, 0, 1]]
    _, theirs = zennit.attribution.IntegratedGradients(model, n_iter=9, baseline_fn=torch.ones_like)(x, start)
    close(IntegratedGradients(model, steps=9, baseline=1)(x, start)[1], theirs)


@pytest.mark.parametrize("kind", [zennit.composites.EpsilonPlus, zennit.composites.GuidedBackprop])
def test_protocol_is_that_of_zennit(kind):
    model, x = gap_net(), images()
    for start in (torch.eye(4).double()[[2, 0, 1]], lambda output: output * 2, None):
        theirs = zennit.attribution.Gradient(model, kind())(x, start)
        ours = Gradient(model, kind(), attr_output=start)(x)
        close(ours[1], theirs[1])
        close(ours[0], theirs[0].detach())


@pytest.mark.parametrize("kind", [zennit.composites.EpsilonPlus, zennit.composites.EpsilonAlpha2Beta1])
def test_relevance_of_zennits_composites_starts_from_the_value_of_the_target(kind):
    model, x = gap_net(), images()
    value = model(x).detach()
    for target, start in ((2, torch.eye(4).double()[2] * value), (2 * torch.ones_like(value), 2 * value)):
        target = target if isinstance(target, int) else Mask(target)
        close(Gradient(model, kind())(x, target)[1], Gradient(model, kind())(x, start)[1])
    heatmap = CondAttribution(model)(x.clone().requires_grad_(), [{"y": 2}], kind()).heatmap
    close(Gradient(model, kind())(x, 2)[1].sum(1), heatmap)


@few
@given(st.integers(0, 10_000), st.sampled_from([nn.Tanh, nn.Softplus, nn.Sigmoid]))
def test_integrated_gradients_are_complete(seed, activation):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double().eval()
    x, x0 = torch.randn(2, 2, 4).double()
    _, found = IntegratedGradients(model, steps=40, baseline=x0, quadrature="gauss_legendre")(x, [0, 2])
    rows = torch.arange(2)
    close(found.sum(1), (model(x) - model(x0)).detach()[rows, [0, 2]], rtol=1e-6, atol=1e-9)


def test_error_of_the_right_sum_falls_with_the_steps():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval(), torch.randn(3, 4).double()
    whole = (model(x) - model(torch.zeros_like(x)))[:, 0].detach()
    errors = [(IntegratedGradients(model, steps=n)(x, 0)[1].sum(1) - whole).abs().max() for n in (50, 100, 200)]
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.2


@pytest.mark.parametrize("form", ["number", "one", "one with batch axis", "each", "function", "array"])
def test_forms_of_baselines(form):
    model, x = gap_net(), images()
    one = torch.rand(3, 8, 8, dtype=torch.float64)
    given, full = {
        "number": (0.5, torch.full_like(x, 0.5)),
        "one": (one, one.expand(x.shape)),
        "one with batch axis": (one[None], one.expand(x.shape)),
        "each": (x.flip(0), x.flip(0)),
        "function": (lambda data: data.mean((2, 3), keepdim=True).expand(data.shape), x.mean((2, 3), keepdim=True)),
        "array": (one.numpy(), one.expand(x.shape)),
    }[form]
    expected = sum(gradient(model, full + k / 3 * (x - full), 1) for k in (1, 2, 3)) / 3 * (x - full)
    close(IntegratedGradients(model, steps=3, baseline=given)(x, 1)[1], expected)


def test_smoothgrad_with_given_noise():
    model, x = gap_net(), images()
    noise = torch.randn(4, *x.shape, dtype=torch.float64) * 0.1
    each = torch.stack([gradient(model, x + e, 2) for e in noise])
    for statistic, wanted in {
        "mean": each.mean(0), "squared": (each**2).mean(0), "variance": each.var(0, unbiased=False),
    }.items():  # fmt: skip
        close(SmoothGrad(model, noise=noise, statistic=statistic)(x, 2)[1], wanted)


def test_noise_has_its_level_and_is_shared_by_samples():
    seen = []
    model = Call(lambda v: (seen.append(v.detach().clone()), v.sum((1, 2), keepdim=True)[..., 0])[1])
    x = torch.stack([torch.linspace(0, 1, 400).view(20, 20), torch.linspace(-2, 2, 400).view(20, 20)]).double()
    check_independent(model, Inputs.single(x), [range(2)])  # (what else the model would be run for)
    seen.clear()
    SmoothGrad(model, n=40, noise_level=0.1, batch_size=2)(x, 0)
    noise = torch.stack(seen[:40]) - x
    assert 0.098 < noise[:, 0].std() < 0.102
    close(noise[:, 1], noise[:, 0] * 4)
    assert (noise.flatten(1).std(1) > 0.05).all()  # in every copy


def test_smoothgrad_depends_on_the_seed_alone():
    model, x = gap_net(), images()
    first = SmoothGrad(model, n=6)(x, 1)[1]
    close(SmoothGrad(model, n=6, batch_size=4)(x, 1)[1], first)
    close(SmoothGrad(model, n=6)(x[1:2], 1)[1], first[1:2])  # and not on what else is in the batch
    assert not torch.allclose(SmoothGrad(model, n=6, seed=1)(x, 1)[1], first)
    torch.manual_seed(0)
    third = SmoothGrad(model, n=6, seed=None)(x, 1)[1]
    assert not torch.allclose(SmoothGrad(model, n=6, seed=None)(x, 1)[1], third)


# --- composites -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epsilon_plus_flat", "gradient_x_input", "deeplift", "excitation_backprop"])
def test_composite_takes_the_place_of_the_gradient(name):
    model, x = gap_net(), images()

    expected = Maps(model)(x, [{"y": 2}], composites.get(name)).heatmap
    close(Gradient(model, composites.get(name))(x, 2)[1], expected)
    close(SmoothGrad(model, composites.get(name), n=3, noise_level=0)(x, 2)[1], expected)
    close(SimpleTaylor(model, composites.get(name))(x, 2)[1], expected)


@pytest.mark.parametrize("kind", [IntegratedGradients, SmoothGrad])
def test_no_composite_is_the_composite_of_the_gradient(kind):
    model, x = gap_net(), images()
    for target in ([0, 1, 2], Neuron("3", (1, 2, 2)), lambda y: y.softmax(1)[:, 1], Mask(torch.rand(3, 4).double())):
        found = quick(kind, model)(x, Target.of(target))[1]
        close(quick(kind, model, composite=composites.Gradient())(x, Target.of(target))[1], found)


def test_path_with_a_composite_integrates_multipliers():
    model, x = gap_net(), images()
    points = [k / 4 * x for k in range(1, 5)]
    each = [Gradient(model, composites.EpsilonPlus())(point, 1)[1] / point for point in points]
    close(IntegratedGradients(model, composites.EpsilonPlus(), steps=4)(x, 1)[1], x * sum(each) / 4)


def test_composite_stays_on_the_model_inside_of_the_context(untouched):
    model, x = gap_net(), images()
    expected = Gradient(model, composites.EpsilonPlus())(x, 1)[1]
    with untouched(model):
        with Gradient(model, composites.EpsilonPlus()) as attributor:
            for _ in range(2):
                close(attributor(x, 1)[1], expected)
                assert attributor.composite.handles
        assert not attributor.composite.handles


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("composite", [None, composites.EpsilonPlus()])
def test_arrays_of_words_start_nothing(composite):
    with pytest.raises(TypeError, match="target must be a class, a list or tensor of classes"):
        Gradient(gap_net(), composite)(images(), np.array(["a", "b", "c"], object))


@pytest.mark.parametrize("composite", [None, composites.EpsilonPlus()])
def test_arrays_start_as_tensors_do(composite):
    model, x = gap_net(), images()
    start = torch.randn(3, 4, dtype=torch.float64)
    method = Gradient(model, composite)
    close(method(x, start.numpy())[1], method(x, start)[1])
    close(Gradient(model, composite, start.numpy())(x)[1], method(x, start)[1])


def test_targets_of_all_kinds():
    model, x = gap_net(), images()
    each = torch.stack([gradient(model, x, c) for c in range(4)])
    mask = torch.rand(3, 4, dtype=torch.float64)
    for target, wanted in [
        (-1, each[3]), ([2], each[2]), (torch.tensor([0, 1, 2]), torch.stack([each[i][i] for i in range(3)])),
        (Mask(mask), torch.einsum("nc,cnxyz->nxyz", mask, each)),
        (Mask(mask[0]), torch.einsum("c,c...->...", mask[0], each)),
        (Score(lambda y: y[:, 1] - y[:, 0]), each[1] - each[0]),
    ]:  # fmt: skip
        for batch_size in (None, 1, 2):
            close(Gradient(model, batch_size=batch_size)(x, Target.of(target))[1], wanted)


@pytest.mark.parametrize("index", [2, (2, 1), (2, 1, -1)])
def test_neurons_of_a_hidden_layer(index):
    model, x = gap_net(), images()
    place = index if isinstance(index, tuple) else (index,)
    leaf = x.clone().requires_grad_()
    hidden = model[:4](leaf)[(slice(None), *place)]
    (expected,) = torch.autograd.grad(hidden.sum(), leaf)
    target = Neuron("3", index)
    close(Gradient(model)(x, target)[1], expected)
    points = [k / 3 * x for k in (1, 2, 3)]
    each = [Gradient(model)(point, target)[1] for point in points]
    close(IntegratedGradients(model, steps=3)(x, target)[1], sum(each) / 3 * x)
    fall = (model[:4](x) - model[:4](torch.zeros_like(x)))[(slice(None), *place)].detach()
    close(Gradient(model, composites.DeepLift())(x, target)[1].flatten(1).sum(1), fall.reshape(3, -1).sum(1))


def test_distribution_over_outputs_starts_excitation_backprop():
    model, x = gap_net().requires_grad_(False), images().abs()
    distribution = torch.rand(3, 4).double().softmax(1)
    each = [Gradient(model, composites.ExcitationBackprop())(x, c)[1] for c in range(4)]
    _, found = Gradient(model, composites.ExcitationBackprop())(x, Mask(distribution))
    close(found, sum(distribution[:, c].view(-1, 1, 1, 1) * each[c] for c in range(4)))


def test_mask_keeps_what_zero_outputs_are_worth():
    """Outputs that are 0 have a gradient all the same."""
    model = Call(lambda v: torch.stack([v[:, 0] - v[:, 0].detach(), 3 * v[:, 1]], 1))
    x = torch.tensor([[1.0, 2.0]]).double()
    close(Gradient(model)(x, Mask(torch.tensor([2.0, 1.0])))[1], torch.tensor([[2.0, 3.0]]).double())
    close(SimpleTaylor(model)(x, 0)[1], torch.tensor([[1.0, 0.0]]).double())


# --- concepts, several inputs, batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Gradient, SimpleTaylor, IntegratedGradients, SmoothGrad])
def test_concepts_of_a_layer_add_up(kind):
    model, x = gap_net(), images()
    parts = [quick(kind, model, condition={"3": [c]})(x, [0, 1, 2])[1] for c in range(6)]
    close(sum(parts), quick(kind, model)(x, [0, 1, 2])[1])
    assert all(part.abs().sum() > 0 for part in parts)


def test_layer_is_explained_in_place_of_the_input():
    model, x = gap_net(), images()
    hidden = model[:4](x).detach()
    found = Gradient(model, composites.DeepLift(), layer="3")(x, 1)[1]
    assert found.shape == hidden.shape
    close(found.flatten(1).sum(1), (model(x) - model(torch.zeros_like(x)))[:, 1].detach())
    close(Sensitivity(model, layer="3")(x, 1)[1], gradient(model[4:], hidden, 1) ** 2)


@pytest.mark.parametrize("kind", EVERY)
def test_several_inputs(kind):
    model, inputs = TwoInputs(), two_inputs()
    output, found = quick(kind, model)(inputs, [0, 1, 2])
    close(output, model(*inputs).detach())
    assert [part.shape for part in found] == [data.shape for data in inputs]
    for number, data in enumerate(inputs):
        held = functools.partial(lambda v, n: model(*(v if i == n else o for i, o in enumerate(inputs))), n=number)
        if kind in (Gradient, Saliency, Sensitivity, SimpleTaylor):
            close(found[number], quick(kind, Call(held))(data, [0, 1, 2])[1])
    if kind is IntegratedGradients:
        whole = IntegratedGradients(model, steps=200, quadrature="middle")(inputs, 1)[1]
        fall = (model(*inputs) - model(*map(torch.zeros_like, inputs)))[:, 1].detach()
        close(sum(part.flatten(1).sum(1) for part in whole), fall, rtol=1e-3, atol=1e-3)


def test_several_inputs_with_a_composite():
    model, inputs = TwoInputs(), two_inputs()
    _, found = Gradient(model, composites.DeepLift())(inputs, 1)
    fall = (model(*inputs) - model(*map(torch.zeros_like, inputs)))[:, 1].detach()
    close(sum(part.flatten(1).sum(1) for part in found), fall)
    parts = [Gradient(model, condition={"out": [1]})(inputs, 1)[1], Gradient(model)(inputs, 1)[1]]
    for left, right in zip(*parts, strict=True):
        close(left, right)


@pytest.mark.parametrize("kind", EVERY)
def test_size_of_batches_does_not_matter(kind):
    model, x = gap_net(), images(5)
    whole = quick(kind, model)(x, [0, 1, 2, 3, 0])[1]
    for size in (1, 3, 100):
        close(quick(kind, model, batch_size=size)(x, [0, 1, 2, 3, 0])[1], whole)


@pytest.mark.parametrize("kind", EVERY)
def test_model_is_left_as_it_was(kind, untouched):
    model, x = gap_net(), images()
    with untouched(model):
        quick(kind, model)(x, 1)
        quick(kind, model, composite=composites.EpsilonPlusFlat())(x, 1)
        with pytest.raises(IndexError):
            quick(kind, model)(x, 4)
        quick(kind, model)(x, Neuron("3", 2))
    assert x.grad is None and not x.requires_grad


def test_functions_of_all_samples_see_all_samples():
    """As in zennit: what a user's function closes over fits the batch, in every step."""
    model, x = gap_net(), images()
    start = torch.eye(4).double()[[2, 0, 1]]
    for kind in (IntegratedGradients, SmoothGrad):
        close(quick(kind, model)(x, lambda output: start)[1], quick(kind, model)(x, [2, 0, 1])[1])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: Gradient(m)(x, 4), IndexError, "target 4 is out of range: the model has outputs 0 to 3"),
        (lambda m, x: Gradient(m)(x, [0, 1]), ValueError, "target has 2 classes for 3 samples"),
        (lambda m, x: Gradient(m)(x, Mask(torch.ones(3, 5))), ValueError, r"mask of shape \(3, 5\), does not fit"),
        (lambda m, x: Gradient(m)(x, Mask(torch.ones(2, 4))), ValueError, "is for 2 samples; there are 3"),
        (lambda m, x: Gradient(m)(x, Score(lambda y: y)), ValueError, r"returned a Tensor of shape \(3, 4\)"),
        (lambda m, x: Gradient(m)(x, "dog"), TypeError, "target must be a class, .*not 'dog'"),
        (lambda m, x: Gradient(m)(x, Neuron("33", 0)), KeyError, "'33' not found in model"),
        (lambda m, x: IntegratedGradients(m)(x, Neuron("33", 0)), KeyError, "'33' not found in model"),
        (lambda m, x: Gradient(m)(x, Neuron("3", 6)), IndexError, r"neuron \(6,\) is not in layer '3'.*\(6, 4, 4\)"),
        (lambda m, x: Gradient(m)(x, Neuron("3", (0, 0, 0, 0))), IndexError, "is not in layer '3'"),
        (lambda m, x: Neuron("3", ()), ValueError, "has no index"),
        (lambda m, x: Neuron("", 1), TypeError, "name of the layer"),
        (lambda m, x: Classes(torch.zeros(2, 2).long()), TypeError, "one axis"),
        (lambda m, x: Mask(torch.tensor([float("nan")])), ValueError, "NaN"),
        (lambda m, x: Gradient(m)(x.long(), 0), TypeError, "floating-point"),
        (lambda m, x: Gradient(m)((x, x[:2]), 0), ValueError, r"\[3, 2\] samples"),
        (lambda m, x: Gradient(m)((), 0), TypeError, "must be a tensor, or a tuple"),
        (lambda m, x: Gradient("net"), TypeError, "model must be a torch.nn.Module, not str"),
        (lambda m, x: Gradient(m, "epsilon"), TypeError, "composite must be None"),
        (lambda m, x: Gradient(m, condition=["3"]), TypeError, "condition must be a dict"),
        (lambda m, x: Gradient(m, condition={"x": 1})(x, 0), KeyError, "'x' not found"),
        (lambda m, x: Gradient(m, batch_size=0), ValueError, "batch_size must be a whole number of at least 1, not 0"),
        (lambda m, x: Gradient(m, layer="nope")(x, 0), KeyError, "'nope' not found"),
        (lambda m, x: IntegratedGradients(m, steps=0), ValueError, "steps must be a whole number"),
        (lambda m, x: IntegratedGradients(m, quadrature="simpson"), ValueError, "quadrature must be one of 'right'"),
        (lambda m, x: nodes("trapezoid", 1), ValueError, "at least 2 points"),
        (lambda m, x: IntegratedGradients(m, baseline=x[:2])(x, 0), ValueError, r"baseline has shape \(2, 3, 8, 8\)"),
        (lambda m, x: IntegratedGradients(m, baseline=x[0, 0])(x, 0), ValueError, r"for all samples as \(3, 8, 8\)"),
        (lambda m, x: IntegratedGradients(m, baseline="0")(x, 0), TypeError, "a baseline is a number"),
        (lambda m, x: IntegratedGradients(m, baseline=(0, 0))(x, 0), ValueError, "2 baselines for 1 inputs"),
        (lambda m, x: IntegratedGradients(m, baseline=float("inf"))(x, 0), ValueError, "NaN or infinite"),
        (lambda m, x: SmoothGrad(m, n=1.5), ValueError, "n must be a whole number"),
        (lambda m, x: SmoothGrad(m, noise_level=-1), ValueError, "noise_level must be"),
        (lambda m, x: SmoothGrad(m, noise_level=True), ValueError, "noise_level must be .* not True"),
        (lambda m, x: SmoothGrad(m, noise=x[None][:0])(x, 0), ValueError, r"it must be \(n, 3, 3, 8, 8\)"),
        (lambda m, x: SmoothGrad(m, statistic="median"), ValueError, "statistic must be one of"),
        (lambda m, x: SmoothGrad(m, noise=x)(x, 0), ValueError, r"it must be \(n, 3, 3, 8, 8\)"),
        (lambda m, x: SmoothGrad(m, noise=(x, x))(x, 0), ValueError, "noise for 2 inputs"),
        (lambda m, x: SmoothGrad(m, noise=-1)(x, 0), TypeError, "noise must be a tensor for each input, not -1"),
        (lambda m, x: SmoothGrad(m, noise="x")(x, 0), TypeError, "noise must be a tensor for each input, not 'x'"),
        (lambda m, x: SmoothGrad(m, seed="a"), ValueError, "seed must be a whole number of 64 bits"),
        (lambda m, x: Gradient(m)(x, lambda y: y[:, :2]), ValueError, "shape"),
        (lambda m, x: IntegratedGradients(m)(x, lambda y: 3), ValueError, "attr_output gives an int"),
    ],
)  # fmt: skip
def test_errors_name_the_culprit(call, error, message, untouched):
    model, x = gap_net(), images()
    with untouched(model), pytest.raises(error, match=message):
        call(model, x)


def test_targets_that_are_checked_before_the_model_runs():
    model = Call(lambda v: pytest.fail("the model runs"))
    for options, target in [({}, [0, 1]), ({}, Mask(torch.ones(2, 4))), ({"baseline": torch.ones(2)}, 0)]:
        with pytest.raises(ValueError, match=r"samples|baseline"):
            IntegratedGradients(model, **options)(images(), target)


def test_model_that_does_not_depend_on_the_data():
    model = Call(lambda v: torch.ones(len(v), 2))
    for kind in (Gradient, IntegratedGradients):
        with pytest.raises(ValueError, match="does not depend on the data"):
            kind(model)(torch.ones(1, 2), 0)
