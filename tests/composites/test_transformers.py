"""Transformers of three libraries under presets of LRP: the same prediction, finite relevance, a closed account."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from preset_cases import LRP_PRESETS, off
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_families import FAMILIES, Logits, built

import crp.composites as composites
from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP, Composite
from crp.errors import UnseenError
from crp.rules import Pass, Whole, register_attention

#: What holds a custom function, as one operation.
REMEDIES = {"bloom": [("*.gelu_impl", Whole(Pass()))]}
#: All presets that have a rule for attention.
PRESETS = [name for name in LRP_PRESETS if "taylor" not in name and "excitation" not in name]
PRESETS += ["attn_lrp", "cp_lrp", "relp"]
#: Models that compute their norms or softmax in float32, whatever the data are in.
ROUGH = 1e-6


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield request.param, *built(request.param)


def preset(kind: type[Composite], name: str) -> Composite:
    return kind(layer_map=REMEDIES.get(name, []))


def relevance(model: nn.Module, data: Tensor, composite: Composite) -> tuple[Tensor, Tensor]:
    """Prediction, and relevance of the data for the second output."""
    with composite.context(model):
        leaf = data.clone().requires_grad_()
        prediction = model(leaf)
        return prediction.detach(), torch.autograd.grad(prediction[:, 1].sum(), leaf)[0]


def assert_closes(model: nn.Module, data: Tensor, composite: Composite) -> None:
    found = CondAttribution(model).absorbed(data, [{"y": 1}], composite)
    amounts = [share.abs() for shares in found.layers.values() for share in shares.values()]
    assert (found.rest.abs() <= ROUGH * (found.initial.abs() + found.input.abs() + sum(amounts))).all(), found.rest


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP])
def test_prediction_stays_and_the_account_closes(family, kind, untouched):
    name, model, data = family
    plain = model(data).detach()
    with untouched(model):
        prediction, found = relevance(model, data, preset(kind, name))
        assert off(prediction, plain) <= 1e-12
        assert found.isfinite().all() and found.abs().max() > 1e-9
        assert_closes(model, data, preset(kind, name))


SEVERAL = ["torchvision_vit", "torchvision_swin", "bert", "gpt2", "llama", "mixtral"]


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("kind", PRESETS)
def test_all_presets_explain_the_families_that_differ_most(name, kind, untouched):
    model, data = built(name)
    composite = LRP_PRESETS[kind]() if kind in LRP_PRESETS else composites.get(kind)
    with untouched(model):
        found = CondAttribution(model)(data, [{"y": 1}], composite, init_rel=1.0)
    assert found.heatmap.isfinite().all() and found.heatmap.abs().max() > 0
    assert_closes(model, data, composite)


#: Presets that have no rule for attention, and those that only change ReLUs, which these models do not call.
REFUSED = ["deep_taylor", "excitation_backprop", "contrastive_excitation_backprop"]
OF_RELUS = ["beta_smooth", "deconvnet", "guided_backprop"]
OTHERS = ["deeplift", "gradient", "gradient_x_input"]


def test_every_preset_of_the_registry_is_in_one_of_these_tests():
    assert set(composites.names()) <= {*PRESETS, *REFUSED, *OF_RELUS, *OTHERS}


@pytest.mark.filterwarnings("ignore:outside DeepLIFT")
@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("kind", OTHERS)
def test_all_other_presets_explain_them(name, kind, untouched):
    model, data = built(name)
    if (kind, name) == ("deeplift", "mixtral"):  # (other tokens go to an expert, for the reference)
        with untouched(model), pytest.raises(RuntimeError, match="its path depends on the values"):
            CondAttribution(model)(data, [{"y": 1}], composites.get(kind))
        return
    with untouched(model):
        found = CondAttribution(model)(data, [{"y": 1}], composites.get(kind))
    assert found.heatmap.isfinite().all() and found.heatmap.abs().max() > 0
    assert off(found.prediction, model(data).detach()) <= 1e-12


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("kind", REFUSED)
def test_methods_without_a_rule_for_attention_say_so(name, kind, untouched):
    model, data = built(name)
    message = rf"{type(LRP_PRESETS[kind]()).__name__} has no rule for (scaled_dot_product_attention|matmul)\(\)"
    with untouched(model), pytest.raises(NotImplementedError, match=message):
        CondAttribution(model)(data, [{"y": 1}], LRP_PRESETS[kind]())


@pytest.mark.filterwarnings("ignore:.* has no rule for")
@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("kind", OF_RELUS)
def test_methods_about_relus_say_so(name, kind, untouched):
    model, data = built(name)
    with untouched(model), pytest.raises(ValueError, match=r"changes the backward pass of ReLU, and .* calls none"):
        CondAttribution(model)(data, [{"y": 1}], composites.get(kind))


@pytest.mark.parametrize("kind", [AttnLRP, CPLRP])
def test_a_custom_function_with_the_values_of_gelu_is_one(kind, untouched):
    model, data = built("bloom")
    with untouched(model):
        found = CondAttribution(model)(data, [{"y": 1}], kind()).heatmap
    plain = copy.deepcopy(model)
    for block in plain.modules():
        if hasattr(block, "gelu_impl"):
            block.gelu_impl = nn.GELU("tanh").eval()
    assert off(found, CondAttribution(plain)(data, [{"y": 1}], kind()).heatmap) <= 1e-6


def test_constants_set_to_zero_conserve():
    """Without biases and constant embeddings, constant attention and gates hand all on; in float32 but for rounding."""
    for name in ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "mixtral", "qwen3_moe"):
        model, data = built(name)
        prediction, found = relevance(model, data, CPLRP())
        assert abs(float(found.sum() / prediction[:, 1]) - 1) <= 1e-5, name


BOTH_WAYS = ["gpt2", "llama", "bert", "opt", "albert", "falcon", "gptj", "deepseek_v3", "hf_beit", "hf_clip_vision"]


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize("kind", [AttnLRP, CPLRP])
def test_attention_of_hugging_face_is_the_same_written_out_and_fused(name, kind):
    model, data = built(name)
    found = []
    for way in ("sdpa", "eager"):
        model.model.set_attn_implementation(way)
        found.append(relevance(model, data, kind())[1])
    assert off(found[0], found[1]) <= 1e-6  # (what is written out has its softmax in float32)


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [AttnLRP, CPLRP])
def test_padded_texts_are_explained_as_each_alone(way, kind):
    model, data = built("llama")
    model.model.set_attn_implementation(way)
    if way == "eager":  # (in float64, the mask of a padded token is infinite, and so the model itself returns NaN)
        model, data = model.float(), data.float()
    short = data[:, 2:]
    batch = torch.cat([data, torch.cat([torch.full_like(data[:, :2], 9.0), short], 1)])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    places = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    padded = Logits(model.model, attention_mask=mask, position_ids=places)
    _, found = relevance(padded, batch, kind())
    _, first = relevance(model, data, kind())
    _, second = relevance(model, short, kind())
    assert off(found[:1], first) <= 1e-5 and off(found[1:, 2:], second) <= 1e-5
    assert not found[1, :2].any()


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_the_same_in_all_ways_to_run_them(name, way):
    model, data = built(name)
    model, data = model.float(), data.float()
    _, wanted = relevance(model, data, AttnLRP())
    model.model.set_experts_implementation(way)
    _, found = relevance(model, data, AttnLRP())
    assert off(found, wanted) <= 1e-4


def test_registered_attention_stands_in_the_registry_of_hugging_face_while_a_composite_is_on():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, scale):
            ctx.save_for_backward(q, k, v)
            ctx.scale = scale
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                out = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=ctx.scale, enable_gqa=True)
                return *torch.autograd.grad(out, leaves, grad), None

    def tiny_kernel(module, query, key, value, attention_mask, scaling=None, **more):
        return Plain.apply(query, key, value, scaling).transpose(1, 2).contiguous(), None

    model, data = built("llama")
    wanted = relevance(model, data, AttnLRP())[1]
    AttentionInterface.register("tiny_kernel", tiny_kernel)
    try:
        model.model.set_attn_implementation("tiny_kernel")
        with pytest.raises(UnseenError, match="PlainBackward"):
            relevance(model, data, AttnLRP())
        register_attention(tiny_kernel, q=1, k=2, v=3)
        assert off(relevance(model, data, AttnLRP())[1], wanted) <= 1e-9
        with AttnLRP().context(model), AttnLRP().context(built("gpt2")[0]):
            assert ALL_ATTENTION_FUNCTIONS["tiny_kernel"] is not tiny_kernel
        assert ALL_ATTENTION_FUNCTIONS["tiny_kernel"] is tiny_kernel
    finally:
        del AttentionInterface._global_mapping["tiny_kernel"]
