"""Encoder–decoder models of Hugging Face: a token of the decoder's output is explained by both texts."""

from __future__ import annotations

import pytest
import torch
import transformers
from preset_cases import off
from torch import nn

from crp.attribution import CondAttribution
from crp.composites import CPLRP, AttnLRP, EpsilonPlus
from crp.outputs import Position

IDS = torch.tensor([[3, 4, 5, 1, 9, 2], [4, 4, 7, 8, 3, 3]])
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3].clone()}
TARGET = [{"y": Position(-1, 5)}]
T5 = {
    "vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "use_cache": False,
}  # fmt: skip
BART = {
    "vocab_size": 11, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "use_cache": False,
}  # fmt: skip
MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "t5_gated": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, feed_forward_proj="gated-gelu")
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "bart_scaled": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**BART, scale_embedding=True)
    ),
}


def built(name: str) -> nn.Module:
    model, generator = MODELS[name]().double().eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [AttnLRP, CPLRP, EpsilonPlus])
def test_both_texts_explain_the_decoders_logit(name, kind, untouched):
    """As the model as a function of both texts' embeddings; the account closes, and nothing else changes."""
    model = built(name)
    attribution = CondAttribution(model)
    with untouched(model):
        found = attribution(BOTH, TARGET, kind(), explain=list(BOTH))
        account = attribution.absorbed(BOTH, TARGET, kind(), explain=list(BOTH))
    embeddings = [model.get_input_embeddings()(ids).detach().requires_grad_() for ids in BOTH.values()]
    with kind().context(model):
        logits = model(inputs_embeds=embeddings[0], decoder_inputs_embeds=embeddings[1]).logits
        wanted = torch.autograd.grad(logits[:, -1, 5].sum(), embeddings)
    for heatmap, of_features in zip(found.heatmap.values(), wanted, strict=True):
        assert off(heatmap, of_features.sum(-1)) <= 1e-12 and heatmap.abs().max() > 1e-4
    assert off(found.prediction, model(**BOTH).logits.detach()) <= 1e-12
    assert account.rest.abs().max() <= 1e-6 * account.initial.abs().max()
    assert off(account.initial, model(**BOTH).logits[:, -1, 5].detach()) <= 1e-12
    assert off(account.input, sum(heatmap.sum(1) for heatmap in found.heatmap.values())) <= 1e-9


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_without_biases_both_texts_have_the_whole_logit(name):
    """Constant attention and gates hand all on: the sum over both texts is the logit."""
    model = built(name)
    heatmaps = CondAttribution(model)(BOTH, TARGET, CPLRP(), explain=list(BOTH)).heatmap
    logit = model(**BOTH).logits[:, -1, 5].detach()
    assert off(sum(heatmap.sum(1) for heatmap in heatmaps.values()), logit) <= 1e-6  # (T5's norm is in float32)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("text", BOTH)
def test_one_text_alone_is_explained_with_the_other_one_constant(name, text):
    model = built(name)
    keys = {"input_ids": "inputs_embeds", "decoder_input_ids": "decoder_inputs_embeds"}
    found = CondAttribution(model)(BOTH, TARGET, AttnLRP(), explain=text).heatmap
    leaf = model.get_input_embeddings()(BOTH[text]).detach().requires_grad_()
    others = {key: ids for key, ids in BOTH.items() if key != text}
    with AttnLRP().context(model):
        (wanted,) = torch.autograd.grad(model(**{keys[text]: leaf}, **others).logits[:, -1, 5].sum(), leaf)
    assert off(found, wanted.sum(-1)) <= 1e-12
    if text == "input_ids":  # (the one that is explained where none is named)
        assert torch.equal(found, CondAttribution(model)(BOTH, TARGET, AttnLRP()).heatmap)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_same_ids_in_both_texts_are_two_inputs(name):
    model, once = built(name), {"input_ids": IDS, "decoder_input_ids": IDS}
    twice = {key: ids.clone() for key, ids in once.items()}
    for explain in ("input_ids", "decoder_input_ids"):
        found, wanted = (CondAttribution(model)(data, TARGET, AttnLRP(), explain=explain) for data in (once, twice))
        assert torch.equal(found.heatmap, wanted.heatmap)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("kind", [AttnLRP, CPLRP])
def test_padding_of_the_encoder_has_no_part(name, kind):
    model, attribution = built(name), CondAttribution(built(name))
    padded = {
        "input_ids": torch.cat([IDS, torch.zeros(2, 2, dtype=torch.int64)], 1),
        "attention_mask": torch.tensor([[1] * 6 + [0] * 2] * 2),
        "decoder_input_ids": BOTH["decoder_input_ids"],
    }
    found = attribution(padded, TARGET, kind(), explain=list(BOTH)).heatmap
    wanted = CondAttribution(model)(BOTH, TARGET, kind(), explain=list(BOTH)).heatmap
    assert not found["input_ids"][:, 6:].any()
    assert off(found["input_ids"][:, :6], wanted["input_ids"]) <= 1e-6
    assert off(found["decoder_input_ids"], wanted["decoder_input_ids"]) <= 1e-6


def test_ids_that_the_model_shifts_are_no_input_of_their_own():
    """BART makes the decoder's ids of the encoder's: constants of the explanation."""
    model = built("bart")
    alone = CondAttribution(model)({"input_ids": IDS}, TARGET, CPLRP()).heatmap
    shifted = torch.cat([torch.full((2, 1), 2), IDS[:, :-1]], 1)
    given = CondAttribution(model)(
        {"input_ids": IDS, "decoder_input_ids": shifted}, TARGET, CPLRP(), explain="input_ids"
    ).heatmap
    assert off(alone, given) <= 1e-12
    with pytest.raises(KeyError, match="no input 'decoder_ids' to explain; there are 'input_ids', 'decoder_input_ids'"):
        CondAttribution(model)(BOTH, TARGET, CPLRP(), explain="decoder_ids")
