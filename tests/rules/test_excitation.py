"""Excitation backprop and its contrast: the formula in matrices, TorchRay's algorithm, zennit, and that they sum up."""

import hypothesis.strategies as st
import pytest
import torch
import zennit.composites
from core_cases import Maps
from hypothesis import given, settings
from rule_cases import LAYERS, as_matrices, attribute, by_hook, close, neg, pos, seeded
from torch import nn
from torch.nn import functional as F

import crp.rules as rules
from crp.attribution import CondAttribution
from crp.composites import ContrastiveExcitationBackprop, ExcitationBackprop

few = settings(max_examples=20, deadline=None)
SIGNED = ["split", "as_is", "shift"]


# --- one layer --------------------------------------------------------------------------------------------------------


def ratio(above, below):
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))


def form_excitation(a, w, p, signed):
    """P_j = Σ_i P_i c_ij / Σ_j c_ij, with the contributions c of each reading of the paper."""
    if signed == "split":
        parts = pos(a)[:, None] * pos(w) + neg(a)[:, None] * neg(w)
    else:
        if signed == "shift":
            a = a - a.amin(1, keepdim=True).clamp(max=0)
        parts = a[:, None] * pos(w)
    return (parts * ratio(p, parts.sum(2))[:, :, None]).sum(1)


def form_contrast(a, w, p, signed):
    return form_excitation(a, w, p, signed) - form_excitation(a, -w, p, signed)


FORMS = {rules.Excitation: form_excitation, rules.ContrastiveExcitation: form_contrast}
PLAIN = [name for name in LAYERS if not any(mode in name for mode in ("reflect", "replicate", "circular", "tokens"))]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("name", PLAIN)
def test_rule_is_the_formula_in_matrices(name, signed, kind):
    layer, a = seeded(name, True, False)
    a[0] = a[0].relu()
    y = layer(a).detach()
    p = torch.randn_like(y)
    _, w, _ = as_matrices(layer, a)
    expected = FORMS[kind](a.flatten(1), w, p.flatten(1), signed).reshape(a.shape)
    close(attribute(kind(signed), layer, a, p), expected)
    close(attribute(kind(signed), layer, a, p / y, multiplier=True), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_split_is_the_rule_of_zennit_without_bias(name):
    layer, a = seeded(name, True, False)
    p = torch.randn_like(layer(a))
    close(attribute(rules.Excitation(), layer, a, p), by_hook(zennit.rules.ZPlus(1e-14, ["bias"]), layer, a, p), 1e-9)


def test_readings_agree_where_no_input_is_negative():
    layer, a = seeded("conv2d_grouped", True, True)
    p = torch.randn_like(layer(a))
    split, as_is, shift = (attribute(rules.Excitation(signed), layer, a, p) for signed in SIGNED)
    assert torch.equal(split, as_is)
    assert torch.equal(split, shift)


def test_output_without_excitation_hands_nothing_on():
    layer = nn.Linear(3, 2).double()
    layer.weight.data = torch.tensor([[-1.0, -2.0, -3.0], [1.0, 0.0, 1.0]]).double()
    a = torch.tensor([[1.0, 2.0, 3.0]]).double()
    found = attribute(rules.Excitation(), layer, a, torch.tensor([[0.5, 0.5]]).double())
    close(found, torch.tensor([[0.125, 0.0, 0.375]]).double())


def test_shift_reaches_pixels_of_value_zero():
    """A black pixel among negative ones is above the minimum, and so has a share."""
    model = nn.Sequential(nn.Linear(3, 1)).double().eval()
    model[0].weight.data = torch.ones(1, 3).double()
    data = torch.tensor([[-1.0, 0.0, 2.0]]).double()
    found = Maps(model)(data, [{"y": 0}], ExcitationBackprop(signed="shift")).heatmap
    close(found, torch.tensor([[0.0, 0.25, 0.75]]).double())


@pytest.mark.parametrize("rule", [rules.Excitation, rules.ContrastiveExcitation])
def test_bad_settings_are_refused(rule):
    with pytest.raises(ValueError, match="signed must be one of 'split', 'as_is', 'shift', not 'clip'"):
        rule("clip")
    with pytest.raises(ValueError, match="stabilizer must be finite and not negative"):
        rule(stabilizer=-1.0)


# --- whole nets -------------------------------------------------------------------------------------------------------


def net(kind="max", bias=True, norm=True, seed=0):
    """Strided and grouped convolutions, batch norm, pooling, dense layers: (n, 3, 9, 9) -> (n, 4)."""
    torch.manual_seed(seed)
    pool = {"max": nn.MaxPool2d(2), "overlapping": nn.MaxPool2d(3, 2, 1), "avg": nn.AvgPool2d(3, 2, 1)}[kind]
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1, bias=bias),
        nn.BatchNorm2d(10) if norm else nn.Identity(),
        nn.ReLU(),
        pool,
        nn.Conv2d(10, 12, 3, 2, 1, groups=2, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * (4 if kind == "max" else 9), 20, bias=bias),
        nn.ReLU(),
        nn.Linear(20, 4, bias=bias),
    )
    if norm:
        nn.init.uniform_(model[1].running_var, 0.5, 1.5)
        nn.init.normal_(model[1].running_mean)
        nn.init.normal_(model[1].bias)
    return model.double().eval()


def images(n=2, seed=0):
    return torch.rand(n, 3, 9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(model):
    """Layers of a sequential net with batch norm in the convolution before it, as (function, kind, weight)."""
    for layer, after in zip(model, [*model[1:], None], strict=True):
        if isinstance(layer, nn.BatchNorm2d | nn.Identity):
            continue
        if isinstance(layer, nn.Conv2d):
            scale = (after.weight / (after.running_var + after.eps).sqrt()) if isinstance(after, nn.BatchNorm2d) else 1
            w = (layer.weight.transpose(0, -1) * scale).transpose(0, -1).detach()
            yield layer, w, lambda x, w, layer=layer: F.conv2d(
                x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)  # fmt: skip
        elif isinstance(layer, nn.Linear):
            yield layer, layer.weight.detach(), F.linear
        else:
            yield layer, None, None


def inputs(model, x):
    """What each of these layers is given."""
    given = []
    for number, layer in enumerate(model):
        given += [] if isinstance(layer, nn.BatchNorm2d | nn.Identity) else [x.detach()]
        x = layer(x) if number < len(model) else x
    return given


def excitation_backprop(model, x, p, dual=None, until=0):
    """TorchRay's algorithm: P/z into each affine layer with its positive weights, times its input.

    The layer ``dual`` (counted among all but batch norm) takes its weights with the opposite sign.
    """
    layers = list(zip(steps(model), inputs(model, x), strict=True))
    for number, ((layer, w, apply), a) in reversed(list(enumerate(layers))):
        if number < until:
            break
        leaf = a.clone().requires_grad_()
        if w is not None:
            z = apply(leaf, pos(-w if number == dual else w))
            p = leaf * torch.autograd.grad(z, leaf, ratio(p, z))[0]
        elif isinstance(layer, nn.AvgPool2d):
            z = layer(leaf)
            p = leaf * torch.autograd.grad(z, leaf, ratio(p, z))[0]
        elif not isinstance(layer, nn.ReLU):
            p = torch.autograd.grad(layer(leaf), leaf, p.reshape(layer(a).shape))[0]
        p = p.detach()
    return p


def one_hot(target, n=2):
    return F.one_hot(torch.full((n,), target), 4).double()


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kind", ["max", "overlapping", "avg"])
def test_net_is_the_algorithm_of_torchray(kind, bias, norm):
    model, data = net(kind, bias, norm), images()
    found = Maps(model)(data, [{"y": 1}], ExcitationBackprop()).heatmap
    close(found, excitation_backprop(model, data, one_hot(1)), 1e-12)


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_signed_inputs_as_torchray_takes_them(kind):
    model, data = net(kind), images() - 0.4
    found = Maps(model)(data, [{"y": 1}], ExcitationBackprop(signed="as_is")).heatmap
    close(found, excitation_backprop(model, data, one_hot(1)), 1e-10)


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_net_without_bias_is_as_in_zennit(kind):
    model, data = net(kind, bias=False, norm=False), images() - 0.4
    found = Maps(model)(data, [{"y": 1}], ExcitationBackprop()).heatmap
    with zennit.composites.ExcitationBackprop(stabilizer=1e-15).context(model):
        leaf = data.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(leaf), leaf, one_hot(1))
    close(found, expected, 1e-12)


def test_batch_norm_is_merged_or_passed():
    """Its scale cancels in the quotient, but for the sign."""
    model, data = net(), images()
    merged, passed = (Maps(model)(data, [{"y": 1}], ExcitationBackprop(c)).heatmap for c in ("auto", None))
    close(passed, merged, 1e-12)
    with torch.no_grad():
        model[1].weight[::2] *= -1
    merged, passed = (Maps(model)(data, [{"y": 1}], ExcitationBackprop(c)).heatmap for c in ("auto", None))
    close(merged, excitation_backprop(model, data, one_hot(1)), 1e-12)
    assert not torch.allclose(passed, merged, rtol=1e-2, atol=1e-5)


def test_start_is_a_distribution_over_outputs():
    model, data = net(), images()
    start = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.1, 0.9]], dtype=torch.float64)
    found = Maps(model)(data, [{}], ExcitationBackprop(), init_rel=start).heatmap
    close(found, excitation_backprop(model, data, start), 1e-12)
    close(found.flatten(1).sum(1), torch.ones(2).double(), 1e-12)


@pytest.mark.parametrize("signed", ["split", "shift"])
@pytest.mark.parametrize("name", ["vgg_bn", "resnet"])
def test_every_layer_sums_to_one(name, signed, images, request):
    model = request.getfixturevalue(name)
    layers = {
        "vgg_bn": ["features.0", "features.1", "features.3", "features.6", "features.10", "classifier.1"],
        "resnet": ["conv1", "layer1", "layer2", "avgpool", "fc"],
    }[name]
    targets = [{"y": target} for target in range(5)]
    composite = ExcitationBackprop(signed=signed)
    found = Maps(model)(images, targets, composite, record_layer=layers)
    kept = CondAttribution(model).absorbed(images, targets, composite).total
    total = found.heatmap.flatten(1).sum(1)
    close(total + kept, torch.ones(20).double(), 1e-12)
    whole = kept.abs() < 1e-13  # no output without excitatory inputs took part
    assert whole.any()
    for relevance in found.relevances.values():
        close(relevance[whole].flatten(1).sum(1), torch.ones(int(whole.sum())).double(), 1e-12)


class Dense(nn.Module):
    """Concatenations, and a smooth activation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (3, 7, 11))
        self.act = nn.Softplus()
        self.fc = nn.Linear(15, 4)
        self.double().eval()

    def forward(self, x):
        for conv in self.convs:
            x = torch.cat([x, self.act(conv(x))], 1)
        return self.fc(x.mean((2, 3)))


def test_dense_net_with_smooth_activations_sums_to_one():
    found = Maps(Dense())(images(), [{"y": 2}], ExcitationBackprop(), record_layer=["convs.2"])
    close(found.heatmap.flatten(1).sum(1), torch.ones(2).double(), 1e-12)
    assert found.heatmap.min() >= 0


# --- contrast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize(("layer", "dual"), [(None, 8), ("9", 8), ("7", 6), ("4", 3)])
def test_contrast_is_the_algorithm_of_torchray(layer, dual, kind):
    """Both parts are propagated to the input and subtracted there; TorchRay subtracts at its contrast layer."""
    model, data = net(kind, seed=1), images()
    found = Maps(model)(data, [{"y": 1}], ContrastiveExcitationBackprop(layer=layer)).heatmap
    assert found.abs().sum() > 0
    expected = excitation_backprop(model, data, one_hot(1)) - excitation_backprop(model, data, one_hot(1), dual)
    close(found, expected, 1e-12)


@pytest.mark.parametrize("until", [4, 6, 8])
def test_difference_may_be_taken_at_any_layer(until):
    """Excitation backprop is linear: TorchRay's contrast layer does not matter."""
    model, data = net(seed=1), images()
    parts = [excitation_backprop(model, data, one_hot(1), dual, until) for dual in (None, 8)]
    name = {4: "4", 6: "6", 8: "8"}[until]
    found = Maps(model)(data, [{"y": 1}], ContrastiveExcitationBackprop(), record_layer=[name]).relevances[name]
    close(found, parts[0] - parts[1], 1e-12)


def test_contrast_sums_to_zero_before_clamping():
    model, data = net(seed=1), images(4)
    found = Maps(model)(data, [{"y": 1}], ContrastiveExcitationBackprop(), record_layer=["0", "3", "8"])
    for relevance in (found.heatmap, *found.relevances.values()):
        assert relevance.flatten(1).sum(1).abs().max() < 1e-12 * relevance.abs().sum()
    assert found.heatmap.sum(1).clamp(min=0).sum() > 0.1


def test_contrast_of_a_layer_that_is_not_there_is_refused(untouched):
    model, data = net(), images()
    with untouched(model), pytest.raises(KeyError, match="'classifier'"):
        CondAttribution(model)(data, [{"y": 1}], ContrastiveExcitationBackprop(layer="classifier"))
    message = r"\('3', Contrast.*: ContrastiveExcitation treats sums .*, and no such operation is called in '3'"
    with untouched(model), pytest.raises(TypeError, match=message):
        CondAttribution(model)(data, [{"y": 1}], ContrastiveExcitationBackprop(layer="3"))
    with pytest.raises(TypeError, match="layer must be the name of a layer, not 9"):
        ContrastiveExcitationBackprop(layer=9)


# --- conditions and laws ----------------------------------------------------------------------------------------------

BOTH = {"eb": ExcitationBackprop(), "contrast": ContrastiveExcitationBackprop()}


@pytest.mark.parametrize("name", BOTH)
def test_concepts_of_a_layer_add_up_to_the_whole(name):
    attribution, data = CondAttribution(net(seed=1)), images()
    whole = attribution(data, [{"y": 1}], BOTH[name]).heatmap
    parts = [attribution(data, [{"y": 1, "4": c}], BOTH[name]).heatmap for c in range(12)]
    close(sum(parts), whole, 1e-12)


def test_start_layer_explains_a_channel():
    model, data = net(), images()
    start = torch.zeros(2, 12, 2, 2, dtype=torch.float64)
    start[:, 5] = 1
    head = model[:5]
    found = Maps(model)(data, [{"4": 5}], ExcitationBackprop(), start_layer="4", init_rel=start).heatmap
    close(found, excitation_backprop(head, data, start), 1e-12)


@few
@given(st.integers(0, 2**31), st.sampled_from(["max", "overlapping", "avg"]), st.booleans(), st.sampled_from(SIGNED))
def test_probabilities_sum_to_one_up_to_what_has_no_excitation(seed, kind, bias, signed):
    model, data = net(kind, bias, seed=seed), images(seed=seed) - (0.4 if signed != "as_is" else 0)
    composite = ExcitationBackprop(signed=signed)
    found = Maps(model)(data, [{"y": 1}], composite).heatmap
    kept = CondAttribution(model).absorbed(data, [{"y": 1}], composite).total
    close(found.flatten(1).sum(1) + kept, torch.ones(2).double(), 1e-12)
    assert found.min() > -1e-15


@few
@given(st.integers(0, 2**31), st.floats(-10, 10), st.sampled_from(list(BOTH)))
def test_result_is_linear_in_the_start(seed, factor, name):
    one, other = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    attribution, data = Maps(net(seed=1)), images()
    first, second, mix = (
        attribution(data, [{}], BOTH[name], init_rel=start).heatmap for start in (one, other, one + factor * other)
    )
    assert (mix - first - factor * second).abs().max() <= 1e-12 * (first.abs().max() + abs(factor) * second.abs().max())


@pytest.mark.parametrize("signed", SIGNED)
def test_samples_do_not_depend_on_each_other(signed):
    model, data = net(), images(3) - torch.tensor([0.1, 0.0, 0.8]).double()[:, None, None, None]
    for composite in (ExcitationBackprop(signed=signed), ContrastiveExcitationBackprop(signed=signed)):
        together = Maps(model)(data, [{"y": 1}], composite).heatmap
        alone = [Maps(model)(data[[i]], [{"y": 1}], composite).heatmap for i in range(3)]
        close(together, torch.cat(alone), 1e-12)
