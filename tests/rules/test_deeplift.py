"""DeepLIFT's rules: the paper's equations in matrices, and summation-to-delta as a law."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torchvision
from deeplift_cases import Call, matrix_form, pairs, relevance, sum_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from crp.attribution import CondAttribution
from crp.composites import Composite, DeepLift
from crp.rules.deeplift import MaxPool, Rescale, RevealCancel, slope

VARIANTS = ("rescale", "reveal_cancel")
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "prelu": nn.PReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
    "elu": nn.ELU(0.7),
    "selu": nn.SELU(),
    "celu": nn.CELU(0.5),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "softsign": nn.Softsign(),
    "log_sigmoid": nn.LogSigmoid(),
    "threshold": nn.Threshold(0.1, 0.3),
}


FUNCTIONS = {
    "exp": lambda x: x.tanh().exp(),
    "square": lambda x: x.tanh().square(),
    "pow": lambda x: x.tanh() ** 3,
    "rpow": lambda x: 2 ** x.tanh(),
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "log": lambda x: torch.log(x.square() + 1),
    "sqrt": lambda x: torch.sqrt(x.square() + 0.1),
    "quotient": lambda x: 3 / (x.square() + 1),
    "divisor": lambda x: torch.full_like(x, 3.0) / (x.square() + 1),
    "reciprocal": lambda x: (x.square() + 1).reciprocal(),
    "steps": lambda x: x + x.round(),
    "in_place": lambda x: x.clone().relu_(),
    "expit": torch.special.expit,
    "sin": torch.sin,
}


def mlp(activation: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), activation, nn.Linear(9, 7), activation, nn.Linear(7, 3)).double()


def cnn(activation: nn.Module, pool: nn.Module, norm: bool = True, seed: int = 0) -> nn.Sequential:
    """Convolutions (strided, grouped), batch norm, and pooling that follows an activation directly."""
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        *([nn.BatchNorm2d(4)] if norm else []),
        activation,
        pool,
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False),
        activation,
        nn.AvgPool2d(2, padding=1),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    layers(torch.zeros(1, 2, 9, 9))
    for module in layers:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, -1, 1)
    return layers.double().eval()


def assert_matrix_form(model: nn.Sequential, x: Tensor, x0: Tensor, variant: str) -> None:
    found = relevance(model, x, DeepLift(reference=x0, variant=variant), 1)
    expected = torch.stack([matrix_form(model, *pair, 1, variant) for pair in zip(x, x0, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_as_in_the_paper(name: str, variant: str) -> None:
    assert_matrix_form(mlp(ACTIVATIONS[name]), *pairs(6), variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, dilation=2), nn.AvgPool2d(3, 1)]
)
def test_convolutions_and_pooling_are_as_in_the_paper(pool: nn.Module, variant: str) -> None:
    # (BatchNorm2d between convolution and activation is the matrix form's own affine layer, so leave it out there)
    assert_matrix_form(cnn(nn.ReLU(), pool, norm=variant == "rescale"), *pairs(2, 9, 9), variant)


def test_reveal_cancel_is_by_hand() -> None:
    """min(a, b) = a - relu(a - b), section 3.1 of the paper: Rescale blames one input, RevealCancel both."""

    class Min(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.difference, self.out = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
            self.difference.weight.data = torch.tensor([[1.0, -1.0]])
            self.out.weight.data = torch.tensor([[1.0, -1.0]])

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([x[:, :1], F.relu(self.difference(x))], 1))

    model, x = Min().double(), torch.tensor([[5.0, 3.0]], dtype=torch.float64)
    assert relevance(model, x, DeepLift()).tolist() == [[0.0, 3.0]]
    # Δ⁺ = 5, Δ⁻ = -3: Δy⁺ = ½[5 + 2], Δy⁻ = ½[0 + 2 - 5]
    found = relevance(model, x, DeepLift(variant="reveal_cancel"))
    torch.testing.assert_close(found, torch.tensor([[1.5, 1.5]], dtype=torch.float64))


def test_reveal_cancel_gives_an_unchanged_input_half_of_both_parts() -> None:
    layer = nn.Linear(3, 1, bias=False).double()
    layer.weight.data = torch.tensor([[1.0, -2.0, 4.0]], dtype=torch.float64)
    x = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    composite = DeepLift(variant="reveal_cancel")
    first = nn.Identity()  # what arrives after it is the multiplier
    kept: list[Tensor] = []
    first.register_forward_hook(lambda *given: kept.append(given[2].clone()) or kept[-1])
    with composite.context(nn.Sequential(first, layer, nn.ReLU())) as model:
        (m,) = torch.autograd.grad(model(x).sum(), kept[-1])
    # Δ⁺ = 3, Δ⁻ = -2, y(Δ⁺) = 3, y = 1: m⁺ = ½(3 + 1) / 3, m⁻ = ½(0 + 1 - 3) / -2
    torch.testing.assert_close(m, torch.tensor([[2 / 3, -2 * 0.5, 4 * (2 / 3 + 0.5) / 2]], dtype=torch.float64))


def test_reveal_cancel_goes_through_batch_norm() -> None:
    """The same as merged into the convolution, also with a negative factor."""
    model, (x, x0) = cnn(nn.Tanh(), nn.MaxPool2d(2)), pairs(2, 9, 9)
    composites = [DeepLift(given, reference=x0, variant="reveal_cancel") for given in (None, "auto")]
    found, merged = (relevance(model, x, composite) for composite in composites)
    assert (model[1].weight < 0).any()
    torch.testing.assert_close(found, merged, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise_functions_hand_on_their_difference(name: str) -> None:
    model, (x, x0) = Call(FUNCTIONS[name]), pairs(10)
    found = relevance(model, x, DeepLift(reference=x0), 6)
    expected = torch.zeros_like(x)
    expected[:, 6] = model(x)[:, 6] - model(x0)[:, 6]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


class Everything(nn.Module):
    """Residual block with one activation object used throughout, a block applied twice, functional and dense parts."""

    def __init__(self, activation: nn.Module, pool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.block, self.grow = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.activation, self.pool, self.head = activation, pool, nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.activation(self.norm(self.stem(x))))
        for _ in range(2):
            x = self.activation(self.block(x) + x)
        x = torch.cat([x, F.relu(self.grow(x), inplace=True)], 1)
        return self.head(F.relu(F.max_pool2d(x, 2)).mean((2, 3)))


POOLS = st.one_of(
    st.builds(
        lambda k, s, p, d, c: nn.MaxPool2d(k, s, min(p, k // 2), d, ceil_mode=c),
        st.integers(2, 3), st.integers(1, 2), st.integers(0, 1), st.integers(1, 2), st.booleans(),
    ),
    st.sampled_from([nn.AdaptiveMaxPool2d(5), nn.AvgPool2d(2, 1), nn.Identity()]),
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from([*ACTIVATIONS, *FUNCTIONS]),
    pool=POOLS,
    variant=st.sampled_from(VARIANTS),
    seed=st.integers(0, 1000),
    closeness=st.sampled_from([1.0, 1.0, 1e-4, 1e-8, 1e-13]),
)
def test_sums_to_delta(name: str, pool: nn.Module, variant: str, seed: int, closeness: float) -> None:
    torch.manual_seed(seed)
    model = Everything(ACTIVATIONS.get(name) or Call(FUNCTIONS[name]), pool).double().eval()
    nn.init.normal_(model.norm.running_mean)
    x, x0 = pairs(2, 10, 10, seed=seed)
    x0 = x + closeness * (x0 - x)
    found = relevance(model, x, DeepLift(reference=x0, variant=variant))
    assert sum_error(model, x, x0, found) < 1e-10


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("indices", [False, True])
def test_pools_of_all_dimensions_sum_to_delta(n: int, adaptive: bool, indices: bool) -> None:
    name = f"{'adaptive_' if adaptive else ''}max_pool{n}d"
    sizes = (3,) if adaptive else (3, 2, 1)

    def pool(x: Tensor) -> Tensor:
        found = getattr(F, name)(x, *sizes, return_indices=indices)
        return (found[0] if indices else found).flatten(1)

    x, x0 = pairs(2, *(7 for _ in range(n)))
    model = Call(lambda x: pool(x.tanh()) @ torch.ones(2 * (3 if adaptive else 4) ** n, 1, dtype=torch.float64))
    assert sum_error(model, x, x0, relevance(model, x, DeepLift(reference=x0))) < 1e-13


def test_max_pool_multipliers_are_between_0_and_1() -> None:
    x, x0 = pairs(1, 8)
    pooled = Call(lambda x: F.max_pool1d(x, 2).flatten(1).sum(1, keepdim=True))
    m = relevance(pooled, x, DeepLift(reference=x0)) / (x - x0)
    assert ((m >= 0) & (m <= 1)).all() and ((m > 0) & (m < 1)).any()


@pytest.mark.parametrize("dx", [0.0, 1e-15, 1e-12, 1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("function", [torch.tanh, torch.exp, F.softplus, F.gelu, F.leaky_relu])
def test_slope_is_the_derivative_where_differences_are_rounded(function, dx: float) -> None:
    x0 = torch.linspace(-2, 2, 41, dtype=torch.float64) + 0.013
    x = x0 + dx
    found = slope(function, x, x0, function(x), function(x0))
    middle = ((x + x0) / 2).requires_grad_()
    (expected,) = torch.autograd.grad(function(middle).sum(), middle)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_slope_across_a_kink_is_the_quotient() -> None:
    x, x0 = torch.tensor([1e-12, 1e-30], dtype=torch.float64), torch.tensor([-3e-12, -3e-30], dtype=torch.float64)
    for call in (torch.relu, F.relu, F.leaky_relu):
        found = slope(call, x, x0, call(x), call(x0))
        torch.testing.assert_close(found * (x - x0), call(x) - call(x0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "name", ["resnet18", pytest.param("vgg11_bn", marks=pytest.mark.slow), "densenet121", "mobilenet_v3_small"]
)
def test_nets_of_torchvision_sum_to_delta(name: str, variant: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x, x0 = pairs(3, 64, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = relevance(model, x[:1], DeepLift(reference=x0[0], variant=variant))
    assert sum_error(model, x[:1], x0[0], found) < 1e-10
    assert [str(w.message).partition(":")[0] for w in caught] == ["outside DeepLIFT's rules"] * ("mobile" in name)


def test_float32_deviates_by_little() -> None:
    model, (x, x0) = cnn(nn.GELU(), nn.MaxPool2d(3, 2, 1)), pairs(2, 9, 9)
    exact = relevance(model, x, DeepLift(reference=x0))
    rounded = relevance(model.float(), x.float(), DeepLift(reference=x0)).double()
    assert (rounded - exact).abs().max() / exact.abs().max() < 1e-5


def test_second_derivatives() -> None:
    """The gradient of relevance, by finite differences of the reference-free quantity: relevance itself."""
    model, (x, x0) = mlp(nn.Softplus()), pairs(6)

    def of(data: Tensor) -> Tensor:
        with composite.context(model) as inside:
            found = torch.autograd.grad(inside(data)[:, 0].sum(), data, create_graph=True)[0].square().sum()
            with composite.inactive():
                return torch.autograd.grad(found, data)[0]

    composite = DeepLift(reference=x0)
    found = of(x.clone().requires_grad_())
    step = 1e-5 * torch.randn(x.shape, dtype=torch.float64)
    above, below = (relevance(model, x + sign * step, composite).square().sum() for sign in (1, -1))
    assert math.isclose((found * step).sum(), (above - below) / 2, rel_tol=1e-6)


def test_recorded_relevance_sums_to_delta_in_every_layer() -> None:
    model, (x, x0) = cnn(nn.ReLU(), nn.MaxPool2d(2)), pairs(2, 9, 9)
    layers = ["0", "1", "2#0", "3", "4", "2#1", "6", "7", "8"]  # one ReLU, used twice
    for variant in VARIANTS:
        composite = DeepLift(reference=x0, variant=variant)
        found = CondAttribution(model)(x.clone().requires_grad_(), [{"y": [1]}], composite, record_layer=layers)
        delta = (model(x) - model(x0))[:, 1].detach()
        torch.testing.assert_close(found.heatmap.flatten(1).sum(1), delta, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found.heatmap, relevance(model, x, composite, 1).sum(1), rtol=1e-11, atol=1e-12)
        for layer in layers:
            torch.testing.assert_close(found.relevances[layer].flatten(1).sum(1), delta, rtol=1e-11, atol=1e-12)


def test_relevance_of_channels_partitions_the_whole() -> None:
    model, (x, x0) = cnn(nn.ReLU(), nn.MaxPool2d(2)), pairs(2, 9, 9)
    attribution, composite = CondAttribution(model), DeepLift(reference=x0[:1], variant="reveal_cancel")
    data = x[:1].clone().requires_grad_()
    parts = [attribution(data, [{"y": [0], "2#0": [channel]}], composite).heatmap for channel in range(4)]
    whole = attribution(data, [{"y": [0]}], composite).heatmap
    torch.testing.assert_close(sum(parts), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("selector", [nn.ReLU, "2", F.relu])
def test_rules_may_be_mapped_to_the_modules_that_call_a_function(selector) -> None:
    model, (x, x0) = cnn(nn.ReLU(), nn.MaxPool2d(2)), pairs(2, 9, 9)
    mapped = relevance(model, x, DeepLift(reference=x0, variant="reveal_cancel", layer_map=[(selector, Rescale())]))
    rescale, reveal_cancel = (relevance(model, x, DeepLift(reference=x0, variant=variant)) for variant in VARIANTS)
    torch.testing.assert_close(mapped, rescale, rtol=1e-12, atol=1e-13)
    assert (mapped - reveal_cancel).abs().max() > 0.01 * mapped.abs().max()


@pytest.mark.parametrize(("rule", "kind"), [(Rescale(), nn.Linear), (RevealCancel(), nn.Linear), (MaxPool(), nn.ReLU)])
def test_rules_refuse_modules_that_call_no_such_function(rule, kind) -> None:
    model, name = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), type(rule).__name__
    with pytest.raises(TypeError, match=rf"{name} treats .*, which (linear|relu)\(\) in '[01]' is not"):
        relevance(model, torch.ones(1, 2), DeepLift(layer_map=[(kind, rule)]))


def test_rules_refuse_composites_without_reference() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(TypeError, match="Rescale compares with a reference, which composites such as DeepLift have"):
        relevance(model, torch.ones(1, 2), Composite(layer_map=[(F.relu, Rescale())]))


def test_model_predicts_as_before_and_is_left_untouched(untouched) -> None:
    model, (x, _) = cnn(nn.ReLU(inplace=True), nn.MaxPool2d(2)), pairs(2, 9, 9)
    expected = model(x)
    for variant in VARIANTS:
        with untouched(model), DeepLift(variant=variant).context(model) as inside:
            assert torch.equal(inside(x.clone().requires_grad_()), expected) and torch.equal(inside(x), expected)
            with torch.no_grad():
                assert torch.equal(inside(x), expected)
