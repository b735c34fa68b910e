"""Parts of a model that no rule can see are refused by name; what the message advises then works."""

from __future__ import annotations

import re
import threading
import warnings

import pytest
import torch
from preset_cases import ACTIVATION_PRESETS, LRP_PRESETS, maps, numbers, off, seeded
from rule_cases import stabilize
from torch import nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus, Gradient, GradientTimesInput, UniformEpsilon
from crp.errors import CRPError, UnseenError
from crp.rules import Epsilon, Pass, Whole

DATA = numbers(2, 6, seed=3)
ALL = {**LRP_PRESETS, **ACTIVATION_PRESETS}
#: (torch scripts some of its own functions when they are first needed)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.torch.jit:{kind}") for kind in ("FutureWarning", "DeprecationWarning")
]


def jit(make, *args):
    """Scripted or traced function, for which newer versions of torch warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * (s + x * s * (1 - s))


class MarkedDirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        x.sigmoid_()
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * y * (1 - y)


class Reversal(torch.autograd.Function):
    """As nets that are trained against another one reverse their gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Itself(Reversal):
    @staticmethod
    def forward(ctx, x):
        return x


def swish(x):
    return x * torch.sigmoid(x)


def squash(x):
    x.sigmoid_()


scripted_in_place = jit(torch.jit.script, squash)


def in_a_thread(function, x):
    result = []
    thread = threading.Thread(target=lambda: result.append(function(x)))
    thread.start()
    thread.join()
    return result[0]


def undispatched(x):
    with torch._C.DisableTorchFunction():
        return x * x.sigmoid()


def dirty_view(x):
    MarkedDirty.apply(x[:, :3])
    return x


def scripted_on_itself(x):
    scripted_in_place(x)
    return x


def scripted_on_a_view(x):
    scripted_in_place(x[:, 1:4])
    return x


def scripted_through_a_view(x):
    y = x.view(-1)
    scripted_in_place(x)
    return y.view(x.shape)


SCRIPTED, CHANGED = "script|trace|jit", "in place"
#: Functions of a tensor (n, 6) that no rule can see, and how the message names what made their results.
UNSEEN = {
    "custom_function": (Swish.apply, "Swish"),
    "reversal": (Reversal.apply, "Reversal"),
    "reversal_of_itself": (Itself.apply, "Itself"),
    "scripted_function": (jit(torch.jit.script, swish), SCRIPTED),
    "traced_function": (jit(torch.jit.trace, swish, DATA), SCRIPTED),
    "scripted_module": (jit(torch.jit.script, nn.Sequential(nn.SiLU(), nn.Tanh())), SCRIPTED),
    "traced_module": (jit(torch.jit.trace, nn.SiLU(), DATA), SCRIPTED),
    "vmap": (torch.vmap(lambda row: row * row.sigmoid()), "MulBackward|vmap"),
    "vmap_of_rows": (
        lambda x: torch.vmap(torch.dot, (0, None))(x, numbers(6))[:, None] * numbers(6),
        "MvBackward|vmap",
    ),
    "jvp": (lambda x: torch.func.jvp(torch.tanh, (x,), (torch.ones_like(x),))[0], "TanhBackward|func"),
    "tangent": (lambda x: torch.func.jvp(torch.tanh, (x,), (torch.ones_like(x),))[1], "MulBackward|func"),
    "vjp": (lambda x: torch.func.vjp(torch.tanh, x)[0], "TanhBackward|func"),
    "thread": (lambda x: in_a_thread(F.silu, x), "SiluBackward"),
    "undispatched": (undispatched, "MulBackward"),
    "mark_dirty": (lambda x: MarkedDirty.apply(x), f"MarkedDirty|{CHANGED}"),
    "mark_dirty_in_place": (lambda x: (MarkedDirty.apply(x), x)[1], f"MarkedDirty|{CHANGED}"),
    "mark_dirty_view": (dirty_view, f"MarkedDirty|{CHANGED}"),
    "scripted_in_place": (scripted_on_itself, f"{SCRIPTED}|{CHANGED}"),
    "scripted_view": (scripted_on_a_view, f"{SCRIPTED}|{CHANGED}"),
    "scripted_through_a_view": (scripted_through_a_view, f"{SCRIPTED}|{CHANGED}"),
}


class Block(nn.Module):
    """A function as a module, which has a buffer, so that it is not looked at as an activation."""

    def __init__(self, function):
        super().__init__()
        self.function = [function]  # (not a submodule)
        self.register_buffer("unused", torch.zeros(1))

    def forward(self, x):
        return self.function[0](x)


class Net(nn.Module):
    """Dense layer, ReLU, block, dense layer: (n, 6) -> (n, 3)."""

    def __init__(self, block):
        super().__init__()
        self.up, self.relu, self.block, self.down = nn.Linear(6, 6), nn.ReLU(), block, nn.Linear(6, 3)

    def forward(self, x):
        return self.down(self.block(self.relu(self.up(x)).clone()))


def refusal(model, composite, data=DATA, **keywords):
    with pytest.raises(UnseenError) as caught:
        maps(model, data, composite, **keywords)
    return str(caught.value)


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_rule_can_see_is_refused(name, preset, untouched):
    function, maker = UNSEEN[name]
    model = seeded(Net(Block(function)))
    with untouched(model):
        message = refusal(model, ALL[preset]())
    reader = r"linear\(\) in 'down'|(view|getitem|mul|unsqueeze)\(\) in 'block'"
    assert re.search(reader, message), f"the reader and its module are not named: {message}"
    assert re.search(maker, message), f"the maker is not named: {message}"
    assert "Whole(" in message and "None" in message, f"no remedy: {message}"


def test_the_error_is_of_both_kinds():
    assert issubclass(UnseenError, CRPError) and issubclass(UnseenError, RuntimeError)


@pytest.mark.parametrize("name", UNSEEN)
def test_gradients_need_no_rule(name):
    model = seeded(Net(Block(UNSEEN[name][0])))
    leaf = DATA.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert off(maps(model, DATA, Gradient()), gradient) <= 1e-12
    assert off(maps(model, DATA, GradientTimesInput()), gradient * DATA) <= 1e-12
    assert off(maps(model, DATA, None), gradient * model(DATA)[:, 1:2].detach()) <= 1e-12


def relevances(model, function, rule):
    """Relevance of the data by hand: ``rule(a, y, m, derivative)`` hands ``m`` through the block, LRP-0 the rest."""
    z = model.up(DATA).detach()
    a = z.relu().requires_grad_()
    y = function(a.clone())
    m = model.down.weight.detach()[1].expand_as(y)
    below = rule(a.detach(), y.detach(), m, lambda m: torch.autograd.grad(y, a, m, retain_graph=True)[0])
    return DATA * ((below * (z > 0)) @ model.up.weight.detach())


BY_HAND = {
    "identity": (Whole(Pass()), lambda a, y, m, derivative: torch.where(a == 0, 0.0, m * y / a)),
    "epsilon": (Whole(Epsilon(0.1)), lambda a, y, m, derivative: derivative(m * y / stabilize(y, 0.1))),
    "none": (None, lambda a, y, m, derivative: derivative(m)),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("selector", ["block", Block, "bl*"], ids=["name", "type", "pattern"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_the_message_advises_works(name, selector, kind, untouched):
    """Whole of a rule treats the module as one operation, None is the ordinary chain rule through it."""
    function, (rule, by_hand) = UNSEEN[name][0], BY_HAND[kind]
    model = seeded(Net(Block(function)))
    with untouched(model):
        found = maps(model, DATA, UniformEpsilon(epsilon=0.0, layer_map=[(selector, rule)]))
    assert off(found, relevances(model, function, by_hand)) <= 1e-9


class Shifted(torch.autograd.Function):
    """Like the sparsemax of some libraries, it changes its input, and returns another tensor."""

    @staticmethod
    def forward(ctx, x):
        x -= x.amax(1, keepdim=True)
        y = (x + 1).clamp(min=0)
        ctx.save_for_backward(y > 0)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class Dense(nn.Module):
    """Dense layer, a block that may change its input, dense layer, which may read that."""

    def __init__(self, reads=False):
        super().__init__()
        self.up, self.block, self.down, self.reads = nn.Linear(6, 5), Block(Shifted.apply), nn.Linear(5, 3), reads

    def forward(self, x):
        z = self.up(x)
        y = self.block(z)
        return self.down(y + z if self.reads else y)


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_module_that_changes_its_input_and_returns_another_tensor_is_one_operation(kind, untouched):
    (rule, by_hand), model = BY_HAND[kind], seeded(Dense())
    a = model.up(DATA).detach().requires_grad_()
    y = model.block(a.clone())
    m = model.down.weight.detach()[1].expand_as(y)
    below = by_hand(a.detach(), y.detach(), m, lambda m: torch.autograd.grad(y, a, m)[0])
    with untouched(model):
        found = maps(model, DATA, UniformEpsilon(epsilon=0.0, layer_map=[("block", rule)]))
        assert off(found, DATA * (below @ model.up.weight.detach())) <= 1e-9
    with pytest.raises(UnseenError, match="was changed in place"):
        maps(seeded(Dense(reads=True)), DATA, UniformEpsilon(layer_map=[("block", rule)]))


class Stateful(nn.Module):
    """Like a spiking neuron, it returns its state, too."""

    def forward(self, x, state):
        state = 0.5 * state + x
        return Swish.apply(state), state


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.neuron, self.down = nn.Linear(6, 5), Stateful(), nn.Linear(5, 3)

    def forward(self, x):
        spikes, state = self.neuron(self.up(x), torch.zeros(5))
        return self.down(self.neuron(self.up(x), state)[0] + spikes)


def test_what_the_message_about_several_results_advises_works(untouched):
    model, leaf = seeded(Steps()), DATA.clone().requires_grad_()
    with pytest.raises(UnseenError, match="Map Whole"):
        maps(model, DATA, UniformEpsilon())
    with pytest.raises(TypeError, match=r"returns a tuple.* or None to it for the ordinary chain rule"):
        maps(model, DATA, UniformEpsilon(layer_map=[("neuron", Whole(Epsilon()))]))
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    with untouched(model):
        assert (
            off(maps(model, DATA, UniformEpsilon(epsilon=0.0, layer_map=[("neuron", None)])), gradient * DATA) <= 1e-9
        )


#: The same functions, made by calls that are seen.
SEEN = {
    "custom_function": swish,
    "scripted_module": lambda x: torch.tanh(F.silu(x)),
    "vmap": swish,
    "mark_dirty": torch.sigmoid,
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("name", SEEN)
def test_what_the_message_advises_works_for_every_method(name, preset):
    """With the rule of the same activation where it is seen."""
    layer_map = [("block", None if preset in ACTIVATION_PRESETS else Whole(Pass()))]
    model, plain = seeded(Net(Block(UNSEEN[name][0]))), seeded(Net(Block(SEEN[name])))
    found, wanted = (maps(m, DATA, ALL[preset](layer_map=layer_map)) for m in (model, plain))
    assert wanted.any() and off(found, wanted) <= 1e-12


class Output(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.body, self.function = nn.Linear(6, 6), [function]

    def forward(self, x):
        return self.function[0](self.body(x).relu())


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("name", ["custom_function", "scripted_function", "vmap", "mark_dirty"])
def test_what_no_rule_can_see_is_refused_at_the_output(name, preset):
    message = refusal(seeded(Output(UNSEEN[name][0])), ALL[preset]())
    assert "output" in message and re.search(UNSEEN[name][1], message), message


def test_parts_of_an_output_are_refused_too():
    class Parts(Output):
        def forward(self, x):
            return {"logits": super().forward(x), "others": [x]}

    model = seeded(Parts(Swish.apply))
    with pytest.raises(UnseenError, match="output"):
        CondAttribution(model)(DATA, [{"y": 1}], EpsilonPlus())


class Edges(nn.Module):
    """Nodes of a graph, whose edges are weighted by what they join."""

    def __init__(self, dense):
        super().__init__()
        self.below, self.weigh, self.head, self.dense = nn.Linear(6, 4), nn.Linear(8, 1), nn.Linear(4, 3), dense

    def forward(self, x):
        edges, nodes = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]]), F.relu(self.below(x))
        weights = self.weigh(nodes[edges].permute(1, 0, 2).flatten(1)).squeeze(1)
        matrix = torch.sparse_coo_tensor(edges, weights, (2, 2), check_invariants=True)
        return self.head(matrix.to_dense() @ nodes if self.dense else torch.sparse.mm(matrix, nodes)).mean(0, True)


def test_sparse_tensors_that_depend_on_the_input_are_refused_where_a_rule_reads_them():
    def explained(model, composite):
        with composite.context(model):
            leaf = DATA.clone().requires_grad_()
            return torch.autograd.grad(model(leaf)[0, 1], leaf)[0]

    with pytest.raises(
        NotImplementedError, match=r"sparse_mm\(\) reads a sparse tensor .* by \.to_dense\(\), or give N"
    ):
        explained(seeded(Edges(dense=False)), EpsilonPlus())
    assert explained(seeded(Edges(dense=True)), EpsilonPlus()).abs().max() > 0
    none = EpsilonPlus(layer_map=[("", None)])
    assert off(explained(seeded(Edges(dense=False)), none), explained(seeded(Edges(dense=True)), none)) <= 1e-9
