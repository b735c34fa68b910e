"""What is known about a tensor, and spares work, holds: in place, through views, and behind other functions."""

from contextlib import nullcontext, suppress

import pytest
import torch
from core_cases import deviation, net
from rule_cases import form_alpha_beta, form_flat, form_gamma, form_zplus, mapped, relevance
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from crp.composites import Composite
from crp.errors import CRPError
from crp.rules import LRP0, AlphaBeta, Flat, Gamma, ZPlus

RULES = {
    "zplus": (ZPlus(1e-3), form_zplus),
    "alpha_beta": (AlphaBeta(2, 1, 1e-3), lambda *t: form_alpha_beta(*t, 2, 1)),
    "gamma": (Gamma(0.25, 1e-3), lambda *t: form_gamma(*t, 0.25)),
}
MASK = torch.tensor([True, False, True, False, True, False])
LOW, WEIGHT = -torch.ones(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64) - 0.5


def inputs():
    return torch.randn(3, 6, dtype=torch.float64)


def refusing(name):
    """A change of what shares memory, but not history, cannot be followed: it may be refused, never overlooked."""
    return suppress(CRPError) if name in ("detached", "without_grad") else nullcontext()


def change(r, how):
    how(r)
    return r


def without_grad(r):
    with torch.no_grad():
        r.sub_(0.5)
    return r


def after_dead_ones(h):
    """A tensor that may have the identity of one that was not negative."""
    for _ in range(20):
        h.relu()
    return h * 1.0


#: Functions of ``r``, which a ReLU gave, and ``h``, which it read; what they give has both signs.
SIGNED = {
    "cat": lambda r, h: torch.cat([r[:, :3], h[:, 3:]], 1),
    "cat_constant": lambda r, h: torch.cat([r[:, :3], LOW.expand(3, 6)[:, :3]], 1),
    "concat_keywords": lambda r, h: torch.concat(dim=1, tensors=(r[:, :3], h[:, 3:])),
    "stack": lambda r, h: torch.stack([r[:, :3], h[:, 3:]], 1).flatten(1),
    "hstack": lambda r, h: torch.hstack([r[:, :2], h[:, 2:]]),
    "where": lambda r, h: torch.where(MASK, r, h),
    "where_method": lambda r, h: r.where(MASK, h),
    "where_constant": lambda r, h: torch.where(MASK, r, -1.0),
    "pad": lambda r, h: F.pad(r[:, 2:], (1, 1), value=-1.0),
    "masked_fill": lambda r, h: r.masked_fill(MASK, -1.0),
    "index_fill": lambda r, h: r.index_fill(1, torch.tensor([2, 4]), -1.0),
    "index_add": lambda r, h: r.index_add(1, torch.tensor([0, 1]), r[:, :2], alpha=-2),
    "index_copy": lambda r, h: r.index_copy(1, torch.tensor([0, 1]), h[:, :2]),
    "index_put": lambda r, h: r.index_put((torch.tensor([0, 1]),), LOW),
    "scatter": lambda r, h: r.scatter(1, torch.tensor([[1], [2], [3]]), -1.0),
    "scatter_add": lambda r, h: r.scatter_add(1, torch.tensor([[1], [2], [3]]), h[:, :1]),
    "select_scatter": lambda r, h: r.select_scatter(h[:, 0], 1, 2),
    "neg": lambda r, h: -r,
    "negative": lambda r, h: r.negative(),
    "mul": lambda r, h: r * -1,
    "mul_left": lambda r, h: -2.0 * r,
    "mul_tensor": lambda r, h: r * LOW,
    "mul_both": lambda r, h: r * h.flip(1),
    "div": lambda r, h: r / -2,
    "sub": lambda r, h: r - 0.5,
    "rsub": lambda r, h: 0.5 - r,
    "sub_of_two": lambda r, h: r - r.flip(1),
    "sub_mean": lambda r, h: r - r.mean(1, keepdim=True),
    "add": lambda r, h: r + h,
    "add_constant": lambda r, h: r + -0.5,
    "add_alpha": lambda r, h: torch.add(r, r.flip(1), alpha=-1),
    "addcmul": lambda r, h: torch.addcmul(r, r, r, value=-1),
    "addcdiv": lambda r, h: torch.addcdiv(r, h, 1 + r),
    "lerp": lambda r, h: torch.lerp(r, h, 0.7),
    "minimum": lambda r, h: torch.minimum(r, h),
    "min": lambda r, h: torch.min(r, other=h.flip(1)),
    "copysign": lambda r, h: torch.copysign(r, h.flip(1)),
    "clamp": lambda r, h: r.clamp(max=0.5) - r.clamp(min=0.2),
    "hardtanh": lambda r, h: F.hardtanh(h, -1, 1),
    "threshold": lambda r, h: F.threshold(r, 0.5, -1.0),
    "leaky": lambda r, h: F.leaky_relu(h, 0.2),
    "prelu": lambda r, h: F.prelu(h, torch.tensor(0.3, dtype=torch.float64)),
    "elu": lambda r, h: F.elu(h),
    "log": lambda r, h: (r + 0.5).log(),
    "logsigmoid": lambda r, h: F.logsigmoid(r),
    "log_softmax": lambda r, h: r.log_softmax(1),
    "sin": lambda r, h: torch.sin(3 * r),
    "remainder": lambda r, h: r.remainder(-3.0),
    "diff": lambda r, h: r.diff(dim=1, append=r[:, :1]),
    "cumsum": lambda r, h: h.cumsum(1),
    "layer_norm": lambda r, h: F.layer_norm(r, (6,)),
    "batch_norm": lambda r, h: F.batch_norm(r, LOW + 1.2, -LOW),
    "group_norm": lambda r, h: F.group_norm(r, 2),
    "bicubic": lambda r, h: F.interpolate(r[:, None, :, None].expand(-1, -1, -1, 2), (3, 2), mode="bicubic").flatten(1),
    "matmul": lambda r, h: r @ WEIGHT,
    "linear": lambda r, h: F.linear(r, WEIGHT),
    "conv": lambda r, h: F.conv1d(r[:, None], WEIGHT[None, None, 0, :3], padding=1)[:, 0],
    "sub_": lambda r, h: r.sub_(0.5),
    "isub": lambda r, h: change(r, lambda r: r.__isub__(0.5)),
    "neg_": lambda r, h: r.neg_(),
    "add_": lambda r, h: r.add_(h),
    "mul_": lambda r, h: change(r, lambda r: r.mul_(-1)),
    "copy_": lambda r, h: change(r, lambda r: r.copy_(h)),
    "fill_": lambda r, h: change(r, lambda r: r[:, 1].fill_(-1.0)),
    "clamp_": lambda r, h: change(r, lambda r: r.clamp_(min=0.2).sub_(0.5)),
    "setitem": lambda r, h: change(r, lambda r: r.__setitem__((slice(None), 1), -1.0)),
    "setitem_tensor": lambda r, h: change(r, lambda r: r.__setitem__((slice(None), slice(2)), h[:, :2])),
    "view": lambda r, h: change(r, lambda r: r.view(-1).sub_(0.5)),
    "view_of_view": lambda r, h: change(r, lambda r: r.T[:3].neg_()),
    "of_its_view": lambda r, h: change(r.view(-1), lambda v: r.sub_(0.5)).view(3, 6),
    "chunk": lambda r, h: change(r, lambda r: r[:, :3].mul_(-1)),
    "masked_fill_": lambda r, h: change(r, lambda r: r.masked_fill_(MASK, -1.0)),
    "detached": lambda r, h: change(r, lambda r: r.detach().sub_(0.5)),
    "without_grad": lambda r, h: without_grad(r),
    "foreach": lambda r, h: torch._foreach_sub([r], 0.5)[0],
    "foreach_": lambda r, h: change(r, lambda r: torch._foreach_sub_([r], 0.5)),
    "dead": lambda r, h: after_dead_ones(h),
}
#: And some whose result is as little negative as what they read.
UNSIGNED = {
    "itself": lambda r, h: r,
    "in_place": lambda r, h: h.clone().relu_(),
    "inplace_flag": lambda r, h: F.relu(h * 1, inplace=True),
    "clamp": lambda r, h: h.clamp(min=0),
    "view": lambda r, h: r.view(-1).view(3, 6),
    "mul": lambda r, h: r * 2,
    "sum": lambda r, h: r + r.flip(1),
    "cat": lambda r, h: torch.cat([r[:, :3], h[:, 3:].abs()], 1),
    "pool": lambda r, h: F.max_pool1d(r, 3, 1, 1),
    "sigmoid": lambda r, h: h.sigmoid(),
    "exp": lambda r, h: h.exp(),
    "square": lambda r, h: h**2,
}


@pytest.mark.parametrize("name", [*SIGNED, *(f"not_negative_{name}" for name in UNSIGNED)])
def test_sign_of_what_a_layer_reads(name):
    """Against the matrix form, which takes positive and negative inputs as they come."""
    between = SIGNED.get(name) or UNSIGNED[name.removeprefix("not_negative_")]

    def hidden(x):
        h = x * 1
        return between(h.relu() * 1, h)  # (torch refuses to change what relu gave)

    x = inputs()
    a, back = torch.func.vjp(hidden, x) if name not in BY_AUTOGRAD else by_autograd(hidden, x)
    assert bool((a < 0).any()) == (name in SIGNED)
    model = net(lambda s, x: s.last(hidden(x)), last=nn.Linear(a.shape[1], 4))
    w, b, m = model.last.weight, model.last.bias, torch.randn(3, 4, dtype=torch.float64)
    for rule, form in RULES.values():
        with Composite(None, layer_map=[("last", rule)]).context(model), refusing(name):
            leaf = x.clone().requires_grad_()
            (found,) = torch.autograd.grad(model(leaf), leaf, m)
            shares = form(a, w, b, m * (a @ w.T + b)).detach()
            (multiplier,) = back(torch.where(a == 0, 0.0, shares / a))
            assert deviation(found, x * multiplier) <= 1e-10


def by_autograd(function, x):
    """As `torch.func.vjp`, for functions that it refuses."""
    leaf = x.clone().requires_grad_()
    a = function(leaf)
    return a.detach(), lambda m: torch.autograd.grad(a, leaf, m, retain_graph=True)


class Calls(TorchDispatchMode):
    """Counts calls of one kernel."""

    def __init__(self, name):
        super().__init__()
        self.name, self.n = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += str(func) == self.name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("functional", [False, True], ids=["modules", "functions"])
def test_no_value_is_read_behind_a_relu(functional):
    """To look whether a layer's input has negative entries makes a device wait; behind a ReLU it has none."""

    def wiring(s, x):
        if functional:
            return F.linear(F.linear(F.linear(x, s.a.weight, s.a.bias).relu(), s.b.weight).relu() * 2, s.c.weight)
        return s.c(s.relu(s.b(s.relu(s.a(x)))))

    model = net(wiring, a=nn.Linear(6, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 4), relu=nn.ReLU())
    with Calls("aten.amin.default") as looked, mapped(RULES["zplus"][0]).context(model):
        leaf = inputs().requires_grad_()
        torch.autograd.grad(model(leaf).sum(), leaf)
    assert looked.n == 1


BY_AUTOGRAD = {"without_grad", "detached", "foreach_"}

#: Changes of an output between the layer and the ReLU; and the same without a change in place.
CHANGES = {
    "none": (lambda y: y, lambda y: y),
    "add_": (lambda y: y.add_(2), lambda y: y + 2),
    "iadd": (lambda y: y.__iadd__(2), lambda y: y + 2),
    "mul_": (lambda y: change(y, lambda y: y.mul_(-1)), lambda y: -y),
    "view": (lambda y: change(y, lambda y: y.view(-1).add_(2)), lambda y: y + 2),
    "slice": (lambda y: change(y, lambda y: y[:, :2].add_(2)), lambda y: torch.cat([y[:, :2] + 2, y[:, 2:]], 1)),
    "setitem": (
        lambda y: change(y, lambda y: y.__setitem__((slice(None), 0), 2.0)),
        lambda y: torch.cat([2 + 0 * y[:, :1], y[:, 1:]], 1),
    ),
    "neg_": (lambda y: y.neg_(), lambda y: -y),
    "clamp_": (lambda y: y.clamp_(max=1.5), lambda y: y.clamp(max=1.5)),
    "detached": (lambda y: change(y, lambda y: y.detach().add_(2)), lambda y: y + 2),
    "foreach": (lambda y: change(y, lambda y: torch._foreach_add_([y], 2.0)), lambda y: y + 2),
    "reshaped": (lambda y: y.flatten(), lambda y: y.flatten()),
    "kept": (lambda y: torch.cat([y, y.relu()], 1), lambda y: torch.cat([y, y.clamp(min=0)], 1)),
}
RELUS = {
    "function": F.relu,
    "method": lambda y: y.relu(),
    "in_place": lambda y: y.relu_(),
    "flag": lambda y: F.relu(y, inplace=True),
    "torch": torch.relu,
    "module": nn.ReLU(),
    "module_in_place": nn.ReLU(inplace=True),
    "clamp": lambda y: y.clamp(min=0),
}


@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("name", CHANGES)
def test_relu_behind_what_was_changed(name, relu):
    """Under γ a ReLU takes the rule of the layer before it, if it reads the layer's output as it was."""
    changing, plain = CHANGES[name]
    model = net(lambda s, x: RELUS[relu](changing(s.fc(x))).view(3, -1), fc=nn.Linear(6, 4))
    x, w, b = inputs(), model.fc.weight, model.fc.bias
    y = x @ w.T + b
    out, back = torch.func.vjp(lambda y: plain(y).clamp(min=0).view(3, -1), y.detach())
    m = torch.randn_like(out)
    torch.testing.assert_close(model(x), out)
    for rule, form in RULES.values():
        with refusing(name):
            found = relevance(rule, model, x, m)
            assert deviation(found, form(x, w, b, back(m)[0] * y).detach()) <= 1e-10


#: Functions of the input ``x`` and of ``h``, a dense layer's output of the same shape; none is a copy of the input.
MIXED = {
    "sum": lambda x, h: x + h,
    "sum_left": lambda x, h: h + x,
    "in_place": lambda x, h: h.add_(x),
    "copy": lambda x, h: (x * 1).add_(h),
    "add_keywords": lambda x, h: torch.add(input=x, other=h, alpha=0.5),
    "difference": lambda x, h: 2 * x - h,
    "lerp": lambda x, h: torch.lerp(x, h, 0.25),
    "addcmul": lambda x, h: torch.addcmul(x, h, torch.ones_like(h)),
    "mean": lambda x, h: torch.stack([x, h]).mean(0),
    "einsum": lambda x, h: torch.stack([x, h], 2).sum(2),
    "sum_of_input": lambda x, h: x + x.flip(1),
    "square": lambda x, h: x * x,
    "product_of_input": lambda x, h: x * x.flip(1).sigmoid(),
    "maximum": lambda x, h: torch.maximum(x, x.flip(1)),
    "exp": lambda x, h: x.exp(),
    "cat": lambda x, h: torch.cat([x, h], 1),
    "alternating": lambda x, h: torch.stack([x, h], 2).flatten(1),
    "where": lambda x, h: torch.where(MASK, x, h),
    "setitem": lambda x, h: change(x * 1, lambda y: y.__setitem__((slice(None), slice(2)), h[:, :2])),
    "copy_": lambda x, h: change(x * 1, lambda y: y[:, :3].copy_(h[:, :3])),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_reads_a_layer_too_is_not_at_the_input(name):
    """The flat rule hands relevance to what it reads, and from there the chain rule goes on to the input."""
    mixed = MIXED[name]
    x = inputs()
    model = net(
        lambda s, x: s.last(mixed(x, s.first(x))),
        first=nn.Linear(6, 6),
        last=nn.Linear(mixed(x, x.clone()).shape[1], 2),
    )
    m = torch.randn(3, 2, dtype=torch.float64)
    with Composite(None, layer_map=[("last", Flat(1e-3)), ("first", LRP0())]).context(model):
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(model(leaf), leaf, m)
    w, b = model.last.weight, model.last.bias
    u, back = torch.func.vjp(lambda x: mixed(x, F.linear(x, model.first.weight, model.first.bias)), x)
    shares = form_flat(u, w, b, m * (u @ w.T + b))
    (multiplier,) = back((shares / u).detach())
    assert deviation(found, (x * multiplier).detach()) <= 1e-9
