"""Composites: which rule reaches which layer, and that inside one the input's gradient is its relevance."""

import inspect
import json
import pickle
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import zennit.composites
import zennit.rules
from core_cases import Maps, heatmap, rules
from torch import Tensor, nn
from zennit.canonizers import SequentialMergeBatchNorm

import crp.composites as composites
from crp.attribution import CondAttribution
from crp.attributors.explaining import find_method
from crp.canonizers import MergeBatchNorm
from crp.composites import Composite, DeepTaylor, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat, get, register
from crp.errors import StateError, UnseenError
from crp.rules import LRP0, Epsilon, Flat, Gamma, Whole, ZBox, ZPlus

#: All presets, each with an argument that is not its default.
PRESETS = {
    "alpha_beta": {"alpha": 1.4, "beta": 0.4},
    "attn_lrp": {"epsilon": 0.1},
    "beta_smooth": {"beta": 3.0},
    "contrastive_excitation_backprop": {"layer": "features.7", "signed": "as_is"},
    "cp_lrp": {"epsilon": 0.1},
    "deconvnet": {},
    "deeplift": {"reference": 0.5},
    "deep_taylor": {"low": -4.0, "high": 4.0, "maxpool": "avg"},
    "epsilon": {"epsilon": 0.1, "norm_scale": True},
    "epsilon_alpha2_beta1": {"epsilon": 1e-3},
    "epsilon_alpha2_beta1_flat": {"epsilon": 1e-3},
    "epsilon_gamma": {"gamma": 0.1},
    "epsilon_gamma_box": {"epsilon": 1e-3},
    "epsilon_plus": {"epsilon": 1e-3},
    "epsilon_plus_flat": {"epsilon": 1e-3},
    "excitation_backprop": {"signed": "shift"},
    "gamma": {"gamma": 0.1},
    "gradient": {},
    "gradient_x_input": {},
    "guided_backprop": {},
    "lrp_0": {"zero_params": "bias"},
    "lrp_cmp": {"split": 0.4, "first": "box", "low": -4.0, "high": 4.0},
    "relp": {"zero_params": "bias"},
    "zplus": {"empty": "epsilon"},
}
NAMES = sorted(PRESETS)


def make(name, *args, **keywords):
    box = {"low": -4.0, "high": 4.0} if name == "epsilon_gamma_box" else {}
    return composites.get(name, *args, **box, **keywords)


def relevance(model, data, target, composite):
    with composite.context(model):
        leaf = data.clone().requires_grad_()
        return torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0]


def test_registry_lists_and_builds_every_preset():
    assert composites.names() == NAMES
    assert [type(make(name)).name for name in NAMES] == NAMES


def test_registry_names_what_there_is():
    with pytest.raises(KeyError, match=r"'epsilon_plus_flatt'; nearest: 'epsilon_plus_flat', .*; there are alpha_"):
        composites.get("epsilon_plus_flatt")


@pytest.mark.parametrize(
    ("name", "preset"),
    [("lrp", "epsilon_plus_flat"), ("LRP", "epsilon_plus_flat"), ("z-plus", "zplus"), ("vanilla gradient", "gradient")],
)
def test_names_that_explain_knows_name_the_same_composite(name, preset):
    assert composites.get(name).describe() == composites.get(preset).describe()
    assert find_method(name).name == preset


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_rebuilt_by_repr_pickle_and_description(name, vgg_bn, images):
    composite = make(name, canonizers=None, **PRESETS[name])
    reference = relevance(vgg_bn, images, 1, composite)
    description = json.loads(json.dumps(composite.describe()))
    for again in (
        eval(repr(composite), vars(composites)),
        pickle.loads(pickle.dumps(composite)),
        composites.get(description["name"], **description["keywords"]),
    ):
        assert repr(again) == repr(composite)
        assert torch.equal(relevance(vgg_bn, images, 1, again), reference)


def test_composite_of_one_s_own_shows_its_rules():
    composite = Composite(None, layer_map=[(nn.Linear, ZPlus())])
    assert "ZPlus(stabilizer=1e-06" in repr(composite)
    assert repr(pickle.loads(pickle.dumps(composite))) == repr(composite)


@pytest.mark.parametrize("name", ["canonizers", "layer_map", "first_map", "name_map", "reference", "variant"])
def test_settings_do_not_change(name):
    """What was changed later had an effect on relevance, or none, but not on pickles, descriptions and tables."""
    composite = composites.DeepLift(layer_map=[(torch.tanh, None)])
    before = getattr(composite, name)
    with pytest.raises(StateError, match=f"{name} of this DeepLift cannot change, .*; make another one"):
        setattr(composite, name, [])
    assert getattr(composite, name) is before and not isinstance(before, list)


@pytest.mark.parametrize("wrap", [lambda rule: rule, Whole], ids=["rule", "whole"])
def test_settings_of_rules_do_not_change_in_a_composite(wrap, mlp, vectors):
    rule = Epsilon(0.1)
    composite = Composite(None, layer_map=[("0", wrap(rule))])
    before = relevance(mlp, vectors, 1, composite)
    with pytest.raises(StateError, match=r"epsilon of this Epsilon cannot change, .*; make another one"):
        rule.epsilon = 3.0
    assert "epsilon=0.1" in repr(composite) and torch.equal(relevance(mlp, vectors, 1, composite), before)
    other = rule.copy()
    other.epsilon = 3.0
    again = Composite(None, layer_map=[("0", wrap(other))])
    assert "epsilon=3.0" in repr(again) and not torch.equal(relevance(mlp, vectors, 1, again), before)


def test_tensor_bounds_survive_the_description(vgg_bn, images):
    low, high = torch.full((1, 3, 1, 1), -4.0), torch.full((1, 3, 1, 1), 5.0)
    composite = EpsilonGammaBox(low=low, high=high)
    description = json.loads(json.dumps(composite.describe()))
    again = composites.get(description["name"], **description["keywords"])
    assert torch.equal(relevance(vgg_bn, images, 1, again), relevance(vgg_bn, images, 1, composite))


def test_description_refuses_what_cannot_be_sent():
    with pytest.raises(TypeError, match="keyword 'canonizers' of the composite is of SequentialMergeBatchNorm"):
        EpsilonPlus([SequentialMergeBatchNorm()]).describe()
    with pytest.raises(TypeError, match="Composite is not in the registry"):
        Composite().describe()


@pytest.mark.parametrize("name", ["epsilon_plus", "epsilon_plus_flat"])
def test_relevance_is_conserved_where_biases_count_as_zero(name, vgg_bn, images):
    composite = make(name, epsilon=1e-15, stabilizer=1e-15, zero_params="bias")
    total = relevance(vgg_bn, images, 2, composite).flatten(1).sum(1)
    torch.testing.assert_close(total, vgg_bn(images)[:, 2].detach(), rtol=1e-10, atol=1e-12)


class Block(nn.Module):
    """A normalization, a gate and attention; only the normalization has a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gate, self.fc = nn.Conv2d(3, 4, 1, bias=False), nn.Linear(4, 4, False), nn.Linear(4, 2, False)
        self.norm = nn.GroupNorm(2, 4)
        nn.init.normal_(self.norm.bias)
        self.double().eval()

    def forward(self, x):
        h = self.norm(self.conv(x)).flatten(2).mT
        h = h * self.gate(h.mean(1, keepdim=True)).sigmoid()
        return self.fc(nn.functional.scaled_dot_product_attention(h, h, h).mean(1))


SETTINGS = {"gates": "split", "attention": "split", "zero_params": "bias"}


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for name in NAMES
        for setting in SETTINGS
        if name != "deep_taylor" and setting in inspect.signature(composites.registry.classes()[name]).parameters
    ],
)
def test_settings_for_what_is_not_affine_reach_every_preset(name, setting, images):
    plain, other = (make(name, **keywords) for keywords in ({}, {setting: SETTINGS[setting]}))
    one, two = (relevance(Block(), images[:1, :, :3, :3], 1, composite) for composite in (plain, other))
    assert (one - two).abs().max() > 1e-3 * one.abs().max()


def test_shortcuts_need_no_canonizer_to_conserve_relevance(resnet, images):
    # LRP-0, as z+ loses what outputs without any positive contribution are given
    composite = Composite(layer_map=[((nn.Conv2d, nn.Linear), LRP0("bias"))])
    total = relevance(resnet, images, 2, composite).flatten(1).sum(1)
    torch.testing.assert_close(total, resnet(images)[:, 2].detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("net", ["vgg_bn", "resnet"])
def test_model_predicts_as_before_and_is_untouched_afterwards(name, net, images, request, untouched):
    model = request.getfixturevalue(net)
    reference = model(images).detach()
    with untouched(model), make(name).context(model):
        torch.testing.assert_close(model(images.requires_grad_()), reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["epsilon_plus", "epsilon_alpha2_beta1"])
def test_flat_on_the_first_layer_makes_a_preset_its_flat_sibling(name, vgg_bn, images):
    found = relevance(vgg_bn, images, 1, get(name, first_map=[(nn.Conv2d, Flat())]))
    torch.testing.assert_close(found, relevance(vgg_bn, images, 1, get(f"{name}_flat")), rtol=0, atol=0)
    assert inspect.signature(type(get(name))) == inspect.signature(type(get(f"{name}_flat")))


@pytest.mark.parametrize(
    ("name_map", "wanted"),
    [
        ([], ["Flat", "ZPlus", "ZPlus"]),
        ([(["0"], Gamma()), (["2"], None)], ["Gamma", "chain", "ZPlus"]),
        ([(["2"], None)], ["Flat", "chain", "ZPlus"]),
        ([(["0"], None)], ["chain", "ZPlus", "ZPlus"]),  # what comes after it reads no input of the model
    ],
)
def test_rules_by_name_come_before_the_first_layer_and_types(name_map, wanted, mlp, vectors):
    composite = Composite(layer_map=[(nn.Linear, ZPlus())], first_map=[(nn.Linear, Flat())], name_map=name_map)
    operations = rules(mlp, composite, vectors)
    assert [(layer, rule) for layer, function, rule in operations if function == "linear"] == [
        ("0", wanted[0]),
        ("2", wanted[1]),
        ("4", wanted[2]),
    ]


def test_layer_map_of_a_preset_comes_before_its_own(vgg_bn, images):
    ours = EpsilonPlus(layer_map=[(nn.Conv2d, LRP0())])
    only = Composite(layer_map=[(nn.Conv2d, LRP0()), (nn.Linear, Epsilon())])
    torch.testing.assert_close(relevance(vgg_bn, images, 0, ours), relevance(vgg_bn, images, 0, only))


@dataclass(frozen=True)
class Record:
    """What some models are called with."""

    data: Tensor


class Entries(UserDict):
    """The same as a mapping, whose class is none of Python's own."""


class Holder(OrderedDict):
    """The same as a dict that has its entries as attributes."""

    __getattr__ = OrderedDict.__getitem__


class Reading(nn.Module):
    """A net that reads its input out of what it is given."""

    def __init__(self, net, read):
        super().__init__()
        self.net, self.read = net, read

    def forward(self, value):
        return self.net(self.read(value))


@pytest.mark.parametrize(
    ("held", "read"),
    [
        (Record, lambda value: value.data),
        (lambda data: Entries(data=data), lambda value: value.data["data"]),
        (lambda data: Holder(data=data), lambda value: value.data),
        (lambda data: [{"data": (data,)}], lambda value: value[0]["data"][0]),
    ],
    ids=["dataclass", "mapping", "dict with attributes", "nested"],
)
def test_an_input_that_is_held_by_something_gets_relevance(held, read, mlp, vectors):
    plain, inside = (vectors.clone().requires_grad_() for _ in range(2))
    with EpsilonPlus().context(mlp) as model:
        model(plain).sum().backward()
    with EpsilonPlus().context(Reading(mlp, read)) as model:
        model(held(inside)).sum().backward()
    assert plain.grad.any() and torch.equal(inside.grad, plain.grad)


@pytest.mark.parametrize("composite", [EpsilonPlus(), get("guided_backprop"), get("gradient_x_input")], ids=repr)
@pytest.mark.parametrize(
    ("held", "read"),
    [(lambda x: SimpleNamespace(data=x), lambda value: value.data), (lambda x: {x}, lambda value: next(iter(value)))],
    ids=["object", "set"],
)
def test_an_input_that_is_not_found_is_refused(held, read, composite, mlp, vectors):
    """No rule would act on it, and its gradient would go by the method's name."""
    with composite.context(Reading(mlp, read)) as model:
        with pytest.raises(UnseenError, match="has seen no input, and what the model puts out depends on one"):
            model(held(vectors.clone().requires_grad_()))
        assert not model(held(vectors)).requires_grad
    with get("gradient").context(Reading(mlp, read)) as model:
        assert model(held(vectors.clone().requires_grad_())).requires_grad


def test_a_composite_on_what_another_one_s_model_calls_is_refused_also_where_no_module_holds_it(mlp, vectors):
    class Calling(nn.Module):
        def forward(self, x):
            return held[0](x)

    held = [mlp]
    with (
        EpsilonPlus().context(mlp),
        EpsilonPlus().context(Calling()) as model,
        pytest.raises(RuntimeError, match="EpsilonPlus and EpsilonPlus are on one model, or on a model and a part"),
    ):
        model(vectors.clone().requires_grad_())


def test_composite_without_rules_is_gradient_times_input(vgg_bn, images):
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(vgg_bn(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(relevance(vgg_bn, images, 1, Composite(None)), images * gradient)


def test_zennit_rules_inside_our_composite_agree_with_a_zennit_composite(vgg_bn, images):
    for module in vgg_bn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    layer_map = [
        (nn.Conv2d, zennit.rules.Gamma(0.3, stabilizer=1e-15)),
        (nn.Linear, zennit.rules.Epsilon(1e-15)),
    ]
    ours = Composite([SequentialMergeBatchNorm()], layer_map=layer_map)
    theirs = zennit.composites.LayerMapComposite(
        [(nn.ReLU, zennit.rules.Pass()), (nn.BatchNorm2d, zennit.rules.Pass()), *layer_map],
        canonizers=[SequentialMergeBatchNorm()],
    )
    attribution = CondAttribution(vgg_bn)
    found = attribution(images, [{"y": 1}], ours).heatmap
    expected = attribution(images, [{"y": 1}], theirs).heatmap
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_our_rules_inside_a_zennit_composite_propagate_relevance(mlp, vectors):
    ours = zennit.composites.LayerMapComposite([(nn.ReLU, zennit.rules.Pass()), (nn.Linear, ZPlus())])
    theirs = zennit.composites.LayerMapComposite([(nn.ReLU, zennit.rules.Pass()), (nn.Linear, zennit.rules.ZPlus())])

    attribution = Maps(mlp)
    found, expected = (attribution(vectors, [{"y": 1}], c).heatmap for c in (ours, theirs))
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_canonizers_can_be_switched_off(vgg_bn, images):
    with_merge = relevance(vgg_bn, images, 1, EpsilonPlus())
    without, empty = (relevance(vgg_bn, images, 1, EpsilonPlus(c)) for c in (None, []))
    assert torch.equal(without, empty)
    assert not torch.allclose(without, with_merge, rtol=1e-2)


def test_smooth_activations_hand_relevance_on():
    model = nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 2)).double()
    data = torch.randn(3, 5, dtype=torch.float64)
    composite = EpsilonPlus(epsilon=1e-15, stabilizer=1e-15, zero_params="bias")
    total = relevance(model, data, 1, composite).sum(1)
    torch.testing.assert_close(total, model(data)[:, 1].detach(), rtol=1e-8, atol=1e-10)
    gradient_times_input = relevance(model, data, 1, Composite(None)).sum(1)
    assert not torch.allclose(total, gradient_times_input, rtol=1e-2)


def test_attention_is_refused_by_methods_without_a_rule_until_one_or_none_is_named(untouched):
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    data = torch.randn(1, 3, 4)
    message = r"DeepTaylor has no rule for scaled_dot_product_attention\(\) in 'self_attn'; give one .*, or None"
    with untouched(model), pytest.raises(NotImplementedError, match=message):
        CondAttribution(model)(data, [{}], DeepTaylor(), init_rel=1)
    composite = DeepTaylor(layer_map=[(nn.MultiheadAttention, None)])
    assert CondAttribution(model)(data, [{}], composite, init_rel=1).heatmap.shape == (1, 4)


@pytest.mark.parametrize("canonizers", ["automatic", 3, SequentialMergeBatchNorm()])
def test_canonizers_of_another_kind_are_refused(canonizers):
    with pytest.raises(TypeError, match='canonizers must be "auto", a list of canonizers or None'):
        EpsilonPlusFlat(canonizers)


@pytest.mark.parametrize("canonizer", [SequentialMergeBatchNorm, "merge"])
def test_canonizers_are_instances(canonizer):
    with pytest.raises(TypeError, match=r"canonizers are instances, such as MergeBatchNorm\(\); .* is none"):
        EpsilonPlusFlat([canonizer])


def test_unknown_settings_are_named_with_those_that_there_are():
    with pytest.raises(TypeError, match=r"EpsilonPlus: got an unexpected keyword argument 'eps'; it takes .*epsilon"):
        EpsilonPlus(eps=0.1)


@pytest.mark.parametrize("name", [None, 3, EpsilonPlusFlat])
def test_composites_have_words_for_names(name):
    with pytest.raises(TypeError, match="name must be the name of a composite, such as 'epsilon_plus', not"):
        get(name)


def test_the_name_of_a_preset_is_not_taken_by_another_class():
    with pytest.raises(ValueError, match=r"'epsilon_plus' is the name of crp\..*\.EpsilonPlus; choose"):
        register("epsilon_plus")(type("Mine", (EpsilonPlus,), {}))
    assert type(get("epsilon_plus")) is EpsilonPlus
    assert register("epsilon_plus")(EpsilonPlus) is EpsilonPlus


def test_lists_that_the_caller_changes_change_nothing_that_is_told():
    layer_map = [(nn.Conv2d, ZPlus())]
    composite = Composite(layer_map=layer_map)
    shown = repr(composite)
    layer_map.append((nn.Linear, Epsilon()))
    assert repr(composite) == shown
    assert repr(pickle.loads(pickle.dumps(composite))) == shown


def test_box_needs_its_bounds():
    with pytest.raises(TypeError, match="EpsilonGammaBox: missing a required argument: 'low'"):
        EpsilonGammaBox()
    with pytest.raises(ValueError, match="low must be below high"):
        EpsilonGammaBox(low=1, high=-1)


def test_failure_while_registering_leaves_the_model_untouched(vgg_bn, untouched):
    class Refusing(MergeBatchNorm):
        def register(self, root_module):
            super().register(root_module)
            raise TypeError("not this one")

    layer_map = [(nn.Linear, ZPlus()), (nn.Conv2d, ZBox(-1, 1))]
    composite = Composite([MergeBatchNorm(), Refusing()], layer_map=layer_map)
    with untouched(vgg_bn), pytest.raises(TypeError, match="not this one"), composite.context(vgg_bn):
        pass
    with composite.context(nn.Flatten()):  # it is on no model
        pass


def test_failure_of_a_rule_leaves_the_model_untouched(vgg_bn, images, untouched):
    class Refusing(ZPlus):
        def terms(self, layer, a, y):
            raise ValueError(f"not {layer}")

    composite = Composite(layer_map=[(nn.Linear, Refusing()), (nn.Conv2d, ZPlus())])
    for run in (heatmap, rules):
        with untouched(vgg_bn), pytest.raises(ValueError, match=r"not linear\(\) in 'classifier"):
            run(vgg_bn, composite, images)


@pytest.mark.parametrize("context", ["accounting", "inactive", "watching"])
def test_contexts_end_with_an_error_as_well(context, mlp, vectors):
    composite = EpsilonPlus()

    def found():
        leaf = vectors.clone().requires_grad_()
        return torch.autograd.grad(mlp(leaf)[:, 1].sum(), leaf)[0]

    with composite.context(mlp):
        wanted = found()
        with pytest.raises(ZeroDivisionError), getattr(composite, context)() as kept:
            raise ZeroDivisionError
        assert torch.equal(found(), wanted)
        assert not getattr(kept, "sinks", kept), "nothing is listed any more"


def test_zennit_canonizers_are_accepted(vgg_bn, images, untouched):
    for module in vgg_bn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # zennit's merge leaves it in
    with untouched(vgg_bn):
        theirs = relevance(vgg_bn, images, 1, EpsilonPlus([SequentialMergeBatchNorm()], stabilizer=1e-15))
    ours = relevance(vgg_bn, images, 1, EpsilonPlus(stabilizer=1e-15))
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-12)
