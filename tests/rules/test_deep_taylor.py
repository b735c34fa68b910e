"""Deep Taylor decomposition: the paper's formulas in matrices, sum-pooling, zennit, and that relevance is conserved."""

import hypothesis.strategies as st
import pytest
import torch
import zennit.composites
import zennit.rules
from core_cases import Maps
from hypothesis import assume, given, settings
from rule_cases import close, jacobian, neg, pos
from torch import nn
from torch.nn import functional as F
from zennit.types import Activation, AvgPool
from zennit.types import Linear as AnyLinear

from crp.attribution import CondAttribution
from crp.composites import Composite, DeepTaylor
from crp.composites.selection import Functions
from crp.rules import SumPool
from crp.rules.functions import names_with

few = settings(max_examples=20, deadline=None)
LOW, HIGH = -1.5, 2.0


def ratio(above, below):
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))


# --- sum-pooling ------------------------------------------------------------------------------------------------------


def windows(pool, shape):
    """Which inputs (columns) each output (row) of a max-pooling looks at, by trial."""
    size = torch.Size(shape).numel()
    low = torch.full((1, *shape), -1.0, dtype=torch.float64)
    rows = []
    for i in range(size):
        spike = low.clone()
        spike.view(-1)[i] = 1.0
        rows.append((pool(spike) > 0).flatten())
    return torch.stack(rows, 1).double()


def form_sum_pool(a, reach, r):
    """R_i = Σ_j a_i R_j / Σ a over the window of j."""
    return a * (ratio(r, a @ reach.T) @ reach)


POOLS = {
    "1d": (nn.MaxPool1d(2), (2, 6)),
    "1d_all": (nn.MaxPool1d(3, 2, 1, dilation=2, ceil_mode=True), (2, 9)),
    "2d": (nn.MaxPool2d(2), (2, 4, 6)),
    "2d_overlapping": (nn.MaxPool2d(3, 2, 1), (2, 5, 6)),
    "2d_oblong": (nn.MaxPool2d((3, 2), (1, 2), (1, 0)), (1, 5, 5)),
    "2d_gaps": (nn.MaxPool2d(2, 3), (1, 7, 8)),
    "2d_dilated": (nn.MaxPool2d(2, 2, 1, dilation=(2, 3)), (1, 6, 7)),
    "2d_ceil": (nn.MaxPool2d(2, 2, ceil_mode=True), (2, 5, 5)),
    "2d_ceil_padded": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), (1, 6, 7)),
    "2d_ceil_long_stride": (nn.MaxPool2d(2, 4, 1, ceil_mode=True), (1, 7, 8)),
    "2d_adaptive": (nn.AdaptiveMaxPool2d((2, 3)), (2, 5, 7)),
    "2d_global": (nn.AdaptiveMaxPool2d(1), (3, 4, 4)),
    "2d_unchanged_axis": (nn.AdaptiveMaxPool2d((None, 2)), (1, 3, 5)),
    "1d_adaptive": (nn.AdaptiveMaxPool1d(3), (2, 7)),
    "3d": (nn.MaxPool3d(2, 1, 1), (1, 3, 2, 4)),
    "3d_adaptive": (nn.AdaptiveMaxPool3d((2, 1, 2)), (1, 3, 3, 4)),
}
SUM_POOL = Composite(None, layer_map=[(Functions(names_with("maximum")), SumPool())])


def pooled(model, a, r, composite=SUM_POOL):
    with composite.context(model):
        leaf = a.clone().requires_grad_()
        y = model(leaf)
        return torch.autograd.grad(y, leaf, ratio(r, y.detach()))[0]


@pytest.mark.parametrize("way", ["function", "module"])
@pytest.mark.parametrize("name", POOLS)
def test_max_pooling_shares_in_proportion(name, way):
    pool, shape = POOLS[name]
    torch.manual_seed(0)
    a = torch.rand(3, *shape, dtype=torch.float64).sub(0.3).relu()
    r = torch.rand_like(pool(a)) * (pool(a) > 0)
    composite = SUM_POOL if way == "function" else Composite(None, layer_map=[(type(pool), SumPool())])
    found = pooled(pool, a, r, composite)
    close(found.flatten(1), form_sum_pool(a.flatten(1), windows(pool, shape), r.flatten(1)))
    close(found.flatten(1).sum(1), r.flatten(1).sum(1), 1e-12)


CALLS = {
    "F": lambda x: F.max_pool2d(x, 3, 2, padding=1),
    "F with indices": lambda x: F.max_pool2d(x, 3, 2, padding=1, return_indices=True)[0],
    "torch": lambda x: torch.max_pool2d(x, [3], [2], [1]),
    "keywords": lambda x: F.max_pool2d(input=x, kernel_size=(3, 3), stride=[2, 2], padding=(1,), ceil_mode=False),
    "module with indices": lambda x: nn.MaxPool2d(3, 2, 1, return_indices=True)(x)[0],
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_every_style_are_pooled(call):
    class Net(nn.Module):
        def forward(self, x):
            return CALLS[call](x)

    a = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    r = torch.rand(2, 3, 3, 3, dtype=torch.float64)
    close(pooled(Net(), a, r), pooled(nn.MaxPool2d(3, 2, 1), a, r), 1e-12)
    unbatched = pooled(Net(), a[0], r[0])
    close(unbatched, pooled(Net(), a, r)[0], 1e-12)


def test_stride_is_the_kernel_by_default():
    class Net(nn.Module):
        def forward(self, x):
            return F.adaptive_max_pool1d(F.max_pool1d(x, 2), 1, return_indices=True)[0]

    a = torch.tensor([[[1.0, 3.0, 2.0, 6.0]]]).double()
    close(pooled(Net(), a, torch.ones(1, 1, 1).double()), a / 12, 1e-12)


@pytest.mark.parametrize("indices", [True, False])
def test_result_can_be_differentiated(indices):
    class Net(nn.Module):
        def forward(self, x):
            y = F.max_pool1d(x, 4, return_indices=indices)
            return y[0] if indices else y

    a = torch.tensor([[[1.0, 3.0, 2.0, 6.0]]]).double()
    with SUM_POOL.context(Net()) as model:
        leaf = a.clone().requires_grad_()
        (found,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        with SUM_POOL.inactive():
            (second,) = torch.autograd.grad(found.square().sum(), leaf)
    leaf = a.clone().requires_grad_()
    expected = leaf * leaf.amax() / leaf.sum()
    close(found, expected.detach(), 1e-12)
    close(second, torch.autograd.grad(expected.square().sum(), leaf)[0], 1e-12)


def test_sum_pooling_of_modules_that_pool_otherwise_is_refused():
    composite = Composite(None, layer_map=[(nn.AvgPool2d, SumPool())])
    with pytest.raises(TypeError, match=r"\(AvgPool2d, SumPool\(.*\)\): SumPool treats "):
        pooled(nn.AvgPool2d(2), torch.rand(1, 1, 4, 4), torch.ones(1, 1, 2, 2), composite)


def test_sum_pooling_of_other_functions_is_refused():
    composite = Composite(None, layer_map=[(F.avg_pool2d, SumPool())])
    with pytest.raises(TypeError, match=r"SumPool treats max-pooling, not avg_pool2d\(\)"):
        pooled(nn.AvgPool2d(2), torch.rand(1, 1, 4, 4), None, composite)


def test_sum_pooling_leaves_indices_as_they_are():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.back = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

        def forward(self, x):
            return self.back(*self.pool(x))

    a = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    values, indices = F.max_pool2d(a, 2, return_indices=True)
    with SUM_POOL.context(Net()) as model:
        assert torch.equal(model(a.clone().requires_grad_()), F.max_unpool2d(values, indices, 2))
    r = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    relevance = pooled(Net(), a, F.max_unpool2d(r, indices, 2))
    close(relevance, pooled(nn.MaxPool2d(2), a, r), 1e-12)


def test_result_changes_continuously_where_the_winner_changes():
    pool = nn.MaxPool1d(2)
    one, other = (torch.tensor([[[1.0 + d, 1.0 - d]]]).double() for d in (1e-6, -1e-6))
    r = torch.ones(1, 1, 1).double()
    assert (pooled(pool, one, r) - pooled(pool, other, r)).abs().max() < 1e-5
    plain = Composite(None)
    assert (one * 0 + pooled(pool, one, r, plain) - pooled(pool, other, r, plain)).abs().max() > 0.9


# --- whole nets -------------------------------------------------------------------------------------------------------


def net(pool="max", bias=-1.0, norm=False, seed=0):
    """Strided and grouped convolutions, pooling, dense layers: (n, 3, 8, 8) -> (n, 4); biases of one sign."""
    torch.manual_seed(seed)
    pooling = {"max": nn.MaxPool2d(2), "overlapping": nn.MaxPool2d(3, 2, 1), "avg": nn.AvgPool2d(2)}[pool]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        pooling,
        nn.Conv2d(8, 8, 3, 2, 1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    ).double().eval()  # fmt: skip
    for layer in model:
        if isinstance(layer, AnyLinear):
            layer.bias.data = bias * 0.05 * torch.rand_like(layer.bias)
    return model


def images(n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LOW + (HIGH - LOW) * torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64)


def form_zplus(a, w, r):
    return a * (ratio(r, a @ pos(w).T) @ pos(w))


def form_zbox(a, w, r):
    """Padding is no input: the bounds are those of pixels that there are."""
    parts = a[:, None] * w - LOW * pos(w) - HIGH * neg(w)
    return ((r / parts.sum(2))[:, :, None] * parts).sum(1)


def form_wsquare(a, w, r):
    return (r / (w**2).sum(1)) @ w**2


def in_matrices(model, x, r, first, maxpool):
    """Relevance of the input, layer by layer as the paper writes it; batch norm passes."""
    given = []
    for layer in model:
        given.append(x.detach())
        x = layer(x)
    for number, (layer, a) in reversed(list(enumerate(zip(model, given, strict=True)))):
        flat = a.flatten(1)
        if isinstance(layer, nn.BatchNorm2d | nn.ReLU | nn.Identity | nn.Flatten):
            continue
        if isinstance(layer, AnyLinear):
            w = jacobian(layer, torch.zeros_like(a[:1]))
            r = (first if number == 0 else form_zplus)(flat, w, r)
        elif isinstance(layer, nn.MaxPool2d) and maxpool == "wta":
            leaf = a.clone().requires_grad_()
            r = torch.autograd.grad(layer(leaf), leaf, r.reshape(layer(a).shape))[0].flatten(1)
        else:
            reach = windows(layer, a.shape[1:]) if isinstance(layer, nn.MaxPool2d) else jacobian(
                layer, torch.zeros_like(a[:1]))  # fmt: skip
            r = form_sum_pool(flat, reach, r)
    return r.reshape(given[0].shape)


FIRST = {"box": (form_zbox, {"low": LOW, "high": HIGH}), "unbounded": (form_wsquare, {})}


@pytest.mark.parametrize("bias", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("maxpool", ["wta", "avg"])
@pytest.mark.parametrize("pool", ["max", "overlapping", "avg"])
def test_net_is_the_formula_in_matrices(pool, maxpool, first, bias):
    model, data = net(pool, bias), images()
    form, bounds = FIRST[first]
    found = Maps(model)(data, [{"y": 1}], DeepTaylor(maxpool=maxpool, **bounds)).heatmap
    start = torch.zeros(2, 4).double()
    start[:, 1] = model(data)[:, 1].detach()
    close(found, in_matrices(model, data, start, form, maxpool), 1e-12)


@pytest.mark.parametrize("first", FIRST)
def test_net_is_as_in_zennit(first):
    model, data = net(), images()
    at_input = zennit.rules.WSquare(1e-15, ["bias"])
    if first == "box":
        at_input = zennit.rules.ZBox(LOW, HIGH, 1e-15, ["bias"])
    composite = zennit.composites.SpecialFirstLayerMapComposite(
        [
            (Activation, zennit.rules.Pass()),
            (AvgPool, zennit.rules.Norm(1e-15)),
            (AnyLinear, zennit.rules.ZPlus(1e-15, ["bias"])),
        ],
        [(AnyLinear, at_input)],
    )
    expected = Maps(model)(data, [{"y": 1}], composite).heatmap
    close(Maps(model)(data, [{"y": 1}], DeepTaylor(**FIRST[first][1])).heatmap, expected, 1e-11)


def test_mlp_is_the_formula_in_matrices(mlp, vectors):
    model = mlp
    found = Maps(model)(vectors, [{"y": 3}], DeepTaylor()).heatmap
    start = torch.zeros(4, 4).double()
    start[:, 3] = model(vectors)[:, 3].detach()
    close(found, in_matrices(model, vectors, start, form_wsquare, "wta"), 1e-12)


def test_batch_norm_is_merged():
    model, data = net(norm=True, bias=1.0), images()
    norm = model[1]
    with torch.no_grad():
        for tensor in (norm.running_var, norm.weight):
            nn.init.uniform_(tensor, 0.5, 1.5)
        norm.weight[::2] *= -1
        nn.init.normal_(norm.running_mean)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        merged = net(bias=1.0)
        merged[0].weight.mul_(scale[:, None, None, None])
        merged[0].bias.copy_((model[0].bias - norm.running_mean) * scale + norm.bias)
    composite = DeepTaylor(low=LOW, high=HIGH, maxpool="avg")
    found, expected = (Maps(m)(data, [{"y": 0}], composite).heatmap for m in (model, merged))
    close(found, expected, 1e-11)


def test_functions_are_as_modules():
    plain = net()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.eval()
            self.conv1, self.conv2, self.fc1, self.fc2 = plain[0], plain[4], plain[7], plain[9]

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            return self.fc2(torch.relu_(self.fc1(self.conv2(x).relu().flatten(1))))

    for maxpool in ("wta", "avg"):
        found, expected = (Maps(m)(images(), [{"y": 1}], DeepTaylor(maxpool=maxpool)).heatmap for m in (Net(), plain))
        close(found, expected, 1e-14)


def test_black_pixels_may_be_relevant():
    """zᴮ and w² hand relevance out themselves, so that a pixel of value 0 may have some."""
    model, data = net(), images()
    data[:, :, 2:4, 2:4] = 0
    for bounds in ({"low": LOW, "high": HIGH}, {}):
        found = Maps(model)(data, [{"y": 1}], DeepTaylor(**bounds)).heatmap
        assert (found[:, :, 2:4, 2:4] != 0).any()


# --- conservation -----------------------------------------------------------------------------------------------------


@few
@given(
    st.integers(0, 2**31), st.sampled_from(["max", "overlapping", "avg"]), st.sampled_from(["wta", "avg"]),
    st.sampled_from(list(FIRST)),
)  # fmt: skip
def test_relevance_is_conserved_and_not_negative_where_biases_are_not_positive(seed, pool, maxpool, first):
    model, data = net(pool, -1.0, seed=seed), images(seed=seed)
    output = model(data).detach()
    target = int(output.amin(0).argmax())
    assume((output[:, target] > 0).all())
    composite = DeepTaylor(maxpool=maxpool, **FIRST[first][1])
    found = Maps(model)(data, [{"y": target}], composite, record_layer=["0", "3", "4", "7"])
    for relevance in (found.heatmap, *found.relevances.values()):
        close(relevance.flatten(1).sum(1), output[:, target], 1e-11)
        assert relevance.min() >= -1e-14


@few
@given(st.integers(0, 2**31), st.sampled_from([None, "bias"]), st.sampled_from(["wta", "avg"]), st.sampled_from([1, 3]))
def test_what_is_lost_is_accounted_for(seed, zero_params, maxpool, bias):
    model, data = net("max", float(bias), seed=seed), images(seed=seed)
    composite = DeepTaylor(maxpool=maxpool, zero_params=zero_params)
    kept = CondAttribution(model).absorbed(data, [{"y": 1}], composite)
    close(kept.input + kept.total, model(data)[:, 1].detach(), 1e-11)
    if zero_params is None:
        assert kept.total.abs().max() > 0


def test_negative_outputs_are_shared_too():
    model, data = nn.Sequential(nn.Linear(2, 1)).double().eval(), torch.tensor([[1.0, 1.0]]).double()
    model[0].weight.data = torch.tensor([[1.0, -3.0]]).double()
    model[0].bias.data.zero_()
    close(Maps(model)(data, [{"y": 0}], DeepTaylor()).heatmap, torch.tensor([[-0.2, -1.8]], dtype=torch.float64))


@pytest.mark.parametrize("name", ["vgg_bn", "resnet"])
def test_deep_nets_conserve_up_to_what_is_accounted_for(name, request):
    model, data = request.getfixturevalue(name), images()
    for maxpool in ("wta", "avg"):
        composite = DeepTaylor(low=LOW, high=HIGH, maxpool=maxpool)
        sixteen = F.interpolate(data, 16)
        kept = CondAttribution(model).absorbed(sixteen, [{"y": 1}], composite)
        close(kept.input + kept.total, model(sixteen)[:, 1].detach(), 1e-11)


# --- conditions, settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maxpool", ["wta", "avg"])
def test_concepts_of_a_layer_add_up_to_the_whole(maxpool):
    attribution, data = CondAttribution(net()), images()
    composite = DeepTaylor(low=LOW, high=HIGH, maxpool=maxpool)
    whole = attribution(data, [{"y": 1}], composite).heatmap
    parts = attribution(data[:1], [{"y": 1, "4": c} for c in range(8)], composite).heatmap
    close(parts.sum(0), whole[0], 1e-12)


def test_start_layer_explains_a_channel():
    model, data = net(), images()
    found = Maps(model)(data, [{"4": 5}], DeepTaylor(low=LOW, high=HIGH), start_layer="4").heatmap
    start = model[:5](data).detach() * F.one_hot(torch.tensor(5), 8)[:, None, None]
    close(found, in_matrices(model[:5], data, start.flatten(1), form_zbox, "wta"), 1e-12)


@few
@given(st.integers(0, 2**31), st.floats(-10, 10), st.sampled_from(["wta", "avg"]))
def test_result_is_linear_in_the_start(seed, factor, maxpool):
    one, other = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    attribution, data, composite = Maps(net()), images(), DeepTaylor(maxpool=maxpool)
    first, second, mix = (
        attribution(data, [{}], composite, init_rel=start).heatmap for start in (one, other, one + factor * other)
    )
    assert (mix - first - factor * second).abs().max() <= 1e-12 * (first.abs().max() + abs(factor) * second.abs().max())


def test_samples_do_not_depend_on_each_other():
    model, data, composite = net(), images(3), DeepTaylor(low=LOW, high=HIGH, maxpool="avg")
    together = Maps(model)(data, [{"y": 1}], composite).heatmap
    alone = [Maps(model)(data[[i]], [{"y": 1}], composite).heatmap for i in range(3)]
    close(together, torch.cat(alone), 1e-12)


def test_bounds_may_be_lists_and_tensors():
    model, data = net(), images()
    low, high = [[[LOW]], [[LOW - 1]], [[LOW]]], torch.tensor([HIGH, HIGH, HIGH + 2]).reshape(3, 1, 1)
    found = Maps(model)(data, [{"y": 1}], DeepTaylor(low=low, high=high)).heatmap
    close(found.flatten(1).sum(1), model(data)[:, 1].detach(), 1e-11)
    assert not torch.allclose(found, Maps(model)(data, [{"y": 1}], DeepTaylor(low=LOW, high=HIGH)).heatmap, rtol=1e-2)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"low": 0.0}, "low and high are given together, .* got low=0.0 and high=None"),
        ({"high": 1.0}, "got low=None and high=1.0"),
        ({"low": 1.0, "high": 0.0}, "low must be below high everywhere"),
        ({"maxpool": "sum"}, "maxpool must be one of 'wta', 'avg', not 'sum'"),
        ({"stabilizer": -1.0}, "stabilizer must be finite and not negative"),
    ],
)
def test_bad_settings_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        DeepTaylor(**keywords)
