"""Provenance of tensors, and the two questions asked of it."""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from unittest import TestCase

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from crp.errors import CRPError
from crp.layers import LayerNotFoundError, get_layer_names, tracing
from crp.trace import Trace, trace
from crp.trace.graph import Adjacency, adjacent, layers_as_units, trace_model_graph


class Net(nn.Module):
    """Net of convolutions ``a``, ``b``, ``c`` and a batch norm, wired by a function."""

    def __init__(self, wiring, **layers: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        self.constant = torch.ones(1, 4, 3, 3)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.bn = nn.BatchNorm2d(4)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.wiring(self, *args, **kwargs)


def net(wiring, **layers: nn.Module) -> nn.Module:
    return Net(wiring, **layers).eval()


X = torch.randn(2, 4, 3, 3)


def upstream(wiring, layer: str = "c", names: str = "abc", **layers: nn.Module) -> list[str]:
    return trace(net(wiring, **layers), X.clone()).upstream(layer, list(names))


# --- who feeds whom -------------------------------------------------------------------------------------------------


@dataclass
class Pack:
    left: Tensor
    rest: dict[str, list[Tensor]]


class Swap(nn.Module):
    def forward(self, first: Tensor, *, second: Tensor) -> tuple[Tensor, Tensor]:
        return second, first


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2


def _setitem(m, x):
    out = torch.zeros(2, 8, 3, 3)
    out[:, :4] = m.a(x)
    out[:, 4:] = m.b(x)
    return m.c(out[:, 2:6])


def _views(m, x):
    out = torch.zeros(2, 8, 3, 3)
    left, right = out[:, :4], out[:, 4:]
    left.copy_(m.a(x))
    right.add_(m.b(x))
    return m.c(out[:, :4])


def _inplace(m, x):
    y = m.a(x)
    y += m.b(x)
    return m.c(y)


def _out(m, x):
    y = torch.empty_like(x)
    torch.add(m.a(x), m.b(x), out=y)
    return m.c(y)


def _data(m, x):
    y = torch.empty_like(x)
    y.data = m.a(x)
    return m.c(y)


WIRINGS = {
    "sequence": (lambda m, x: m.c(m.b(m.a(x))), ["b"]),
    "plus": (lambda m, x: m.c(m.a(x) + m.b(x)), ["a", "b"]),
    "plus the input": (lambda m, x: m.c(x + m.b(x)), ["b"]),
    "skip": (lambda m, x: m.c((y := m.a(x)) + m.b(y)), ["a", "b"]),
    "in-place": (_inplace, ["a", "b"]),
    "out argument": (_out, ["a", "b"]),
    "data": (_data, ["a"]),
    "cat and functional": (lambda m, x: m.c(F.relu(torch.cat([m.b(x), m.a(x)]))), ["b", "a"]),
    "slices": (lambda m, x: m.c(m.a(x)[:, [0, 1, 2, 3]].transpose(2, 3)), ["a"]),
    "one half": (lambda m, x: m.c(torch.cat([m.a(x), m.b(x)]).chunk(2)[0]), ["a", "b"]),
    "write into slices": (_setitem, ["a", "b"]),
    "write through views": (_views, ["a", "b"]),
    "matmul": (lambda m, x: m.c(m.a(x) @ m.b(x)), ["a", "b"]),
    "index": (lambda m, x: m.c(m.a(x)[m.b(x)[:, 0, 0, 0] > 0]), ["a", "b"]),
    "constant": (lambda m, x: m.c(torch.ones(2, 4, 3, 3)), []),
    "input": (lambda m, x: m.c(x), []),
    "unused": (lambda m, x: (m.a(x), m.c(m.b(x)))[1], ["b"]),
    "dict": (lambda m, x: m.c({"y": [m.a(x)], "z": m.b(x)}["y"][0]), ["a"]),
    "dropout in evaluation": (lambda m, x: m.c(F.dropout(m.a(x), training=False)), ["a"]),
    "autograd function": (lambda m, x: m.c(Twice.apply(m.a(x))), ["a"]),
    "in-place method": (lambda m, x: m.c(m.a(x).relu_()), ["a"]),
}


@pytest.mark.parametrize(("wiring", "expected"), WIRINGS.values(), ids=WIRINGS)
def test_nearest_layers_upstream(wiring, expected):
    assert upstream(wiring) == expected


def test_modules_between_are_skipped_or_found_as_asked():
    def wiring(m, x):
        return m.c(m.relu(m.bn(m.a(x))))

    for relu in (nn.ReLU(), nn.ReLU(inplace=True)):
        assert upstream(wiring, relu=relu) == ["a"]
        assert upstream(wiring, names=["a", "bn"], relu=relu) == ["bn"]
        assert upstream(wiring, names=["a", "bn", "relu"], relu=relu) == ["relu"]


def test_an_inplace_module_feeds_also_those_who_hold_the_tensor_from_before():
    def wiring(m, x):
        y = m.a(x)
        m.relu(y)
        return m.c(y)

    assert upstream(wiring, names=["a", "relu"], relu=nn.ReLU(inplace=True)) == ["relu"]


@pytest.mark.parametrize(
    "same", [nn.Identity(), nn.Dropout(), nn.Sequential()], ids=lambda module: type(module).__name__
)
def test_modules_that_hand_their_input_on_feed_only_their_own_readers(same):
    assert upstream(lambda m, x: m.c(m.same(m.a(x))), names=["a", "same"], same=same) == ["same"]
    assert upstream(lambda m, x: m.c(m.same(m.a(x))), same=same) == ["a"]

    def beside(m, x):
        y = m.a(x)
        m.same(y)
        return m.c(y)

    assert upstream(beside, names=["a", "same"], same=same) == ["a"]


def test_several_inputs_and_outputs_of_a_module():
    def wiring(m, x):
        first, second = m.swap(m.a(x), second=m.b(x))
        return m.c(first if m.use == 0 else second)

    for use, expected in enumerate(["b", "a"]):
        model = net(wiring, swap=Swap())
        model.use = use
        record = trace(model, X)
        assert record.upstream("c", ["a", "b", "swap"]) == [expected]  # handed through as they are
        assert len(record.calls_of("swap")[0].inputs) == 2


def test_dataclasses_hold_tensors():
    def wiring(m, x):
        pack = Pack(m.a(x), {"rest": [m.b(x)]})
        return m.c(m.join(pack))

    class Join(nn.Module):
        def forward(self, pack: Pack) -> Tensor:
            return pack.left + pack.rest["rest"][0]

    assert upstream(wiring, join=Join()) == ["a", "b"]
    assert upstream(wiring, "join", join=Join()) == ["a", "b"]


def test_containers_are_layers_too():
    def wiring(m, x):
        return m.c(m.block(m.a(x)) + x)

    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    assert upstream(wiring, names=["a", "block"], block=block) == ["block"]
    assert upstream(wiring, names=["a", "block.0"], block=block) == ["block.0"]
    assert upstream(wiring, names=["a"], block=block) == ["a"]
    # Its own layers are the nearest to a container's output; those before it, if none of its own are asked for.
    assert upstream(wiring, "block", names=["a", "block.0"], block=block) == ["block.0"]
    assert upstream(wiring, "block", names=["a", "block"], block=block) == ["a"]
    assert upstream(wiring, "block.0", names=["a", "block"], block=block) == ["a"]


def test_where_the_trail_is_lost_a_module_is_made_from_its_inputs():
    class Numpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(self.inner(x).numpy().copy())

    assert upstream(lambda m, x: m.c(m.numpy(m.a(x))), numpy=Numpy()) == ["a"]


def test_every_call_of_a_module_counts():
    def wiring(m, x):
        return m.c(m.relu(m.b(m.relu(m.a(x)))))

    record = trace(net(wiring, relu=nn.ReLU()), X)
    assert [call.number for call in record.calls_of("relu")] == [0, 1]
    assert record.upstream("relu", ["a", "b"]) == ["a", "b"]
    assert record.upstream("relu", ["a", "relu"]) == ["a", "relu"]
    assert record.upstream("b", ["a", "relu"]) == ["relu"]


def test_calls_are_in_the_order_in_which_they_began(resnet, images):
    record = trace(resnet, images)
    names = [call.layer for call in record.calls]
    assert names[:7] == ["", "conv1", "bn1", "relu", "layer1", "layer1.conv1", "layer1.bn1"]
    assert len(names) == 1 + 3 + 7 + 3 + 7 + 2  # model; stem; block; projection with its container; block; head
    calls = {call.layer: call for call in record.calls}
    assert calls["layer1.conv1"].parent is calls["layer1"] and calls["layer1"].parent is calls[""]
    assert [name for name, call in calls.items() if not call.is_leaf] == ["", "layer1", "layer2", "layer2.downsample"]


def test_a_caught_exception_inside_the_model_leaves_the_rest_right():
    def wiring(m, x):
        y = m.a(x)
        try:
            m.b(y[:, :1])
        except RuntimeError:
            return m.c(y)

    record = trace(net(wiring), X)
    assert record.upstream("c", ["a", "b"]) == ["a"]
    assert [len(record.calls_of(layer)[0].outputs) for layer in ("", "b")] == [1, 0]


def test_an_unknown_tensor_at_the_place_of_a_forgotten_one_is_unknown():
    def wiring(m, x):
        array = m.constant.numpy()
        forgotten = [m.a(x) for _ in range(100)]
        places = {id(y) for y in forgotten}
        del forgotten
        others = [torch.from_numpy(array) for _ in range(100)]  # a function that is not shown to a function mode
        reused = [y for y in others if id(y) in places]
        return m.c(reused[0])

    assert upstream(wiring) == []


def test_many_forks_take_no_longer_than_one():
    def wiring(m, x):
        y = m.a(x)
        for _ in range(64):
            y = y + F.relu(y)
        return m.c(y)

    assert upstream(wiring) == ["a"]


# --- adjacency ------------------------------------------------------------------------------------------------------


def adjacent_kinds(record: Trace, first: type[nn.Module], second: type[nn.Module]) -> Adjacency:
    def units(kind):
        return layers_as_units(record, [name for name, other in record.modules.items() if issubclass(other, kind)])

    return adjacent(units(first), units(second))


def pairs(wiring, **layers: nn.Module) -> tuple[list[tuple[str, str]], dict[str, str]]:
    found = adjacent_kinds(trace(net(wiring, **layers), X), nn.Conv2d, nn.BatchNorm2d)
    return [(pair.first.name, pair.second.name) for pair in found.pairs], found.unpaired


def _hand_back_both(m, x):
    return m.bn(y := m.a(x)), y


def _change_before(m, x):
    y = m.a(x)
    y += 1
    return m.bn(y)


def _change_a_view_before(m, x):
    y = m.a(x)
    y[0].zero_()
    return m.bn(y)


def _change_after(m, x):
    z = m.bn(y := m.a(x))
    y.zero_()
    return z


class Kept(nn.Module):
    """Container that hands out what it made and also the batch norm of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y), y


ADJACENT = {
    "sequence": lambda m, x: m.bn(m.a(x)),
    "metadata is no value": lambda m, x: m.bn(y := m.a(x)).reshape(y.size(0), y.shape[1], y.numel() // len(y) // 4),
    "unchanged": lambda m, x: m.bn(m.a(x).contiguous()),
    "beside others": lambda m, x: m.bn(m.a(x)) + m.b(x) + x,
}


@pytest.mark.parametrize("wiring", ADJACENT.values(), ids=ADJACENT)
def test_adjacent(wiring):
    found, unpaired = pairs(wiring)
    assert found == [("a", "bn")]
    assert set(unpaired) == {"b", "c"}


NOT_ADJACENT = {
    "functional between": (lambda m, x: m.bn(F.relu(m.a(x))), "input comes from relu"),
    "cat between": (lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 2)), "input comes from cat"),
    "module between": (lambda m, x: m.bn(m.other(m.a(x))), "input comes from 'other' (ReLU)"),
    "view between": (lambda m, x: m.bn(m.a(x)[:1]), "input comes from getitem"),
    "model's input": (lambda m, x: m.bn(x), "input comes from the model's input"),
    "constant": (lambda m, x: m.bn(m.constant), "input is made by no layer"),
    "changed in place": (_change_before, "input comes from add"),
    "changed through a view": (_change_a_view_before, "input comes from zero"),
    "changed afterwards": (_change_after, "input comes from 'a', whose output is also read by zero"),
    "read beside": (lambda m, x: (y := m.a(x)) + m.bn(y), "input comes from 'a', whose output is also read by add"),
    "read twice": (
        lambda m, x: ((y := m.a(x)) + 1) + (y + 2) + m.bn(y),
        "input comes from 'a', whose output is also read by add",
    ),
    "read by a module": (
        lambda m, x: m.b(y := m.a(x)) + m.bn(y),
        "input comes from 'a', whose output is also read by 'b'",
    ),
    "kept by an identity": (
        lambda m, x: m.same(y := m.a(x)) + m.bn(y),
        "input comes from 'a', whose output is also read by 'same'",
    ),
    "value steers": (
        lambda m, x: m.bn(y) if bool((y := m.a(x)).isfinite().all()) else y,
        "input comes from 'a', whose output is also read by isfinite",
    ),
    "also the output": (_hand_back_both, "input comes from 'a', whose output is also read by the model's output"),
    "called twice": (lambda m, x: m.bn(m.a(m.bn(m.b(x)))), "called 2 times, behind 'b', 'a'"),
    "called twice in a row": (lambda m, x: m.bn(m.bn(m.a(x))), "called 2 times: input comes from 'bn' (BatchNorm2d)"),
    "first called twice": (
        lambda m, x: m.bn(m.a(m.a(x))),
        "input comes from 'a', which is called 2 times and whose output is also read by 'a'",
    ),
    "one of several calls": (
        lambda m, x: m.bn(m.a(x)) + m.bn(m.a(x + 1)) + m.a(x + 2),
        "input comes from 'a', which is called 3 times and whose output is also read by add",
    ),
    "not called": (lambda m, x: m.a(x), "not called"),
    "weight used elsewhere": (
        lambda m, x: m.bn(m.a(x)) + F.conv2d(x, m.a.weight),
        "weight of 'a' is also read by conv2d",
    ),
    "scale used elsewhere": (
        lambda m, x: m.bn(m.a(x)) * m.bn.weight[0],
        "weight of 'bn' is also read by getitem",
    ),
}


@pytest.mark.parametrize(("wiring", "reason"), NOT_ADJACENT.values(), ids=NOT_ADJACENT)
def test_not_adjacent_and_why(wiring, reason):
    found, unpaired = pairs(wiring, other=nn.ReLU(), same=nn.Identity())
    assert found == []
    assert unpaired["bn"] == reason


def test_weight_shared_with_another_layer_is_no_pair():
    model = net(lambda m, x: m.b(m.bn(m.a(x))))
    model.b.weight = model.a.weight
    found = adjacent_kinds(trace(model, X), nn.Conv2d, nn.BatchNorm2d)
    assert found.unpaired["bn"] == "weight of 'a' is also read by 'b'"


class Side(nn.Conv2d):
    """Convolution with more to hand out than its output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.side = x * 2
        return super().forward(x), self.side


def test_side_products_of_a_layer_are_not_its_output():
    _, unpaired = pairs(lambda m, x: m.bn(m.two(x)[0]), two=Side(4, 4, 1))
    assert unpaired["bn"] == "input comes from 'two', which has 2 outputs"

    class Hidden(Side):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    _, unpaired = pairs(lambda m, x: m.bn(m.one.side) if m.one(x) is not None else x, one=Hidden(4, 4, 1))
    assert unpaired["bn"] == "input comes from 'one'"


def test_a_layer_whose_weight_is_computed_by_inner_modules_can_be_in_a_pair():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    assert pairs(lambda m, x: m.bn(m.conv(x)), conv=conv)[0] == [("conv", "bn")]
    conv.register_forward_hook(lambda _m, _i, out: out.mean() and None)
    assert pairs(lambda m, x: m.bn(m.conv(x)), conv=conv)[0] == [("conv", "bn")]
    _, unpaired = pairs(lambda m, x: m.bn(m.conv(x)) * m.conv.parametrizations.weight.original0.sum(), conv=conv)
    assert unpaired["bn"] == "parametrizations.weight.original0 of 'conv' is also read by sum"


def test_pairs_through_containers():
    found, _ = pairs(
        lambda m, x: m.last(m.first(x)),
        first=nn.Sequential(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))),
        last=nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    )
    assert found == [("first.0.1", "last.0")]


def test_a_tensor_that_a_container_also_hands_out_counts_only_where_it_is_used():
    assert pairs(lambda m, x: m.kept(x)[0], kept=Kept())[0] == [("kept.conv", "kept.bn")]
    found, unpaired = pairs(lambda m, x: sum(m.kept(x)), kept=Kept())
    assert found == []
    assert unpaired["kept.bn"] == "input comes from 'kept.conv', whose output is also read by add"


def test_both_directions():
    record = trace(net(lambda m, x: m.b(m.bn(x))), X)
    found = adjacent_kinds(record, nn.BatchNorm2d, (nn.Conv2d, nn.Linear))
    assert [(pair.first.name, pair.second.name) for pair in found.pairs] == [("bn", "b")]
    assert found.unpaired == {"a": "not called", "c": "not called"}


def test_reasons_of_first_layers_without_a_partner():
    _, unpaired = pairs(lambda m, x: (m.c(m.a(x) + m.b(x)), m.bn(x))[1])
    assert unpaired["a"] == "output is read by add"
    assert unpaired["c"] == "nothing reads its output"


def test_hooks_of_others_on_the_two_layers_do_not_spoil_the_pair():
    model = net(lambda m, x: m.bn(m.a(x)))
    model.a.register_forward_hook(lambda _m, _i, out: out.clone())
    model.a.register_forward_hook(lambda _m, _i, out: out.mean() and None)
    model.bn.register_forward_pre_hook(lambda _m, args: (args[0].view_as(args[0]),))
    found = adjacent_kinds(trace(model, X), nn.Conv2d, nn.BatchNorm2d)
    assert [pair.first.name for pair in found.pairs] == ["a"]


def test_replacing_every_pair_leaves_the_output_as_it_is(resnet, images):
    expected = resnet(images)
    found = adjacent_kinds(trace(resnet, images), nn.Conv2d, nn.BatchNorm2d)
    assert len(found.pairs) == 6 and not [name for name in found.unpaired if "bn" in name]
    for pair in found.pairs:
        conv, bn = (resnet.get_submodule(unit.name) for unit in pair)
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        conv.weight.data *= scale[:, None, None, None]
        conv.bias = nn.Parameter(bn.bias - bn.running_mean * scale)
        bn.forward = lambda x: x
    torch.testing.assert_close(resnet(images), expected, rtol=1e-12, atol=1e-12)


# --- the model is left as it was ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_model_generators_and_input_are_untouched(resnet, images, untouched, training):
    resnet.train(training)
    resnet.relu = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout())
    resnet.layer1.register_forward_hook(lambda _m, _i, out: None)
    before, state = images.clone(), torch.get_rng_state()
    with untouched(resnet):
        trace(resnet, images)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)


def test_inputs_are_not_changed_by_an_inplace_first_layer():
    x = X.clone()
    trace(net(lambda m, x: m.a(x.add_(1)), relu=nn.ReLU(inplace=True)), x)
    assert torch.equal(x, X)


def test_an_exception_leaves_nothing_behind(resnet, images, untouched):
    resnet.train()
    with untouched(resnet), pytest.raises(RuntimeError):
        trace(resnet, images[:, :2])

    def fail(m, x):
        m.calls += 1
        m.bn(m.a(x))
        raise ValueError("broken")

    model = net(fail).train()
    model.register_buffer("calls", torch.zeros(()))
    with untouched(model), pytest.raises(ValueError, match="broken"):
        trace(model, X)
    assert not tracing()
    assert torch.randn(2).add(1).shape == (2,)  # no mode is left on


def test_a_replaced_buffer_comes_back(untouched):
    def wiring(m, x):
        m.mean = x.mean((0, 2, 3))
        return m.a(x)

    model = net(wiring)
    model.register_buffer("mean", torch.zeros(4))
    with untouched(model):
        trace(model, X)


def test_tracing_tells_hooks_to_stay_inert():
    seen = []
    model = net(lambda m, x: m.a(x))
    model.a.register_forward_hook(lambda *_: seen.append(tracing()))
    trace(model, X)
    model(X)
    assert seen == [True, False]


def test_a_thread_that_uses_the_model_meanwhile_is_not_recorded():
    started, finished = threading.Event(), threading.Event()

    def wiring(m, x):
        if tracing():
            started.set()
            finished.wait(10)
        return m.c(m.a(x)) if tracing() else m.c(m.b(x))

    model = net(wiring)

    def use() -> None:
        started.wait(10)
        model(X)
        finished.set()

    thread = threading.Thread(target=use)
    thread.start()
    record = trace(model, X)
    thread.join()
    assert [call.layer for call in record.calls] == ["", "a", "c"]


def test_tensors_are_freed_as_without_a_trace():
    def wiring(m, x):
        y = m.a(x)
        first = weakref.ref(y)
        y = m.b(y)
        assert first() is None
        return y

    trace(net(wiring), X)


def test_inference_mode_outside():
    with torch.inference_mode():
        record = trace(net(_views), torch.ones(2, 4, 3, 3))
    assert record.upstream("c", ["a", "b"]) == ["a", "b"]


def test_wrapped_and_compiled_models_have_their_plain_names(mlp, vectors):
    for model in (torch.compile(mlp, backend="eager"), nn.DataParallel(mlp)):
        assert trace(model, vectors).upstream("4", ["0", "2"]) == ["2"]


def test_compiled_parts_run_as_python(mlp, vectors):
    mlp[2] = nn.Sequential(mlp[2], nn.ReLU())
    mlp[2].compile(backend="eager", fullgraph=True)
    mlp[4] = torch.compile(mlp[4], backend="eager", fullgraph=True)
    with torch.no_grad():
        mlp(vectors)  # compiled by now
    assert trace(mlp, vectors).upstream("4", ["0", "2.0"]) == ["2.0"]


# --- drop-in --------------------------------------------------------------------------------------------------------


def test_find_input_layers_of_a_plain_net(vgg_bn, images, untouched):
    with untouched(vgg_bn):
        found = trace_model_graph(vgg_bn, images, get_layer_names(vgg_bn, [nn.Conv2d, nn.Linear]))
    chain = ["features.0", "features.3", "features.7", "classifier.1", "classifier.4"]
    assert found.layer_names == chain
    assert [found.find_input_layers(name) for name in chain] == [[], *([name] for name in chain[:-1])]
    assert found.find_input_layers("classifier.2") == ["classifier.1"]


def test_find_input_layers_of_a_residual_net(resnet, images):
    found = trace_model_graph(resnet, images, get_layer_names(resnet, [nn.Conv2d, nn.Linear]))
    both = ["layer1.conv2", "conv1"]
    assert found.find_input_layers("layer1.conv1") == ["conv1"]
    assert found.find_input_layers("layer2.conv1") == both
    assert found.find_input_layers("layer2.downsample.0") == both
    assert found.find_input_layers("fc") == ["layer2.conv2", "layer2.downsample.0"]


def test_layer_names_can_be_chosen_anew(resnet, images):
    found = trace_model_graph(resnet, images, ["conv1"])
    assert found.find_input_layers("fc") == ["conv1"]
    found.set_layer_names(("layer1", "layer2"))
    assert found.find_input_layers("fc") == ["layer2"]
    assert found.find_input_layers("layer2") == ["layer1"]


def test_maps_and_text(mlp, vectors):
    found = trace_model_graph(mlp, vectors, ["0"])
    assert list(found.layer_node_map) == ["0", "1", "2", "3", "4"]
    assert {node.id: node for node in found.layer_node_map.values()} == found.id_node_map
    node = found.layer_node_map["2"]
    assert [n.layer_name for n in node.input_nodes] == ["1"] and [n.layer_name for n in node.output_nodes] == ["3"]
    assert str(found) == "0 -> 1\n1 -> 2\n2 -> 3\n3 -> 4\n4 -> end"


def test_containers_are_next_to_no_layer():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2))
    nodes = trace_model_graph(net, torch.zeros(1, 4), ["1"]).layer_node_map

    def around(layer):
        return [[n.layer_name for n in side] for side in (nodes[layer].input_nodes, nodes[layer].output_nodes)]

    assert [around(layer) for layer in ("0.0", "0.1", "1")] == [[[], ["0.1"]], [["0.0"], ["1"]], [["0.1"], []]]


def test_debug_logs_the_graph(mlp, vectors):
    with TestCase().assertLogs("crp.trace.graph", "DEBUG") as logs:
        trace_model_graph(mlp, vectors, ["0"], debug=True)
    assert "2 -> 3" in logs.output[0]


def test_unknown_layers_are_named_before_the_model_runs(mlp):
    with pytest.raises(LayerNotFoundError, match="<layer_names> '9'"):
        trace_model_graph(mlp, torch.zeros(1, 99), ["0", "9"])
    found = trace_model_graph(mlp, torch.zeros(1, 6, dtype=torch.float64), ["0"])
    with pytest.raises(KeyError, match=r"'x'.*; there are"):
        found.find_input_layers("x")
    with pytest.raises(KeyError, match=r"'x'.*; there are"):
        found.set_layer_names(["x"])


def test_layers_that_were_not_called_are_told_from_unknown_ones():
    model = net(lambda m, x: m.c(m.a(x)))
    found = trace_model_graph(model, X, ["a", "b", "c"])
    assert found.find_input_layers("c") == ["a"]
    with pytest.raises(KeyError, match="'b' is in the model, but the forward pass did not call it"):
        found.find_input_layers("b")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(1, 3, 3, 3), r"layer 'a' \(Conv2d\) takes 4 channels and gets a tensor of shape \(1, 3, 3, 3\)"),
        (torch.zeros(1, 4, 3, 3).double(), "has weights of torch.float32 and gets torch.float64, for data of shape"),
        ("picture.jpg", "gets a str in place of a tensor; of the inputs, 0 is a str"),
        ((X, X), "the model takes .*, and the data do not fit that: too many positional arguments"),
    ],
    ids=["channels", "dtype", "word", "arguments"],
)
def test_a_sample_that_the_model_cannot_take_is_told_of(sample, message):
    model = nn.Sequential(OrderedDict(a=nn.Conv2d(4, 4, 1)))
    with pytest.raises(CRPError, match=message):
        trace_model_graph(model, sample, ["a"])


def test_a_tuple_is_several_arguments():
    model = net(lambda m, x, y: m.c(m.a(x) + m.b(y)))
    assert trace_model_graph(model, (X, X), ["a", "b"]).find_input_layers("c") == ["a", "b"]


def test_densenet_is_traced_in_seconds():
    model = torchvision.models.densenet121(weights=None).eval()
    names = get_layer_names(model, [nn.Conv2d, nn.Linear])
    start = time.process_time()
    found = trace_model_graph(model, torch.zeros(1, 3, 64, 64), names)
    elapsed = time.process_time() - start
    assert found.find_input_layers("features.denseblock1.denselayer3.conv1") == [
        "features.conv0",
        "features.denseblock1.denselayer1.conv2",
        "features.denseblock1.denselayer2.conv2",
    ]
    assert elapsed < 5, f"{elapsed:.1f} s of processor time"


def test_record_is_plain_data(mlp, vectors):
    record = trace(mlp, vectors)
    assert isinstance(record, Trace)
    with pytest.raises(LayerNotFoundError):
        record.calls_of("nope")


def test_single_calls_of_a_layer_are_places_of_their_own():
    relu, data = nn.ReLU(), torch.randn(1, 4)
    net = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    found = trace_model_graph(net, data, ["0", "1#0", "2", "1#1", "4"])
    feeding = {name: found.find_input_layers(name) for name in found.layer_names}
    assert feeding == {"0": [], "1#0": ["0"], "2": ["1#0"], "1#1": ["2"], "4": ["1#1"]}
    found.set_layer_names(["1#0", "1.input#1"])
    assert found.find_input_layers("1#1") == ["1.input#1"]
    assert found.find_input_layers("1.input#1") == ["1#0"]
    assert found.find_input_layers("1") == ["1.input#1"]
    with pytest.raises(KeyError, match="'1#2' is in the model, but the forward pass did not call it"):
        found.find_input_layers("1#2")


def test_a_model_in_training_mode_is_traced_as_it_is_explained():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.ReLU(), nn.Linear(3, 2)).train()
    graph = trace_model_graph(model, torch.zeros(1, 4), ["0", "4"])  # (in training, one sample has no variance)
    assert graph.find_input_layers("4") == ["0"]
    assert all(module.training for module in model.modules())
