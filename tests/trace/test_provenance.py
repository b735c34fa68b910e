"""What a traced pass records of functions and modules, and that one pass serves all who ask."""

import gc
import weakref
from dataclasses import fields, is_dataclass

import pytest
import torch
from canonizer_cases import Merged, check, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from crp.canonizers import MergeBatchNorm
from crp.trace import FunctionCall, Operand, Passive, known, recorded, structure, trace
from crp.trace.record import Node
from crp.trace.recorder import _Recorder


class Wired(nn.Module):
    def __init__(self, wiring, **layers):
        super().__init__()
        self.wiring = wiring
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
        self.register_buffer("fixed", torch.randn(3, 4))
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.wiring(self, *args, **kwargs)


X = torch.randn(5, 3)


def counts(call):
    """How many operands depend on an input of the model, and how many others there are."""
    dependent = sum(bool(operand.origins) for operand in call.operands)
    return dependent, len(call.operands) - dependent


def operations(wiring, *args, **layers):
    return trace(Wired(wiring, **layers).eval(), *(args or (X,))).operations


def test_a_write_is_not_taken_for_one_to_what_has_the_place_in_memory_of_a_tensor_that_is_gone():
    recorder = _Recorder(nn.Identity())
    for _ in range(50):
        gone = torch.ones(3)
        recorder.keep(gone, Node("input", "input", None, []))
        with recorder:
            gone.view(3).add_(1)
        del gone
        tensor, node = torch.ones(3), Node("input", "input", None, [])
        recorder.keep(tensor, node)
        tensor.mul_(2)  # (nobody sees it)
        assert recorder.find(tensor) is node


def test_a_write_by_another_view_is_found():
    recorder, tensor = _Recorder(nn.Identity()), torch.ones(3)
    recorder.keep(tensor, Node("input", "input", None, []))
    with recorder:
        tensor.view(3).add_(1)
    assert recorder.find(tensor).name == "add"


# --- functions ------------------------------------------------------------------------------------------------------


COUNTS = {
    "linear": (lambda m, x: F.linear(x, m.weight, m.bias), [("linear", 1, 2)]),
    "operator": (lambda m, x: x @ m.fixed + m.bias, [("matmul", 1, 1), ("add", 1, 1)]),
    "product": (lambda m, x: x * x.sum(1, keepdim=True), [("sum", 1, 0), ("mul", 2, 0)]),
    "getter": (lambda m, x: x @ m.weight.T, [("T", 0, 1), ("matmul", 1, 1)]),
    "computed weight": (
        lambda m, x: F.linear(x, m.weight - m.weight.mean()),
        [("mean", 0, 1), ("sub", 0, 2), ("linear", 1, 1)],
    ),
    "in place": (
        lambda m, x: F.relu_(x + 1).add_(m.bias[:3]),
        [("add", 1, 0), ("relu", 1, 0), ("getitem", 0, 1), ("add", 1, 1)],
    ),
    "list": (lambda m, x: torch.cat([x, m.weight, x]), [("cat", 2, 1)]),
    "keywords": (lambda m, x: torch.addmm(input=m.bias, mat1=x, mat2=m.fixed), [("addmm", 1, 2)]),
    "metadata": (lambda m, x: x.view(x.shape[0], x.size(1)).relu(), [("view", 1, 0), ("relu", 1, 0)]),
    "detached": (lambda m, x: F.linear(x.detach(), m.weight), [("detach", 1, 0), ("linear", 0, 2)]),
    "data": (lambda m, x: F.linear(x.data, m.weight), [("data", 1, 0), ("linear", 0, 2)]),
    "comparison": (lambda m, x: (x > 0).float() @ m.fixed, [("gt", 1, 0), ("float", 0, 1), ("matmul", 0, 2)]),
    "written to": (
        lambda m, x: m.fixed.clone().copy_(x.T[:, :4]),
        [("clone", 0, 1), ("T", 1, 0), ("getitem", 1, 0), ("copy", 1, 1)],
    ),
    "packet": (lambda m, x: torch.ops.aten.linear.default(x, m.weight, m.bias), [("linear", 1, 2)]),
}


@pytest.mark.parametrize(("wiring", "expected"), COUNTS.values(), ids=COUNTS)
def test_functions_in_order_with_the_operands_that_depend_on_the_input(wiring, expected):
    found = [(call.name, *counts(call)) for call in operations(wiring)]
    assert found == expected


def test_where_functions_run_and_with_what():
    def wiring(m, x):
        return F.conv1d(m.inner(x)[:, :3, None], m.weight[:, :, None], None, (1,), padding=[2])

    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    first, second, sliced, weight, last = operations(wiring, inner=inner)
    assert (first.name, first.call.layer, second.name, second.call.layer) == ("linear", "inner.0", "relu", "inner.1")
    assert first.arguments[1:] == (Operand(None, "inner.0.weight"), Operand(None, "inner.0.bias"))
    assert first.returned == ((5, 3), torch.float32)
    assert first.function is F.linear
    assert sliced.call.layer == ""
    assert sliced.arguments[1] == (..., ..., None)  # slices are no plain data
    assert last.arguments == (Operand(sliced.outputs[0], None), Operand(weight.outputs[0], None), None, (1,))
    assert last.keywords == {"padding": (2,)}


def test_origins_are_numbers_of_inputs():
    def wiring(m, x, ids, *, more):
        hidden = F.linear(x, m.weight)
        return hidden * m.table(ids) + more["z"]

    net = Wired(wiring, table=nn.Embedding(7, 4))
    *_, product, total = trace(net, X, torch.arange(5), more={"z": torch.ones(5, 4)}).operations
    assert [sorted(operand.origins) for operand in product.operands] == [[0], [1]]
    assert [sorted(operand.origins) for operand in total.operands] == [[0, 1], [2]]
    assert counts(total) == (2, 0)


def test_a_lost_trail_depends_on_all_inputs_of_the_module():
    class Numpy(nn.Module):
        def forward(self, x, other):
            return torch.from_numpy((x.numpy() * other.numpy()).copy())

    (last,) = operations(lambda m, x, y: F.linear(m.inner(x, y), m.weight), X, X, inner=Numpy())[-1:]
    assert [sorted(operand.origins) for operand in last.operands] == [[0, 1], []]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_modules_are_calls():
    scripted = torch.jit.trace(nn.Linear(3, 3), X)
    record = trace(nn.Sequential(nn.Linear(3, 3), scripted, nn.Linear(3, 2)), X)
    assert record.upstream("2", ["0", "1"]) == ["1"]
    assert [(call.name, call.call.layer, counts(call)[0]) for call in record.operations] == [
        ("linear", "0", 1),
        ("linear", "2", 1),
    ]


def test_readers_of_parameters_by_every_name():
    def tie(m):
        m.inner.weight = m.weight
        return m

    record = trace(tie(Wired(lambda m, x: m.inner(x) + m.weight.sum(), inner=nn.Linear(3, 4))), X)
    assert record.parameter_readers["weight"] is record.parameter_readers["inner.weight"]
    assert [str(reader) for reader in record.parameter_readers["weight"]] == ["'inner'", "sum"]
    assert record.parameter_readers["bias"] == []


def test_a_record_holds_neither_tensors_nor_modules():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    todo, seen = [trace(net, torch.ones(1, 1, 4, 4))], set()
    kinds = set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kinds.add(type(value))
        assert not isinstance(value, Tensor | nn.Module | weakref.ref)
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif is_dataclass(value) and not isinstance(value, type):
            todo += [getattr(value, entry.name) for entry in fields(value)]
    assert {FunctionCall, Operand} <= kinds


# --- one pass for all -----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A net whose forward passes are counted outside of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 3, 2), randomize(nn.BatchNorm2d(3)), nn.Dropout()
        self.double().eval()

    def forward(self, x):
        PASSES.append(self.training)
        return self.drop(self.norm(self.conv(x)).relu())


PASSES: list[bool] = []
IMAGE = torch.ones(2, 1, 3, 3, dtype=torch.float64)


@pytest.fixture
def net():
    PASSES.clear()
    return Counting()


def test_one_record_for_each_structure(net):
    key = structure(net)
    assert known(net, key) is None
    record = recorded(net, (IMAGE,), {}, key)
    assert known(net, structure(net)) is record
    assert recorded(net, (IMAGE,), {}, structure(net)) is record
    assert PASSES == [False]


def test_a_merge_and_others_share_the_pass(net):
    key = structure(net)
    (canonizer,) = MergeBatchNorm().apply(net)
    assert structure(net) == key  # it waits for the first call
    net(IMAGE)
    assert canonizer.merged == {"norm": "conv"}
    assert structure(net) == key
    assert len(PASSES) == 2
    record = recorded(net, (IMAGE,), {}, structure(net))
    assert len(PASSES) == 2
    assert [call.name for call in record.operations] == ["conv2d", "batch_norm", "relu"]
    canonizer.remove()
    assert structure(net) == key


def test_a_merge_takes_the_record_of_others(net):
    recorded(net, (IMAGE,), {}, structure(net))
    (canonizer,) = MergeBatchNorm().apply(net)
    assert canonizer.merged == {"norm": "conv"}
    canonizer.remove()
    assert PASSES == [False]
    check(net, IMAGE, {"norm": "conv"})


CHANGES = {
    "hook": lambda net: net.conv.register_forward_hook(lambda *_: None),
    "pre-hook": lambda net: net.conv.register_forward_pre_hook(lambda *_: None),
    "pre-hook of the model": lambda net: net.register_forward_pre_hook(lambda *_: None),
    "passive hook inside": lambda net: net.conv.register_forward_pre_hook(Passive(lambda *_: None)),
    "training": lambda net: net.drop.train(),
    "forward": lambda net: setattr(net.drop, "forward", lambda x: x),
    "module": lambda net: setattr(net, "drop", nn.Dropout().eval()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_structure_is_looked_at_again(change, net):
    key = structure(net)
    record = recorded(net, (IMAGE,), {}, key)
    change(net)
    assert structure(net) != key
    assert recorded(net, (IMAGE,), {}, structure(net)) is not record
    assert known(net, key) is record


def test_passive_changes_are_none(net):
    key = structure(net)
    net.register_forward_pre_hook(Passive(lambda *_: None))
    net.norm.forward = Passive(lambda x: x)
    assert structure(net) == key
    assert torch.equal(net.norm(IMAGE), IMAGE)


def test_modes_are_remembered_beside_each_other(net):
    for training in (False, True) * 3:
        net.train(training)
        recorded(net, (IMAGE,), {}, structure(net))
    assert PASSES == [False, True]


def test_only_a_few_structures_are_remembered(net):
    first = structure(net)
    recorded(net, (IMAGE,), {}, first)
    for _ in range(4):
        net.register_forward_hook(lambda *_: None)
        recorded(net, (IMAGE,), {}, structure(net))
    assert known(net, first) is None
    assert len(PASSES) == 5


def test_records_keep_no_model_alive():
    net = Counting()
    with Merged(net, IMAGE):
        pass
    record = weakref.ref(known(net, structure(net)))
    gone = [weakref.ref(net), weakref.ref(net.conv), weakref.ref(net.conv.weight)]
    del net
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert record() is None


def test_a_pass_that_fails_is_not_remembered(net):
    key = structure(net)
    with pytest.raises(RuntimeError):
        recorded(net, (IMAGE[:, :0],), {}, key)
    assert known(net, key) is None
