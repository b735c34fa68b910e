"""What DeepLIFT's paper has no rule for: decomposed exactly, or named as what it is."""

from __future__ import annotations

import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from deeplift_cases import Call, pairs, relevance, sum_error
from torch import Tensor, nn
from torch.nn import functional as F

from crp.composites import DeepLift


def of_each(function, x: Tensor, y: Tensor) -> Tensor:
    """A function of each sample."""
    return torch.cat([function(a, b) for a, b in zip(x, y, strict=True)])


OUTSIDE = {
    "mul": lambda x, y: x * y,
    "same": lambda x, y: x * x + y,
    "matmul": lambda x, y: (x[:, :, None] @ y[:, None]).sum(2),
    "einsum": lambda x, y: torch.einsum("ni,ni->n", x, y)[:, None] + 0 * x,
    "linear": lambda x, y: torch.stack([F.linear(a[:3], b.view(2, 3)) for a, b in zip(x, y, strict=True)]).repeat(1, 3),
    "conv1d": lambda x, y: F.conv1d(x[None], y[:, None, :3], padding=1, groups=len(x))[0],
    "bmm": lambda x, y: torch.bmm(x[:, None], y[:, :, None]).flatten(1).expand(-1, 6),
    "baddbmm": lambda x, y: torch.baddbmm(x[:, None, :1], x[:, :, None], y[:, None], beta=0.5, alpha=2).sum(2),
    "addmm": lambda x, y: of_each(lambda a, b: torch.addmm(b[None], a[None], b.expand(6, 6)), x, y),
    "linear with a bias": lambda x, y: of_each(lambda a, b: F.linear(a[None], b[:, None] + a, bias=b), x, y),
    "conv": lambda x, y: of_each(lambda a, b: F.conv1d(a[None], b[None, None, :5], padding=2), x, y),
    "bilinear": lambda x, y: F.bilinear(x, y, torch.arange(216.0).to(x).view(6, 6, 6).cos()),
    "normalize": lambda x, y: F.normalize(x) + F.normalize(y, p=1, dim=1),
    "cosine": lambda x, y: F.cosine_similarity(x, y)[:, None] * x,
    "div": lambda x, y: x / (y.square() + 1),
    "broadcast": lambda x, y: x / (x.square().sum(1, keepdim=True) + 1) + x * y.mean(1, keepdim=True),
    "softmax": lambda x, y: x.softmax(1) * 3,
    "softmax_far": lambda x, y: (300 * x).softmax(1),
    "softmin": lambda x, y: F.softmin(x, 1),
    "log_softmax": lambda x, y: x.log_softmax(-1),
    "layer_norm": lambda x, y: F.layer_norm(x, (6,), torch.arange(6.0).to(x), y.detach()[0] * 0 + 2),
    "rms_norm": lambda x, y: F.rms_norm(x, (6,), torch.arange(6.0).to(x)),
    "group_norm": lambda x, y: F.group_norm(x, 2, torch.arange(6.0).to(x), eps=0.1),
    "instance_norm": lambda x, y: F.instance_norm(x.view(-1, 2, 3), weight=torch.tensor([2.0, 3.0]).to(x)).flatten(1),
    "glu": lambda x, y: F.glu(torch.cat([x, y], 1), 1),
}  # fmt: skip


class Pair(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.left(x).tanh(), self.right(x)))


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_outside_is_decomposed_exactly_and_named_once(name: str) -> None:
    torch.manual_seed(0)
    model, (x, x0) = Pair(OUTSIDE[name]).double(), pairs(6)
    with pytest.warns(UserWarning, match="outside DeepLIFT's rules: ") as caught:
        found = relevance(model, x, DeepLift(reference=x0))
    assert len(caught) == 1 and "so that they do not sum" not in str(caught[0].message)
    assert sum_error(model, x, x0, found) < 1e-13


#: Functions that are several others, each of which the paper has a rule for.
SEVERAL = {
    "norm": lambda x: x.norm(dim=1),
    "norm of one": lambda x: torch.norm(x, 1, 1),
    "norm of three": lambda x: x.norm(3.0, dim=1, keepdim=True),
    "vector norm": lambda x: torch.linalg.vector_norm(x, dim=(1,)),
    "norm of linear algebra": lambda x: torch.linalg.norm(x, dim=1),
    "norm of a matrix": lambda x: torch.stack([torch.linalg.norm(a.view(2, 3)) for a in x]),
    "distance": lambda x: F.pairwise_distance(x, x.flip(1) * 2, p=2),
    "distances": lambda x: torch.cdist(x.view(-1, 2, 3), x.view(-1, 2, 3).flip(2) * 2).flatten(1),
    "deviation": lambda x: x.std(1),
    "deviation of all": lambda x: torch.stack([a.std(False) for a in x]),
    "variance": lambda x: torch.var(x, dim=1, correction=2, keepdim=True),
    "variance and mean": lambda x: torch.var_mean(x, 1)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_functions_that_are_several_others_are_exact(name: str) -> None:
    """The ordinary chain rule was used, with a warning."""
    torch.manual_seed(0)
    (x, x0), out = pairs(6), nn.Linear(6, 6).double()
    model = Call(lambda x: SEVERAL[name](out(x)).reshape(len(x), -1))
    assert sum_error(model, x, x0, relevance(model, x, DeepLift(reference=x0))) < 1e-13


def test_norms_are_the_steps_that_they_consist_of() -> None:
    (x, x0), out = pairs(6), nn.Linear(6, 6).double()
    once, apart = (
        relevance(Call(lambda x, f=f: f(out(x))[:, None]), x, DeepLift(reference=x0))
        for f in (lambda x: x.norm(dim=1), lambda x: (x**2).sum(1).sqrt())
    )
    torch.testing.assert_close(once, apart, rtol=1e-12, atol=1e-12)


def test_norms_that_are_maxima_are_named() -> None:
    x, x0 = pairs(6)
    with pytest.warns(UserWarning, match=r"ordinary chain rule in norm\(\), so that they do not sum"):
        relevance(Call(lambda x: x.norm(float("inf"), dim=1)[:, None]), x, DeepLift(reference=x0))


def test_product_gives_each_factor_the_mean_of_the_other() -> None:
    x, x0 = pairs(2)
    with pytest.warns(UserWarning, match=r"mul\(\)"):
        found = relevance(Call(lambda x: x[:, :1] * x[:, 1:]), x, DeepLift(reference=x0))
    torch.testing.assert_close(found, (x - x0) * (x + x0).flip(1) / 2, rtol=1e-12, atol=0)


TABLE = torch.arange(36, dtype=torch.float64).view(9, 4)


def rectified_by_index(x: Tensor) -> Tensor:
    y = x.clone()
    y[y < 0] = 0
    return y


def put(target: Tensor, places: Tensor, values: Tensor | float) -> Tensor:
    """Entries of each row, put at these places of the row."""
    target[torch.arange(len(target))[:, None], places] = values
    return target


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: x + x.detach().floor(), "add"),
        (lambda x: x - x.detach().amax(1, keepdim=True), "sub"),
        (lambda x: torch.cat([x, x.detach().argsort(1)], 1), "cat"),
        (lambda x: F.embedding(x[:, 0].detach().floor().abs().long(), TABLE) + x, "add"),
        (lambda x: x - x.detach().sum().item(), "sub"),
        (lambda x: x * x.detach().sum().item(), "mul"),
        (lambda x: torch.where(x > 0, x, 0), "where"),
        (lambda x: x * (x > 0), "mul"),
        (rectified_by_index, "masked_fill"),
        (lambda x: x[x[:, 0].argsort()], "getitem"),
        (lambda x: x[:, x[0].argsort()[:2]], "getitem"),
        (lambda x: put(torch.zeros_like(x), x.argsort(1), x), "setitem"),
        (lambda x: put(x.clone(), x.argsort(1)[:, :2], 0.0), "setitem"),
        (lambda x: put(x.clone(), x[:, :2].argsort(1), x[:, 2:]), "setitem"),
        (lambda x: torch.zeros_like(x).index_add(0, x[:, 0].argsort(), x), "index_add"),
        (lambda x: torch.zeros_like(x).index_add_(0, x[:, 0].argsort(), x), "index_add_?"),
        (lambda x: torch.zeros_like(x).scatter_add(1, x.argsort(1), x), "scatter_add"),
    ],
)
def test_constants_that_depend_on_the_data_are_named(function, named: str) -> None:
    """Those of sums were not, although relevance does not sum to the difference; others were named without a reason."""
    x, x0 = pairs(4)
    with pytest.warns(UserWarning, match=rf"other constants than for the reference in {named}\(\): they depend"):
        relevance(Call(function), x, DeepLift(reference=x0))


class Chosen(nn.Module):
    """A function of a tensor and of a number that is 1 for the data and 0 for the reference."""

    def __init__(self, function) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleDict({kind: nn.ModuleList(map(make, (0, 1))) for kind, make in self.kinds.items()})
        for parameter in self.layers.parameters():
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        self.up, self.out, self.function = nn.Linear(4, 4), nn.Linear(4, 2), function

    kinds: ClassVar = {
        "dense": lambda _: nn.Linear(4, 4),
        "conv": lambda _: nn.Conv1d(1, 1, 3, padding=1),
        "batch_norm": lambda k: nn.BatchNorm1d(4, eps=0.1 + k),
        "layer_norm": lambda _: nn.LayerNorm(4),
    }

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.layers, self.up(x), int(x.sum() > 0)))


#: Calls that are other ones for the data than for the reference: by a number, a word, a layer that is chosen, or a way.
CHOSEN = {
    "times": (lambda layers, h, k: h * (1 + k), "mul"),
    "words": (lambda layers, h, k: torch.mul(h, other=1.5 + k), "mul"),
    "alpha": (lambda layers, h, k: torch.add(h, h, alpha=1 + k), "add"),
    "plus": (lambda layers, h, k: h + k, "add"),
    "index": (lambda layers, h, k: h[:, [[0, 1, 2, 3], [1, 0, 2, 3]][k]], "getitem"),
    "numpy": (lambda layers, h, k: h[:, np.array([[0, 1, 2, 3], [3, 2, 1, 0]][k])], "getitem"),
    "whole number": (lambda layers, h, k: torch.cat([h[:, 1:], h[:, np.int64(k)][:, None]], 1), "getitem"),
    "slice": (lambda layers, h, k: h[:, k : k + 3].repeat(1, 2)[:, :4], "getitem"),
    "roll": (lambda layers, h, k: h.roll(1 + k, 1), "roll"),
    "axis": (lambda layers, h, k: h.view(-1, 2, 2).sum(1 + k).repeat(1, 2), "sum"),
    "equation": (
        lambda layers, h, k: torch.einsum(["bi,ij->bj", "bi,ji->bj"][k], h, h.new_ones(4, 4).triu()),
        "einsum",
    ),
    "dense": (lambda layers, h, k: layers["dense"][k](h), "linear"),
    "bias": (lambda layers, h, k: F.linear(h, layers["dense"][0].weight, layers["dense"][k].bias), "linear"),
    "conv": (lambda layers, h, k: layers["conv"][k](h[:, None])[:, 0], "conv1d"),
    "batch norm": (lambda layers, h, k: layers["batch_norm"][k](h), "batch_norm"),
    "layer norm": (lambda layers, h, k: layers["layer_norm"][k](h), "layer_norm"),
    "softmax": (lambda layers, h, k: h.view(-1, 2, 2).softmax(1 + k).flatten(1), "softmax"),
    "more": (lambda layers, h, k: -h if k else h, "neg"),
    "fewer": (lambda layers, h, k: h if k else -h, "(linear|neg)"),
}


@pytest.mark.filterwarnings("ignore:outside DeepLIFT's rules")
@pytest.mark.parametrize("variant", ["rescale", "reveal_cancel"])
@pytest.mark.parametrize("name", CHOSEN)
def test_calls_that_the_values_choose_are_named(name: str, variant) -> None:
    """Whole numbers, keywords, words and parameters were not looked at, nor were calls that have a rule."""
    function, named = CHOSEN[name]
    x = pairs(4)[0].abs()
    model = Chosen(function).double().eval()
    with pytest.warns(UserWarning, match=rf"other constants than for the reference in .*\b{named}\(\)"):
        found = relevance(model, x, DeepLift(reference=-x, variant=variant))
    assert sum_error(model, x, -x, found) > 1e-3, "which is why"


def test_a_call_that_is_left_at_the_end_is_named() -> None:
    x = pairs(4)[0].abs()
    model = Call(lambda x: x if x.sum() > 0 else x.flip(1))
    with pytest.warns(UserWarning, match=r"other constants than for the reference in flip\(\)"):
        relevance(model, x, DeepLift(reference=-x))


@pytest.mark.parametrize(
    "function",
    [
        lambda layers, h, k: F.elu(h, 1.0 + k),
        lambda layers, h, k: F.leaky_relu(h, 0.1 + 0.1 * k),
        lambda layers, h, k: h.clamp(max=0.1 + k),
        lambda layers, h, k: (h.contiguous() if k else h).view(len(h), 2, -1)[:, :, [0, 1]].flatten(1),
    ],
)
def test_elementwise_functions_may_be_others(function) -> None:
    """Rescale compares their values; and a copy changes none."""
    x = pairs(4)[0].abs()
    model = Chosen(function).double().eval()
    assert sum_error(model, x, -x, relevance(model, x, DeepLift(reference=-x))) < 1e-13


class OfOneSample(DeepLift):
    """All samples have one reference, which the model sees once."""

    def reference_for(self, data: Tensor, number: int) -> Tensor:
        return torch.zeros_like(data[:1]).requires_grad_()


def test_numbers_of_samples_are_no_constants() -> None:
    x, _ = pairs(6)
    model = Call(lambda x: x.tanh().view(len(x), 2, 3).sum(1).expand(len(x), 3))
    assert torch.equal(relevance(model, x, OfOneSample()), relevance(model, x, DeepLift()))


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: torch.einsum("ni,ni,ni->n", x, x, x)[:, None], "einsum"),
        (lambda x: F.batch_norm(x, None, None, training=True), "batch_norm"),
    ],
)
def test_what_is_not_decomposed_is_named(function, named: str) -> None:
    x, x0 = pairs(4)
    with pytest.warns(UserWarning, match=rf"ordinary chain rule in {named}\(\), so that they do not sum"):
        relevance(Call(function), x, DeepLift(reference=x0))
    with pytest.warns(UserWarning, match=r"DeepLift has no rule for sort\(\)"):
        relevance(Call(lambda x: x.sort(1)[0]), x, DeepLift(reference=x0))


def test_what_selects_alike_needs_no_warning() -> None:
    mask = torch.tensor([True, False, True, True])
    x, x0 = pairs(4)
    places = torch.tensor([3, 1, 2, 0])
    model = Call(lambda x: torch.where(mask, x, 0) * mask + x[:, places][:, places].masked_fill(mask, 0.0))
    assert torch.equal(relevance(model, x, DeepLift(reference=x0), 2)[:, 2], (x - x0)[:, 2])
    model = Call(lambda x: put(put(torch.zeros_like(x) * 1.5, places.expand(len(x), -1), x), places[None, :2], 0.0))
    assert torch.equal(relevance(model, x, DeepLift(reference=x0), 2)[:, 2], (x - x0)[:, 2])


def test_sparse_weights_are_compared() -> None:
    weight = torch.eye(4, dtype=torch.float64).roll(1, 0)
    x, x0 = pairs(4)
    model = Call(lambda x: (weight.to_sparse() @ x.T).T)
    assert torch.equal(relevance(model, x, DeepLift(reference=x0), 2)[:, 1], (x - x0)[:, 1])


def test_second_derivatives_of_what_is_outside_are_refused() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with DeepLift().context(Call(lambda x: x * x.tanh().flip(1))) as model, pytest.warns(UserWarning, match="outside"):
        y = model(x)
        with pytest.raises(RuntimeError, match=r"no second derivatives through mul\(\)"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_constant_reference_does_not_blow_up_normalizations() -> None:
    """With halves, multipliers of 1 / sqrt(eps) would cancel, and leave nothing of float32."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU())))
    for module in model[::3]:
        nn.init.zeros_(module.bias)
    x, x0 = pairs(6)
    with pytest.warns(UserWarning, match="layer_norm"):
        found = relevance(model, x.float(), DeepLift())
    assert sum_error(model, x.float(), 0 * x0.float(), found) < 1e-5


def test_each_call_names_its_own() -> None:
    x, x0 = pairs(4)
    functions = [lambda x: x * x, lambda x: x.softmax(1), lambda x: (x * x).nonsense(), lambda x: x.softmax(1)]
    model, said = Call(functions[0]), []
    with DeepLift(reference=x0).context(model):
        for model.function in functions:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    model(x.clone().requires_grad_())
                except AttributeError:
                    assert model.function is functions[2]
            said.append([str(w.message).partition("; ")[0] for w in caught])
    named = [["outside DeepLIFT's rules: mul()"], ["outside DeepLIFT's rules: softmax()"]]
    assert said == [*named, [], named[1]]
