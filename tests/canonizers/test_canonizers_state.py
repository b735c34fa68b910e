"""Looking at a model leaves every state as it was: predictions afterwards are equal bit for bit."""

import random
import warnings
from collections import Counter, deque

import numpy as np
import pytest
import torch
from canonizer_cases import Merged, randomize
from torch import nn
from torch.nn import functional as F

from crp.layers.state import undisturbed
from crp.trace import trace


class Net(nn.Module):
    """Two layers, and between them what a function of the net and the hidden tensor makes; sets up state if told."""

    def __init__(self, between, setup=lambda net: None):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 3), randomize(nn.BatchNorm1d(3)), nn.Linear(3, 2)
        self.between = between
        setup(self)

    def forward(self, x):
        hidden = self.norm(self.first(x))
        return self.last(self.between(self, hidden))


class Meter:
    """Object of the user's own."""

    def __init__(self):
        self.sum, self.values = 0.0, []

    def update(self, value):
        self.sum += value
        self.values.append(value)
        return self.sum + len(self.values)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.mean = torch.zeros(3)
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.mean = 0.5 * self.mean + x.mean(0)
        self.total += x.sum(0)
        return x + self.calls + self.mean + self.total


class Clipped(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


def count(net, x):
    net.calls += 1
    return x * net.calls


class Decaying(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        self.weight.mul_(0.5)
        return x * self.weight


def turn_weight(net, x):
    with torch.no_grad():
        net.first.weight.T.mul_(0.5)
    return x


def spike(net, x):
    net.membrane = 0.9 * net.membrane + x
    return (net.membrane > 0.1).to(x) + net.membrane


def spike_in_place(net, x):
    net.membrane.mul_(0.9).add_(x)
    return x + net.membrane


def repeat(net, x):
    net.membrane[:1].add_(x.mean(0))
    return x + net.membrane


def append(net, x):
    net.past.append(x)
    return sum(net.past)


def cache(net, x):
    if "x" not in net.cache:
        net.cache["x"] = x
        return x
    return 2 * net.cache["x"]


def cached_value(net, x):
    net.cache["x"] = net.cache["x"] + x
    return net.cache["x"]


def nest(net, x):
    net.cache["past"][-1].append(x.sum().item())
    return x + sum(net.cache["past"][-1])


def collect(net, x):
    net.seen.add(x.sum().item() + len(net.seen))
    return x * len(net.seen)


def create(net, x):
    if not hasattr(net, "started"):
        net.started = x + 1
        return x
    return x + net.started


def delete(net, x):
    if hasattr(net, "started"):
        del net.started
        return x
    return x + 1


def update_meter(net, x):
    return x + net.meter.update(x.sum().item())


def fill_array(net, x):
    net.array += 1
    return x + float(net.array.sum())


def replace_buffer(net, x):
    net.mean = net.mean + x.mean(0)
    return x + net.mean


def write_to_buffer(net, x):
    net.mean += x.mean(0)
    return x + net.mean


def write_past_the_count(net, x):
    net.mean.data.add_(1)
    return x + net.mean


def change_a_sign(net, x):
    net.mean.neg_()
    return x + net.mean.signbit()


def resize_buffer(net, x):
    net.mean.resize_(net.mean.numel() - 1)
    return x + net.mean.numel()


def add_buffer(net, x):
    if "extra" not in net._buffers:
        net.register_buffer("extra", torch.ones(3))
        return x
    return x + net.extra


def delete_buffer(net, x):
    if "mean" in net._buffers:
        del net.mean
        return x
    return x + 1


def add_module(net, x):
    if not hasattr(net, "inner"):
        net.inner = Inner()
        return x
    return x + 1


def set_flags(net, x):
    result = x * (2 if net.first.weight.requires_grad else 1) * (3 if net.last.training else 1)
    net.last.training = not net.last.training
    net.first.weight.requires_grad_(False)
    return result


def backward(net, x):
    with torch.enable_grad():
        (net.scale * x.detach()).sum().backward()
    return x + net.scale.grad


def add_hook(net, x):
    net.last.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    return x


def draw(net, x):
    return x + torch.randn(3, generator=net.generator)


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (deprecated, and in use)
        return torch.jit.script(module)


def has(**attributes):
    """Set-up: attributes, each made anew for each net."""

    def setup(net):
        for name, make in attributes.items():
            setattr(net, name, make())

    return setup


def has_buffer(value):
    return lambda net: net.register_buffer("mean", value.clone())


def replaced(name, make):
    return lambda net: setattr(net, name, make())


def plain(net, x):
    return x


CASES = {
    "counts calls": (count, has(calls=lambda: 0)),
    "membrane": (spike, has(membrane=lambda: 0.0)),
    "membrane in place": (spike_in_place, has(membrane=lambda: torch.zeros(5, 3))),
    "membrane in a list": (lambda net, x: x + net.state[0].add_(x), has(state=lambda: [torch.zeros(5, 3)])),
    "membrane in a tuple": (lambda net, x: x + net.state[0].add_(x), has(state=lambda: (torch.zeros(5, 3),))),
    "membrane that repeats": (repeat, has(membrane=lambda: torch.zeros(3).expand(5, 3))),
    "list": (append, has(past=list)),
    "deque": (append, has(past=lambda: deque([torch.ones(5, 3)], maxlen=2))),
    "dict": (cache, has(cache=dict)),
    "value of a dict": (cached_value, has(cache=lambda: {"x": 1.0})),
    "counter": (lambda net, x: net.cache.update("a") or x * net.cache["a"], has(cache=Counter)),
    "nested": (nest, has(cache=lambda: {"past": [[], []]})),
    "set": (collect, has(seen=set)),
    "created": (create, has()),
    "deleted": (delete, has(started=lambda: 1)),
    "object": (update_meter, has(meter=Meter)),
    "objects in a list": (lambda net, x: x + net.meters[0].update(1), has(meters=lambda: [Meter()])),
    "array": (fill_array, has(array=lambda: np.zeros(3))),
    "inner module": (lambda net, x: net.inner(x), has(inner=Inner)),
    "module that is not registered": (lambda net, x: net.inner[0](x), has(inner=lambda: [Inner()])),
    "scripted module": (lambda net, x: net.inner(x), has(inner=lambda: scripted(Inner()))),
    "scripted weight": (lambda net, x: net.inner(x), has(inner=lambda: scripted(Decaying()))),
    "weight through a view": (turn_weight, has()),
    "buffer replaced": (replace_buffer, has_buffer(torch.zeros(3))),
    "buffer written to": (write_to_buffer, has_buffer(torch.zeros(3))),
    "buffer written to past the count": (write_past_the_count, has_buffer(torch.zeros(3))),
    "sign of zero": (change_a_sign, has_buffer(torch.zeros(1))),
    "buffer resized": (resize_buffer, has_buffer(torch.zeros(9))),
    "buffer added": (add_buffer, has()),
    "buffer deleted": (delete_buffer, has_buffer(torch.zeros(3))),
    "complex buffer": (
        lambda net, x: x + net.mean.mul_(1j).real.float(),
        has_buffer(torch.ones(3, dtype=torch.complex128)),
    ),
    "module added": (add_module, has()),
    "flags": (set_flags, has()),
    "gradient": (backward, has(scale=lambda: nn.Parameter(torch.ones(3)))),
    "hook added": (add_hook, has()),
    "generator": (draw, has(generator=lambda: torch.Generator().manual_seed(1))),
    "generator of Python": (lambda net, x: x + net.generator.random(), has(generator=lambda: random.Random(1))),
    "generator of NumPy": (
        lambda net, x: x + net.generator.random(),
        has(generator=lambda: np.random.default_rng(1)),
    ),
    "generator of NumPy, old": (
        lambda net, x: x + net.generator.random_sample(),
        has(generator=lambda: np.random.RandomState(1)),
    ),
    "random": (lambda net, x: x + random.random() + np.random.random() + torch.rand(()), has()),  # noqa: NPY002
    "dropout": (lambda net, x: F.dropout(x), has()),
    "clipped weight": (plain, replaced("last", lambda: Clipped(3, 2))),
}
CASES["embedding"] = (
    lambda net, x: x + net.table(torch.tensor([1, 2]))[0] + net.table.weight.sum(),
    has(table=lambda: nn.Embedding(4, 3, max_norm=0.1)),
)
DATA = torch.linspace(-1, 2, 20).reshape(5, 4)


def build(name):
    torch.manual_seed(0)
    return Net(*CASES[name]).eval()


def predictions(net):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    return [net(DATA).detach() for _ in range(3)]


def generators():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()  # noqa: NPY002


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_trace_leaves_the_state(name, model_state):
    net, untouched, used = (build(name) for _ in range(3))
    before, attributes, drawn = model_state(net), vars(net).copy(), generators()
    trace(net, DATA)
    assert model_state(net) == before
    assert list(vars(net)) == list(attributes)
    assert all(vars(net)[key] is value for key, value in attributes.items())
    assert generators() == drawn
    expected = predictions(untouched)
    assert equal(predictions(net), expected)
    if name not in ("random", "dropout", "clipped weight"):
        used(DATA)
        assert not equal(predictions(used), expected)  # the state matters


@pytest.mark.parametrize("name", ["counts calls", "membrane", "membrane in place", "list", "created", "generator"])
def test_a_merge_leaves_the_state_of_one_call_for_each(name):
    net, other = build(name).double(), build(name).double()
    data = DATA.double()
    with Merged(net, data) as run:  # which looks, and then calls
        assert run.canonizer.merged == {"norm": "first"}
        outputs = [run.output, net(data), net(data)]
    expected = [other(data) for _ in outputs]
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_tried_keeps_its_state(untouched):
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return F.linear(x, self.weight, self.bias)

    net = nn.Sequential(Counting(4, 3), randomize(nn.BatchNorm1d(3))).double().eval()
    with Merged(net, DATA.double()) as run:
        assert run.canonizer.merged == {"1": "0"}
    assert net[0].calls == 1


def test_a_forward_pass_that_fails_leaves_the_state(model_state):
    def fail(net, x):
        net.calls += 1
        net.norm.running_mean += 1
        net.past.append(x)
        net.new = x
        raise ValueError("failed")

    net = Net(fail, has(calls=lambda: 0, past=list))
    before = model_state(net)
    with pytest.raises(ValueError, match="failed"):
        trace(net, DATA)
    assert model_state(net) == before
    assert (net.calls, net.past) == (0, [])


def test_inputs_are_left_as_they_are():
    class Greedy(nn.Module):
        def forward(self, x, parts, *, state):
            parts["x"][0].add_(x.add_(1))
            parts["y"] = x
            state.values.append(state.sum)
            state.sum += 1
            return parts["x"][0]

    x, part, state = torch.zeros(3), torch.zeros(3), Meter()
    parts = {"x": [part]}
    trace(Greedy(), x, parts, state=state)
    assert not x.any() and not part.any()
    assert parts == {"x": [part]}
    assert (state.sum, state.values) == (0, [])


def test_lazy_modules_are_refused_by_name():
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(
        ValueError, match=r"0\.weight, .*1\.running_var.*: no call has given these a shape; call the model"
    ):
        trace(net, DATA)
    net(DATA)
    trace(net, DATA)


@pytest.mark.parametrize("kind", [torch.sparse_coo, torch.sparse_csr])
def test_tensors_without_numbers_in_memory(kind):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.eye(4).to_sparse(layout=kind))

        def forward(self, x):
            self.table.mul_(2)
            return x @ self.table.to_dense()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (CSR is in beta)
        net = Sparse()
        trace(net, DATA)
    assert torch.equal(net.table.to_dense(), torch.eye(4))


def test_inference_tensors_come_back():
    with torch.inference_mode():
        net = build("buffer written to")
        with undisturbed(net):
            net(DATA)
        assert not net.mean.any()


def test_what_did_not_change_is_not_written_to():
    net = build("buffer written to")
    gradient = torch.autograd.grad  # (of a graph that holds the parameters as they are)
    output = net.first(DATA).square().sum()
    versions = {name: tensor._version for name, tensor in net.state_dict().items() if name != "mean"}
    trace(net, DATA)
    assert versions == {name: tensor._version for name, tensor in net.state_dict().items() if name != "mean"}
    assert gradient(output, net.first.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("name", ["dropout", "membrane in place", "buffer written to"])
def test_a_device(name):
    net, other = build(name).cuda(), build(name).cuda()
    if name == "membrane in place":
        net.membrane, other.membrane = net.membrane.cuda(), other.membrane.cuda()
    drawn = torch.cuda.get_rng_state()
    trace(net, DATA.cuda())
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
    if name != "dropout":
        assert torch.equal(net(DATA.cuda()), other(DATA.cuda()))


# --- quantisation ---------------------------------------------------------------------------------------------------


def quantized(training):
    quantization = pytest.importorskip("torch.ao.quantization")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (deprecated, and in use)
        net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return quantization.prepare_qat(net.train()).train(training)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("calls", [0, 2], ids=["new", "used"])
def test_a_model_in_training_for_quantisation(training, calls):
    data = torch.randn(4, 2, 4, 4)
    net, other, used = (quantized(training) for _ in range(3))
    for model in (net, other, used):
        for _ in range(calls):
            model(data)
    trace(net, 3 * data)
    used(3 * data)
    assert [*net.state_dict()] == [*other.state_dict()]
    assert equal(net.state_dict().values(), other.state_dict().values())
    assert any(
        a.shape != b.shape or (a != b).any()
        for a, b in zip(used.state_dict().values(), other.state_dict().values(), strict=True)
    )
    for factor in (1, 2):
        expected = other(factor * data)
        assert torch.equal(net(factor * data), expected)
        assert not torch.equal(used(factor * data), expected)


def test_norms_between_observers_are_left(untouched):
    net, data = quantized(False), torch.randn(4, 2, 4, 4)
    for _ in range(20):
        net(data)
    with Merged(net, data) as run:
        assert run.canonizer.left == {"1": "output is read by '2'; a hook changes what goes between it and '0'"}
