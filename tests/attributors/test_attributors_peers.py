"""Attributors against captum and pytorch-grad-cam, where these are right."""

import functools

import pytest
import torch
from attributor_cases import TwoInputs, gap_net, images, two_inputs
from torch import nn

from crp.attributors import (
    ELRP,
    GradCAM,
    GradCAMPlusPlus,
    Gradient,
    GuidedGradCAM,
    IntegratedGradients,
    Occlusion,
    Saliency,
    ShapleySampling,
    SimpleTaylor,
    SmoothGrad,
)

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
CLASSES = torch.tensor([0, 3, 1])


@pytest.fixture
def captum():
    return pytest.importorskip("captum.attr")


@pytest.fixture
def grad_cam():
    return pytest.importorskip("pytorch_grad_cam")


def test_gradients(captum):
    model, x = gap_net(), images()
    data = x.clone().requires_grad_()
    close(Gradient(model)(x, CLASSES)[1], captum.Saliency(model).attribute(data, CLASSES, abs=False))
    close(Saliency(model)(x, CLASSES)[1], captum.Saliency(model).attribute(data, CLASSES))
    close(SimpleTaylor(model)(x, CLASSES)[1], captum.InputXGradient(model).attribute(data, CLASSES).detach())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("right", "riemann_right"), ("left", "riemann_left"), ("middle", "riemann_middle"),
        ("trapezoid", "riemann_trapezoid"), ("gauss_legendre", "gausslegendre"),
    ],
)  # fmt: skip
def test_integrated_gradients(captum, ours, theirs):
    model, inputs = TwoInputs(), two_inputs()
    bases = tuple(torch.rand_like(data) for data in inputs)
    # (eighths are exact in single precision, which their points and weights are in)
    expected = captum.IntegratedGradients(model).attribute(inputs, bases, CLASSES % 3, n_steps=8, method=theirs)
    _, found = IntegratedGradients(model, steps=8, baseline=bases, quadrature=ours)(inputs, CLASSES % 3)
    exact = ours in ("right", "left", "middle")
    weights = 8 / 7 if ours == "trapezoid" else 1  # (theirs sum to 1 - 1/n)
    for left, right in zip(found, expected, strict=True):
        close(left, right * weights, rtol=1e-10 if exact else 1e-6, atol=1e-12 if exact else 1e-7)


def test_smoothgrad(captum, monkeypatch):
    model, x = gap_net(), images(1)
    noise = torch.randn(6, *x.shape, dtype=torch.float64) * 0.2
    data = x.clone().requires_grad_()
    tunnel = captum.NoiseTunnel(captum.Saliency(model))
    for theirs, ours in {"smoothgrad": "mean", "smoothgrad_sq": "squared", "vargrad": "variance"}.items():
        draws = iter(noise)
        monkeypatch.setattr(torch, "normal", lambda *args, draws=draws, **keywords: next(draws))
        expected = tunnel.attribute(
            data, nt_type=theirs, nt_samples=6, nt_samples_batch_size=1, stdevs=0.2, target=1, abs=False
        )
        close(SmoothGrad(model, noise=noise, statistic=ours)(x, 1)[1], expected.detach())


@pytest.mark.parametrize(("window", "step"), [(2, 2), (4, 2), (2, 1), (8, 1)])
def test_occlusion(captum, window, step):
    model, x = gap_net(), images()
    expected = captum.Occlusion(model).attribute(
        x, (3, window, window), strides=(3, step, step), baselines=0.3, target=CLASSES
    )  # fmt: skip
    found = Occlusion(model, window_shape=window, step=step, baseline=0.3)(x, CLASSES)[1]
    close(found, expected.double(), rtol=1e-6, atol=1e-6)


def test_shapley_values_of_all_permutations(captum):
    import itertools

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)).double().eval(), torch.randn(3, 4).double()
    expected = captum.ShapleyValues(model).attribute(x, target=CLASSES)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    close(ShapleySampling(model, permutations=orders)(x, CLASSES)[1], expected.double(), rtol=1e-6, atol=1e-6)


def test_class_activation_maps_of_captum(captum):
    model, x = gap_net(), images()
    for relu in (True, False):
        expected = captum.LayerGradCam(model, model[4]).attribute(x, CLASSES, relu_attributions=relu)
        close(GradCAM(model, layer="4", relu=relu).maps(x, CLASSES)[1], expected.detach())
    data = x.clone().requires_grad_()
    expected = captum.GuidedGradCam(model, model[4]).attribute(data, CLASSES, interpolate_mode="nearest")
    found = GuidedGradCAM(model, layer="4", interpolation="nearest")(x, CLASSES)[1]
    close(found, expected.detach())


@pytest.mark.parametrize("layer", ["1", "4"])
def test_class_activation_maps_of_grad_cam(grad_cam, layer):
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = gap_net(), images()
    targets = [ClassifierOutputTarget(int(c)) for c in CLASSES]
    place = model[int(layer)]
    for kind, ours in [
        (grad_cam.GradCAM, GradCAM(model, layer=layer)),
        (grad_cam.GradCAMPlusPlus, GradCAMPlusPlus(model, layer=layer, eps=1e-6)),
    ]:
        with kind(model, [place]) as theirs:
            activation = theirs.activations_and_grads(x)
            assert activation.shape == (3, 4)
            loss = sum(target(output) for target, output in zip(targets, activation, strict=True))
            model.zero_grad()
            loss.backward(retain_graph=True)
            acts, grads = (store[0].detach().numpy() for store in (
                theirs.activations_and_grads.activations, theirs.activations_and_grads.gradients))  # fmt: skip
            expected = theirs.get_cam_image(x, place, targets, acts, grads, False)
        model.zero_grad()
        close(ours.maps(x, CLASSES)[1][:, 0], torch.from_numpy(expected).clamp(min=0))


def test_elrp_is_the_epsilon_rule_of_captum_for_a_vanishing_epsilon(captum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double().eval()
    x = torch.randn(3, 5).double()
    expected = captum.LRP(model).attribute(x, CLASSES)
    close(Gradient(model, ELRP(epsilon=1e-12))(x, CLASSES)[1], expected.detach(), rtol=1e-6, atol=1e-6)
