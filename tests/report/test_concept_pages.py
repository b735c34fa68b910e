"""Pages of concepts: the samples that speak against, beside those that speak for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_net import Images, make_fv, make_net, mined
from PIL import Image
from report_cases import NAMES, Parsed, report
from zennit.composites import EpsilonPlus

from crp.visualization import FeatureVisualization
from crp.visualization.analysis import RowSelection, similarity
from crp.visualization.report.facts import concepts_of_samples, get_facts
from crp.visualization.report.graphs import DrawnNode, _draw_histogram, draw_columns
from crp.visualization.report.maps import read_facts, square_map
from crp.visualization.table.ranking import class_means, top_k
from crp.visualization.table.store import Table
from crp.wording import percent


@pytest.fixture(scope="module")
def fv(tmp_path_factory: pytest.TempPathFactory) -> FeatureVisualization:
    return mined(tmp_path_factory.mktemp("mined"))


@pytest.fixture(scope="module")
def atlas(fv: FeatureVisualization, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(fv, tmp_path_factory.mktemp("atlas") / "out")


def negative_part(atlas: Path, concept: int) -> str:
    text = (atlas / f"concept/second/{concept}.html").read_text()
    return text.partition("<h2>Most negative</h2>")[2].partition("<h2>")[0]


def test_the_most_negative_samples_stand_beside_the_most_relevant(fv, atlas):
    table = Table.open(fv.path)
    least, best = top_k(table, "second", k=4, least=True), top_k(table, "second", k=3)
    shown = 0
    for concept in range(5):
        known = set(zip(best.sample[:, concept].tolist(), best.target[:, concept].tolist(), strict=True))
        columns = (least.value[:, concept], least.sample[:, concept], least.target[:, concept])
        rows = [row for row in zip(*(c.tolist() for c in columns), strict=True) if row[0] < 0 and row[1:] not in known]
        part = negative_part(atlas, concept)
        captions = re.findall(r"<figcaption><b>(.*?)</b>.*?<span>sample (\d+)</span>", part)
        assert captions == [(percent(value), str(sample)) for value, sample, _ in rows[:2]]
        assert part.count('class="tile as-overlay"') == len(captions), "masked pictures would be white"
        shown += len(captions)
    assert shown >= 4


def test_their_heatmaps_are_of_class_and_concept(fv, atlas):
    least = top_k(Table.open(fv.path), "second", k=1, least=True)
    concept = int(least.value[0].argmin())
    sample, target = int(least.sample[0, concept]), int(least.target[0, concept])
    condition = {"y": [target], "second": [concept]}
    heatmap = fv.attribution(fv.dataset[sample][0][None], [condition], EpsilonPlus()).heatmap[0].detach().numpy()
    cell, cells = (int(n) for n in re.search(r"h(\d+)-(\d+)", negative_part(atlas, concept)).groups())
    with Image.open(atlas / f"maps/second/{concept}.png") as image:
        assert image.size == (64 * cells, 64)
        steps = np.asarray(image)[:, 64 * cell : 64 * (cell + 1)].astype(int) - 127
    assert np.abs(steps / 127 - square_map(heatmap, 64)).max() <= 0.5 / 127 + 1e-6
    assert steps.sum() < 0


@pytest.mark.parametrize("n_negative", [0, 1, 5])
def test_as_many_are_shown_as_are_asked_for(fv, tmp_path, n_negative):
    atlas = report(fv, tmp_path / "out", n_negative=n_negative, layers=["second"])
    counts = [negative_part(atlas, concept).count("<figcaption>") for concept in range(5)]
    assert max(counts) == n_negative


@pytest.mark.parametrize("mode", ["relevance", "activation"])
def test_histograms_have_the_unit_of_the_references(fv, atlas, mode):
    best = top_k(Table.open(fv.path), "second", mode, k=1).value[0]
    least = top_k(Table.open(fv.path), "second", mode, k=1, least=True).value[0]
    for concept in range(5):
        page = Parsed(atlas / f"concept/second/{concept}.html")
        ends = f"{percent(float(least[concept]))} to {percent(float(best[concept]))}"
        assert f"{mode.capitalize()}: histogram from {ends}" in page.all("aria-label")
        assert f"Figures: its share of the layer's {mode}." in page.text


def test_pictures_are_described_by_what_they_are_shown_for(fv, atlas):
    words = {"Most relevant": "is relevant", "Most active": "is active", "Most negative": "speaks against it"}
    for concept in range(5):
        text = (atlas / f"concept/second/{concept}.html").read_text()
        for heading, what in words.items():
            part = text.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]
            described = re.findall(r'alt="([^"]+)"', part)
            assert all(one.endswith(f"where second {concept} {what}") for one in described), heading


def test_similar_concepts_are_those_whose_relevance_goes_along(fv, atlas):
    cosine = similarity(fv.path, RowSelection("second", "relevance"))
    shown = 0
    for concept in range(5):
        part = (atlas / f"concept/second/{concept}.html").read_text().partition("<h2>Similar concepts</h2>")[2]
        chips = re.findall(r"<span>(\d)<small>(.*?) alike</small>", part)
        order = [other for other in np.argsort(-cosine[concept], kind="stable").tolist() if other != concept]
        assert chips == [(str(o), percent(cosine[concept, o])) for o in order if cosine[concept, o] > 0.05]
        shown += len(chips)
    assert 0 < shown < 20


def test_what_a_concept_does_is_told_once(fv, atlas):
    told = [Parsed(atlas / f"concept/second/{i}.html").text.lower().count("switched off") for i in range(5)]
    assert max(told) == 1


def test_a_single_output_is_no_probability(tmp_path):
    net = make_net()
    net.out = torch.nn.Linear(7, 1, dtype=torch.float64).eval()
    torch.nn.init.constant_(net.out.weight, 0.01)
    fv = mined(tmp_path / "mined", Images(12, [0] * 12), net=net)
    atlas = report(fv, tmp_path / "out", class_names=["size"])
    pages = [Parsed(page).text for page in (atlas / "concept/second").glob("*.html")]
    told = [page for page in pages if "switched off" in page]
    assert told and all("output of its references when it is switched off" in page for page in told)
    figure = re.search(r"(\S+ → \S+)", told[0])[1]
    assert "%" not in figure, figure
    sample = next(iter((atlas / "sample").glob("*.html")))
    output = net(fv.dataset[int(sample.stem)][0][None]).item()
    assert f"Explained for size ({output:.3g})." in Parsed(sample).text


@pytest.mark.parametrize("page", ["concept/first/0.html", "concept/second/1.html", "sample/0.html"])
def test_links_of_a_graph_tell_their_layer(atlas, page):
    text = (atlas / page).read_text()
    graph = text.partition('<svg class="graph"')[2].partition('<p class="note">')[0]
    links = re.findall(r'<a href="[^"]*/(concept|class)/(?:(\w+)/)?(\d+)\.html[^"]*" aria-label="([^"]+)"', graph)
    names = {f"{layer} · {n}" if kind == "concept" else NAMES[int(n)] for kind, layer, n, _ in links}
    assert links and {link[3] for link in links} == names
    assert graph.count("<a ") == len(links)


def test_graphs_tell_what_references_hand_down(fv, atlas):
    """A concept's own share is the mean over its references; of one above, it counts as much as that one does."""
    means = class_means(Table.open(fv.path), "second")
    mean = (means.value * means.rows[:, None]).sum(0) / means.rows.sum()
    above = {lower: [] for lower in range(4)}

    def side(layer: str, concept: int, other: str) -> tuple[list[int], list[float]]:
        text = (atlas / f"concept/{layer}/{concept}.html").read_text()
        graph = text.partition('<svg class="graph"')[2].partition("</svg>\n<p")[0]
        widths = [float(width) for width in re.findall(r'<path [^>]*stroke-width="([\d.]+)"', graph)]
        found = [int(n) for n in re.findall(rf'aria-label="{other} · (\d+)"', graph)]
        return found, widths[-len(found) :] if other == "first" else widths[: len(found)]

    def expected(shares: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
        most = max(abs(share) for _, share in shares)
        return [one for one, _ in shares], [round(1 + 9 * abs(share) / most, 1) for _, share in shares]

    for concept in range(5):
        best = top_k(Table.open(fv.path), "second", k=3).value[:, concept]
        rows = read_facts(atlas / f"maps/second/{concept}.png")["rows"][: np.count_nonzero(best)]
        known, total = [dict(below) for _, below, *_ in rows if below], {}
        for lower in {lower for below in known for lower in below}:
            total[lower] = sum(below.get(lower, 0) for below in known) / len(known)
        shares = sorted(total.items(), key=lambda one: -one[1])
        assert side("second", concept, "first") == expected(shares)
        for lower, share in shares:
            above[lower].append((concept, share * mean[concept]))
    for lower, shares in above.items():
        assert side("first", lower, "second") == expected(sorted(shares, key=lambda one: -one[1]))


def test_the_graph_of_a_sample_tells_shares_of_its_relevance(fv, atlas):
    pages = sorted((atlas / "sample").glob("*.html"))[:4]
    for page in pages:
        sample, target = int(page.stem), int(page.stem) % 3
        top = concepts_of_samples(Table.open(fv.path), "second", {sample: [target]}, 4)[sample, target]
        rows = read_facts(atlas / f"maps/samples/{sample}.{target}.png")["rows"][1:]
        below = [dict(row[1]) for row in rows]
        wanted = {n: sum(s * part.get(n, 0) for (_, s), part in zip(top, below, strict=True)) for n in range(4)}
        kept = [n for n in sorted(wanted, key=lambda n: -wanted[n]) if any(n in part for part in below)]
        graph = page.read_text().partition('<svg class="graph"')[2].partition('<p class="note">')[0]
        assert re.findall(r'aria-label="first · (\d+)"', graph) == [str(n) for n in kept]
        widths = []
        for (_, share), (_, parts, *_) in zip(top, rows, strict=True):
            widths += [share * part / top[0][1] for part in (1, *dict(parts).values())]
        drawn = re.findall(r'<path [^>]*stroke-width="([\d.]+)"', graph)
        assert drawn == [str(round(1 + 9 * width, 1)) for width in widths]


def test_bars_are_drawn_beside_their_numbers_for_the_eye_alone(fv, atlas):
    bars = [
        attributes
        for page in atlas.rglob("*.html")
        for tag, attributes in Parsed(page).elements
        if tag == "svg" and attributes.get("class") == "bar"
    ]
    assert bars and all(bar["aria-hidden"] == "true" and "aria-label" not in bar for bar in bars)
    pages = "".join(page.read_text() for page in atlas.rglob("*.html"))
    widths = re.findall(r'<svg class="bar"[^>]*><rect[^>]* width="([\d.]+)%"', pages)
    assert len(widths) == len(bars) and max(map(float, widths)) == 100, "the longest is the largest"


def test_rounding_is_no_negative_relevance(fv):
    counts = {"relevance": 3, "activation": 3, "negative": 2}
    questions = {"relevance": fv.RelMax.question, "activation": fv.ActMax.question}
    facts = get_facts(Table.open(fv.path), "second", questions, counts)
    concept = int(facts.negative.value[0].argmin())
    assert facts.references(concept, counts).negative
    facts.negative.value[:, concept] = -1e-5 * facts.relevant.value[0, concept]
    assert facts.references(concept, counts).negative == []


def test_words_of_a_graph_are_not_cut_and_curves_begin_behind_them():
    columns = [{"y": DrawnNode("an eighteen letter")}, {1: DrawnNode("1", picture="data:,")}]
    graph = draw_columns(columns, {("y", 1): 0.5}, (45, 165), 210)
    (word, _, _), (picture, _, _) = graph["nodes"]
    half = 4 * 18  # (a letter has 8 units at most)
    assert word - half >= 0 and graph["width"] - picture == 45
    (edge,) = graph["edges"]
    assert edge.x0 == min(word + half + 5, (word + picture) / 2) and edge.x2 == picture
    short = draw_columns([{"y": DrawnNode("8")}, columns[1]], {("y", 1): 0.5}, (45, 165), 210)
    assert [x for x, _, _ in short["nodes"]] == [45, 165] and short["width"] == 210


def test_nodes_of_a_graph_stand_below_each_other_and_curves_end_at_them():
    columns = [{"y": DrawnNode("8")}, {i: DrawnNode(str(i), picture="data:,") for i in range(3)}]
    graph = draw_columns(columns, {("y", 0): 1.0, ("y", 2): -0.5}, (45, 165), 210)
    (_, middle, _), *others = graph["nodes"]
    ys = [y for _, y, _ in others]
    assert ys[0] >= 23 and ys[-1] + 36 <= graph["height"], "pictures and what is written below them are in it"
    assert ys[1] - ys[0] == ys[2] - ys[1] > 46 and middle == ys[1]
    assert [(e.y0, e.y1, e.x2, e.width, e.against) for e in graph["edges"]] == [
        (middle, ys[0], 165, 10, False),
        (middle, ys[2], 165, 5.5, True),
    ]


def test_bars_of_a_histogram_are_roots_of_counts():
    drawn = _draw_histogram(np.array([0, 1, 4, 16]), "a", "b", [0.25])
    assert drawn["bars"] == [(105.0, 73.0, 23.0), (210.0, 50.0, 46.0), (315.0, 4.0, 92.0)]
    assert (drawn["low"], drawn["high"], drawn["ticks"]) == ("a", "b", [105.0])


def test_the_thickest_curve_of_a_graph_is_the_largest_share_whatever_its_sign(atlas):
    pages = [
        re.findall(r'<path d="M60.0 .*?" stroke-width="([\d.]+)"', p.read_text()) for p in atlas.glob("concept/first/*")
    ]
    several = [widths for widths in pages if len(widths) > 1]
    assert several and all(widths.count("10.0") == 1 and "10" not in widths for widths in several)


def test_samples_of_several_classes_count_once_among_references(tmp_path):
    """A sample fills the first ranks with all its classes, where these are predicted by the same concepts."""
    net, n = make_net(), {"relevance": 8, "activation": 8, "negative": 4}
    with torch.no_grad():
        net.out.weight.copy_(net.out.weight[:1] + 0.01 * net.out.weight)
    fv = make_fv(tmp_path, Images(30), net=net, layers=["second"])
    fv.run(EpsilonPlus(), targets="all", progress=False)
    facts = get_facts(
        Table.open(fv.path), "second", {"relevance": fv.RelMax.question, "activation": fv.ActMax.question}, n
    )
    top, _ = fv._lookup("second", "relevance", (0, 8))
    blocks = list(Table.open(fv.path).blocks("second"))
    for concept in range(5):
        found = facts.references(concept, n)
        wanted = top.sample[:8, concept][top.value[:8, concept] != 0]
        assert [one.sample for one in found.relevant] == wanted.tolist()
        below = {sample for block in blocks for sample in block.sample[block.value[:, concept] < 0].tolist()}
        assert len({one.sample for one in found.negative}) == len(found.negative) == min(4, len(below))


@pytest.mark.parametrize("n_parts", [0, 2], ids=["whole", "in parts"])
def test_a_reference_of_several_classes_leads_to_the_page_of_its_own(tmp_path, n_parts):
    fv = make_fv(tmp_path / "mined", Images(12))
    fv.run(EpsilonPlus(), targets="all", progress=False)
    for part in range(n_parts):
        report(fv, tmp_path / "out", part=(part, n_parts))
    folder = report(fv, tmp_path / "out")
    several = set()
    for page in folder.glob("concept/second/*.html"):
        for kind in ("Most relevant", "Most negative"):
            shown = page.read_text().partition(f"<h2>{kind}</h2>")[2].partition("<h2>")[0]
            for address, name in re.findall(r'/sample/([\d.]+)\.html">.*?alt="[^"]*, (\w+), where', shown):
                sample = (folder / f"sample/{address}.html").read_text()
                assert f"<h1>Why {name}?" in sample and "its concepts here" in sample
                lead = sample.partition('class="lead">')[2].partition("</p>")[0]
                others = dict(re.findall(r'href="[./a-z]*?([\d.]+)\.html">(\w+)</a>', lead))
                assert name not in others.values()
                assert all(f"<h1>Why {b}?" in (folder / f"sample/{a}.html").read_text() for a, b in others.items())
                several |= {address} if others else set()
        active = re.findall(r"sample (\d+), (\w+), where second \d is active", page.read_text())
        assert active and all(name == NAMES[int(sample) % 3] for sample, name in active), (
            "their label, as no class counts"
        )
    assert len(several) > 1 and any("." in address for address in several)
    for target, name in enumerate(NAMES):
        samples = (folder / f"class/{target}.html").read_text().partition("Samples of this class")[2]
        for address in re.findall(r"sample/([\d.]+)\.html", samples):
            assert f"<h1>Why {name}?" in (folder / f"sample/{address}.html").read_text()


def test_blue_curves_are_explained_where_there_are_any(atlas):
    pages = [page.read_text() for page in atlas.glob("concept/*/*.html")] + [
        p.read_text() for p in atlas.glob("sample/*")
    ]
    blue = [page for page in pages if 'class="against"/>' in page]
    assert blue and len(blue) < len(pages)
    assert [page for page in pages if "Blue: relevance that speaks against the class." in page] == blue
