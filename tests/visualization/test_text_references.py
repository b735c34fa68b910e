"""Reference texts of concepts: their words and heatmaps, whole, through a concept, and at its strongest token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from text_cases import Letters, model_of, texts_of_ids

from crp.attribution import CondAttribution
from crp.composites import AttnLRP
from crp.concepts import AxisConcept
from crp.image import TextHeatmap
from crp.outputs import Position
from crp.visualization import FeatureVisualization, ImageCache, Texts

LAYERS = {"transformer.h.0.mlp.act": AxisConcept(-1), "transformer.h.1.ln_2": AxisConcept(-1, 2)}
NEURONS, HEADS = LAYERS
OF_CLASSES = {"bert.encoder.layer.0.intermediate": AxisConcept(-1), "bert.pooler": AxisConcept(-1)}


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def fv(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureVisualization:
    position, layers = (-1, LAYERS) if request.param == "gpt2" else (None, OF_CLASSES)
    texts = Texts(texts_of_ids(12), Letters(), position=position)
    made = FeatureVisualization(
        CondAttribution(model_of(request.param)), texts, layers, path=tmp_path_factory.mktemp(request.param)
    )
    made.run(AttnLRP(), targets="prediction", batch_size=5, progress=False)
    return made


def given(fv: FeatureVisualization, sample: int) -> dict[str, torch.Tensor]:
    ids = fv.dataset[sample][0][:1]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def found(fv: FeatureVisualization, layer: str, **settings: Any) -> tuple[Any, list[TextHeatmap]]:
    top, _ = fv._lookup(layer, "relevance", (0, 3))
    return top, fv.get_max_reference(1, layer, "relevance", (0, 3), AttnLRP(), **settings)[1]


def test_references_are_texts_with_the_relevance_of_a_class_through_the_concept(fv: FeatureVisualization) -> None:
    for layer, concept in fv.layer_map.items():
        top, texts = found(fv, layer, init="relevance")
        for rank, text in enumerate(texts):
            sample, target = int(top.sample[rank, 1]), int(top.target[rank, 1])
            data = given(fv, sample)
            y = target if fv.dataset.position is None else Position(-1, target)
            condition = {"y": y, layer: [1]}
            wanted = fv.attribution(data, [condition], AttnLRP(), mask_map=concept.mask).heatmap[0]
            np.testing.assert_allclose(text.relevance, wanted.numpy(), rtol=1e-9, atol=1e-14)
            assert text.strongest == top.position[rank, 1] and str(text) == "".join(fv.dataset.words(sample).words)
            assert text.explained == fv.dataset.words(sample).position


def test_heatmaps_of_activations_start_at_the_concept(fv: FeatureVisualization) -> None:
    def kept(activation: torch.Tensor) -> torch.Tensor:
        return activation * (torch.arange(activation.shape[-1]) == 1)

    for layer in (layer for layer, concept in fv.layer_map.items() if concept.groups is None):
        top, texts = found(fv, layer)
        for rank, text in enumerate(texts):
            data = given(fv, int(top.sample[rank, 1]))
            wanted = fv.attribution(data, [{}], AttnLRP(), start_layer=layer, init_rel=kept).heatmap[0]
            np.testing.assert_allclose(text.relevance, wanted.numpy(), rtol=1e-9, atol=1e-14)


def test_single_tokens_of_a_concept_add_up_to_all(fv: FeatureVisualization) -> None:
    from crp.visualization.text_references import TextRow, read_text, text_heatmaps

    for layer in fv.layer_map:
        asked = read_text(fv.dataset, 3, fv.device)
        (length,) = asked.lengths
        for targets in ((2,), ()):
            rows = [TextRow(targets, layer, 1), *(TextRow(targets, layer, 1, at) for at in range(length))]
            whole, *parts = text_heatmaps(fv.attribution, asked, rows, fv.layer_map, AttnLRP())
            if layer == "bert.pooler":  # (behind the tokens: all of it is at each)
                parts = parts[:1]
            torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-9, atol=1e-12)
            assert whole.abs().max() > 0 and len({str(part) for part in parts}) == len(parts)


def test_only_the_strongest_token_counts_with_rf(fv: FeatureVisualization) -> None:
    layer = next(iter(fv.layer_map))
    _, whole = found(fv, layer, init="relevance")
    _, texts = found(fv, layer, init="relevance", rf=True)
    assert any(not np.allclose(a.relevance, b.relevance) for a, b in zip(whole, texts, strict=True))
    if fv.dataset.position is not None:
        for text in texts:
            assert not text.relevance[text.strongest + 1 :].any(), "later tokens do not matter to a token"


def test_without_a_composite_and_with_a_function_of_ones_own(fv: FeatureVisualization, tmp_path: Any) -> None:
    layer = next(iter(fv.layer_map))
    plain = fv.get_max_reference([0, 1], layer, "activation", (0, 2))
    assert all(text.relevance is None for texts in plain.values() for text in texts) and list(plain) == [0, 1]
    fv.Cache = ImageCache(tmp_path)
    try:
        words = fv.get_max_reference(
            0, layer, "activation", (0, 2), AttnLRP(), plot_fn=lambda texts, heat, rf: [str(text) for text in texts]
        )
    finally:
        fv.Cache = None
    assert words[0] == [str(text) for text in plain[0]]
    targets, _ = fv.compute_stats(0, layer)
    of_class = fv.get_stats_reference(0, layer, targets[:1], "relevance", (0, 1), AttnLRP(), init="relevance")
    assert isinstance(of_class[f"0:{targets[0]}"][0], TextHeatmap)


def test_windows_keep_the_colours_of_the_whole_text() -> None:
    text = TextHeatmap(tuple("abcdefgh"), np.arange(8) - 3.0, frozenset({0, 5}), explained=7, strongest=5)
    part = text.window(2)
    assert part.words == tuple("defgh") and part.strongest == 2 and part.explained == 4 and part.special == {2}
    np.testing.assert_allclose(part.strengths, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(text.window(2, around=0).strengths, [-0.75, -0.5, -0.25])
    assert text.scaled_without([7]).scale == 3 and text.scaled_without([7]).strengths[-1] == 1
    assert TextHeatmap(("a",), np.zeros(1)).strengths.tolist() == [0]
    with pytest.raises(ValueError, match="a text of 1 tokens has relevance of shape"):
        TextHeatmap(("a",), np.zeros(2))
    with pytest.raises(ValueError, match="not finite"):
        TextHeatmap(("a",), np.array([np.nan]))
