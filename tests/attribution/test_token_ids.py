"""Texts: token ids are explained by their embeddings, at positions of the output, and one token against another."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest
import torch
from preset_cases import numbers, off, seeded
from torch import nn
from transformer_families import built

import crp
from crp.attribution import CondAttribution
from crp.attributors import Gradient
from crp.composites import CPLRP, AttnLRP, DeepLift, EpsilonPlus, GradientTimesInput
from crp.concepts import AxisConcept
from crp.outputs import Position

IDS = torch.tensor([[3, 4, 5, 1, 9, 2], [4, 4, 7, 8, 3, 3]])
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
#: What explains, and the sum over the features of a gradient of embeddings that it equals.
WAYS = {"attn": AttnLRP, "cp": CPLRP, "plus": EpsilonPlus, "gradient": GradientTimesInput}


class Reader(nn.Module):
    """Bag of tokens and positions, (n, tokens) -> (n, 3)."""

    def __init__(self, reads: str = "ids"):
        super().__init__()
        self.reads, self.words, self.places = reads, nn.Embedding(11, 4), nn.Embedding(6, 4)
        self.mix, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, ids, weight=None):
        words = self.words(ids.clone() if self.reads == "copy" else ids)
        if self.reads == "twice":
            words = words + self.places(ids)
        x = words + self.places(torch.arange(ids.shape[1]))
        return self.out(torch.relu(self.mix(x)).mean(1) * (1 if weight is None else weight))


def language_model(name="gpt2"):
    model, _ = built(name)
    return model.model


def relevance_of_embeddings(model, composite, y, ids=IDS, **others):
    """By the model as a function of its embeddings, (samples, tokens)."""
    leaf = model.get_input_embeddings()(ids).detach().requires_grad_()

    def start():
        output = model(inputs_embeds=leaf, **others).logits
        if isinstance(y, int):
            return output[:, y].sum()
        return sum(sign * output[:, p, t].sum() for (p, t), sign in y.signed())

    with composite.context(model):
        (gradient,) = torch.autograd.grad(start(), leaf)
    return gradient.sum(-1)


# --- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "mixtral", "bert", "distilbert"])
@pytest.mark.parametrize("way", WAYS)
def test_ids_are_explained_by_their_embeddings(name, way, untouched):
    model = language_model(name)
    y = 1 if "bert" in name else Position(-1, 5)
    with untouched(model):
        found = CondAttribution(model)(TEXT, [{"y": y}], WAYS[way]())
    wanted = relevance_of_embeddings(model, WAYS[way](), y, attention_mask=TEXT["attention_mask"])
    assert found.heatmap.shape == IDS.shape
    assert off(found.heatmap, wanted) <= 1e-12 and wanted.abs().max() > 1e-6
    assert off(found.prediction, model(**TEXT).logits.detach()) <= 1e-12


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_embeddings_in_place_of_ids_have_a_number_for_each_token_too(name):
    model = language_model(name)
    y = [{"y": 1 if name == "bert" else Position(-1, 5)}]
    attribution, embeddings = CondAttribution(model), model.get_input_embeddings()(IDS).detach()
    wanted = attribution(TEXT, y, CPLRP()).heatmap
    found = attribution({"inputs_embeds": embeddings, "attention_mask": TEXT["attention_mask"]}, y, CPLRP())
    assert found.heatmap.shape == IDS.shape and off(found.heatmap, wanted) <= 1e-12
    # (a mask may be floating, and is no data beside ids)
    assert off(attribution({**TEXT, "attention_mask": torch.ones(IDS.shape)}, y, CPLRP()).heatmap, wanted) <= 1e-12


def test_what_else_a_model_reads_of_its_ids_stays(untouched):
    """RoBERTa counts positions by the ids that are no padding, which it cannot of embeddings."""
    model, ids = language_model("roberta"), torch.tensor([[3, 0, 0, 4, 5]])
    data = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with untouched(model):
        found = CondAttribution(model)(data, [{"y": 1}], CPLRP())
    plain = model(**data).logits.detach()
    by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=data["attention_mask"]).logits
    assert off(found.prediction, plain) <= 1e-12 and off(plain, by_embeddings.detach()) > 1e-6
    assert not found.heatmap[0, 1:3].any()


def test_left_padded_texts_are_explained_as_each_alone():
    model, short = language_model("llama"), IDS[1:, 2:]
    padded = torch.stack([IDS[0], torch.cat([torch.tensor([0, 0]), short[0]])])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    places = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    data = {"input_ids": padded, "attention_mask": mask, "position_ids": places}
    y = [{"y": Position(-1, 5)}]
    attribution = CondAttribution(model)
    found = attribution(data, y, AttnLRP()).heatmap
    alone = [attribution({"input_ids": ids}, y, AttnLRP()).heatmap[0] for ids in (IDS[:1], short)]
    assert off(found[0], alone[0]) <= 1e-5 and off(found[1, 2:], alone[1]) <= 1e-5
    assert not found[1, :2].any()


def test_both_texts_of_an_encoder_and_a_decoder():
    model = language_model("t5")
    data = {"input_ids": IDS, "decoder_input_ids": IDS.clone()[:, :3]}
    y, attribution = [{"y": Position(-1, 5)}], CondAttribution(model)
    rules = GradientTimesInput()
    first, second = (attribution(data, y, rules, explain=name).heatmap for name in data)
    both = attribution(data, y, rules, explain=list(data)).heatmap
    assert first.shape == (2, 6) and second.shape == (2, 3)
    assert off(both["input_ids"], first) <= 1e-12 and off(both["decoder_input_ids"], second) <= 1e-12
    assert first.abs().max() > 1e-6 < second.abs().max()


@pytest.mark.parametrize(
    "data", [IDS, (IDS,), {"ids": IDS}, UserDict(ids=IDS)], ids=["tensor", "tuple", "dict", "user"]
)
def test_a_model_of_ones_own(data, untouched):
    """Positions are looked up, too, in an embedding of their own: it is found which of them reads the ids."""
    model = seeded(Reader())
    with untouched(model):
        found = CondAttribution(model)(data, [{"y": 1}], EpsilonPlus(), record_layer=["words", "mix"])
    leaf = model.words(IDS).detach().requires_grad_()
    inner = nn.Sequential(model.mix, nn.ReLU())

    class Rest(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.places, self.out = inner, model.places, model.out

        def forward(self, x):
            return self.out(self.inner(x + self.places(torch.arange(6))).mean(1))

    wanted = CondAttribution(Rest().eval())(leaf, [{"y": 1}], EpsilonPlus())
    assert off(found.heatmap, leaf.grad.sum(-1)) <= 1e-12
    assert off(found.relevances["words"], leaf.grad) <= 1e-12
    assert off(found.prediction, wanted.prediction) <= 1e-12


def test_the_account_closes_and_conditions_add_up():
    model, attribution = language_model("gpt2"), None
    attribution = CondAttribution(model)
    kept = attribution.absorbed(TEXT, [{"y": Position(-1, 5)}], AttnLRP())
    assert kept.rest.abs().max() <= 1e-10 and kept.input.abs().max() > 1e-6
    layer = "transformer.h.0"
    masks = {layer: AxisConcept(1).mask}
    y = {"y": Position(-1, 5)}
    (whole,) = attribution({"input_ids": IDS[:1]}, [y], CPLRP()).heatmap
    parts = attribution({"input_ids": IDS[:1]}, [{**y, layer: [i]} for i in range(6)], CPLRP(), mask_map=masks)
    assert off(parts.heatmap.sum(0), whole) <= 1e-10


def test_many_positions_and_tokens_share_a_forward_pass():
    model, calls = language_model("llama"), []
    targets = [Position(p, t) for p in (1, 3, -1) for t in (2, 5)]
    attribution = CondAttribution(model)
    one_by_one = [attribution(TEXT, [{"y": y}], AttnLRP()).heatmap for y in targets]
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    parts = list(attribution.generate(TEXT, [{"y": y} for y in targets], AttnLRP(), batch_size=6, verbose=False))
    handle.remove()
    found = torch.cat([part.heatmap for part in parts]).unflatten(0, (2, 6))
    assert off(found, torch.stack(one_by_one, 1)) <= 1e-12
    assert len(calls) == 2, "one for each text: each part of the rows is of one"
    assert not found[:, 0, 2:].any(), "later tokens do not matter"


@pytest.mark.parametrize("name", ["intgrad", "smoothgrad", "saliency", "deeplift", "attn_lrp", "occlusion"])
def test_explain_gives_a_number_for_each_token(name):
    model = seeded(Reader())
    options = {"smoothgrad": {"n": 2, "noise_level": 0.0}}.get(name, {})
    found = crp.explain(name, model, IDS, 1, **options)
    assert found.shape == IDS.shape and found.abs().max() > 1e-6
    if name == "intgrad":
        empty = Reader.forward(model, IDS)[:, 1].detach()
        model.words.weight.data.zero_()
        assert off(found.sum(1), empty - model(IDS)[:, 1].detach()) <= 1e-2


def test_occlusion_of_whole_tokens():
    model = seeded(Reader())
    found = crp.explain("occlusion", model, IDS, 1, window_shape=1)
    score, words = model(IDS)[:, 1].detach(), model.words.weight.data.clone()
    for place in range(6):
        ids = IDS.clone()
        model.words.weight.data = torch.cat([words[:10], torch.zeros(1, 4, dtype=words.dtype)])
        ids[:, place] = 10
        used = torch.where(torch.arange(11)[:, None] == 10, 0, words)
        model.words.weight.data = used
        if not (IDS == 10).any():
            assert off(found[:, place], score - model(ids)[:, 1].detach()) <= 1e-12
    with torch.no_grad():
        model.words.weight.copy_(words)


@pytest.mark.parametrize(
    ("data", "model", "error", "message"),
    [
        (torch.tensor([[3, 11]]), seeded(Reader()), IndexError, r"input 0 holds the id 11; layer 'words' .* 0 to 10"),
        (IDS, seeded(Reader("copy")), ValueError, "no layer looks up the embeddings of input 0"),
        (IDS % 6, seeded(Reader("twice")), ValueError, r"layers \['words', 'places'\] look up"),
        (IDS, seeded(nn.Linear(6, 3)), TypeError, "data must be a floating-point tensor"),
        ({"a": IDS, "b": IDS}, seeded(Reader()), TypeError, "no input is a floating-point tensor"),
        (IDS > 3, seeded(Reader()), TypeError, "data must be a floating-point tensor"),
        (IDS.double(), seeded(Reader()), TypeError, r"layer 'words' .* gets torch.float64: give ids.long\(\)"),
        ({"ids": IDS.byte()}, seeded(Reader()), TypeError, "or holds token ids, int64: 'ids' is torch.uint8"),
    ],
    ids=["unknown", "copy", "twice", "no_embeddings", "two_inputs", "bool", "floats", "bytes"],
)
def test_what_cannot_be_explained_is_named(data, model, error, message, untouched):
    with untouched(model):
        for explain in (CondAttribution(model), Gradient(model)):
            with pytest.raises(error, match=message):
                explain(data, [{"y": 1}]) if isinstance(explain, CondAttribution) else explain(data, 1)


def test_which_layer_looks_ids_up_is_found_out_once_and_leaves_nothing_behind():
    """What the model keeps of its calls is of one call; a layer that looks the ids up later is noticed."""

    class Keeping(Reader):
        def __init__(self):
            super().__init__()
            self.calls, self.kept = 0, torch.zeros(1, 3)

        def forward(self, ids):
            self.calls += 1
            found = super().forward(ids) + self.kept
            self.kept = found.detach()[:1]
            return found

    model, other, ids = seeded(Keeping()), seeded(Keeping()), IDS[:1].clamp(max=5)
    for number in (1, 2):
        found = CondAttribution(model)(ids, [{"y": 1}], EpsilonPlus())
        assert off(found.prediction, other(ids).detach()) <= 1e-12
        assert model.calls == other.calls == number
    model.reads = "twice"
    with pytest.raises(ValueError, match=r"layers \['words', 'places'\] look up the embeddings of input 0"):
        CondAttribution(model)(ids, [{"y": 1}], EpsilonPlus())
    assert not model.places._forward_hooks and not model._forward_pre_hooks


def test_ids_that_the_only_embedding_does_not_read():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 4), nn.Linear(4, 3)

        def forward(self, ids):
            return self.out(self.embed(ids + 1).mean(1))

    model = seeded(Counting())
    with pytest.raises(ValueError, match="layer 'embed' does not look up the ids of input 0 themselves"):
        CondAttribution(model)(IDS, [{"y": 1}], EpsilonPlus())
    assert not model.embed._forward_hooks and not model._forward_pre_hooks


def test_a_reference_is_one_for_embeddings():
    model = seeded(Reader())
    found = CondAttribution(model)(IDS, [{"y": 1}], DeepLift())
    words = model.words.weight.data.clone()
    whole = model(IDS)[:, 1].detach()
    model.words.weight.data.zero_()
    assert off(found.heatmap.sum(1), whole - model(IDS)[:, 1].detach()) <= 1e-10
    model.words.weight.data.copy_(words)


# --- positions ------------------------------------------------------------------------------------------------------


class Everywhere(nn.Module):
    """Logits at every position, linear, (n, 6, 4) -> (n, 6, 3)."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.out(x.cumsum(1))


TARGETS = {
    "one": (Position(2, 1), {(2, 1): 1}),
    "last": (Position(-1, -1), {(5, 2): 1}),
    "against": (Position(3, 0, against=2), {(3, 0): 1, (3, 2): -1}),
    "several": (Position(3, [0, 1], against=[2]), {(3, 0): 1, (3, 1): 1, (3, 2): -1}),
    "list": ([Position(1, 0), Position(-1, 1, against=0)], {(1, 0): 1, (5, 1): 1, (5, 0): -1}),
    "element": ([Position(1, 0), (4, 2)], {(1, 0): 1, (4, 2): 1}),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("composite", [EpsilonPlus, CPLRP, lambda: None])
def test_tokens_at_positions(name, composite):
    (target, places), model, data = TARGETS[name], seeded(Everywhere()), numbers(2, 6, 4)
    start = {} if composite() is not None else {"init_rel": 1.0}
    found = CondAttribution(model)(data, [{"y": target}], composite(), **start).heatmap
    leaf = data.clone().requires_grad_()
    score = sum(sign * model(leaf)[:, p, t].sum() for (p, t), sign in places.items())
    (gradient,) = torch.autograd.grad(score, leaf)
    if composite is EpsilonPlus:
        whole = sum(sign * model(data).detach()[:, p, t] for (p, t), sign in places.items())
        assert off(found.sum((1, 2)) if found.dim() == 3 else found.sum(1), whole) <= 1e-5
        return
    assert off(found, (gradient if composite() is None else gradient * data).sum(1)) <= 1e-12


@pytest.mark.parametrize("target", [Position(3, 0, against=2), [Position(3, 0, against=2), Position(-1, 1)]])
def test_targets_of_explain(target):
    model, data = seeded(Everywhere()), numbers(2, 6, 4)
    found = crp.explain("gradient", model, data, target)
    each = target if isinstance(target, list) else [target] * 2
    for row, place in enumerate(each):
        leaf = data[row : row + 1].clone().requires_grad_()
        score = sum(sign * model(leaf)[0, p, t] for (p, t), sign in place.signed())
        assert off(found[row : row + 1], torch.autograd.grad(score, leaf)[0]) <= 1e-12
    assert off(crp.explain("gradient", model, data, target, batch_size=1), found) == 0


BAD = {
    "position": (Position(6, 1), IndexError, r"'y' is Position\(position=6, token=1, against=\(\)\), but"),
    "token": (Position(0, 3), IndexError, r"the shape \(6, 3\) for each sample; it must be \(positions, vocabulary\)"),
    "float": (Position(0.5, 1), TypeError, r"must have Position\(position, token\) with ints"),
    "nothing": (Position(0, []), TypeError, "with ints, or lists of them"),
    "tensor": (Position(0, torch.tensor(1)), TypeError, "with ints, or lists of them"),
    "twice": (Position(0, 1, against=1), ValueError, "names a token twice"),
    "twice, once from the end": (Position(0, 1, against=-2), ValueError, "row 0: 'y' names a token twice"),
    "twice in a list": ([Position(0, 1), Position(-6, 2, against=1)], ValueError, "names a token twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_positions_that_are_none(name):
    (target, error, message), model = BAD[name], seeded(Everywhere())
    with pytest.raises(error, match=message):
        CondAttribution(model)(numbers(1, 6, 4), [{"y": target}], CPLRP())
    if isinstance(target, Position):  # (of crp.explain, a list has one for each sample)
        with pytest.raises(error, match=message.replace("'y'", "'target'")):
            crp.explain("gradient", model, numbers(1, 6, 4), target)


def test_positions_of_an_output_without_any_and_of_other_numbers():
    model = seeded(nn.Linear(4, 3))
    with pytest.raises(IndexError, match=r"must be \(positions, vocabulary\)"):
        CondAttribution(model)(numbers(1, 4), [{"y": Position(-1, 1)}], CPLRP())
    with pytest.raises(ValueError, match="target has 2 places for 3 samples"):
        crp.explain("gradient", seeded(Everywhere()), numbers(3, 6, 4), [Position(0, 1)] * 2)
    with pytest.raises(ValueError, match=r"give a target, such as crp.outputs.Position\(-1, token\)"):
        crp.explain("gradient", seeded(Everywhere()), numbers(3, 6, 4))
    assert np.ndim(Position(0, 1).token) == 0


PLACES = {"gpt2": "transformer.wpe", "bert": "bert.embeddings.position_embeddings"}


@pytest.mark.parametrize(("name", "places"), PLACES.items(), ids=PLACES)
def test_positions_are_an_input_of_their_own(name, places):
    """A token and its place add up, and so share a multiplier, before any norm: Σ_d e_td m_td and Σ_d p_td m_td."""
    model = language_model(name)
    data = {**TEXT, "position_ids": torch.arange(6).expand(2, -1)}
    y = Position(-1, 3) if name == "gpt2" else 3
    both = {"explain": ["input_ids", "position_ids"]}
    attribution = CondAttribution(model)
    found = attribution(data, [{"y": y}], CPLRP(), **both).heatmap
    alone = attribution(TEXT, [{"y": y}], CPLRP()).heatmap
    assert off(found["input_ids"], alone) <= 1e-12
    leaf = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with CPLRP().context(model):
        logits = model(inputs_embeds=leaf, attention_mask=TEXT["attention_mask"]).logits
        logits = logits[:, -1, 3] if name == "gpt2" else logits[:, 3]
        multiplier = torch.autograd.grad(logits.sum(), leaf)[0] / leaf.detach()
    place = model.get_submodule(places).weight[:6].detach()
    assert off(found["position_ids"], (place * multiplier).sum(-1)) <= 1e-12
    kept = attribution.absorbed(data, [{"y": y}], CPLRP(), **both)
    assert off(kept.input, sum(heat.sum(1) for heat in found.values() if heat is not None)) <= 1e-12
    assert (kept.rest.abs() <= 1e-9 * kept.initial.abs().max()).all()
