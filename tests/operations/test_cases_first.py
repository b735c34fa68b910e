"""First is what reads the model's input; first, last and depth follow the forward pass, not the registration."""

from __future__ import annotations

import copy

import pytest
import torch
from preset_cases import BOX, FIRST_PRESETS, LRP_PRESETS, assert_same_map, maps, numbers, off, seeded
from torch import nn
from torch.nn import functional as F

from crp.composites import LRP, Depth, EpsilonPlus, First, Last
from crp.rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus

IMAGES = numbers(2, 3, 8, 8, seed=3)


def layers():
    """Layers of one net, seeded, in the order in which it calls them."""
    made = {
        "stem": nn.Conv2d(3, 4, 3), "body": nn.Conv2d(4, 5, 3), "deep": nn.Conv2d(5, 6, 2), "hidden": nn.Linear(54, 7),
        "head": nn.Linear(7, 3),
    }  # fmt: skip
    return seeded(nn.ModuleDict(made))


class Net(nn.Module):
    """(n, 3, 8, 8) -> (n, 3); its layers are registered in a given order, and some that it never calls."""

    def __init__(self, order, unused=()):
        super().__init__()
        made = layers()
        for name in order:
            self.add_module(name, made[name])
        for i, layer in enumerate(unused):
            self.add_module(f"unused{i}", layer.double())

    def forward(self, x):
        h = F.relu(self.stem(x))
        h = F.relu(self.deep(F.relu(self.body(h)))).flatten(1)
        return self.head(F.relu(self.hidden(h)))


class Functional(Net):
    """The same without a call of a module."""

    def forward(self, x):
        h = F.conv2d(x, self.stem.weight, self.stem.bias).relu()
        h = torch.conv2d(h, self.body.weight, self.body.bias).relu_()
        h = F.relu(F.conv2d(h, self.deep.weight, self.deep.bias)).flatten(1)
        return F.linear(F.linear(h, self.hidden.weight, self.hidden.bias).relu(), self.head.weight, self.head.bias)


ORDER = ["stem", "body", "deep", "hidden", "head"]
ORDERS = {
    "reversed": lambda: Net(ORDER[::-1]),
    "head_first": lambda: Net(["head", *ORDER[:-1]]),
    "alphabetical": lambda: Net(sorted(ORDER)),
    "shuffled": lambda: Net(["deep", "head", "body", "stem", "hidden"]),
    "unused_behind": lambda: Net(ORDER, [nn.Conv2d(3, 4, 3), nn.Linear(7, 9)]),
    "functions": lambda: Functional(ORDER[::-1]),
    "nested": lambda: nn.Sequential(Net(ORDER[::-1])),
}


@pytest.mark.covering(3)
@pytest.mark.parametrize("preset", LRP_PRESETS)
@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_registration_does_not_matter(name, preset):
    assert_same_map(ORDERS[name]().eval(), Net(ORDER).eval(), IMAGES, LRP_PRESETS[preset](), 1e-12)


def unused_before():
    """Layers that are never called stand before the stem, too."""
    model = nn.Module()
    model.aux = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Linear(2, 2)).double()
    model.net = Net(ORDER[::-1])
    model.forward = model.net.forward
    return model.eval()


@pytest.mark.parametrize("preset", LRP_PRESETS)
def test_layers_that_are_not_called_do_not_count(preset):
    assert_same_map(unused_before(), Net(ORDER).eval(), IMAGES, LRP_PRESETS[preset](), 1e-12)


class Wired(nn.Module):
    """A function ``(layers, x) -> features``, and a dense layer behind the mean over positions."""

    def __init__(self, wiring, **layers):
        super().__init__()
        self.wiring = wiring
        self.head = nn.LazyLinear(3)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.head(F.relu(self.wiring(self, x)).flatten(2).mean(2))


def wired(wiring, **layers):
    model = Wired(wiring, **layers).double()
    model(IMAGES)
    return seeded(model)


def conv(inputs=3, size=3, **settings):
    return nn.Conv2d(inputs, 4, size, padding=size // 2, **settings)


BLUR = torch.full((3, 1, 3, 3), 1 / 9, dtype=torch.float64)
COLOURS = numbers(3, 3, seed=9)
#: Net, and the names of the modules that read its input; the rest are not first.
READERS = {
    "two_stems": (
        lambda: wired(lambda s, x: torch.cat([s.a(x).relu(), s.b(x[:, :2]).relu()], 1), a=conv(), b=conv(2)),
        ["a", "b"],
    ),
    "stems_of_channels": (
        lambda: wired(
            lambda s, x: s.c(sum(F.relu(f(x[:, i : i + 1])) for i, f in enumerate((s.a, s.b)))),
            a=conv(1),
            b=conv(1),
            c=conv(4),
        ),
        ["a", "b"],
    ),
    "skip_from_the_input": (
        lambda: wired(lambda s, x: s.c(s.a(x).relu()) + s.b(x), a=conv(), c=conv(4), b=conv(size=1)),
        ["a", "b"],
    ),
    "input_and_features": (
        lambda: wired(lambda s, x: s.b(torch.cat([x, s.a(x).relu()], 1)), b=conv(7), a=conv()),
        ["a"],
    ),
    "input_plus_features": (lambda: wired(lambda s, x: s.b(x + s.a(x)[:, :3].relu()), b=conv(), a=conv()), ["a"]),
    "normalised": (lambda: wired(lambda s, x: s.b(s.a((x - 0.3) / 0.2).relu()), b=conv(4), a=conv()), ["a"]),
    "clamped": (lambda: wired(lambda s, x: s.b(s.a(x.clamp(-1, 1)).relu()), b=conv(4), a=conv()), ["a"]),
    "padded": (
        lambda: wired(lambda s, x: s.b(s.a(F.pad(x, (1, 2, 3, 1))).relu()), b=conv(4), a=conv()),
        ["a"],
    ),
    "shared": (
        lambda: wired(lambda s, x: s.b(torch.cat([s.a(x).relu(), s.a(x.flip(1)).relu()], 1)), b=conv(8), a=conv()),
        ["a"],
    ),
    "pooled": (lambda: wired(lambda s, x: s.b(s.a(F.avg_pool2d(x, 2)).relu()), b=conv(4), a=conv()), ["a"]),
    "resized": (lambda: wired(lambda s, x: s.b(s.a(F.interpolate(x, (6, 6))).relu()), b=conv(4), a=conv()), ["a"]),
    "blur_in_front": (
        lambda: wired(
            lambda s, x: s.b(s.a(x).relu()), b=conv(3), a=nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        ),
        ["a"],
    ),
}
#: Rule of what reads the input, of other convolutions, and of dense layers.
RULES = {
    "epsilon_plus_flat": (Flat(1e-6), ZPlus(1e-6), Epsilon(1e-6)),
    "epsilon_alpha2_beta1_flat": (Flat(1e-6), AlphaBeta(2, 1, 1e-6), Epsilon(1e-6)),
    "epsilon_gamma_box": (ZBox(stabilizer=1e-6, **BOX), Gamma(0.25, 1e-6), Epsilon(1e-6)),
    "deep_taylor": (WSquare(0.0, "bias"), ZPlus(0.0, "bias"), ZPlus(0.0, "bias")),
    "deep_taylor_box": (ZBox(stabilizer=0.0, zero_params="bias", **BOX), ZPlus(0.0, "bias"), ZPlus(0.0, "bias")),
}


def by_name(model, readers, preset):
    """The preset, with the rule of each convolution by its name."""
    first, convolution, dense = RULES[preset]
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    rules = [(name, first if name in readers else convolution) for name in convolutions]
    return LRP(layer_map=[*rules, (nn.Linear, dense)])


@pytest.mark.filterwarnings("ignore:ZBox.*are not between:UserWarning")  # (of what is normalised in the net)
@pytest.mark.parametrize("preset", RULES)
@pytest.mark.parametrize("name", READERS)
def test_all_that_read_the_input_are_first(name, preset):
    make, readers = READERS[name]
    model = make()
    wanted = maps(model, IMAGES, by_name(model, readers, preset))
    assert off(maps(model, IMAGES, FIRST_PRESETS[preset]()), wanted) <= 1e-12


class Blurred(nn.Module):
    """A fixed function of the picture before the net."""

    def __init__(self, function):
        super().__init__()
        self.net, self.function = Net(ORDER[::-1]), function

    def forward(self, x):
        return self.net(self.function(x))


BEFORE = {
    "blur": (lambda x: F.conv2d(x, BLUR, padding=1, groups=3), lambda: depthwise()),
    "colours": (lambda x: F.conv2d(x, COLOURS[:, :, None, None]), lambda: pointwise()),
}


def depthwise():
    layer = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False).double()
    layer.weight = nn.Parameter(BLUR)
    return layer


def pointwise():
    layer = nn.Conv2d(3, 3, 1, bias=False).double()
    layer.weight = nn.Parameter(COLOURS[:, :, None, None])
    return layer


@pytest.mark.parametrize("preset", RULES)
@pytest.mark.parametrize("name", BEFORE)
def test_a_fixed_function_of_the_colours_in_front_is_first(name, preset):
    function, layer = BEFORE[name]
    model, plain = Blurred(function).eval(), Blurred(layer()).eval()
    assert_same_map(model, plain, IMAGES, FIRST_PRESETS[preset]())
    wanted = maps(plain, IMAGES, by_name(plain, ["function"], preset))
    assert off(maps(plain, IMAGES, FIRST_PRESETS[preset]()), wanted) <= 1e-12


@pytest.mark.parametrize("preset", ["epsilon_plus_flat", "epsilon_alpha2_beta1_flat", "deep_taylor", "deep_taylor_box"])
@pytest.mark.parametrize(
    "spelling",
    [lambda x: torch.einsum("bchw,dc->bdhw", x, COLOURS), lambda x: (x.movedim(1, 3) @ COLOURS.T).movedim(3, 1)],
    ids=["einsum", "matmul"],
)
def test_a_product_in_front_is_first(spelling, preset):
    """The rule at the input is the same for convolutions and dense layers."""
    assert_same_map(Blurred(spelling).eval(), Blurred(pointwise()).eval(), IMAGES, FIRST_PRESETS[preset]())


def stretched(x):
    return torch.zeros(len(x), 3, 10, 8, dtype=x.dtype)


SCALE, ROWS = torch.tensor([0.5, 2.0, -1.5], dtype=torch.float64), torch.arange(1, 9)
#: Ways to copy the input, and the plain one.
COPIES = {
    "scaled": (lambda x: torch.einsum("bchw,c->bchw", x - 0.3, SCALE), lambda x: (x - 0.3) * SCALE[:, None, None]),
    "moved": (lambda x: torch.einsum("bchw,c->bcwh", x - 0.3, SCALE), lambda x: ((x - 0.3) * SCALE[:, None, None]).mT),
    "turned": (lambda x: torch.einsum("bchw->bcwh", x - 0.3), lambda x: (x - 0.3).mT),
    "rows": (lambda x: stretched(x).index_copy(2, ROWS, x)[:, :, :8], lambda x: F.pad(x, (0, 0, 1, 0))[:, :, :8]),
    "part": (
        lambda x: torch.slice_scatter(stretched(x), x, 2, 1, 9)[:, :, :8],
        lambda x: F.pad(x, (0, 0, 1, 0))[:, :, :8],
    ),
}


@pytest.mark.filterwarnings("ignore:ZBox.*are not between:UserWarning")
@pytest.mark.parametrize("preset", RULES)
@pytest.mark.parametrize("name", COPIES)
def test_the_input_is_reached_through_copies(name, preset):
    assert_same_map(*(Blurred(function).eval() for function in COPIES[name]), IMAGES, FIRST_PRESETS[preset]())


PRODUCTS = {
    "elementwise": lambda x: x * x.sin(),
    "matmul": lambda x: x @ x.sin().mT,
    "einsum": lambda x: torch.einsum("bcij,bckj->bcik", x, x.sin()),
    "baddbmm": lambda x: torch.baddbmm(x.mean(1), x[:, 0], x[:, 1].mT)[:, None].expand(-1, 3, -1, -1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention_written_out": lambda x: (x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) @ x,
}


@pytest.mark.parametrize("preset", [preset for preset in FIRST_PRESETS if "deep_taylor" not in preset])
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_reads_a_product_of_the_input_is_first(name, preset):
    """No operation with weights stands before it."""
    model = Blurred(PRODUCTS[name]).eval()
    composite = FIRST_PRESETS[preset]()
    found = {o.layer: o.rule for o in composite.report(model, IMAGES).operations if o.function == "conv2d"}
    plain = {o.layer: o.rule for o in composite.report(model.net, IMAGES).operations if o.function == "conv2d"}
    assert found == {f"net.{layer}": rule for layer, rule in plain.items()}


def test_a_layer_that_reads_the_input_and_then_features_is_first_once():
    class Twice(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.head, self.one = nn.Linear(3, 3), nn.Conv2d(3, 3, 3, padding=1)
            self.two = self.one if shared else nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.head(F.relu(self.two(F.relu(self.one(x)))).mean((2, 3)))

    shared, copies = seeded(Twice(True)), Twice(False).double().eval()
    copies.load_state_dict({**shared.state_dict(), **{f"two.{k}": v for k, v in shared.one.state_dict().items()}})
    for preset in RULES:  # (others go by depth, which two layers do not share)
        assert_same_map(shared, copies, IMAGES, FIRST_PRESETS[preset]())


SELECTORS = {
    "first": (First(nn.Conv2d), ["stem"]),
    "first_two": (First(nn.Conv2d, 2), ["stem", "body"]),
    "first_dense": (First(nn.Linear), ["hidden"]),
    "last": (Last(nn.Conv2d), ["deep"]),
    "last_two": (Last((nn.Conv2d, nn.Linear), 2), ["hidden", "head"]),
    "upper": (Depth(0.5, 1, (nn.Conv2d, nn.Linear)), ["hidden", "head"]),
    "lower": (Depth(0, 0.5, (nn.Conv2d, nn.Linear)), ["stem", "body", "deep"]),
    "middle": (Depth(0.3, 0.7, nn.Conv2d), ["body", "deep"]),
}


@pytest.mark.parametrize("order", ["reversed", "shuffled", "unused_behind", "functions", "registered"])
@pytest.mark.parametrize("name", SELECTORS)
def test_positions_follow_the_forward_pass(name, order):
    selector, layers = SELECTORS[name]
    model = Net(ORDER).eval() if order == "registered" else ORDERS[order]().eval()
    by_name = EpsilonPlus(layer_map=[(layer, Gamma(2.0)) for layer in layers])
    found = maps(model, IMAGES, EpsilonPlus(layer_map=[(selector, Gamma(2.0))]))
    assert off(found, maps(Net(ORDER).eval(), IMAGES, by_name)) <= 1e-12
    assert off(found, maps(Net(ORDER).eval(), IMAGES, EpsilonPlus())) > 1e-3


def test_positions_of_a_copy_are_its_own():
    """A composite is put on one net after the other."""
    composite = EpsilonPlus(layer_map=[(Last(nn.Conv2d), Gamma(2.0))])
    one, other = Net(ORDER).eval(), Net(ORDER[::-1]).eval()
    first = maps(one, IMAGES, composite)
    assert off(maps(other, IMAGES, composite), first) <= 1e-12
    assert off(maps(copy.deepcopy(other), IMAGES, composite), first) <= 1e-12


class Embedded(nn.Module):
    """Each number of a row times a vector of its own, plus another, beside a token, as tables are read by attention."""

    def __init__(self, is_embedded=False):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 4))
        self.token, self.is_embedded = nn.Parameter(torch.zeros(1, 1, 4)), is_embedded
        self.first, self.head = nn.Linear(4, 5), nn.Linear(35, 3)

    def embed(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x.squeeze(1)[..., None] * self.scale + self.shift], 1)

    def forward(self, x):
        return self.head(F.relu(self.first(x if self.is_embedded else self.embed(x))).flatten(1))


@pytest.mark.parametrize("preset", ["epsilon_plus_flat", "epsilon_alpha2_beta1_flat", "deep_taylor", "deep_taylor_box"])
def test_numbers_that_become_vectors_get_what_their_copies_have(preset):
    model, above = (seeded(Embedded(is_embedded)) for is_embedded in (False, True))
    data = numbers(2, 1, 6, seed=3)
    wanted = maps(above, model.embed(data).detach(), FIRST_PRESETS[preset]())[:, 1:].sum(2)
    assert off(maps(model, data, FIRST_PRESETS[preset]()).flatten(1), wanted) <= 1e-9
