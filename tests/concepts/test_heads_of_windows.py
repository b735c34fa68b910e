"""Heads of attention in windows: torchvision's Swin, which never calls its projections, as Swin that does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from preset_cases import off
from torch.nn import functional as F
from torchvision.models import swin_transformer
from transformer_families import built

from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP, EpsilonPlus
from crp.concepts import AxisConcept, ChannelConcept
from crp.errors import InputError
from crp.graph import trace_model_graph
from crp.helper import get_output_shapes
from crp.layers.addresses import rebound
from crp.trace.axes import channel_axes
from crp.visualization.mining.axes import check_axes
from crp.visualization.mining.run import mine

HEADS = AxisConcept(-1, groups=2)
#: A plain block and one of shifted windows.
LAYERS = ["features.1.0.attn.proj", "features.3.1.attn.proj"]
#: Block and input of the output projection of Swin in other libraries.
OTHERS = {
    "timm_swin": "layers.1.blocks.1.attn.proj.input",
    "hf_swin": "model.swin.encoder.layers.1.blocks.1.attention.o_proj.input",
}


def swin(name, n_samples=2):
    model, data = built(name)
    return model, torch.cat([data * (1 + i) for i in range(n_samples)])


def written_out(name):
    """The same model, whose attention calls its projection."""
    model, _ = built(name)
    for attention in model.modules():
        if isinstance(attention, swin_transformer.ShiftedWindowAttention):

            def linear(x, weight, bias, attention=attention):
                return attention.proj(x) if weight is attention.proj.weight else F.linear(x, weight, bias)

            functions = SimpleNamespace(**vars(F) | {"linear": linear})
            attend = rebound(swin_transformer.shifted_window_attention, F=functions)
            attention.forward = rebound(type(attention).forward, shifted_window_attention=attend).__get__(attention)
    return model


@pytest.mark.parametrize("name", ["torchvision_swin", "torchvision_swin_v2"])
@pytest.mark.parametrize("make", [AttnLRP, CPLRP, EpsilonPlus, lambda: None], ids=["attn", "cp", "plus", "none"])
def test_heads_are_those_of_attention_that_calls_its_projection(name, make, untouched):
    places = [*LAYERS, *(f"{layer}.input" for layer in LAYERS)]
    results, (plain, data) = [], swin(name)
    for model in (plain, written_out(name)):
        with untouched(model):
            results.append(
                [
                    CondAttribution(model)(data, [condition], make(), record_layer=places, mask_map=HEADS.mask)
                    for place in places[2:]
                    for condition in ({"y": 1, place: [0]}, {"y": 1, place: [1]}, {"y": 1, place: [0, 1]})
                ]
            )
        assert dict(get_output_shapes(model, data[:1], places[2:])) == {places[2]: (4, 8), places[3]: (4, 16)}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.heatmap, other.heatmap, rtol=1e-12, atol=1e-15)
        for place in places:
            torch.testing.assert_close(one.activations[place], other.activations[place], rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(one.relevances[place], other.relevances[place], rtol=1e-12, atol=1e-15)
    first, second, both = (result.heatmap for result in results[0][:3])
    assert off(first + second, both) <= 1e-10 and min(first.abs().max(), second.abs().max()) > 1e-4


@pytest.mark.parametrize("name", [*OTHERS, "torchvision_swin"])
def test_heads_add_up_and_conditions_go_back_together(name, untouched):
    model, data = swin(name, 1)
    layer = OTHERS.get(name, f"{LAYERS[1]}.input")
    conditions = [{"y": 1, layer: heads} for heads in ([0], [1], [0, 1])]
    with untouched(model):
        first, second, both = CondAttribution(model)(data, conditions, AttnLRP(), mask_map=HEADS.mask).heatmap
    assert off(first + second, both) <= 1e-10 and min(first.abs().max(), second.abs().max()) > 0


def test_an_attention_of_windows_inside_of_a_graph():
    model, data = swin("torchvision_swin", 1)
    graph = trace_model_graph(model, data, [*LAYERS, *(f"{layer}.input" for layer in LAYERS), "features.1.0.attn"])
    assert graph.find_input_layers(LAYERS[1]) == [f"{LAYERS[1]}.input"]
    graph.set_layer_names([f"{layer}.input" for layer in LAYERS])
    assert graph.find_input_layers(f"{LAYERS[1]}.input") == [f"{LAYERS[0]}.input"]


def test_the_axis_of_the_heads_is_known():
    model, data = swin("torchvision_swin", 1)
    layers = [LAYERS[1], f"{LAYERS[1]}.input"]
    axes = channel_axes(model, data, layers)
    assert [tuple(axes[layer]) for layer in layers] == [(-1, (4, 4, 16), "linear")] * 2
    with pytest.raises(ValueError, match=r"puts out \(4, 4, 16\), made by linear\(\), whose channels come last"):
        check_axes(model, data, {f"{LAYERS[1]}.input": ChannelConcept()})


@pytest.mark.parametrize("name", [*OTHERS, "torchvision_swin"])
def test_heads_of_windows_are_not_mined_by_the_window(name, tmp_path):
    model, data = swin(name, 3)
    layer = OTHERS.get(name, f"{LAYERS[1]}.input")
    pictures = [(one, i) for i, one in enumerate(data)]
    message = rf"'{layer}' has shape \(\d+, 4, 16\): 4 entries along its first axis for each of \d rows, such as"
    with pytest.raises(InputError, match=message):
        mine(CondAttribution(model), pictures, {layer: HEADS}, CPLRP(), tmp_path / "table", progress=False)


def test_attention_with_a_forward_of_its_own_is_left_alone():
    class Mine(swin_transformer.ShiftedWindowAttention):
        def forward(self, x):
            return super().forward(x)

    model, data = swin("torchvision_swin", 1)
    model.features[1][0].attn.__class__ = Mine
    with pytest.raises(InputError, match=r"'features.1.0.attn.proj.input', named as condition, is not called"):
        CondAttribution(model)(data, [{"y": 1, "features.1.0.attn.proj.input": [0]}], None, mask_map=HEADS.mask)
