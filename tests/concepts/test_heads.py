"""Heads, neurons and tokens of transformers as they are: conditions on what layers are called with."""

from __future__ import annotations

import pytest
import torch
from preset_cases import numbers, off
from torch import nn
from torch.nn import functional as F
from transformer_families import built
from zennit.composites import EpsilonGammaBox as ZennitComposite

import crp
from crp.attribution import CondAttribution
from crp.attributors import Neuron
from crp.composites import CPLRP, AttnLRP, EpsilonPlus
from crp.concept_graph import AttributionGraph
from crp.concepts import AxisConcept
from crp.engine.taps import tapped
from crp.errors import InputError, InputTypeError
from crp.graph import trace_model_graph
from crp.helper import get_output_shapes
from crp.layers.addresses import Address, hooked_at

HEADS, NEURONS, TOKENS = AxisConcept(-1, groups=2), AxisConcept(-1), AxisConcept(1)
#: Family; a block and the block before; in it, the output projection of attention, and the last layer of the MLP; and
#: numbers of neurons and tokens.
FAMILIES = {
    "torchvision_vit": (
        "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_0", "self_attention.out_proj", "mlp.3", 12, 5
    ),
    "timm_vit": ("blocks.1", "blocks.0", "attn.proj", "mlp.fc2", 12, 5),
    "hf_vit": ("model.vit.layers.1", "model.vit.layers.0", "attention.o_proj", "mlp.fc2", 12, 5),
    "bert": (
        "model.bert.encoder.layer.1", "model.bert.encoder.layer.0", "attention.output.dense", "output.dense", 12, 6
    ),
    "gpt2": ("model.transformer.h.1", "model.transformer.h.0", "attn.c_proj", "mlp.c_proj", 32, 6),
    "llama": ("model.model.layers.1", "model.model.layers.0", "self_attn.o_proj", "mlp.down_proj", 12, 6),
}  # fmt: skip


def in_float64(family):
    """Model and data; norms that compute in float32, whatever the data are in, give way to torch's."""
    model, data = built(family)
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm).__name__ == "LlamaRMSNorm":
                exact = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(module, name, exact)
    return model.eval(), data


def places(family):
    """Layer, concept and number of concepts, for heads, neurons and tokens."""
    block, before, projection, down, n_neurons, n_tokens = FAMILIES[family]
    return {
        "heads": (f"{block}.{projection}.input", HEADS, 2),
        "neurons": (f"{block}.{down}.input", NEURONS, n_neurons),
        "tokens": (before, TOKENS, n_tokens),
        "tokens_before": (f"{block}.input", TOKENS, n_tokens),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["heads", "neurons", "tokens", "tokens_before"])
@pytest.mark.parametrize(
    "kind", [AttnLRP, CPLRP, EpsilonPlus, None], ids=["attn_lrp", "cp_lrp", "epsilon_plus", "none"]
)
def test_parts_add_up_to_the_whole(family, what, kind, untouched):
    """Σ over the concepts is what flows through all of them; for tokens of a block, that is all there is."""
    model, data = in_float64(family)
    layer, concept, n = places(family)[what]
    attribution, mask_map = CondAttribution(model), {layer: concept.mask}
    composite = None if kind is None else kind()
    conditions = [{"y": 1}, {"y": 1, layer: list(range(n))}, *({"y": 1, layer: [c]} for c in range(n))]
    with untouched(model):
        result = attribution(data, conditions, composite, mask_map=mask_map, record_layer=[layer])
    whole, through_all, *parts = result.heatmap
    assert off(sum(parts), through_all) <= 1e-10
    assert min(float(part.abs().max()) for part in (through_all, *parts)) > 0 or what == "neurons"
    if "tokens" in what:
        assert off(sum(parts), whole) <= 1e-10
    else:  # (residual connections lead past it)
        assert off(through_all, whole) > 1e-3
    shares = concept.attribute(result.relevances[layer][:1], abs_norm=False)
    assert shares.shape == (1, n)
    torch.testing.assert_close(shares.sum(), result.relevances[layer][0].sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["heads", "neurons"])
def test_a_branch_is_masked_and_the_residual_connection_stays(family, what):
    """Without ``exclude_parallel``, what flows past the heads is in every heatmap, once."""
    model, data = in_float64(family)
    layer, concept, n = places(family)[what]
    conditions = [{"y": 1}, {"y": 1, layer: []}, *({"y": 1, layer: [c]} for c in range(n))]
    result = CondAttribution(model)(data, conditions, AttnLRP(), mask_map={layer: concept.mask}, exclude_parallel=False)
    whole, past, *parts = result.heatmap
    assert off(sum(part - past for part in parts) + past, whole) <= 1e-10
    excluded = CondAttribution(model)(data, conditions[2:], AttnLRP(), mask_map={layer: concept.mask}).heatmap
    assert off(torch.stack(parts) - past, excluded) <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_below_heads(family):
    """A condition on heads of two blocks, and the attribution graph of heads over the same two."""
    model, data = in_float64(family)
    block, before, projection, *_ = FAMILIES[family]
    upper, lower = f"{block}.{projection}.input", f"{before}.{projection}.input"
    attribution = CondAttribution(model)
    heads = [(above, below) for above in range(2) for below in range(2)]
    result = attribution(
        data, [{"y": 1, upper: [a], lower: [b]} for a, b in heads], AttnLRP(), mask_map=HEADS.mask
    ).heatmap
    both = attribution(data, [{"y": 1, upper: [0, 1], lower: [0, 1]}], AttnLRP(), mask_map=HEADS.mask).heatmap
    assert off(result.sum(0, keepdim=True), both) <= 1e-10
    graph = trace_model_graph(model, data, [lower, upper])
    assert graph.find_input_layers(upper) == [lower] and graph.find_input_layers(lower) == []
    assert set(graph.find_input_layers(block)) == {upper, lower}
    found = AttributionGraph(attribution, graph, {lower: HEADS, upper: HEADS})
    _, connections = found(data, AttnLRP(), 1, upper, target=1, width=[2], abs_norm=False)
    recorded = attribution(
        data, [{"y": 1, upper: [1]}], AttnLRP(), mask_map=HEADS.mask, record_layer=[lower], exclude_parallel=False
    ).relevances[lower]
    wanted = HEADS.attribute(recorded, abs_norm=False)[0]
    values = {head: value for _, head, value in connections[upper, 1]}
    torch.testing.assert_close(torch.tensor([values[0], values[1]]).double(), wanted)


# --- nn.MultiheadAttention ------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """A layer around an `nn.MultiheadAttention`, called in all its ways."""

    def __init__(self, batch_first=True, needs_weights=False, encoder=False):
        super().__init__()
        torch.manual_seed(1)
        self.needs_weights, self.batch_first, self.encoder = needs_weights, batch_first, encoder
        self.attn = nn.MultiheadAttention(6, 3, batch_first=batch_first)
        self.head = nn.Linear(6, 2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.double().eval()

    def forward(self, x):
        y = x if self.batch_first else x.transpose(0, 1)
        y = self.attn(y, y, value=y, need_weights=self.needs_weights)[0]
        return self.head(x + (y if self.batch_first else y.transpose(0, 1))).mean(1)


class WrittenOut(nn.Module):
    """The same, of layers that it calls."""

    def __init__(self, fused):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(6, 18).double()
        self.attn.qkv.load_state_dict({"weight": fused.attn.in_proj_weight, "bias": fused.attn.in_proj_bias})
        self.attn.out_proj, self.head = fused.attn.out_proj, fused.head
        self.eval()

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in self.attn.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.attn.out_proj(y)).mean(1)


WAYS = {"batch_first": {}, "time_first": {"batch_first": False}, "weights": {"needs_weights": True}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [AttnLRP, CPLRP, EpsilonPlus, lambda: None])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_heads_of_multi_head_attention(way, make, n_samples, untouched):
    """They have the names, values and conditional heatmaps of the same layer that is written out."""
    concept, layers = AxisConcept(-1, groups=3), ["attn.out_proj.input", "attn.out_proj"]
    fused, data = Fused(**WAYS[way]), numbers(n_samples, 4, 6)
    results = []
    for model in (fused, WrittenOut(fused)):
        conditions = [{"y": 1, layers[0]: [c]} for c in range(3)]
        with untouched(model):
            results.append(CondAttribution(model)(data, conditions, make(), record_layer=layers, mask_map=concept.mask))
        assert dict(get_output_shapes(model, data[:1], layers)) == dict.fromkeys(layers, (4, 6))
    one, other = results
    torch.testing.assert_close(one.heatmap, other.heatmap, rtol=1e-9, atol=1e-12)
    assert one.heatmap.abs().max() > 0
    for layer in layers:
        torch.testing.assert_close(one.activations[layer], other.activations[layer], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.relevances[layer], other.relevances[layer], rtol=1e-9, atol=1e-12)


def test_heads_of_a_sample_without_an_axis_of_samples():
    class Single(Fused):
        def forward(self, x):
            return self.head(x + self.attn(x[0], x[0], x[0])[0]).mean(1)

    conditions = [{"y": 1, "attn.out_proj.input": [c]} for c in range(3)]
    data, mask = numbers(1, 4, 6), AxisConcept(-1, groups=3).mask
    one, other = (CondAttribution(m)(data, conditions, AttnLRP(), mask_map=mask).heatmap for m in (Single(), Fused()))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


class Wrapping(nn.Module):
    """A module that returns the only output of attention."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        return self.attn(x, x, x)[0]


def test_a_rule_for_the_whole_attention_has_no_heads():
    """What counts as one function by its rule hides what is inside, and says so."""
    from crp.rules import Pass, Whole

    fused, data, mask = Fused(), numbers(1, 4, 6), AxisConcept(-1, groups=3).mask
    inner = Wrapping(fused.attn)
    model = nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 2)).double().eval()
    conditions = [{"y": 1, "1.attn.out_proj.input": [0]}]
    with pytest.raises(RuntimeError, match=r"flow from the start does not reach '1.attn.out_proj.input'"):
        composite = AttnLRP(layer_map=[("1", Whole(Pass()))])
        CondAttribution(model)(data[:, :2], conditions, composite, mask_map=mask, init_rel=1.0)
    with pytest.raises(TypeError, match="returns a tuple, not a tensor, so that it cannot count as one function"):
        composite = AttnLRP(layer_map=[("1.attn", Whole(Pass()))])
        CondAttribution(model)(data[:, :2], conditions, composite, mask_map=mask, init_rel=1.0)
    # (by the chain rule, the attention is one function, too, but what is inside of it stands in autograd's graph)
    named = AttnLRP(layer_map=[(F.multi_head_attention_forward, None)])
    parts = [{"y": 1, "attn.out_proj.input": ids} for ids in ([0], [1], [2], [0, 1, 2])]
    *each, together = CondAttribution(fused)(data, parts, named, mask_map=mask).heatmap
    assert off(sum(each), together) <= 1e-10


def test_an_attention_inside_of_a_graph():
    fused = Fused()
    layers = ["attn.out_proj.input", "attn.out_proj", "head.input", "head"]
    graph = trace_model_graph(fused, numbers(1, 4, 6), layers)
    assert graph.find_input_layers("head") == ["head.input"]
    assert graph.find_input_layers("head.input") == ["attn.out_proj"]
    assert graph.find_input_layers("attn.out_proj") == ["attn.out_proj.input"]
    assert graph.find_input_layers("attn.out_proj.input") == []
    graph.set_layer_names(["attn.out_proj.input"])
    assert graph.find_input_layers("head.input") == ["attn.out_proj.input"]
    graph.set_layer_names(["attn"])
    assert graph.find_input_layers("head.input") == ["attn"]


# --- names ----------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Layers that are called twice, by keyword, and one whose name is that of an input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.block = nn.Linear(3, 3).double(), nn.ModuleDict({"input": nn.Linear(3, 2).double()})
        self.eval()

    def forward(self, x):
        h = self.fc(input=self.fc(x).relu())
        return self.block["input"](h)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("fc", Address("fc")),
        ("fc.input", Address("fc", True)),
        ("fc#1", Address("fc", False, 1)),
        ("fc.input#1", Address("fc", True, 1)),
        ("block.input", Address("block.input")),
        ("block.input.input", Address("block.input", True)),
        ("block.input.input#0", Address("block.input", True, 0)),
        (".input", Address(".input")),
        ("input", Address("input")),
        ("fc#", Address("fc#")),
        ("fd.input#1", Address("fd.input#1")),
    ],
)
def test_names_are_read(name, address):
    assert Address.of(name, dict(Named().named_modules())) == address


def test_inputs_are_what_layers_were_called_with():
    model, x = Named(), numbers(2, 3)
    layers = ["fc.input#0", "fc.input#1", "fc#0", "fc#1", "block.input.input", "block.input"]
    result = CondAttribution(model)(x, [{"y": 1}], EpsilonPlus(), record_layer=layers)
    first = model.fc(x).detach()
    second = model.fc(first.relu()).detach()
    wanted = [x, first.relu(), first, second, second, model.block["input"](second).detach()]
    for layer, values in zip(layers, wanted, strict=True):
        torch.testing.assert_close(result.activations[layer], values)
    torch.testing.assert_close(result.relevances["fc.input#0"].sum(1), result.heatmap)
    torch.testing.assert_close(result.relevances["block.input.input"], result.relevances["fc#1"])
    started = CondAttribution(model)(x, [{}], EpsilonPlus(), start_layer="block.input.input")
    torch.testing.assert_close(started.prediction, second)


@pytest.mark.parametrize("make", [EpsilonPlus, lambda: None, lambda: ZennitComposite(low=-4.0, high=4.0)])
def test_relevance_of_an_input_is_that_of_what_alone_made_it(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    x, layers = numbers(2, 3), ["2.input", "1"]
    result = CondAttribution(model)(x, [{"y": 1}], make(), record_layer=layers)
    torch.testing.assert_close(result.relevances["2.input"], result.relevances["1"])
    heatmaps = [CondAttribution(model)(x, [{"y": 1, layer: [c]} for c in range(5)], make()).heatmap for layer in layers]
    torch.testing.assert_close(*heatmaps)
    neurons = [crp.explain("gradient", model, x, Neuron(layer, 3)) for layer in layers]
    torch.testing.assert_close(*neurons)


def test_what_cannot_be_named():
    model, x = Named(), numbers(1, 3)
    attribution = CondAttribution(model)
    with pytest.raises(KeyError, match=r"'fd.input' not found in model; nearest: 'block.input'"):
        attribution(x, [{"y": 0, "fd.input": [0]}], None)
    with pytest.raises(InputError, match=r"'fc.input', named as condition.*|layer 'fc.input' is called 2 times"):
        attribution(x, [{"y": 0, "fc.input": [0]}], None)
    with pytest.raises(InputTypeError, match=r"such as 'attn.out_proj.input' for its heads"):
        CondAttribution(Fused())(numbers(1, 4, 6), [{"y": 0, "attn": [0]}], None)

    class OfNothing(nn.Module):
        def forward(self):
            return torch.zeros(1)

    nothing = OfNothing()
    with (
        hooked_at({"a": nothing}, {("a", True): lambda *_: None}),
        pytest.raises(InputTypeError, match=r"'a\.input': OfNothing is called without a tensor"),
    ):
        nothing()


def test_hooks_are_taken_off_after_errors():
    fused, x = Fused(), numbers(1, 4, 6)

    class Interrupt(BaseException):
        pass

    def interrupt(*_):
        raise Interrupt

    fused.attn.register_forward_pre_hook(lambda *_: None)
    with (
        pytest.raises(Interrupt),
        tapped(fused, {"attn.out_proj.input": "record"}),
        hooked_at(dict(fused.named_modules()), {("attn.out_proj", False): interrupt}),
    ):
        fused(x)
    assert not torch.overrides._get_current_function_mode()
    assert len(fused.attn._forward_hooks) == 0 and len(fused.attn._forward_pre_hooks) == 1
    seen = []
    with hooked_at(dict(fused.named_modules()), {("attn.out_proj", False): lambda *a: seen.append(a[-1].shape)}):
        fused(x)
    assert seen == [(1, 4, 6)]
