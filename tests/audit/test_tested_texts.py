"""Interventions and contexts of texts: what closed forms, and one changed forward pass for each concept, say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from text_cases import Bag, Letters, model_of, texts_of_ids

from crp.attribution import CondAttribution
from crp.audit import contexts, interventions
from crp.composites import AttnLRP, EpsilonPlus
from crp.concepts import AxisConcept
from crp.visualization import FeatureVisualization, Table, Texts
from crp.visualization.report import write_report
from crp.visualization.table.derived import read_kept

SAMPLES = [3, 0, 5]


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> FeatureVisualization:
    texts = Texts(texts_of_ids(12, "none"), Letters())
    layers = {"features": AxisConcept(-1)}
    fv = FeatureVisualization(CondAttribution(Bag()), texts, layers, path=tmp_path_factory.mktemp("bag"))
    fv.run(EpsilonPlus(), targets="prediction", progress=False)
    return fv


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> FeatureVisualization:
    texts = Texts(texts_of_ids(8), Letters(), position=-1)
    layers = {"transformer.h.0.mlp.act": AxisConcept(-1), "transformer.h.1.attn.c_proj.input": AxisConcept(-1, 2)}
    fv = FeatureVisualization(CondAttribution(model_of("gpt2")), texts, layers, path=tmp_path_factory.mktemp("gpt"))
    fv.run(AttnLRP(), targets="prediction", progress=False)
    return fv


def added(fv: FeatureVisualization, sample: int, target: int) -> torch.Tensor:
    """What each token adds to a class by each feature: (tokens, features)."""
    ids = torch.tensor(texts_of_ids(12, "none")[sample]["input_ids"])
    model = fv.attribution.model
    return (model.embed(ids).relu() * model.out.weight[target]).detach()


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_what_a_feature_added_is_missing_without_it(bag, scale):
    found = interventions(bag, EpsilonPlus(), "features", SAMPLES, [2, 0, 1, 3], scale=scale)
    predicted = [int(torch.stack([added(bag, s, y).sum() for y in range(3)]).argmax()) for s in SAMPLES]
    assert found.target.tolist() == predicted and found.sample.tolist() == SAMPLES
    parts = torch.stack([added(bag, s, y).sum(0) for s, y in zip(SAMPLES, predicted, strict=True)])[:, [2, 0, 1, 3]]
    assert np.allclose(found.change, (scale - 1) * parts.numpy(), atol=1e-12)
    assert np.allclose(found.relevance, parts.numpy(), rtol=1e-4, atol=1e-8)
    if scale < 1:
        assert found.agreement == pytest.approx(1)


def test_a_context_is_what_lies_on_other_tokens(bag):
    generator = torch.Generator().manual_seed(0)
    lengths = [len(texts_of_ids(12, "none")[s]["input_ids"]) for s in SAMPLES]
    inside = [torch.rand(n, generator=generator) < 0.5 for n in lengths]
    found = contexts(bag, EpsilonPlus(), "features", SAMPLES, inside, [1, 3], targets=[1, 2, 0], batch_size=1)
    for row, (sample, target) in enumerate(zip(SAMPLES, (1, 2, 0), strict=True)):
        parts = added(bag, sample, target)[:, [1, 3]]
        wanted = 1 - parts[inside[row]].sum(0) / parts.sum(0)
        assert np.allclose(found.score[row], wanted.numpy(), atol=1e-4)
    message = r"2 masks are given for 3 texts|inside\[\d\] must be boolean"
    for wrong in (inside[:2], [inside[0], inside[1], inside[2][:-1]], [*inside[:2], inside[2].float()], [1, 2, 3]):
        with pytest.raises((ValueError, TypeError), match=message):
            contexts(bag, EpsilonPlus(), "features", SAMPLES, wrong)


@pytest.mark.parametrize("layer", ["transformer.h.0.mlp.act", "transformer.h.1.attn.c_proj.input"])
def test_a_token_of_a_language_model_changes_as_with_a_hook(gpt, layer):
    """Neurons of an MLP and heads of an attention, at all positions; the token that follows the last one."""
    model, concept = gpt.attribution.model, gpt.layer_map[layer]
    found = interventions(gpt, AttnLRP(), layer, SAMPLES, [1, 0], scale=0.25)
    module = model.get_submodule(layer.removesuffix(".input"))
    for row, sample in enumerate(SAMPLES):
        text = texts_of_ids(8)[sample]
        ids = torch.tensor([[i for i, mask in zip(text["input_ids"], text["attention_mask"], strict=True) if mask]])
        with torch.no_grad():
            before = model(ids).logits[0, -1]
        assert found.target[row] == before.argmax()
        for column, one in enumerate([1, 0]):

            def changed(values: torch.Tensor, one: int = one) -> torch.Tensor:
                size = values.shape[-1] // (concept.groups or values.shape[-1])
                values = values.clone()
                values[..., one * size : (one + 1) * size] *= 0.25
                return values

            if layer.endswith(".input"):
                handle = module.register_forward_pre_hook(lambda _, args, of=changed: (of(args[0]), *args[1:]))
            else:
                handle = module.register_forward_hook(lambda _, __, output, of=changed: of(output))
            with torch.no_grad(), handle:
                after = model(ids).logits[0, -1]
            wanted = float(after[found.target[row]] - before[found.target[row]])
            assert found.change[row, column] == pytest.approx(wanted, abs=1e-10) and wanted


def test_one_target_is_for_all_texts(bag):
    of_all = interventions(bag, EpsilonPlus(), "features", [0, 1], [1], targets=2)
    of_each = interventions(bag, EpsilonPlus(), "features", [0, 1], [1], targets=[2, 2])
    assert np.array_equal(of_all.change, of_each.change) and of_all.target.tolist() == [2, 2]


def test_what_texts_have_not_is_refused(bag, gpt):
    with pytest.raises(ValueError, match="none is patched by another; leave patch out"):
        interventions(bag, EpsilonPlus(), "features", [0], patch=[1])
    with pytest.raises(IndexError, match="the model has outputs 0 to 2; there is no output 3"):
        interventions(bag, EpsilonPlus(), "features", [0], targets=[3])
    with pytest.raises(ValueError, match="there are 2 targets for 1 samples"):
        interventions(bag, EpsilonPlus(), "features", [0], targets=[1, 2])
    with pytest.raises(ValueError, match="scale must be a finite number, not nan"):
        interventions(bag, EpsilonPlus(), "features", [0], scale=float("nan"))


def test_they_are_kept_and_shown_on_pages(bag, tmp_path: Path):
    table = Table.open(bag.path)
    found = interventions(bag, EpsilonPlus(), "features", SAMPLES)
    found.save(table)
    assert np.array_equal(read_kept(table, "interventions", "features").arrays["change"], found.change)
    masks = [torch.ones(len(texts_of_ids(12, "none")[s]["input_ids"]), dtype=torch.bool) for s in SAMPLES]
    contexts(bag, EpsilonPlus(), "features", SAMPLES, masks).save(table)
    folder = write_report(bag, EpsilonPlus(), tmp_path / "atlas", n_references=2, verbose=False).parent
    pages = [path.read_text(encoding="utf-8") for path in folder.rglob("*.html")]
    assert any("Interventions" in page for page in pages) and any("outside of the object" in page for page in pages)
