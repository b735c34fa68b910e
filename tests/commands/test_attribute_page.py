"""``crp attribute --page``: a picture's explanation as a page by itself."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, find_browser
from click.testing import CliRunner, Result
from PIL import Image
from report_cases import EVIL, Parsed

import crp
from crp.commands.cli import cli
from crp.visualization.report.maps import square_map
from crp.wording import percent

FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    maps = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1)
    return nn.Sequential(*maps, nn.Flatten(), nn.Linear(80, 3))

flat = lambda: nn.Sequential(nn.Flatten(), nn.Linear(300, 3))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paged_nets.py").write_text(FACTORY)
    pixels = np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8)
    for name in ("picture.png", "other.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "paged_nets", raising=False)
    return tmp_path


def run(*arguments: object, pictures: tuple[str, ...] = ("picture.png",), model: str = "paged_nets:net") -> Result:
    given = ("attribute", *pictures, "--model", model, *arguments)
    return CliRunner().invoke(cli, [str(argument) for argument in given])


def maps_of(page: Path) -> np.ndarray:
    """Heatmaps of a page, side by side, in -1..1."""
    contents = re.findall(r"base64,([A-Za-z0-9+/=]+)", page.read_text())
    images = [Image.open(io.BytesIO(base64.b64decode(one))) for one in contents]
    (maps,) = [one for one in images if one.mode == "P"]
    return (np.asarray(maps).astype(int) - 127) / 127


@pytest.mark.parametrize(
    ("arguments", "layer", "wanted", "options"),
    [
        (("--page",), "3", None, {}),
        (("--layer", "1"), "1", None, {}),
        (("--layer", "1", "--concept", 3, "--concept", 0), "1", [3, 0], {}),
        (("--layer", "1", "--concept", -1, "--concept", 0, "--concept", 3), "1", [3, 0], {}),
        (("--layer", "1", "--option", "epsilon=3.0"), "1", None, {"epsilon": 3.0}),
    ],
    ids=["suggested layer", "named layer", "named concepts", "from the end", "an option of the method"],
)
def test_a_page_shows_the_concepts_with_their_heatmaps(place, arguments, layer, wanted, options):
    result = run("--method", "epsilon", "--target", 1, "--json", "--out", "why.html", *arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    model = __import__("paged_nets").net().eval()
    data = torch.from_numpy(np.asarray(Image.open("picture.png")).copy()).permute(2, 0, 1)[None] / 255
    relevance = crp.explain("epsilon", model, data, 1, layer=layer, **options)[0].flatten(1).sum(1).detach()
    shares = relevance / relevance.abs().sum()
    ids = wanted or shares.argsort(descending=True)[:4].tolist()
    assert facts["layer"] == layer and [one["concept"] for one in facts["concepts"]] == ids
    assert [one["share"] for one in facts["concepts"]] == pytest.approx(shares[ids].tolist(), abs=1e-5)
    page = Parsed(place / "why.html")
    for concept in ids:
        assert f"{layer} · {concept}" in page.text and percent(float(shares[concept])) in page.text
    chances = model(data).softmax(1)[0].tolist()
    assert all(f"class {i}{percent(chance)}" in page.text for i, chance in enumerate(chances))
    heatmaps = [crp.explain("epsilon", model, data, 1, **options)[0].sum(0)]
    heatmaps += [crp.explain("epsilon", model, data, 1, condition={layer: [one]}, **options)[0].sum(0) for one in ids]
    heatmaps = [(one / one.abs().sum()).detach().double().numpy() for one in heatmaps]
    heatmaps += [one - heatmaps[0] for one in heatmaps[1:]]
    expected = np.concatenate([square_map(one, 10) for one in heatmaps], axis=1)
    assert np.abs(maps_of(place / "why.html") - expected).max() <= 0.5 / 127 + 1e-4
    # (the file has the whole heatmap, one of each concept, and then what sets each apart)
    cells = [re.search(r"\bh(\d+)-(\d+)", attributes.get("class") or "") for _, attributes in page.elements]
    shown = [(int(found[2]), int(found[1])) for found in cells if found]
    n = len(ids)
    assert [pair for pair in shown if pair[1]] == [(2 * n + 1, i + row) for i in range(1, n + 1) for row in (0, n)]


def graph_of(page: Path) -> tuple[list[str], list[float], list[tuple[int, int]]]:
    """Labels at the nodes of a page's graph, widths of its edges, and sizes of its pictures."""
    drawn = re.search(r'<svg class="graph".*?</svg>', page.read_text(), re.S)
    if drawn is None:
        return [], [], []
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", drawn[0])
    contents = re.findall(r'href="data:image/png;base64,([^"]+)"', drawn[0])
    sizes = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in contents]
    return labels, [float(width) for width in re.findall(r'stroke-width="([\d.]+)"', drawn[0])], sizes


@pytest.mark.parametrize(
    ("arguments", "layers", "top"),
    [
        ((), ["3", "1"], None),
        (("--layer", "3", "--concept", 2, "--concept", 0, "--graph", "1"), ["3", "1"], [2, 0]),
        (("--layer", "3", "--graph", "2", "--graph", "0"), ["3", "2", "0"], None),
    ],
    ids=["suggested", "named", "two lower layers"],
)
def test_a_page_draws_how_relevance_flows_between_concepts(place, arguments, layers, top):
    result = run("--method", "epsilon", "--target", 1, "--json", "--page", "--out", "why.html", *arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    model = __import__("paged_nets").net().eval()
    data = torch.from_numpy(np.asarray(Image.open("picture.png")).copy()).permute(2, 0, 1)[None] / 255
    flow = crp.concept_flow("epsilon", model, data, 1, layers, concepts=top)
    between = {pair: share for pair, share in flow.edges.items() if pair[0][0] != "y"}
    assert {(tuple(one["from"]), tuple(one["to"])) for one in facts["graph"]} == set(between)
    found = [one["share"] for one in facts["graph"]]
    assert found == pytest.approx([*between.values()], rel=1e-4, abs=1e-7)
    labels, widths, sizes = graph_of(place / "why.html")
    assert labels == ["class 1", *(str(node[1]) for column in flow.columns[1:] for node in column)]
    most = max(map(abs, flow.edges.values()))
    assert widths == pytest.approx([1 + 9 * abs(share) / most for share in flow.edges.values()], abs=0.06)
    assert sizes == [(10, 10)] * (len(labels) - 1)
    assert f"From the class to {' to '.join(layers)}" in Parsed(place / "why.html").text


def test_relevance_against_the_class_is_blue(place):
    assert run("--method", "epsilon", "--target", 1, "--page", "--out", "why.html").exit_code == 0
    text = (place / "why.html").read_text()
    model = __import__("paged_nets").net().eval()
    data = torch.from_numpy(np.asarray(Image.open("picture.png")).copy()).permute(2, 0, 1)[None] / 255
    edges = crp.concept_flow("epsilon", model, data, 1, ["3", "1"]).edges
    assert text.count('class="against"') == sum(share < 0 for share in edges.values()) > 0


def test_several_pictures_have_a_page_each(place):
    result = run("--page", "--out", "pages", pictures=("picture.png", "other.png"))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (place / "pages").iterdir()) == ["other.html", "picture.html"]


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (("--method", "grad_cam", "--layer", "1"), "paged_nets:net"),
        (("--method", "occlusion", "--option", "window_shape=[2, 2]"), "paged_nets:net"),
        ((), "paged_nets:flat"),
    ],
    ids=["class activation map", "perturbation", "no maps in the model"],
)
def test_where_there_are_no_concepts_the_page_shows_the_whole(place, arguments, model):
    result = run("--page", "--json", "--out", "why.html", *arguments, model=model)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["concepts"] == []
    assert "its concepts" not in Parsed(place / "why.html").text
    assert maps_of(place / "why.html").shape == (10, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--page", "--out", "why.png"), "--out why.png must end in .html for a page"),
        (
            ("--page", "--layer", "1", "--concept", 4, "--out", "a.html"),
            "0 to 3; there is no concept 4",
        ),
        (("--page", "--concept", 1, "--out", "a.html"), "--concept needs the --layer"),
        (("--method", "ig", "--layer", "1", "--concept", 1, "--out", "a.html"), "has no relevance of concepts"),
        (("--page", "--layer", "9", "--out", "a.html"), "'9'"),
        (("--page", "--method", "occlusion", "--layer", "1", "--out", "a.html"), "leave --layer out"),
        (
            ("--page", "--layer", "1", "--concept", -5, "--out", "a.html"),
            "0 to 3; there is no concept -5",
        ),
        (("--graph", "0", "--out", "why.png"), "--graph is for --page, which draws it"),
        (("--page", "--graph", "9", "--out", "a.html"), "<--graph> '9' not found in model"),
        (("--page", "--layer", "1", "--graph", "3", "--out", "a.html"), "must go from the output to the input"),
        (("--page", "--graph", "3", "--out", "a.html"), "has a layer twice"),
        (("--page", "--method", "ig", "--graph", "0", "--out", "a.html"), "leave --graph out"),
        (("--page", "--method", "ig", "--graph", "0", "--layer", "1", "--out", "a.html"), "leave --graph and --layer"),
    ],
    ids=[
        "suffix",
        "concept",
        "no layer",
        "method",
        "layer",
        "layer of a method without",
        "negative",
        "no page",
        "layer of the graph",
        "order",
        "twice",
        "graph of a method without",
        "both",
    ],
)
def test_what_cannot_be_shown_is_refused(place, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1 and message in result.output.replace("\n", " "), result.output
    assert not list(place.glob("*.html")) and not (place / "why.png").exists()


def test_names_stay_text(place):
    (place / "names.txt").write_text("\n".join([EVIL] * 3))
    result = run("--page", "--classes", "names.txt", "--out", "why.html")
    assert result.exit_code == 0, result.output
    page = Parsed(place / "why.html")
    assert EVIL in page.text and [tag for tag, _ in page.elements].count("script") == 1


@pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt-get install chromium")
def test_the_page_needs_nothing_else(place):
    assert run("--page", "--out", "why.html").exit_code == 0
    browser = Browser()
    try:
        browser.resize(390, 800)
        browser.open((place / "why.html").as_uri())
        browser.evaluate("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: '/', bubbles: true}))")
        assert browser.errors == []
        assert [one for one in browser.requests if not one.startswith("data:")] == [(place / "why.html").as_uri()]
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.evaluate("document.querySelectorAll('a[href]:not(.skip)').length") == 0
        assert browser.evaluate("document.querySelectorAll('main h1').length") == 1
        browser.evaluate("document.getElementById('as-heatmap').click()")
        style = "getComputedStyle(document.querySelector('.tile.free .stack>img')).visibility"
        assert browser.evaluate(style) == "hidden"
    finally:
        browser.close()
