"""What layers keep of the relevance: by hand for each rule, and as a law, initial = input + kept + rest."""

import warnings

import pytest
import torch
from core_cases import conv_net, deviation, exhibit, heatmap, images, net
from rule_cases import LAYERS, as_matrices, neg, pos, seeded, stabilize
from torch import nn
from torch.nn import functional as F
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

import crp.composites as composites
import crp.rules as rules
from crp.attribution import CondAttribution
from crp.composites import CPLRP, LRP, AttnLRP, Composite, EpsilonPlus, EpsilonPlusFlat
from crp.concepts import ChannelConcept
from crp.visualization import FeatureVisualization

EPS = 1e-2  # large enough to be seen


def part(contributions, bias, whole):
    """Handed on, kept by bias and kept by the stabilizer, and by an empty part, where ``whole`` is shared."""
    z = contributions + bias
    s = stabilize(z, EPS)
    shares = {"bias": bias / s, "stabilizer": (s - z) / s, "empty": torch.zeros_like(z), "input": contributions / s}
    nothing = {"bias": 0.0, "stabilizer": 0.0, "empty": 1.0, "input": 0.0}
    return {k: torch.where(z == 0, torch.full_like(z, nothing[k]), v) * whole for k, v in shares.items()}


def plus(*parts):
    return {k: sum(p[k] for p in parts) for k in parts[0]}


def positive(a, w):
    return pos(a) @ pos(w).T + neg(a) @ neg(w).T


def negative(a, w):
    return pos(a) @ neg(w).T + neg(a) @ pos(w).T


def gamma(a, w, b, y, g=0.5):
    z = y - b
    return plus(
        part(z + g * positive(a, w), b + g * pos(b), y * (y > 0)),
        part(z + g * negative(a, w), b + g * neg(b), y * (y < 0)),
    )


FORMS = {
    "epsilon": (rules.Epsilon(EPS), lambda a, w, b, y: part(y - b, b, y)),
    "epsilon_zero_bias": (rules.Epsilon(EPS, "bias"), lambda a, w, b, y: part(y - b, 0 * b, y)),
    "zplus": (rules.ZPlus(EPS), lambda a, w, b, y: part(positive(a, w), pos(b), y)),
    "zplus_zero_bias": (rules.ZPlus(EPS, "bias"), lambda a, w, b, y: part(positive(a, w), 0 * b, y)),
    "alpha_beta": (
        rules.AlphaBeta(2, 1, EPS),
        lambda a, w, b, y: plus(part(positive(a, w), pos(b), 2 * y), part(negative(a, w), neg(b), -y)),
    ),
    "gamma": (rules.Gamma(0.5, EPS), gamma),
    "wsquare": (rules.WSquare(EPS), lambda a, w, b, y: part((w**2).sum(1).expand_as(y), b**2, y)),
    "flat": (rules.Flat(EPS), lambda a, w, b, y: part((w != 0).double().sum(1).expand_as(y), 0 * b, y)),
    "zbox": (
        rules.ZBox(-3.0, 2.5, EPS),
        lambda a, w, b, y: part(a @ w.T + 3 * pos(w).sum(1) - 2.5 * neg(w).sum(1), 0 * b, y),
    ),
}


def account(model, composite, data=None, conditions=({"y": 0},), **keywords):
    return CondAttribution(model).absorbed(images() if data is None else data, list(conditions), composite, **keywords)


def holds(found, tolerance=1e-9):
    """Whether nothing is left over."""
    return bool((found.rest.abs() <= tolerance * found.initial.abs().max()).all())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d_grouped", "conv3d", "transposed2d"])
@pytest.mark.parametrize("form", FORMS)
def test_layer_keeps_what_the_formula_says(form, kind):
    rule, shares = FORMS[form]
    layer, a = seeded(kind, True, False)
    a[0] = 0  # nothing contributes, or the bias alone
    with torch.no_grad():
        layer.bias[0] = 0
    model = nn.Sequential(layer, nn.Flatten()).eval()
    _, w, b = as_matrices(layer, a)
    y = layer(a).detach().flatten(1)
    wanted = shares(a.flatten(1), w, b.expand_as(y), y)
    composite = Composite(None, layer_map=[(type(layer), rule)])
    for target in (0, y.shape[1] - 1):
        found = account(model, composite, a, [{"y": target}])
        scale = y[:, target].abs().max()
        assert set(found.layers) == {"0"}
        for name, kept in found.layers["0"].items():
            assert (kept - wanted[name][:, target]).abs().max() <= 1e-12 * scale, name
        assert (found.input - wanted["input"][:, target]).abs().max() <= 1e-12 * scale
        torch.testing.assert_close(found.initial, y[:, target], rtol=1e-12, atol=1e-14)
        assert holds(found, 1e-12)


def test_kinds_of_layers_are_all_that_is_tested():
    assert {"linear", "conv1d", "conv2d_grouped", "conv3d", "transposed2d"} <= set(LAYERS)


def test_pass_keeps_what_inputs_of_zero_are_given():
    model = nn.Sequential(nn.Sigmoid(), nn.Flatten()).double().eval()
    data = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    found = account(model, Composite(None, layer_map=[(nn.Sigmoid, rules.Pass())]), data)
    torch.testing.assert_close(found.layers["0"]["empty"], torch.tensor([0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found.input, torch.tensor([0.0, 2.0], dtype=torch.float64).sigmoid() * data[:, 0].sign())


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.InstanceNorm1d(6, affine=True), nn.BatchNorm1d(6)]
)
def test_normalization_keeps_its_bias(norm):
    shape = (2, 4, 6) if isinstance(norm, nn.LayerNorm) else (2, 6, 4)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(24, 2, bias=False)).double().eval()
    data = torch.randn(shape, dtype=torch.float64)
    composite = LRP(None, layer_map=[((nn.Linear, nn.BatchNorm1d), rules.Epsilon(0.0))])
    found = account(model, composite, data)
    bias = norm.bias.detach().expand(shape) if shape[-1] == 6 else norm.bias.detach()[:, None].expand(shape)
    wanted = (bias.flatten(1) * model[2].weight[0].detach()).sum(1)
    torch.testing.assert_close(found.layers["0"]["bias"], wanted, rtol=1e-9, atol=1e-12)
    assert holds(found, 1e-12)


#: What adds a constant to what depends on the input; none of these has a rule of its own.
CONSTANTS = {
    "add_": lambda s, h: h.add_(1),
    "iadd_view": lambda s, h: (h[:, :2].__iadd__(1), h)[1],
    "rsub": lambda s, h: 1 - h,
    "sub_": lambda s, h: h.sub_(0.5),
    "alpha": lambda s, h: torch.add(h, torch.ones_like(h), alpha=2),
    "pad": lambda s, h: F.pad(h, (1, 1), value=1.0),
    "where": lambda s, h: torch.where(h.detach() > 0, h, 1.0),
    "masked_fill_": lambda s, h: h.masked_fill_(h.detach() < 0, 1.0),
    "cat": lambda s, h: torch.cat([h, torch.ones_like(h)], 2),
    "stack": lambda s, h: torch.stack([torch.ones_like(h), h], -1),
    "assign": lambda s, h: (h.__setitem__((slice(None), 0), 1.0), h)[1],
    "buffer": lambda s, h: torch.ones_like(h).add_(h),
    "into_buffer": lambda s, h: (b := torch.ones_like(h).detach(), b.__setitem__((slice(None), 0), h[:, 0]), b)[2],
    "conv": lambda s, h: F.conv2d(h, torch.ones(4, 4, 1, 1).to(h), torch.ones(4).to(h)),
    "maximum": lambda s, h: torch.maximum(h, torch.linspace(1, 2, h.shape[-1]).to(h)),
    "none": lambda s, h: h * 2,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_keep_their_share(name):
    model = conv_net(CONSTANTS[name])
    kept = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LRP has no rule for conv2d")
        for composite in (LRP(layer_map=[((nn.Conv2d, nn.Linear), rules.Epsilon(0.0))]), Composite()):
            if name == "maximum" and type(composite) is Composite:
                continue
            found = account(model, composite)
            assert holds(found)
            kept.append(found.layers.get("", {}).get("bias", torch.zeros(2)))
    assert all((share != 0).all() for share in kept) == (name != "none")


class Twice(nn.Module):
    """A module that is used twice, in place, with a constant between."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(3, 4)

    def forward(self, x):
        h = self.act(self.conv(x))
        h = h + 0.5
        return self.fc(self.act(self.conv(h)).mean((2, 3)))


NETS = {"exhibit": exhibit, "twice": lambda: net(lambda s, x: s.inner(x), inner=Twice()).inner}
COMPOSITES = {
    "epsilon_plus": EpsilonPlus(),
    "epsilon_plus_flat": EpsilonPlusFlat(epsilon=0.1),
    "zero_bias": EpsilonPlus(zero_params="bias", epsilon=0.1, gates="split"),
    "epsilon": composites.get("epsilon", epsilon=0.3, norm_scale=True),
    "alpha_beta": composites.get("alpha_beta", alpha=1.4, beta=0.4),
    "gamma_box": composites.get("epsilon_gamma_box", low=-4.0, high=4.0),
    "unmerged": composites.get("gamma", canonizers=None),
    "deep_taylor": composites.get("deep_taylor", maxpool="avg"),
    "excitation": composites.get("excitation_backprop"),
}


@pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)
@pytest.mark.parametrize("name", NETS)
def test_nothing_is_lost(name, composite):
    model, data = NETS[name](), images(3, 8)
    layer = {"exhibit": "mix#0", "twice": "conv#1"}[name]
    found = account(model, composite, data, [{"y": [0]}, {"y": [1, 2]}, {"y": 3}, {"y": [0]}])
    assert found.initial.shape == (12,)
    assert holds(found)
    torch.testing.assert_close(found.total, found.initial - found.input, rtol=1e-7, atol=1e-9)
    assert holds(account(model, composite, data, [{}], start_layer=layer, init_rel=lambda y: y.square()))
    assert holds(account(model, composite, data, [{}], start_layer=layer))
    ones = account(model, composite, data, [{"y": 1}], init_rel=torch.ones(4, dtype=torch.float64))
    assert holds(ones)
    torch.testing.assert_close(ones.initial, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_contrast_leaves_what_it_takes_away():
    """The rest of what starts is what the dual output takes: all of it."""
    found = account(exhibit(), composites.get("contrastive_excitation_backprop"), images(2, 8))
    torch.testing.assert_close(found.rest, found.initial, rtol=1e-9, atol=0)


@pytest.mark.parametrize("exclude_parallel", [True, False])
def test_rest_is_what_conditions_mask(exclude_parallel):
    """Concepts of a layer through which all flows add up to the whole, in the data, in every layer, and in the rest."""
    model, data, composite = exhibit(), images(2, 8), EpsilonPlus(epsilon=0.1)
    whole = account(model, composite, data)
    parts = account(
        model, composite, data, [{"y": 0, "mix#1": [c]} for c in range(6)], exclude_parallel=exclude_parallel
    )
    assert (parts.rest.abs() > 1e-6).any()

    def summed(rows):
        return rows.reshape(2, 6).sum(1)

    torch.testing.assert_close(summed(parts.input), whole.input)
    for layer, kept in whole.layers.items():
        for kind, share in kept.items():
            if layer != "mix":  # of whose two calls one is above the mask
                times = 6 if layer == "fc" else 1  # what lies above the mask is kept in each part
                torch.testing.assert_close(summed(parts.layers[layer][kind]), times * share)
    relevance = CondAttribution(model)(data, [{"y": 0}], composite, record_layer=["mix#1"]).relevances["mix#1"]
    masked = relevance.sum((1, 2, 3))[:, None] - relevance.sum((2, 3))
    torch.testing.assert_close(parts.rest.reshape(2, 6), masked, rtol=1e-7, atol=1e-10)
    nothing = account(model, composite, data, [{"y": 0, "mix#1": []}], exclude_parallel=exclude_parallel)
    torch.testing.assert_close(nothing.rest, relevance.sum((1, 2, 3)), rtol=1e-7, atol=1e-10)
    assert not nothing.input.any()


def test_composites_of_zennit_and_multipliers_keep_no_account():
    model = exhibit()
    for composite in (ZennitEpsilonPlus(), None):
        with pytest.raises(TypeError, match=r"only a composite of crp\.composites accounts for what layers keep, not"):
            account(model, composite, images(2, 8))
    for name in ("gradient", "guided_backprop"):
        with pytest.raises(TypeError, match="gives multipliers, of which layers keep nothing; it has no relevance"):
            account(model, composites.get(name), images(2, 8))


@pytest.mark.parametrize(
    "wiring",
    [
        lambda s, x: s.fc(x.flatten(2).flatten(0, 1)).reshape(len(x), -1),
        lambda s, x: s.fc(x.flatten(2).transpose(0, 1)).transpose(0, 1).flatten(1),
    ],
    ids=["flat", "transposed"],
)
def test_layers_whose_first_axis_is_not_that_of_the_samples(wiring):
    """Whose a row is cannot be told, so that samples are accounted for one by one."""
    model = net(wiring, fc=nn.Linear(36, 4))
    composite = Composite(layer_map=[(nn.Linear, rules.Epsilon())])
    assert heatmap(model, composite).any()
    kept = account(model, composite)
    torch.testing.assert_close(kept.input + kept.total, kept.initial, rtol=1e-10, atol=1e-12)
    assert kept.layers["fc"]["bias"].abs().min() > 0


def test_accounting_leaves_nothing_behind(untouched, tmp_path):
    model, data, composite = exhibit(), images(4, 8), EpsilonPlusFlat()
    before = heatmap(model, composite, data)
    with untouched(model):
        account(model, composite, data)
    assert torch.equal(heatmap(model, composite, data), before)
    samples = torch.utils.data.TensorDataset(data, torch.arange(4))
    tables = []
    for folder in ("before", "after"):
        view = FeatureVisualization(
            CondAttribution(model), samples, {"deep": ChannelConcept()}, path=str(tmp_path / folder)
        )
        view.run(composite, 0, 4, 2)
        tables.append(view.get_max_reference([0, 1], "deep", "relevance", composite=composite, plot_fn=None))
        account(model, composite, data)
    assert str(tables[0]) == str(tables[1])
    assert deviation(heatmap(model, composite, data), before) == 0


def test_several_forward_passes_account_for_the_last():
    model, data, composite = exhibit(), images(2, 8), EpsilonPlus()
    with composite.context(model), composite.accounting() as kept:
        model(images(3, 8).requires_grad_())
        out = model(data.requires_grad_())
        sinks = [sink for layer in kept.sinks.values() for sink in layer]
        assert {len(sink) for sink in sinks} == {1, 2}  # (one row for all, where a product is accounted for)
        found = torch.autograd.grad(out[:, 0].sum(), [data, *sinks], allow_unused=True)
    total = sum(g.sum() for g in found if g is not None)
    torch.testing.assert_close(total, out[:, 0].sum().detach(), rtol=1e-7, atol=1e-10)


class Decay(nn.Module):
    """Weights that fade with the distance of tokens, as in scans of states: the exponential of masked sums."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rate, self.value = nn.Linear(4, 1), nn.Linear(4, 3)

    def forward(self, x):
        rate = -torch.nn.functional.softplus(self.rate(x)).transpose(1, 2)
        n = rate.shape[-1]
        below = torch.ones(n, n, dtype=torch.bool).tril(-1)
        sums = rate[..., None].expand(-1, -1, n, n).masked_fill(~below, 0).cumsum(-2)
        sums = sums.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
        return (sums.exp()[:, 0] @ self.value(x)).sum(1)


class Spectrum(nn.Module):
    """Tokens mixed by a Fourier transform, as in FNet, whose complex numbers another function reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.value = nn.Linear(4, 3)

    def forward(self, x):
        return torch.fft.fft(self.value(x), dim=1).real[:, 1]


class Steps(nn.Module):
    """A recurrent layer: all of its states, and the last ones."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.above = kind(4, 3, bidirectional=True), nn.Linear(6, 3)

    def forward(self, x):
        states, last = self.rnn(x.transpose(0, 1))
        last = last[0] if isinstance(last, tuple) else last
        return self.above(states[-1] + last.transpose(0, 1).flatten(1))


class Deviates(nn.Module):
    """The same of two statistics."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(4, 6), nn.Linear(10, 3)

    def forward(self, x):
        var, mean = torch.var_mean(self.below(x), 2)
        return self.above(torch.cat([var, mean], 1))


class Overwrites(Deviates):
    """Something without a rule, in the place of what it reads."""

    def forward(self, x):
        return self.above(torch.cat([self.below(x).mean(2).cumprod_(1), x[:, :, 0]], 1))


class Factors(Deviates):
    """A function of several results without a rule."""

    def forward(self, x):
        left, right = torch.linalg.qr(self.below(x))
        return self.above(torch.cat([left[:, :, 0], right[:, 0, :5]], 1))


@pytest.mark.filterwarnings("ignore:.* has no rule for (linalg_qr|cumprod):UserWarning")
@pytest.mark.parametrize("kind", [AttnLRP, EpsilonPlus])
@pytest.mark.parametrize(
    "model",
    [Steps(nn.LSTM), Steps(nn.GRU), Steps(nn.RNN), Deviates(), Factors(), Overwrites()],
    ids=["lstm", "gru", "rnn", "var_mean", "qr", "in place"],
)
def test_functions_of_several_results_or_without_a_rule_keep_what_they_do_not_explain(model, kind):
    found = account(model.double().eval(), kind(), torch.randn(2, 5, 4, dtype=torch.float64))
    assert found.total.abs().min() > 1e-6 and holds(found)


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP])
@pytest.mark.parametrize("model", [Decay(), Spectrum()], ids=["minus infinity", "complex"])
def test_masked_and_complex_entries_keep_an_account_of_numbers(model, kind):
    found = account(model.double().eval(), kind(), torch.randn(2, 5, 4, dtype=torch.float64))
    assert found.total.isfinite().all() and holds(found)


def test_an_expert_without_tokens_keeps_nothing():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.above = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            mine, others = x[0].split([0, x.shape[1]])
            return self.above(torch.cat([self.first(mine), self.second(others)]).mean(0, keepdim=True))

    found = account(Experts().double().eval(), EpsilonPlus(), torch.randn(1, 5, 4, dtype=torch.float64))
    assert not any(share.any() for share in found.layers["first"].values()) and holds(found)


def test_what_was_read_may_be_overwritten_later():
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.below, self.above = nn.Linear(4, 6), nn.Linear(2, 3)

        def forward(self, x):
            h = self.below(x)
            top = torch.max(h, 1).values
            return self.above(torch.stack([top, h.abs_().mean(1)], 1))

    assert holds(account(Later().double().eval(), EpsilonPlus(), torch.randn(3, 4, dtype=torch.float64)))
