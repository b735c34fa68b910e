"""The report: what it shows is what was mined, and whatever it shows is escaped and stays inside of the file."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import OrderedDict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_net import Images, make_fv, make_net, mined
from PIL import Image
from torch import nn
from zennit.composites import EpsilonPlus

from crp.visualization.report import Finding, make_tile, write_report
from crp.visualization.report.page import ClassSection, Page, Tile, percent, render
from crp.visualization.report.pictures import DIM, NEGATIVE, POSITIVE, heatmap_picture, sample_picture
from crp.visualization.table.ranking import class_means, top_k
from crp.visualization.table.store import Table

EVIL = "<script>alert('x')</script>\" onload=\"y' & {{ 7 * 6 }}"


class Parsed(HTMLParser):
    """Elements of a page: (tag, attributes), and the text outside of the style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "style":
            self.style += data
        else:
            self.text += data

    def all(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.elements if attribute in attrs]


def report(fv, path: Path, **keywords) -> Parsed:
    keywords = {"n_concepts": 2, "n_references": 3, "verbose": False} | keywords
    return Parsed(write_report(fv, EpsilonPlus(), path / "report.html", **keywords).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def fv(tmp_path_factory):
    return mined(tmp_path_factory.mktemp("mined"))


@pytest.fixture(scope="module")
def page(fv, tmp_path_factory):
    return report(fv, tmp_path_factory.mktemp("page"), class_names=["apple", "pear", "plum"])


def pixels(address: str) -> np.ndarray:
    head, content = address.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


# ---- what is shown


def test_concepts_of_a_class_are_its_most_relevant_with_their_shares(fv, page):
    means = class_means(Table.open(fv.path), "second")
    for row, target in enumerate(means.targets):
        best = np.argsort(-means.value[row])[:2]
        best = [c for c in best if means.value[row, c] > 0]
        shown = [a for a in page.all("id") if a.startswith(f"class-{target}-layer-1-")]
        assert shown == [f"class-{target}-layer-1-concept-{c}" for c in best]
        for concept in best:
            assert f"second:{concept} {percent(means.value[row, concept])}" in page.text


def test_layers_come_from_output_to_input(page):
    layers = re.findall(r"(first|second) \d of \d concepts", page.text)
    assert layers == ["second", "first"] * 3


def test_references_are_those_of_the_ranking(fv, page):
    names = ["apple", "pear", "plum"]
    table = Table.open(fv.path)
    best = top_k(table, "second", "relevance", k=3, of_class=1)
    concept = int(next(a for a in page.all("id") if a.startswith("class-1-layer-1")).rsplit("-", 1)[1])
    tips = [
        f"sample {i}, class pear: {percent(v)} of the sample's relevance"
        for i, v in zip(best.sample[:, concept], best.value[:, concept], strict=True)
    ]
    active = top_k(table, "second", "activation", k=3)
    tips += [
        f"sample {i}, class {names[t]}: {percent(v)} of the sample's activation"
        for i, v, t in zip(active.sample[:, concept], active.value[:, concept], active.target[:, concept], strict=True)
    ]
    titles = page.all("title")
    at = titles.index(tips[0])
    assert titles[at : at + 6] == tips


def test_heatmap_of_a_most_relevant_sample_is_conditioned_on_class_and_concept(fv, page):
    concept = int(next(a for a in page.all("id") if a.startswith("class-2-layer-1")).rsplit("-", 1)[1])
    index = int(top_k(Table.open(fv.path), "second", k=1, of_class=2).sample[0, concept])
    image = fv.dataset[index][0]
    heatmap = fv.attribution(image[None], [{"y": [2], "second": [concept]}], EpsilonPlus()).heatmap[0]
    assert heatmap_picture(heatmap, image, 96) in page.all("src")


def test_mean_heatmap_weighs_the_samples_equally(fv, page):
    images = fv.dataset.data[1::3]
    heatmaps = fv.attribution(images, [{"y": [1]}], EpsilonPlus()).heatmap
    mean = (heatmaps / heatmaps.abs().sum((1, 2), keepdim=True)).mean(0)
    assert heatmap_picture(mean, images.mean(0), 96) in page.all("src")


def test_provenance_and_coverage(fv, page):
    table = Table.open(fv.path)
    for value in (*table.fingerprints.values(), table.digest):
        assert value in page.text
    for name, version in table.versions.items():
        assert f"{name} {version}" in page.text
    assert "12 of 12 looked at, 0 skipped, missing: none" in page.text and "References ranked by" in page.text


def test_missing_and_skipped_samples_are_told(tmp_path):
    broken = {4: ValueError("cannot be read <script>")}
    fv = make_fv(tmp_path, Images(broken=broken))
    with pytest.warns(UserWarning, match="skipped"):
        fv.run_distributed(EpsilonPlus(), 0, 9, on_error="skip", progress=False)
    page = report(fv, tmp_path)
    assert "9 of 12 looked at, 1 skipped, missing: 9 to 11" in page.text
    assert "cannot be read <script>" in page.text
    assert "script" not in [tag for tag, _ in page.elements]


def test_elsewhere_names_other_classes(fv, page):
    means = class_means(Table.open(fv.path), "first")
    concept = int(next(a for a in page.all("id") if a.startswith("class-0-layer-0")).rsplit("-", 1)[1])
    share = {name: percent(means.value[row, concept]) for row, name in enumerate(["apple", "pear", "plum"])}
    at = page.text.index(f"first:{concept}")
    told = re.sub(r"[ \n]+", " ", page.text[at : page.text.index("Elsewhere", at) + 200])
    assert f"pear {share['pear']}" in told
    assert f"plum {share['plum']}" in told


def test_findings(fv, tmp_path):
    image = fv.dataset[0][0]
    rare = (0, "second", int(class_means(Table.open(fv.path), "second").value[0].argmin()))
    tile = make_tile(image, image[0], "a caption", "a tip")
    finding = Finding("A title", ["One.", "Two."], [("42", "answers")], [("A group", [tile])], rare)
    page = report(fv, tmp_path, findings=[finding], n_concepts=1)
    for text in ("A title", "One.", "Two.", "42", "answers", "A group", "a caption"):
        assert text in page.text
    assert f"class-0-layer-1-concept-{rare[2]}" in page.all("id")
    assert f"#class-0-layer-1-concept-{rare[2]}" in page.all("href")
    assert "a tip" in page.all("title")


def test_choice_of_classes_and_layers(fv, tmp_path):
    page = report(fv, tmp_path, classes=[2], layers=["first"])
    anchors = [a for a in page.all("id") if a.startswith("class-")]
    assert anchors
    assert {a[:15] for a in anchors} == {"class-2", "class-2-layer-0"}


def test_the_same_mining_gives_the_same_file(fv, tmp_path):
    write_report(fv, EpsilonPlus(), tmp_path / "a.html", verbose=False)
    write_report(fv, EpsilonPlus(), tmp_path / "new" / "b.html", verbose=False)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "new" / "b.html").read_bytes()


def test_the_model_is_untouched(fv, tmp_path, untouched):
    with untouched(fv.attribution.model):
        report(fv, tmp_path)


# ---- that it is safe and whole


def test_names_are_escaped(tmp_path):
    children = make_net().named_children()
    net = nn.Sequential(OrderedDict((EVIL if name == "second" else name, module) for name, module in children)).eval()
    fv = mined(tmp_path, net=net, layers=["first", EVIL])
    page = report(fv, tmp_path, class_names={i: f"{EVIL} {i}" for i in range(3)}, title=EVIL, lead=EVIL,
                  findings=[Finding(EVIL, [EVIL], [(EVIL, EVIL)], [(EVIL, [])])])  # fmt: skip
    assert "script" not in [tag for tag, _ in page.elements]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert f"{EVIL} 0" in page.text
    assert f"{EVIL}:" in page.text
    assert any(EVIL in title for title in page.all("title"))


def test_nothing_outside_of_the_file_is_referred_to(page):
    assert all(source.startswith("data:image/png;base64,") for source in page.all("src"))
    assert all(target.startswith("#") for target in page.all("href"))
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    assert "url(" not in page.style
    assert "@import" not in page.style


def test_policy_allows_pictures_and_this_style_only(page):
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    assert page.style.strip()
    assert not page.all("style")


def test_links_lead_to_places_that_are_there_once(page):
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in page.all("href")} <= set(ids)


def test_render_is_plain_data_to_text():
    tile = Tile("data:,a", "data:,b", "", EVIL)
    section = ClassSection("class-0", EVIL, 1, 1, tile, [])
    page = Parsed(render(Page("t", "", False, [], [section], [("a", EVIL)], [(3, EVIL)])))
    assert page.text.count(EVIL) == 4  # navigation, heading, provenance, skipped


# ---- pictures


def test_heatmap_picture_colours():
    heatmap = torch.tensor([[2.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    sample = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    picture = pixels(heatmap_picture(heatmap, sample, 96)) / 255
    expected = np.array([[POSITIVE, NEGATIVE], [[0] * 3, [DIM] * 3]])
    assert np.abs(picture - expected).max() < 0.5 / 255 + 1e-9


def test_sample_picture_keeps_values_in_range_and_rescales_others():
    grey = torch.tensor([[[0.0, 0.2], [0.4, 0.6]]], dtype=torch.float64)
    assert pixels(sample_picture(grey, 96)).tolist() == [[0, 51], [102, 153]]
    assert pixels(sample_picture(grey * 5 - 1, 96)).tolist() == [[0, 85], [170, 255]]
    colour = torch.stack([grey[0], grey[0] * 0, grey[0] * 0])
    assert pixels(sample_picture(colour, 96))[1, 1].tolist() == [153, 0, 0]


def test_zero_heatmap_is_the_dimmed_sample():
    picture = pixels(heatmap_picture(torch.zeros(2, 3), torch.ones(1, 2, 3), 96))
    assert (picture == round(255 * DIM)).all()


def test_large_pictures_are_reduced():
    assert pixels(sample_picture(torch.rand(3, 60, 30), 20)).shape == (20, 10, 3)


# ---- errors


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"n_concepts": 0}, ValueError, "n_concepts must be at least 1, got 0"),
        ({"classes": [7]}, KeyError, r"no sample of class 7 was mined; the classes are \[0, 1, 2\]"),
        ({"layers": ["secnd"]}, KeyError, "'secnd' was not mined.*nearest: 'second'"),
        ({"layers": []}, ValueError, "at least one layer"),
        ({"class_names": ["a", "b"]}, ValueError, r"2 names, and none for the classes \[2\]"),
        ({"findings": [Finding("t", concept=(0, "nope", 1))]}, KeyError, "finding is about .*nope"),
        ({"findings": [Finding("t", concept=(0, "second", 5))]}, IndexError, "has the concepts 0 to 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(fv, tmp_path, keywords, error, message):
    with pytest.raises(error, match=message):
        report(fv, tmp_path, **keywords)
    assert not list(tmp_path.iterdir())


def test_nothing_mined(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was mined"):
        report(make_fv(tmp_path), tmp_path)


def test_another_model_is_refused(fv, tmp_path):
    other = make_fv(tmp_path, net=make_net(seed=1))
    other.path, other.RelMax, other.ActMax = fv.path, fv.RelMax, fv.ActMax
    other.RelStats, other.ActStats = fv.RelStats, fv.ActStats
    with pytest.raises(ValueError, match="another model"):
        report(other, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_heatmap_must_fit_its_image():
    with pytest.raises(ValueError, match=r"got \(1, 4, 4\) and \(8, 8\); resize images in the dataset"):
        make_tile(torch.zeros(1, 4, 4), torch.zeros(8, 8), "")
