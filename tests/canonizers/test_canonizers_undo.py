"""A merge leaves nothing behind, whatever happens; merged parameters are those of today; zennit's merges work too."""

import copy

import pytest
import torch
from canonizer_cases import Merged, check, randomize
from torch import nn
from zennit.canonizers import NamedMergeBatchNorm, SequentialMergeBatchNorm
from zennit.torchvision import ResNetCanonizer, VGGCanonizer

from crp.attribution import CondAttribution
from crp.canonizers import MergeBatchNorm, batchnorm
from crp.composites import EpsilonPlus


class Net(nn.Module):
    """A batch norm after a convolution and one before; fails behind both if told to."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=1e-2)
        self.ahead, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 2)
        self.fails = False

    def forward(self, x):
        x = self.last(self.ahead(self.bn(self.conv(x)).relu()))
        if self.fails:
            raise ValueError("failed in the forward pass")
        return x.flatten(2).sum(2)


MERGED = {"bn": "conv", "ahead": "last"}


@pytest.fixture
def net():
    return randomize(Net()).double().eval()


@pytest.fixture
def data():
    return torch.randn(2, 3, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("known", [False, True], ids=["first_call", "later"])
def test_a_forward_pass_that_fails_leaves_the_model_as_it_was(known, net, data, untouched):
    attribution, state = CondAttribution(net), copy.deepcopy(net.state_dict())
    if known:
        attribution(data, [{"y": 1}], EpsilonPlus())
    net.fails = True
    for _ in range(2):
        with untouched(net), pytest.raises(ValueError, match="failed in the forward pass"):
            attribution(data, [{"y": 1}], EpsilonPlus())
        with untouched(net), pytest.raises(ValueError, match="failed"), EpsilonPlus().context(net):
            net(data)
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    net.fails = False
    check(net, data, MERGED)


def test_a_merge_that_fails_half_way_is_undone(net, data, untouched, monkeypatch):
    check(net, data, MERGED)
    real, done = batchnorm.fold, []

    def fold(*args):
        if done:
            raise MemoryError("no memory")
        done.append(args)
        return real(*args)

    monkeypatch.setattr(batchnorm, "fold", fold)
    with untouched(net), pytest.raises(MemoryError):
        MergeBatchNorm().apply(net)
    assert done


def test_merging_what_is_merged_changes_nothing(net, data, untouched):
    reference = net(data).detach()
    with untouched(net), Merged(net, data), Merged(net, data) as inner:
        assert inner.canonizer.left == dict.fromkeys(MERGED, "its forward is replaced")
        torch.testing.assert_close(inner.output, reference, rtol=1e-12, atol=1e-13)


def test_parameters_that_learn_do_so_afterwards(net, data):
    with Merged(net, data) as run:
        assert not net.conv.weight.requires_grad
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert run.canonizer.merged == MERGED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("size", [1, 3])
def test_precision_and_memory_format_are_kept(dtype, order, kind, size, untouched):
    model = randomize(
        nn.Sequential(kind(4, 6, size, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), kind(6, 6, 1))
    )
    model = model.eval().to(dtype).to(memory_format=order)
    data = torch.randn(2, 4, 5, 5, dtype=dtype).to(memory_format=order)
    double = copy.deepcopy(model).double()
    exact = double(data.double())
    with untouched(model), Merged(model, data) as run:
        assert run.canonizer.merged == {"1": "0", "3": "4"}
        assert model[0].weight.dtype == model[0].bias.dtype == dtype
        for layer, weight in zip((model[0], model[4]), _undone(run), strict=True):
            assert layer.weight is not weight
            assert layer.weight.stride() == weight.stride()
    with Merged(double, data.double()), Merged(model, data):
        for place in (0, 4):  # rounded once
            rounding = (model[place].weight.double() - double[place].weight).abs() / double[place].weight.abs()
            assert rounding.max() <= (4 if dtype == torch.float32 else 0.51) * torch.finfo(dtype).eps
    assert run.output.dtype == dtype
    assert (run.output.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def _undone(run):
    weights = {module: parameter for module, name, parameter in run.canonizer._undo if name == "weight"}
    return list(weights.values())


@pytest.mark.parametrize(
    "name", ["weight", "bias", "running_mean", "running_var", "eps", "conv", "load", "assign", "swap", "removed"]
)
def test_every_change_of_parameters_is_noticed(name, net, data):
    check(net, data, MERGED)
    with torch.no_grad():
        if name == "eps":
            net.bn.eps = 0.5
        elif name == "conv":
            net.conv.weight.mul_(2)
        elif name == "removed":
            net.last.bias = net.bn.bias = None
        elif name == "swap":
            net.last.weight = nn.Parameter(net.last.weight.flip(0))
        elif name in ("load", "assign"):
            state = {key: tensor + 1 for key, tensor in net.state_dict().items()}
            net.load_state_dict(state, assign=name == "assign")
        else:
            getattr(net.ahead, name).add_(0.5)
    check(net, data, MERGED)


def test_parameters_at_the_same_address_are_noticed(net, data):
    check(net, data, MERGED)
    own = net.conv.weight
    state = own.data_ptr(), own._version
    for _ in range(50):  # memory is used again soon
        own.data = own.data * 1.1
        if (own.data_ptr(), own._version) == state:
            break
    else:
        pytest.skip("the memory was not used again")
    check(net, data, MERGED)


def test_another_parameter_in_the_same_memory_is_noticed(net, data):
    check(net, data, MERGED)
    old = net.conv.weight
    new = net.conv.weight = nn.Parameter(old.data)
    with torch.no_grad():
        while new._version < old._version:
            new.mul_(2)
    assert (new.data_ptr(), new._version) == (old.data_ptr(), old._version)
    check(net, data, MERGED)


def test_merged_parameters_are_kept_while_nothing_changes(net, data):
    def merged():
        with Merged(net, data):
            return [net.conv.weight, net.conv.bias, net.last.weight, net.last.bias]

    assert all(a is b for a, b in zip(merged(), merged(), strict=True))


def test_inference_tensors_are_merged_anew(data):
    with torch.inference_mode():
        net = randomize(Net()).double().eval()
    with torch.no_grad():
        check(net, data, MERGED)
        with torch.inference_mode():
            net.conv.weight.mul_(2)
        check(net, data, MERGED)


# --- zennit's ---------------------------------------------------------------------------------------------------------


def by_hand_merged(net):
    """The net as it is with its batch norms merged by hand, without an epsilon."""
    merged = copy.deepcopy(net)
    with torch.no_grad():
        scale = net.bn.weight / net.bn.running_var.sqrt()
        merged.conv.weight.mul_(scale[:, None, None, None])
        merged.conv.bias = nn.Parameter(net.bn.bias - net.bn.running_mean * scale)
    merged.bn = nn.Identity()
    return merged.eval()


@pytest.mark.parametrize(
    "canonizer",
    [NamedMergeBatchNorm([(["conv"], "bn")]), SequentialMergeBatchNorm(), VGGCanonizer(), ResNetCanonizer()],
)
def test_zennits_merges_inside_our_composites(canonizer, net, data, untouched):
    net.bn.eps = 0.0  # zennit leaves it in
    composite = EpsilonPlus([canonizer], stabilizer=1e-15, epsilon=1e-15)
    with untouched(net):
        found = CondAttribution(net)(data, [{"y": 1}], composite)
    by_hand = EpsilonPlus([], stabilizer=1e-15, epsilon=1e-15)
    expected = CondAttribution(by_hand_merged(net))(data, [{"y": 1}], by_hand)
    torch.testing.assert_close(found.prediction, expected.prediction, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.heatmap, expected.heatmap, rtol=1e-9, atol=1e-12)
    unmerged = CondAttribution(net)(data, [{"y": 1}], by_hand).heatmap
    assert not torch.allclose(unmerged, expected.heatmap, rtol=1e-3)


def test_zennits_merges_beside_ours(net, data, untouched):
    net.bn.eps = 0.0
    reference = net(data).detach()
    composite = EpsilonPlus([NamedMergeBatchNorm([(["conv"], "bn")]), MergeBatchNorm()])
    with untouched(net), composite.context(net):
        torch.testing.assert_close(net(data).detach(), reference, rtol=1e-12, atol=1e-13)
        ours = composite.handles[1]
        assert ours.merged == MERGED  # what is left of the batch norm is merged once more
