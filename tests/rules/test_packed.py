"""Layers whose weights are packed into a few bits are explained as the dense layers that they stand for."""

from __future__ import annotations

import pytest
import torch
from preset_cases import numbers, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import crp.composites
import crp.rules.packed
from crp.attribution import CondAttribution
from crp.composites import AttnLRP, EpsilonPlus, EpsilonPlusFlat
from crp.engine.kernel_calls import CallRecorder
from crp.engine.replayed import Replayed
from crp.errors import UnseenError
from crp.layers.state import undisturbed
from crp.rules import Epsilon

OTHERS = "DeepLift EpsilonAlpha2Beta1 ExcitationBackprop Gradient GuidedBackprop UniformGamma"
KINDS = [AttnLRP, EpsilonPlus, EpsilonPlusFlat, *(getattr(crp.composites, name) for name in OTHERS.split())]
DATA = numbers(3, 3, 2, 2)


class _Kernel(torch.autograd.Function):
    """A kernel that no mode sees, with a derivative."""

    @staticmethod
    def forward(ctx, x, packed, scale):
        ctx.saved = packed, scale
        return x @ _whole(packed, scale).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ _whole(*ctx.saved), None, None


def _whole(packed: Tensor, scale: Tensor) -> Tensor:
    """Two weights of four bits in each byte."""
    return (torch.stack([packed >> 4, packed & 15], -1).flatten(1).double() - 8) * scale


def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 7
    levels = ((weight / scale).round() + 8).to(torch.uint8)
    return (levels[:, ::2] << 4) | levels[:, 1::2], scale


class Packed(nn.Module):
    """As those of quantized language models."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed, scale = _pack(layer.weight.detach())
        self.register_buffer("qweight", packed)
        self.register_buffer("scale", scale)
        self.bias = layer.bias
        self.n_called: list[int] = []

    def dense(self) -> Tensor:
        return _whole(self.qweight, self.scale)

    def kernel(self, x: Tensor) -> Tensor:
        return _Kernel.apply(x, self.qweight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        self.n_called.append(x.shape[0])
        y = self.kernel(x)
        return y if self.bias is None else y + self.bias


class ForInference(Packed):
    """A kernel without a derivative."""

    def kernel(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().kernel(x)


class Warned(Packed):
    """An operator that torch knows, without a derivative: it sends nothing back, and torch warns."""

    def kernel(self, x: Tensor) -> Tensor:
        return torch.ops.crp_tests.packed(x, self.qweight, self.scale)


def _operator(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return x @ _whole(packed, scale).T


_library = torch.library.Library("crp_tests", "FRAGMENT")
_library.define("packed(Tensor x, Tensor packed, Tensor scale) -> Tensor")
_library.impl("packed", _operator, "CPU")
_library.define("viewed(Tensor x, Tensor packed, Tensor scale) -> Tensor")
_library.impl(
    "viewed", lambda *args: torch.ops.crp_tests.packed(*args).flatten(1).view(-1, 12), "CompositeImplicitAutograd"
)


class OfIntegers(nn.Linear):
    """A layer of torch with integers in place of its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, dtype=torch.float64)
        packed, self.scale = _pack(layer.weight.detach())
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias

    def dense(self) -> Tensor:
        return _whole(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        y = _Kernel.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class OwnClass(Tensor):
    """A weight of a class of its own, for which few functions are there."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> Tensor:
        packed, scale = _pack(weight)
        own = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        own.packed, own.scale = packed, scale
        return own

    def __init__(self, weight: Tensor) -> None:
        super().__init__()

    def dequantize(self) -> Tensor:
        return _whole(self.packed, self.scale)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = (*args, *(kwargs or {}).values())
            y = _Kernel.apply(x, weight.packed, weight.scale)
            return y if bias is None else y + bias
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def of_own_class(layer: nn.Linear) -> nn.Linear:
    other = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
    weight = OwnClass(layer.weight.detach())
    other.weight, other.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    other.dense = weight.dequantize
    return other


MAKERS = {
    "kernel": Packed,
    "inference": ForInference,
    "operator": Warned,
    "nn.Linear": OfIntegers,
    "class": of_own_class,
}


def pair(make, bias: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """A net with packed layers, and the dense one that it stands for."""
    layers = [nn.Linear(12, 32, bias), nn.ReLU(), nn.Linear(32, 16, bias), nn.ReLU(), nn.Linear(16, 4, bias)]
    dense = seeded(nn.Sequential(nn.Flatten(), *layers))
    packed = nn.Sequential(*(make(part) if isinstance(part, nn.Linear) else part for part in dense)).eval()
    with torch.no_grad():
        for number in (1, 3, 5):
            dense[number].weight.copy_(packed[number].dense())
    return packed, dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("make", "bias"), [*((make, True) for make in MAKERS), ("kernel", False)])
def test_results_are_those_of_the_dense_net(make, kind, bias):
    packed, dense = pair(MAKERS[make], bias)
    conditions = [{"y": 1}, {"y": 2, "3": list(range(9))}]
    found, exact = (CondAttribution(net)(DATA[:2], conditions, kind(), ["1", "3"]) for net in (packed, dense))
    torch.testing.assert_close(found.heatmap, exact.heatmap, rtol=1e-9, atol=1e-12)
    assert found.heatmap.abs().amax() > 0
    for layer in ("1", "3"):
        torch.testing.assert_close(found.relevances[layer], exact.relevances[layer], rtol=1e-9, atol=1e-12)


def test_rules_that_take_no_weights_apart_do_not_unpack(monkeypatch):
    def refuse(self):
        raise AssertionError("unpacked")

    packed, dense = pair(Packed)
    CondAttribution(packed)(DATA, [{"y": 1}], AttnLRP())
    monkeypatch.setattr(crp.rules.packed._PackedWeight, "dequantize", refuse)
    found, exact = (CondAttribution(net)(DATA, [{"y": 1}], AttnLRP()).heatmap for net in (packed, dense))
    torch.testing.assert_close(found, exact)
    with pytest.raises(AssertionError, match="unpacked"):
        CondAttribution(packed)(DATA, [{"y": 1}], EpsilonPlusFlat())


def test_rules_of_zennit_unpack():
    from zennit.rules import ZPlus

    results = [
        CondAttribution(net)(DATA, [{"y": 1}], EpsilonPlus(layer_map=[(nn.Linear, ZPlus())])).heatmap
        for net in pair(of_own_class)
    ]
    torch.testing.assert_close(*results)


def test_a_bias_that_counts_as_zero():
    results = [
        CondAttribution(net)(
            DATA, [{"y": 1}], EpsilonPlus(layer_map=[(nn.Linear, Epsilon(zero_params="bias"))])
        ).heatmap
        for net in pair(Packed)
    ]
    torch.testing.assert_close(*results)


def test_the_model_is_left_as_it_was():
    packed, _ = pair(Packed)
    own = packed[3].forward
    packed[3].forward = own
    with EpsilonPlus().context(packed):
        assert "forward" in vars(packed[1])
    assert "forward" not in vars(packed[1])
    assert vars(packed[3])["forward"] is own
    with pytest.raises(RuntimeError, match="stop"), EpsilonPlus().context(packed):
        raise RuntimeError("stop")
    assert "forward" not in vars(packed[1])


class Rectified(Packed):
    """A layer of integers with an activation."""

    def kernel(self, x: Tensor) -> Tensor:
        return _Rectifying.apply(super().kernel(x))


class Rooted(Packed):
    def kernel(self, x: Tensor) -> Tensor:
        return super().kernel(_Rooting.apply(x))


class _Rectifying(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Rooting(_Rectifying):
    @staticmethod
    def forward(ctx, x):
        return x.sign() * x.abs().sqrt()


@pytest.mark.parametrize("make", [Rectified, Rooted])
def test_layers_that_are_no_sums_of_weighted_inputs_are_refused(make):
    with pytest.raises(UnseenError, match="Backward, where no rule can see it"):
        CondAttribution(pair(make, bias=False)[0])(DATA, [{"y": 1}], EpsilonPlus())


def test_each_layer_is_asked_whether_it_is_such_a_sum():
    class Some(Packed):
        rectifies = False

        def kernel(self, x: Tensor) -> Tensor:
            y = super().kernel(x)
            return _Rectifying.apply(y) if self.rectifies else y

    packed, _ = pair(Some)
    CondAttribution(packed)(DATA, [{"y": 1}], EpsilonPlus())
    other, _ = pair(Some)
    other[3].rectifies = True
    with pytest.raises(UnseenError, match="_RectifyingBackward, where no rule can see it"):
        CondAttribution(other)(DATA, [{"y": 1}], EpsilonPlus())


def test_layers_that_are_called_with_more_than_an_input_are_refused():
    class Scaled(Packed):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            return super().forward(x) * scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Scaled(nn.Linear(12, 4).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1), 2.0)

    with pytest.raises(UnseenError, match="_KernelBackward"):
        CondAttribution(Net().eval())(DATA, [{"y": 1}], EpsilonPlus())


def test_weights_that_change_between_calls_are_noticed():
    packed, dense = pair(Packed)
    attribution, composite = CondAttribution(packed), EpsilonPlusFlat()
    attribution._replayed = Replayed(CallRecorder(2, cost=0))
    for round in range(8):
        if round == 5:
            packed[3].qweight.copy_(packed[3].qweight.flip(0))
            with torch.no_grad():
                dense[3].weight.copy_(packed[3].dense())
        found = attribution(DATA, [{"y": 1}], composite).heatmap
        torch.testing.assert_close(found, CondAttribution(dense)(DATA, [{"y": 1}], EpsilonPlusFlat()).heatmap)


@pytest.mark.parametrize("name", ["packed", "viewed"])
def test_operators_without_a_derivative_are_refused(name):
    operator = getattr(torch.ops.crp_tests, name)

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[0](x.flatten(1))
            layer = self[1]
            return self[2](h + operator(h, layer.qweight, layer.scale))

    first, last = nn.Linear(12, 12).double(), nn.Linear(12, 3).double()
    net = Net(first, Packed(nn.Linear(12, 12).double()), last).eval()
    with pytest.raises(NotImplementedError, match=rf"{name}.* is registered with torch without a derivative"):
        CondAttribution(net)(DATA, [{"y": 1}], EpsilonPlus())


def test_how_a_weight_is_packed_is_put_back_with_it():
    class State:
        def __init__(self) -> None:
            self.order = [1, 2]

    weight = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    weight.state = State()
    net = nn.Module()
    net.weight = weight
    for later in ((), net.parameters()):
        with undisturbed(net, later=later):
            weight.data = torch.zeros(2, 2)
            weight.state.order, weight.state.more = [3], True
        assert torch.equal(net.weight, torch.arange(4, dtype=torch.uint8))
        assert vars(weight.state) == {"order": [1, 2]}
