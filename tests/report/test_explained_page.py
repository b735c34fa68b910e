"""The page of one explanation, written of given pictures, heatmaps and shares."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report_cases import Parsed

from crp.visualization.report.explained import ExplainedConcept, ExplainedGraph, ExplainedPicture, write_explained
from crp.visualization.report.maps import crop_of, square_map

SIDES = (100, 80)


def spot(row: int, column: int, shape: tuple[int, int] = SIDES) -> torch.Tensor:
    """Heatmap that is a small square, beside a little everywhere."""
    heatmap = torch.full(shape, 1e-4)
    heatmap[row : row + 8, column : column + 8] = 2.0
    return heatmap


def explained(*concepts: ExplainedConcept, side: tuple[int, int] = SIDES, **other: object) -> ExplainedPicture:
    image = torch.rand(3, *side, generator=torch.Generator().manual_seed(0))
    given = {"heatmap": spot(10, 10, side), "target": "ship", "prediction": [("ship", 0.9)], "said": "ship 90 %"}
    return ExplainedPicture(
        "a.png", image, **{**given, "method": "epsilon", "model": "net", "layer": "top", **other}, concepts=concepts
    )


def page_of(shown: ExplainedPicture, folder: Path) -> tuple[str, Parsed]:
    path = write_explained(shown, folder / "why.html")
    return path.read_text(), Parsed(path)


def test_each_concept_has_its_own_crop_and_a_bar_relative_to_the_largest(tmp_path):
    parts = [ExplainedConcept("3", 0.4, spot(70, 60)), ExplainedConcept("5", -0.1, spot(10, 60))]
    text, page = page_of(explained(*parts), tmp_path)
    crops = [re.search(r"\bk(\d+)-(\d+)-(\d+)", one) for one in page.all("class")]
    shown = [tuple(int(number) / 100 for number in found.groups()) for found in crops if found]
    wanted = [crop_of((part.heatmap / part.heatmap.sum()).double().numpy()) for part in parts]
    assert np.allclose(sorted(set(shown) - {(0.0, 0.0, 1.0)}), sorted(wanted), atol=0.006)
    bars = [attributes for tag, attributes in page.elements if tag == "rect" and attributes.get("height") == "100%"]
    assert [bar["width"] for bar in bars[:2]] == ["100.0%", "25.0%"]
    assert [bar.get("class") for bar in bars[:2]] == [None, "neg"]
    assert "2 concepts carry 30.0\N{NO-BREAK SPACE}% of the relevance in top." in page.text
    assert '<body class="pixels">' not in text
    scale = [(one["offset"], one["stop-color"]) for tag, one in page.elements if tag == "stop"]
    assert scale == [("0", "#2159bf"), ("0.5", "#ffffff"), ("1", "#cc171c")]  # (blue against, red for)


@pytest.mark.parametrize(
    ("n", "told"), [(0, ""), (1, " 1 concept carries 40.0\N{NO-BREAK SPACE}% of the relevance in top.")]
)
def test_the_first_sentences_count_the_concepts(tmp_path, n, told):
    _, page = page_of(explained(*[ExplainedConcept("3", 0.4, spot(70, 60))] * n), tmp_path)
    [lead] = re.findall(r"ship 90 %\. Relevance by epsilon\.(.*)", page.text)
    assert lead == told


def test_heatmaps_may_be_coarser_and_zero(tmp_path):
    coarse, none = spot(1, 1, (25, 20)), ExplainedConcept("0", 0.0, torch.zeros(SIDES))
    text, _ = page_of(explained(none, heatmap=coarse), tmp_path)
    contents = [Image.open(io.BytesIO(base64.b64decode(one))) for one in re.findall(r"base64,([A-Za-z0-9+/=]+)", text)]
    [maps] = [np.asarray(one).astype(int) - 127 for one in contents if one.mode == "P"]
    fine = torch.nn.functional.interpolate(coarse[None, None].double(), SIDES, mode="bilinear")[0, 0]
    whole = square_map((fine / fine.abs().sum()).numpy(), 100)
    assert maps.shape == (100, 300) and np.abs(maps[:, :100] - 127 * whole).max() <= 1.5
    assert not maps[:, 100:200].any() and (maps[:, 200:] == -maps[:, :100]).all()


def test_small_pictures_have_visible_pixels(tmp_path):
    text, _ = page_of(explained(side=(64, 48)), tmp_path)
    assert '<body class="pixels">' in text


def test_a_graph_has_short_labels_and_small_pictures(tmp_path):
    label = "a label of more than eighteen letters"
    columns = [{"y": ("ship", None)}, {3: (label, spot(70, 60))}]
    graph = ExplainedGraph(
        columns,
        {
            ("y", 3): 4.0,
        },
        ["top"],
    )
    text, _ = page_of(explained(graph=graph), tmp_path)
    drawn = re.search(r'<svg class="graph".*?</svg>', text, re.S)[0]
    assert re.findall(r"<text[^>]*>([^<]*)</text>", drawn) == ["ship", label[:18]]
    [content] = re.findall(r'href="data:image/png;base64,([^"]+)"', drawn)
    assert max(Image.open(io.BytesIO(base64.b64decode(content))).size) == 92
