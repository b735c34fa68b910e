"""What an attribution costs, counted exactly: floating-point operations and calls of torch's kernels."""

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from architectures import Family
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18
from zennit.composites import EpsilonPlusFlat as ZennitEpsilonPlusFlat
from zennit.torchvision import ResNetCanonizer

import crp
from crp.attribution import CondAttribution
from crp.composites import EpsilonAlpha2Beta1Flat, EpsilonGammaBox, EpsilonPlusFlat, Gradient
from crp.concepts import ChannelConcept
from crp.demo.net import DigitNet

BOX = {"low": -3.0, "high": 3.0}


class Calls(TorchDispatchMode):
    """Counts calls of kernels: of all, or of those named."""

    def __init__(self, names=None):
        super().__init__()
        self.names, self.n = names, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += self.names is None or str(func) in self.names
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def vgg():
    model = Family("vgg16_bn", 64, "").build().float().requires_grad_(False)
    return model, torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def count(counter, run):
    run()  # what is kept for the model is kept now
    with counter:
        run()
    return counter.get_total_flops() if isinstance(counter, FlopCounterMode) else counter.n


def gradient(model, data):
    leaf = data.clone().requires_grad_()
    model(leaf)[:, 3].sum().backward()


def ratio(kind, model, data, composite):
    make = {"flops": lambda: FlopCounterMode(display=False), "calls": Calls}[kind]
    attribution = CondAttribution(model)
    ours = count(make(), lambda: attribution(data, [{"y": 3}], composite))
    return ours / count(make(), lambda: gradient(model, data))


@pytest.mark.parametrize(
    ("composite", "most"),
    [(EpsilonPlusFlat(), 1.50), (EpsilonGammaBox(**BOX), 1.51), (EpsilonAlpha2Beta1Flat(), 2.0), (Gradient(), 1.0)],
    ids=lambda value: type(value).__name__ if not isinstance(value, float) else "",
)
def test_floating_point_operations_in_gradients(vgg, composite, most):
    assert 0.99 < ratio("flops", *vgg, composite) <= most


def test_calls_of_kernels_in_gradients(vgg):
    model, data = vgg
    most = 1.5 if hasattr(torch.compiler, "set_stance") else 1.52  # (torch before 2.6 counts a few more views)
    assert ratio("calls", model, data[:, :, :64, :64], EpsilonPlusFlat()) <= most


def test_residual_blocks_cost_no_more_where_no_relu_reads_a_convolution():
    model = resnet18(weights=None).eval().requires_grad_(False)
    data = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert ratio("flops", model, data, EpsilonGammaBox(**BOX)) <= 2.0


def test_concepts_of_one_sample_go_back_together():
    """The number of concepts does not change the number of kernels, as long as they fit into one part."""
    model = resnet18(weights=None).eval().requires_grad_(False)
    data = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    attribution, layer = CondAttribution(model), "layer3.1.conv2"

    def calls(n):
        conditions = [{"y": 3, layer: channel} for channel in range(n)]
        return count(Calls(), lambda: attribution(data, conditions, EpsilonPlusFlat()))

    assert calls(32) == calls(16)


def test_an_activation_in_place_sends_nothing_back_to_what_it_overwrote():
    """`ReLU6(inplace=True)` costs a copy in the forward pass, and nothing in the backward pass."""
    data = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def calls(inplace):
        layers = [layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 3), nn.ReLU6(inplace=inplace))]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
        return count(Calls(), lambda: CondAttribution(model)(data, [{"y": 3}], EpsilonPlusFlat()))

    assert calls(True) - calls(False) <= 4 * 2


def test_zennits_own_rules_run_once_for_all_concepts_of_a_sample():
    model = resnet18(weights=None).eval().requires_grad_(False)
    data = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    composite = ZennitEpsilonPlusFlat(canonizers=[ResNetCanonizer()])

    def convolutions(n):
        conditions = [{"y": 3, "layer3.1.conv2": channel} for channel in range(n)]
        counter = Calls(["aten.convolution.default"])
        return count(counter, lambda: CondAttribution(model)(data, conditions, composite))

    assert convolutions(8) == convolutions(2)


def test_a_part_is_gone_while_its_successor_is_computed():
    """The caller alone keeps the results of `generate`."""
    model = resnet18(weights=None).eval().requires_grad_(False)
    conditions = [{"y": 3, "layer2.0.conv1": channel} for channel in range(6)]
    parts, kept = [], []

    def mask(row, channels, layer):
        kept.append(sum(ref() is not None for ref in parts))
        return ChannelConcept.mask(row, channels, layer)

    for part in CondAttribution(model).generate(
        torch.randn(1, 3, 32, 32), conditions, EpsilonPlusFlat(), ["layer2"], mask, batch_size=2, verbose=False
    ):
        parts += map(weakref.ref, (part.heatmap, *part.relevances.values(), *part.activations.values()))
        del part
    assert len(parts) == 3 * 5
    assert len(kept) >= 6 and not any(kept)


@pytest.mark.parametrize(
    ("composite", "kernels", "functions"),
    [
        (EpsilonPlusFlat(), 100, 1290),
        (EpsilonGammaBox(low=0.0, high=1.0), 125, 1325),
        (EpsilonAlpha2Beta1Flat(), 133, 1350),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_what_a_call_of_a_small_net_costs_beside_its_arithmetic(composite, kernels, functions):
    """Calls of kernels, and of functions of this package, in the demo's net; both are fixed costs of every call."""
    model = DigitNet().eval().requires_grad_(False)
    data = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    attribution, called = CondAttribution(model), [0]
    attribution.replay = False
    package = str(Path(crp.__file__).parent)

    def profile(frame, event, _):
        called[0] += event == "call" and frame.f_code.co_filename.startswith(package)

    def run():
        return attribution(data, [{"y": 3}], composite)

    assert count(Calls(), run) <= kernels  # (torch before 2.6 counts a few more views)
    gc.collect()
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    assert called[0] <= functions
