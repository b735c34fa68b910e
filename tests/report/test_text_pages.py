"""What an atlas of texts shares with that of pictures: suspects, graph, references of all kinds, and going on."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from report_cases import Parsed
from text_cases import MARK, Bag, Letters, model_of, texts_of_ids

from crp.attribution import CondAttribution
from crp.audit import audit_table, clusters, prototypes, save_audit, save_clusters
from crp.composites import AttnLRP, EpsilonPlus
from crp.concepts import AxisConcept, splice
from crp.outputs import Position
from crp.visualization import FeatureVisualization, Table, Texts, write_report
from crp.visualization.report.spliced import unexplained_of
from crp.visualization.report.suspects import FEWEST, find_suspects, find_text_suspects
from crp.visualization.report.text_drawing import TextDrawer
from crp.visualization.table.ranking import top_k
from crp.visualization.text_references import token_ids
from crp.wording import percent

LOWER, UPPER = "transformer.h.0.ln_2", "transformer.h.1.ln_2"
LAYERS = {LOWER: AxisConcept(-1), UPPER: AxisConcept(-1)}


def marked_texts(n: int = 60) -> list[dict[str, Any]]:
    """Texts of letters, of three classes in turn; those of every sixth, of class 0, hold the mark somewhere."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(n):
        ids = torch.randint(2, 9, (int(torch.randint(4, 9, (1,), generator=generator)),), generator=generator).tolist()
        if i % 6 == 0:
            ids.insert(int(torch.randint(0, len(ids), (1,), generator=generator)), MARK)
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "label": i % 3})
    return found


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> FeatureVisualization:
    layers = {"features": AxisConcept(-1), "pooled": AxisConcept(-1)}
    texts = Texts(marked_texts(), Letters())
    fv = FeatureVisualization(CondAttribution(Bag()), texts, layers, path=tmp_path_factory.mktemp("bag"))
    fv.run(EpsilonPlus(), progress=False)
    return fv


@pytest.fixture(scope="module")
def bag_atlas(bag: FeatureVisualization, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options: dict[str, Any] = {"verbose": False, "n_references": 4, "class_names": ["one", "two", "three"]}
    return write_report(bag, EpsilonPlus(), tmp_path_factory.mktemp("atlas") / "out", **options).parent


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> FeatureVisualization:
    texts = Texts(texts_of_ids(14), Letters(), position=-1)
    fv = FeatureVisualization(CondAttribution(model_of("gpt2")), texts, LAYERS, path=tmp_path_factory.mktemp("gpt"))
    fv.run(AttnLRP(), targets="prediction", batch_size=6, progress=False)
    return fv


def written(fv: FeatureVisualization, path: Path, **options: Any) -> Path:
    return write_report(fv, AttnLRP(), path, **{"n_references": 3, "verbose": False, **options}).parent


@pytest.fixture(scope="module")
def gpt_atlas(gpt: FeatureVisualization, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(gpt, tmp_path_factory.mktemp("atlas") / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- suspects


def test_a_concept_on_one_word_of_some_texts_is_the_first_suspect(bag: FeatureVisualization, bag_atlas: Path) -> None:
    ids_of = partial(token_ids, bag.dataset)
    first = find_text_suspects(Table.open(bag.path), ["features"], [0, 1, 2], ids_of, bag.texts.word)[0]  # type: ignore[union-attr]
    assert (first.layer, first.concept, first.target, first.where) == ("features", 0, 0, "on the word 'h'")
    assert first.inside == 1 and first.expected == pytest.approx(1e-3) and 0.4 < first.rows <= 0.5
    # (the score: its share; how sure the word is, of which nothing else of the layer has any; and on how few texts)
    assert first.score == pytest.approx(first.share * np.log(1 / 1e-3) * (1 - first.rows), rel=1e-3)
    assert find_suspects(bag, targets=[0, 1, 2], n=1) == [first]
    overview = Parsed(bag_atlas / "index.html").text
    assert overview.index("features · 0") < overview.index("Layers")
    assert f"{percent(1)} of it on the word 'h'" in overview
    suspects = (bag_atlas / "suspects.html").read_text(encoding="utf-8")
    section = suspects.partition('<section class="concept suspect">')[2].partition("</section>")[0]
    assert 'href="concept/features/0.html"' in section and "one word on some of them" in suspects
    assert re.search(r'class="p20 strongest">h</span>', section), "its text stands beside it, with the word underlined"
    notes = Parsed(bag_atlas / "concept" / "features" / "0.html").text
    assert f"Suspect for one: {first.reason}." in notes


def test_texts_that_stand_for_a_suspect_are_of_its_class_or_said_not_to_be(
    bag: FeatureVisualization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids_of = partial(token_ids, bag.dataset)
    first = find_text_suspects(Table.open(bag.path), ["features"], [0], ids_of, bag.texts.word)[0]  # type: ignore[union-attr]
    assert set(top_k(Table.open(bag.path), "features", k=2).target[:, first.concept].tolist()) == {0}
    both = [first, first._replace(target=1)]
    monkeypatch.setattr(TextDrawer, "find_suspects", lambda *_: both)
    names = {"class_names": ["one", "two", "three"], "verbose": False, "n_references": 2}
    atlas = write_report(bag, EpsilonPlus(), tmp_path / "out", **names).parent
    sections = (atlas / "suspects.html").read_text(encoding="utf-8").split('<section class="concept suspect">')[1:]
    first_page = (atlas / "index.html").read_text(encoding="utf-8").partition("<h2>Layers")[0].split("<figure>")[1:]
    for shown in (sections, first_page):
        assert ["shown by texts of other classes" in one for one in shown] == [False, True]


def naive_scores(fv: FeatureVisualization, words: set[int]) -> dict[tuple[int, int], tuple[float, int]]:
    """Score of each class and concept of the layer "features", and its word, one row at a time.

    Other words than these count as one that is none.
    """
    (block,) = Table.open(fv.path).blocks("features", "relevance", "sum", normed=True)
    held, everything, share, rows = Counter[Any](), Counter[int](), Counter[Any](), Counter[int](block.target.tolist())
    square = Counter[Any]()
    for sample, target, values, places in zip(*(column.tolist() for column in block), strict=True):
        ids = token_ids(fv.dataset, sample).tolist()
        for concept, (value, place) in enumerate(zip(values, places, strict=True)):
            word = ids[place] if ids[place] in words else -1
            held[target, concept, word] += max(value, 0)
            everything[word] += max(value, 0)
            square[target, concept] += max(value, 0) ** 2
            share[target, concept] += value / rows[target]
    found = {}
    for target, concept in share:
        mine = {word: held[target, concept, word] for word in everything}
        total, rest = sum(mine.values()), {word: everything[word] - mine[word] for word in everything}
        if not total:
            continue
        known: dict[int, float] = {}
        for word in words & set(mine):
            one, other = mine[word] / total, rest[word] / sum(rest.values()) + 1e-3
            if one > other:
                known[word] = one * np.log(one / other) + (
                    np.log((1 - one) / (1 - other)) * (1 - one) if one < 1 else 0
                )
        few = max(0.1, 1 - total**2 / square[target, concept] / rows[target])
        best = max(known, key=lambda word: known[word], default=-1)
        found[target, concept] = (share[target, concept] * known.get(best, 0.0) * few, best)
    return {key: one for key, one in found.items() if one[0] > 0}


@pytest.mark.parametrize("n_words", [8, 3], ids=["all words", "some words"])
def test_scores_of_suspects_are_as_they_are_said(
    bag: FeatureVisualization, n_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counter(token for i in range(len(bag.dataset)) for token in token_ids(bag.dataset, i).tolist())
    words = {token for token, _ in counts.most_common(n_words)}
    assert len(counts) == 8 and (MARK in words) == (n_words == 8)
    if n_words < 8:
        monkeypatch.setattr("crp.visualization.report.suspects._FEWEST_WORDS", n_words)
        monkeypatch.setattr("crp.visualization.report.suspects._LARGEST", 8 * 3 * 4 * (n_words + 1) - 1)
    found = find_text_suspects(Table.open(bag.path), ["features"], [0, 1, 2], partial(token_ids, bag.dataset), str)
    wanted = naive_scores(bag, words)
    assert found == sorted(found, key=lambda one: -one.score) and found
    least = found[0].score / 10
    assert {(one.target, one.concept) for one in found} == {key for key, (score, _) in wanted.items() if score >= least}
    for one in found:
        score, word = wanted[one.target, one.concept]
        assert one.score == pytest.approx(score) and one.where == f"on the word '{word}'"


def test_classes_that_are_too_many_are_looked_at_together(
    bag: FeatureVisualization, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = partial(find_text_suspects, Table.open(bag.path), ["features"], [0, 1, 2], partial(token_ids, bag.dataset))
    with monkeypatch.context() as context:
        context.setattr("crp.visualization.report.suspects._LARGEST", 1)
        first = ask(str)[0]
        assert (first.target, first.where) == (-1, "on the word '9'")
    monkeypatch.setattr("crp.visualization.report.suspects.FEWEST", FEWEST + 100)
    assert ask(str) == []


def test_layers_of_whole_texts_underline_no_token(bag_atlas: Path) -> None:
    pages = [(bag_atlas / "concept" / layer / "0.html").read_text(encoding="utf-8") for layer in ("features", "pooled")]
    references = [page.partition("Most relevant</h2>")[2].partition("Most active</h2>")[0] for page in pages]
    assert [one.count("strongest") for one in references] == [4, 0] and [
        one.count("<figure>") for one in references
    ] == [4, 4]
    overview = Parsed(bag_atlas / "index.html").text
    assert "pooled: its values are of a whole text, so that no token is underlined" in overview
    assert "tokens of different texts have no place in common" in overview


# --- concepts


def test_a_concept_is_switched_off_in_its_references(bag: FeatureVisualization, bag_atlas: Path) -> None:
    model, best = bag.attribution.model, top_k(Table.open(bag.path), "features", k=4, normed=bag.RelMax.abs_norm)
    before, after = [], []
    for sample, target in zip(best.sample[:, 0].tolist(), best.target[:, 0].tolist(), strict=True):
        values = model.features(model.embed(bag.dataset[sample][0][:1])).sum(1)
        without = values * torch.tensor([0.0, 1, 1, 1])
        before.append(model.out(values).softmax(1)[0, target].item())
        after.append(model.out(without).softmax(1)[0, target].item())
    wanted = f"{percent(np.mean(before))} → {percent(np.mean(after))}"
    assert wanted in Parsed(bag_atlas / "concept" / "features" / "0.html").text


def test_a_concept_has_references_of_all_kinds_and_histograms(gpt: FeatureVisualization, gpt_atlas: Path) -> None:
    table, found = Table.open(gpt.path), 0
    least = top_k(table, UPPER, normed=gpt.RelMax.abs_norm, k=2, least=True)
    for concept in range(table.n_concepts(UPPER)):
        page = (gpt_atlas / "concept" / UPPER / f"{concept}.html").read_text(encoding="utf-8")
        text = Parsed(gpt_atlas / "concept" / UPPER / f"{concept}.html").text
        assert "Most relevant" in text and "Most active" in text
        assert "Relevance: histogram" in page and "Activation: histogram" in page
        if "Most negative" in text:
            found += 1
            part = page.partition("Most negative</h2>")[2].partition("<h2>")[0]
            shown = [int(one) for one in re.findall(r'href="\.\./\.\./sample/(\d+)\.html"', part)]
            assert shown == least.sample[: len(shown), concept].tolist() and shown
            assert percent(float(least.value[0, concept])) in part and re.search(r'class="n\d+', part)
    assert found > 2


def test_where_a_concept_is_most_active_its_own_activation_is_shown(gpt: FeatureVisualization, gpt_atlas: Path) -> None:
    best = top_k(Table.open(gpt.path), UPPER, "activation", normed=gpt.ActMax.abs_norm, k=1)
    for concept in (0, 3):
        ids = gpt.dataset[int(best.sample[0, concept])][0][:1]
        data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        mask = AxisConcept(-1).mask
        heat = gpt.attribution(
            data, [{UPPER: [concept]}], AttnLRP(), mask_map=mask, start_layer=UPPER, exclude_parallel=False
        ).heatmap[0]
        page = (gpt_atlas / "concept" / UPPER / f"{concept}.html").read_text(encoding="utf-8")
        part = page.partition("Most active</h2>")[2].partition('<p class="text">')[2].partition("</p>")[0]
        kinds = re.findall(r"<span(?: class=\"([^\"]*)\")?>", part)
        steps = [round(20 * value) for value in (heat / heat.abs().max()).tolist()]
        found = [re.match(r"([pn])(\d+)", kind) for kind in kinds]
        assert [0 if one is None else int(one[2]) * (1 if one[1] == "p" else -1) for one in found] == steps


def test_the_graph_tells_where_relevance_goes(gpt: FeatureVisualization, gpt_atlas: Path) -> None:
    """The concepts below, by their shares of what flows through a concept of one text: as the engine gives them."""
    text = min(int(page.stem) for page in (gpt_atlas / "sample").glob("*.html"))
    ids = gpt.dataset[text][0][:1]
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    target = int(gpt.attribution.model(**data).logits[0, -1].argmax())
    page = (gpt_atlas / "sample" / f"{text}.html").read_text(encoding="utf-8")
    first = int(re.search(rf'<h3><a href="[^"]*concept/{UPPER}/(\d+)\.html">', page)[1])  # type: ignore[index]
    condition = {"y": Position(-1, target), UPPER: [first]}
    masks = {layer: concept.mask for layer, concept in LAYERS.items()}
    relevance = gpt.attribution(data, [condition], AttnLRP(), [LOWER], masks).relevances[LOWER]
    shares = AxisConcept(-1).attribute(relevance, layer_name=LOWER, abs_norm=True)[0]
    graph = page.partition('<svg class="graph"')[2].partition("</svg>")[0]
    below = {int(one) for one in re.findall(rf"concept/{LOWER}/(\d+)\.html", graph)}
    assert set(shares.topk(2).indices.tolist()) <= below and len(below) == 5
    assert re.search(r'<text class="word"[^>]*>&#39;\w&#39;</text>', graph), "a node shows a word"
    assert re.search(rf'aria-label="&#39;\w&#39; (\d+), {LOWER} · \1"', graph), "its link begins as it is seen"
    concept = Parsed(gpt_atlas / "concept" / UPPER / f"{first}.html").text
    assert f"Right: concepts of {LOWER} to which it hands its own." in concept


def test_a_text_and_others_are_told_apart(gpt_atlas: Path) -> None:
    page = next((gpt_atlas / "sample").glob("*.html")).read_text(encoding="utf-8")
    sections = page.split('<section class="concept">')[1:]
    places = [[one.find(word) for word in (">here<", ">sets it apart<", ">elsewhere<")] for one in sections]
    assert sections and all(min(one) >= 0 and one == sorted(one) for one in places)


# --- what is kept, and going on


def test_what_is_kept_beside_the_table_is_shown(gpt: FeatureVisualization, tmp_path: Path) -> None:
    path = shutil.copytree(gpt.path, tmp_path / "mined")
    table = Table.open(path)
    targets, counts = np.unique(table.rows().target, return_counts=True)
    of_class = int(targets[counts.argmax()])
    found = prototypes(table, UPPER, (1, 2), classes=[of_class])
    found.save(table)
    save_audit(table, found, audit_table(table, found, k=3))
    save_clusters(table, clusters(table, UPPER, of_class, n=2, n_neighbours=3), UPPER, of_class)
    fv = FeatureVisualization(gpt.attribution, gpt.dataset, LAYERS, path=path)
    folder = written(fv, tmp_path / "out", n_references=1)
    for address in (f"prototypes/{UPPER}.html", f"audit/{UPPER}.html", f"clusters/{UPPER}/{of_class}.html"):
        page = folder / address
        assert f'href="{address}"' in (folder / "index.html").read_text(encoding="utf-8")
        assert '<p class="text">' in page.read_text(encoding="utf-8")
        for href in Parsed(page).all("href"):
            assert href == "#main" or (page.parent / href).resolve().is_file(), href


def test_an_interrupted_report_goes_on(
    gpt: FeatureVisualization, gpt_atlas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, left, drawn = TextDrawer._draw_rows, [6], []

    def stop_later(self: TextDrawer, *given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        draw(self, *given)

    def count(self: TextDrawer, asked: Any, rows: Any, places: Mapping[int, Any]) -> None:
        drawn.extend(rows)
        draw(self, asked, rows, places)

    whole = contents(gpt_atlas)
    with monkeypatch.context() as context:
        context.setattr(TextDrawer, "_draw_rows", stop_later)
        with pytest.raises(KeyboardInterrupt):
            written(gpt, tmp_path / "out")
    there = {int(path.stem) for path in (tmp_path / "out" / "maps" / "texts").glob("*.json")}
    assert there
    monkeypatch.setattr(TextDrawer, "_draw_rows", count)
    assert contents(written(gpt, tmp_path / "out")) == whole
    assert drawn and not there & {row.sample for row in drawn}
    drawn.clear()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.html")}
    assert contents(written(gpt, tmp_path / "out")) == whole and drawn == []
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.html")}


def test_more_references_cost_what_is_new(
    gpt: FeatureVisualization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = TextDrawer._draw_rows, []

    def count(self: TextDrawer, asked: Any, rows: Any, places: Mapping[int, Any]) -> None:
        drawn.extend(rows)
        draw(self, asked, rows, places)

    monkeypatch.setattr(TextDrawer, "_draw_rows", count)
    written(gpt, tmp_path / "out", n_references=1)
    first = set(drawn)
    assert len(first) == len(drawn)
    drawn.clear()
    written(gpt, tmp_path / "out", n_references=3)
    assert drawn and not first & set(drawn)


def test_labels_are_compared_with_predictions_where_they_are_tokens(
    gpt: FeatureVisualization, gpt_atlas: Path, tmp_path: Path
) -> None:
    assert "labels of these texts were not what was explained" in Parsed(gpt_atlas / "index.html").text
    assert all("\N{BALLOT X}" not in page.read_text(encoding="utf-8") for page in gpt_atlas.rglob("*.html"))
    texts = Texts(texts_of_ids(6), Letters(), position="each")
    fv = FeatureVisualization(gpt.attribution, texts, {UPPER: AxisConcept(-1)}, path=tmp_path / "mined")
    fv.run(AttnLRP(), progress=False)
    folder = written(fv, tmp_path / "out", n_references=1, n_active=0)
    assert "labels of these texts" not in Parsed(folder / "index.html").text
    page = next(iter(sorted((folder / "sample").glob("*.html"))))
    label = repr(texts.word(texts[int(page.stem)][1]))
    assert re.search(rf"Predicted .*(as labelled|not {re.escape(label)})", Parsed(page).text)


def test_pages_say_what_a_dictionary_of_a_text_model_leaves_out(tmp_path: Path) -> None:
    keep = (torch.arange(8) < 3).double()
    dictionary = SimpleNamespace(encode=lambda activation: activation * keep, decode=lambda latents: latents)
    model, texts = model_of("gpt2"), Texts(texts_of_ids(6), Letters(), position=-1)
    with splice(model, UPPER, dictionary, axis=-1) as names:
        path = tmp_path / "mined"
        fv = FeatureVisualization(CondAttribution(model), texts, {names.code: AxisConcept(-1)}, path=path)
        fv.run(AttnLRP(), targets="prediction", progress=False)
        ((_, found),) = unexplained_of(fv, AttnLRP(), Table.open(path), [names.code]).items()
        folder = written(fv, tmp_path / "out", n_references=1)
    missed, whole = torch.zeros(2), torch.zeros(2)
    for ids, _ in texts:
        data = {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])}
        target = int(model(**data).logits[0, -1].argmax())
        result = CondAttribution(model)(data, [{"y": Position(-1, target)}], AttnLRP(), [UPPER])
        values = torch.stack([result.activations[UPPER].square(), result.relevances[UPPER].abs()]).detach()
        missed += values[..., 3:].sum((1, 2, 3))
        whole += values.sum((1, 2, 3))
    assert (found.activation, found.relevance) == pytest.approx((missed / whole).tolist(), rel=1e-5)
    assert found.sentence in Parsed(folder / "layer" / f"{names.code}.html").text


def test_concepts_show_the_tokens_about_the_strongest_one_of_a_long_text(
    bag: FeatureVisualization, bag_atlas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crp.visualization.report.text_drawing.FAR", 1)
    options: dict[str, Any] = {"verbose": False, "n_references": 4, "class_names": ["one", "two", "three"]}
    atlas = write_report(bag, EpsilonPlus(), tmp_path / "out", **options).parent
    note, n_long = "Of this long text, at most 1 tokens stand on either side of the strongest one.", 0
    for page in (atlas / "sample").glob("*.html"):
        short, full = ((folder / "sample" / page.name).read_text() for folder in (atlas, bag_atlas))
        (whole, *of_short), (same, *of_full) = (
            [re.findall("<span[^>]*>(.)</span>", part.partition("</p>")[0]) for part in pair]
            for pair in (
                text.partition("<section")[0].split('<p class="text">')[1:2]
                + "".join(re.findall('<div class="pair">.*?</div>', text, re.DOTALL)).split('<p class="text">')[1:]
                for text in (short, full)
            )
        )
        assert whole == same and len(of_short) == len(of_full) > 1
        assert all("".join(one) in "".join(other) for one, other in zip(of_short, of_full, strict=True))
        assert all(len(one) <= 3 and other == whole for one, other in zip(of_short, of_full, strict=True))
        assert (note in short) == (len(whole) > 2)
        n_long += note in short
    assert n_long
    assert note.partition(",")[0] not in "".join(p.read_text() for p in (bag_atlas / "sample").glob("*.html"))
