"""The atlas: what it shows is what was mined, each picture is stored once, and whatever is shown stays text."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import OrderedDict
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from feature_net import Images, make_fv, make_net, mined
from PIL import Image
from report_cases import EVIL, NAMES, Parsed, report
from torch import nn
from torchvision.ops import Permute
from zennit.composites import EpsilonPlus

from crp.composites import EpsilonPlus as OwnEpsilonPlus
from crp.concepts import AxisConcept, ChannelConcept
from crp.errors import InputError
from crp.image.colours import as_picture, resized
from crp.visualization.report import (
    Finding,
    drawing,
    make_tile,
    pages,
    picture_drawing,
    picture_rows,
    unfinished,
    write_report,
)
from crp.visualization.report.addresses import Addresses, slug
from crp.visualization.report.drawing import Row, scores
from crp.visualization.report.maps import crop_of, encode_maps, read_facts, square_map
from crp.visualization.report.options import ReportOptions
from crp.visualization.report.picture_drawing import PictureDrawer, picture_file
from crp.visualization.report.render import Renderer, SingleRenderer, _breaking, counted
from crp.visualization.report.suspects import _parts_of_pictures, find_suspects
from crp.visualization.table.ranking import class_means, top_k
from crp.visualization.table.store import Table
from crp.wording import percent


@pytest.fixture(scope="module")
def fv(tmp_path_factory):
    return mined(tmp_path_factory.mktemp("mined"))


@pytest.fixture(scope="module")
def atlas(fv, tmp_path_factory) -> Path:
    return report(fv, tmp_path_factory.mktemp("atlas") / "out")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is shown


def test_there_is_a_page_for_every_class_layer_concept_and_reference(fv, atlas):
    table = Table.open(fv.path)
    wanted = {f"class/{target}.html" for target in range(3)} | {"index.html", "suspects.html", "search.html"}
    for layer in table.layers:
        wanted |= {f"layer/{layer}.html", *(f"concept/{layer}/{i}.html" for i in range(table.n_concepts(layer)))}
        for mode in ("relevance", "activation"):
            best = top_k(table, layer, mode, k=3)
            wanted |= {f"sample/{i}.html" for i, v in zip(best.sample.flat, best.value.flat, strict=True) if v}
        least = top_k(table, layer, k=2, least=True)
        wanted |= {f"sample/{i}.html" for i, v in zip(least.sample.flat, least.value.flat, strict=True) if v < 0}
    assert {name for name in files(atlas) if name.endswith(".html")} == wanted


def test_captions_tell_right_and_wrong_predictions(fv, atlas):
    chances, kinds = fv.attribution.model(fv.dataset.data).softmax(1).detach(), set()
    pages = "".join(page.read_text() for page in (atlas / "class").glob("*.html"))
    for caption, sample in re.findall(r"<figcaption>((?:<span[^>]*>[^<]*</span>)*<span>sample (\d+)</span>)", pages):
        best, label = int(chances[int(sample)].argmax()), fv.dataset.labels[int(sample)]
        word = f"{NAMES[best]} {percent(float(chances[int(sample), best]))}</span>"
        right, wrong = f'<span class="ok">✓ {word}', f'<span>{NAMES[label]}</span><span class="bad">✗ {word}'
        assert caption.startswith(right if best == label else wrong)
        kinds.add(best == label)
    assert kinds == {True, False}


@pytest.mark.parametrize("layer", ["first", "second"])
@pytest.mark.parametrize("mode", ["relevance", "activation"])
def test_references_are_those_of_the_ranking(fv, atlas, layer, mode):
    best = top_k(Table.open(fv.path), layer, mode, k=3)
    for concept in range(best.sample.shape[1]):
        text = (atlas / f"concept/{layer}/{concept}.html").read_text()
        part = text.partition("Most relevant" if mode == "relevance" else "Most active")[2].partition("</div><h2>")[0]
        part = part.partition("<h2>")[0]
        captions = re.findall(r"<figcaption><b>(.*?)</b><span.*?>(?:✓ )?(\w+).*?<span>sample (\d+)</span>", part)
        columns = (best.value[:, concept], best.target[:, concept], best.sample[:, concept])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        assert captions == [(percent(value), NAMES[target], str(sample)) for value, target, sample in rows if value]
        cells = re.findall(r'<span class="map[^"]*"><img src="([^"]+)" class="h(\d+)-\d+"', part)
        assert len(set(cells)) == len(captions)  # (each shows its own of the heatmaps of a file)


def test_heatmaps_are_conditioned_on_class_and_concept(fv, atlas):
    best = top_k(Table.open(fv.path), "second", k=1)
    for concept in range(5):
        sample, target = int(best.sample[0, concept]), int(best.target[0, concept])
        condition = {"y": [target], "second": [concept]}
        result = fv.attribution(fv.dataset[sample][0][None], [condition], EpsilonPlus(), record_layer=["first"])
        with Image.open(atlas / f"maps/second/{concept}.png") as image:
            steps = np.asarray(image)[:, :64].astype(int) - 127
        expected = square_map(result.heatmap[0].detach().numpy(), 64)
        assert np.abs(steps / 127 - expected).max() <= 0.5 / 127 + 1e-6
        row = drawing.Drawn(*read_facts(atlas / f"maps/second/{concept}.png")["rows"][0])
        relevance = result.relevances["first"].flatten(2).sum(-1)[0]
        relevance = relevance / relevance.abs().sum()
        assert row.below == [
            [i, pytest.approx(float(relevance[i]), abs=1e-4)]
            for i in relevance.argsort(descending=True).tolist()
            if relevance[i] > 0
        ]
        assert row.before == pytest.approx(float(result.prediction.softmax(1)[0, target]), abs=1e-6)
        assert row.predicted == int(result.prediction.argmax())


def test_heatmaps_of_the_most_active_begin_at_the_concept(fv, atlas):
    best = top_k(Table.open(fv.path), "second", "activation", k=1)
    page = Parsed(atlas / "concept/second/3.html")
    assert "Where the concept is most active, whichever class it speaks for." in page.text
    relevant = len([one for one in top_k(Table.open(fv.path), "second", k=3).value[:, 3] if one])
    data = fv.dataset[int(best.sample[0, 3])][0][None]
    result = fv.attribution(data, [{"second": [3]}], EpsilonPlus(), start_layer="second")
    with Image.open(atlas / "maps/second/3.png") as image:
        steps = np.asarray(image)[:, 64 * relevant : 64 * (relevant + 1)].astype(int) - 127
    assert np.abs(steps / 127 - square_map(result.heatmap[0].detach().numpy(), 64)).max() <= 0.5 / 127 + 1e-6


def test_a_sample_shows_its_prediction_and_what_sets_its_concepts_apart(fv, atlas):
    name = min((atlas / "sample").iterdir(), key=lambda path: int(path.stem))
    sample = int(name.stem)
    data, target = fv.dataset[sample][0][None], fv.dataset[sample][1]
    file = next((atlas / "maps/samples").glob(f"{sample}.*.png"))
    known = [drawing.Drawn(*row) for row in read_facts(file)["rows"]]
    of_class = int(file.stem.split(".")[1])
    concepts = class_means_of(fv, sample, of_class)[: len(known) - 1]
    conditions = [{"y": [of_class]}, *({"y": [of_class], "second": [concept]} for concept in concepts)]
    whole, *parts = fv.attribution(data, conditions, EpsilonPlus()).heatmap.detach().numpy()
    with Image.open(file) as image:
        cells = np.asarray(image).astype(int) - 127
    assert cells.shape[1] == 64 * (1 + 2 * len(concepts))
    for number, part in enumerate(parts):
        expected = square_map(part / np.abs(part).sum() - whole / np.abs(whole).sum(), 64)
        place = 64 * (1 + len(concepts) + number)
        assert np.abs(cells[:, place : place + 64] / 127 - expected).max() <= 0.5 / 127 + 1e-6
    chances = fv.attribution(data, [{"y": [0]}], EpsilonPlus()).prediction.softmax(1)[0].detach()
    page = Parsed(name)
    for one, chance in enumerate(chances.tolist()):
        label = "\N{NO-BREAK SPACE}(label)" if one == target else ""
        assert f"{NAMES[one]}{label}{percent(chance)}" in page.text, "the most probable classes, and the label"


def class_means_of(fv, sample: int, target: int) -> list[int]:
    """Concepts of the highest layer by their share in one row."""
    for block in Table.open(fv.path).blocks("second", normed=True, samples=[sample]):
        row = block.value[block.target.tolist().index(target)]
        return [c for c in np.argsort(-row, kind="stable").tolist() if row[c] > 0]
    raise AssertionError


def test_a_sample_shows_as_many_concepts_as_are_asked_for(tmp_path):
    net = nn.Sequential(OrderedDict(first=nn.Conv2d(1, 9, 3), relu=nn.ReLU(), flat=nn.Flatten(), out=nn.Linear(144, 3)))
    for parameter in net.double().eval().parameters():
        nn.init.uniform_(parameter, 0.1, 1)
    dataset = Images()
    dataset.data.abs_()
    found = report(mined(tmp_path, dataset, net=net, layers=("first",)), tmp_path / "out", n_sample_concepts=8)
    for page in (found / "sample").iterdir():
        assert page.read_text().count('<section class="concept">') == 8


def test_a_concept_is_switched_off_to_see_what_it_does(fv, atlas):
    concept = 1
    row = drawing.Drawn(*read_facts(atlas / f"maps/second/{concept}.png")["rows"][0])
    best = top_k(Table.open(fv.path), "second", k=1)
    sample, target = int(best.sample[0, concept]), int(best.target[0, concept])
    net = make_net()
    with torch.no_grad():
        hidden = net[:4](fv.dataset[sample][0][None])
        hidden[:, concept] = 0
        after = float(net[4:](hidden).softmax(1)[0, target])
    assert row.after == pytest.approx(after, abs=1e-6)
    assert not fv.attribution.model.get_submodule("second")._forward_hooks


def test_classes_show_their_concepts_by_share(fv, atlas):
    means = class_means(Table.open(fv.path), "second")
    for target, name in enumerate(NAMES):
        page = Parsed(atlas / f"class/{target}.html")
        best = [c for c in np.argsort(-means.value[target], kind="stable") if means.value[target, c] > 0]
        share, these = percent(means.value[target, best].sum()), counted(len(best), "concept")
        assert f"{share} of the relevance of {name} is that of {these} of 5." in page.text
        assert name in page.text
        running = np.cumsum(means.value[target, best])
        for concept, so_far in zip(best, running, strict=True):
            assert f"{percent(means.value[target, concept])}; so far {percent(so_far)}" in page.text


def test_the_picture_of_a_class_is_of_the_class(fv, tmp_path):
    found = report(fv, tmp_path / "out", n_references=1)
    address_of = {
        Addresses.picture(*picture_drawing.picture_file(fv.dataset.data[i], 224)): label
        for i, label in enumerate(fv.dataset.labels)
    }
    chips = re.findall(
        r'<a class="chip large" href="class/(\d).html">.*?src="(pictures/[^"]+)"',
        (found / "index.html").read_text(),
        re.S,
    )
    assert len(chips) >= 2 and all(address_of[picture] == int(target) for target, picture in chips)


def test_mean_heatmap_weighs_the_samples_equally(fv, atlas):
    heatmaps = fv.attribution(fv.dataset.data[1::3], [{"y": [1]}], EpsilonPlus()).heatmap
    mean = (heatmaps / heatmaps.abs().sum((1, 2), keepdim=True)).sum(0)
    with Image.open(atlas / "maps/classes/1.png") as image:
        assert (
            np.abs((np.asarray(image).astype(int) - 127) / 127 - square_map(mean.numpy(), 64)).max() <= 0.5 / 127 + 1e-6
        )


def test_provenance_and_coverage(fv, atlas):
    table, page = Table.open(fv.path), Parsed(atlas / "index.html")
    for value in (*table.fingerprints.values(), table.digest):
        assert value in page.text
    assert "12 of 12 looked at, 0 skipped" in page.text and "References ranked by" in page.text


@pytest.mark.parametrize("composite", [OwnEpsilonPlus(), None, EpsilonPlus()], ids=["own", "gradient", "the same"])
def test_heatmaps_by_another_composite_than_shares_are_told(fv, tmp_path, composite):
    text = Parsed(report(fv, tmp_path / "out", composite=composite, n_references=1) / "index.html").text
    own = "the plain gradient" if composite is None else repr(composite)
    told = "with which the table was mined; heatmaps, and the concepts of lower layers, are by "
    assert (f"{told}{own}." in text) == (told in text) == (not isinstance(composite, EpsilonPlus))
    assert ("Shares, references and suspects are by zennit.composites.EpsilonPlus(), " in text) == (told in text)


def test_missing_and_skipped_samples_are_told(tmp_path):
    fv = make_fv(tmp_path, Images(broken={4: ValueError("cannot be read <script>")}))
    with pytest.warns(UserWarning, match="skipped"):
        fv.run_distributed(EpsilonPlus(), 0, 9, on_error="skip", progress=False)
    with pytest.warns(UserWarning, match="covers 9 of 12 samples"):
        page = Parsed(report(fv, tmp_path / "out") / "index.html")
    assert "8 of 12 looked at, 1 skipped" in page.text and "3 of 12 samples were not mined yet: 9 to 11" in page.text
    assert "cannot be read <script>" in page.text


def test_findings_come_first_and_link_to_their_concept(fv, tmp_path):
    tile = make_tile(fv.dataset.data[0], fv.dataset.data[0][0], "a tile")
    finding = Finding("A mark", ["It is there."], [("90 %", "of it")], [("With it", [tile])], (2, "second", 3))
    page = Parsed(report(fv, tmp_path / "out", findings=[finding]) / "index.html")
    for text in ("A mark", "It is there.", "90 %", "With it", "a tile"):
        assert text in page.text
    assert "concept/second/3.html" in page.all("href")
    with pytest.raises(KeyError, match="a finding is about"):
        report(fv, tmp_path / "no", findings=[finding._replace(concept=(2, "third", 3))])
    with pytest.raises(IndexError, match="has the concepts 0 to 4"):
        report(fv, tmp_path / "no", findings=[finding._replace(concept=(2, "second", 5))])


# ---- files


def test_no_picture_is_stored_twice_and_all_files_are_used(fv, atlas):
    content = files(atlas)
    pictures = {name: data for name, data in content.items() if name.endswith((".png", ".webp"))}
    hashes = [hashlib.sha256(data).hexdigest() for name, data in pictures.items() if name.startswith("pictures/")]
    assert len(set(hashes)) == len(hashes)
    shown = {
        (page.parent / address).resolve().relative_to(atlas).as_posix()
        for page in atlas.rglob("*.html")
        for address in Parsed(page).all("src")
    }
    assert set(pictures) - shown == set()


def test_a_second_report_draws_nothing_and_changes_nothing(fv, atlas, monkeypatch):
    before = files(atlas)
    monkeypatch.setattr(picture_rows.PictureRows, "draw", lambda *_: pytest.fail("drawn again"))
    report(fv, atlas)
    assert files(atlas) == before


def test_a_picture_that_was_cut_is_written_again(fv, tmp_path):
    tile = make_tile(fv.dataset.data[0], fv.dataset.data[0][0], "a tile")
    keywords = {"findings": [Finding("A finding", tiles=[("Some", [tile])])]}
    atlas = report(fv, tmp_path / "out", **keywords)
    before = files(atlas)
    cut = {name: content[: len(content) // 2] for name, content in before.items() if name.startswith("pictures/")}
    for name, content in cut.items():
        (atlas / name).write_bytes(content)
    report(fv, atlas, **keywords)
    after = files(atlas)
    assert len(cut) > 5 and before.keys() == after.keys()
    assert all(after[name] == before[name] for name in cut)


def assert_same_maps(folder, other):
    """Heatmaps of two atlases are the same but for rounding."""
    paths = [path for path in files(folder) if path.startswith("maps/")]
    assert paths == [path for path in files(other) if path.startswith("maps/")]
    for path in paths:
        pixels = [np.asarray(Image.open(place / path)).astype(int) for place in (folder, other)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1  # (of 255 steps, where rounding falls on the other side)
        facts = [read_facts(place / path) for place in (folder, other)]
        rows = [[[*chain(*map(np.ravel, (r[0], *r[1], r[2:5])))] for r in one.get("rows", [])] for one in facts]
        for row, row_of_other in zip(*rows, strict=True):
            assert [value is None for value in row] == [value is None for value in row_of_other]
            assert [v for v in row if v is not None] == pytest.approx(
                [v for v in row_of_other if v is not None], abs=2e-3
            )


@pytest.mark.parametrize("composite", [EpsilonPlus, OwnEpsilonPlus, None], ids=["zennit", "own", "gradient"])
@pytest.mark.parametrize("large", [False, True], ids=["of-a-layer", "of-all-layers"])
def test_rows_of_a_sample_share_a_forward_pass_and_are_drawn_the_same(fv, tmp_path, monkeypatch, composite, large):
    n_passed = {}
    for name, sharing in (("paired", 10**9), ("shared", 2)):
        monkeypatch.setattr(picture_rows, "SMALL", 1 if large and name == "shared" else 64)
        monkeypatch.setattr(picture_rows, "_SHARING_OF_SMALL", sharing)
        passed = []  # (samples in each pass that relevance is sent back through)
        hook = fv.attribution.model.register_forward_hook(
            lambda _module, data, _output, passed=passed: passed.extend([0] * len(data[0]) * torch.is_grad_enabled())
        )
        report(fv, tmp_path / name, composite=composite and composite())
        hook.remove()
        n_passed[name] = len(passed)
    assert n_passed["shared"] < 0.7 * n_passed["paired"]
    if large and composite is OwnEpsilonPlus:  # (one for each sample and for the mean of its class; and for the layers)
        assert n_passed["shared"] == 2 * len(fv.dataset) + 3
    assert_same_maps(tmp_path / "paired", tmp_path / "shared")


def interrupt(fv, folder, monkeypatch, n_parts, **options):
    """Write a report that is interrupted after so many parts of heatmaps; the rows that were drawn."""
    draw, left, drawn = picture_rows.PictureRows.draw, [n_parts], []

    def fail_later(self, rows):
        for some, part in draw(self, rows):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            drawn.extend(some)
            yield some, part

    with monkeypatch.context() as context:
        context.setattr(picture_rows.PictureRows, "draw", fail_later)
        with pytest.raises(KeyboardInterrupt):
            report(fv, folder, **options)
    return drawn


def go_on(fv, folder, monkeypatch, **options):
    """Write a report, or a part of it; the rows that were drawn."""
    draw, drawn = picture_rows.PictureRows.draw, []
    with monkeypatch.context() as context:
        context.setattr(picture_rows.PictureRows, "draw", lambda self, rows: drawn.extend(rows) or draw(self, rows))
        report(fv, folder, **options)
    return drawn


def test_an_interrupted_report_goes_on(fv, atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_drawing, "_SHARED_BY", 0)  # (each file alone, with those of its samples)
    interrupt(fv, tmp_path / "out", monkeypatch, 4)
    there = set(files(tmp_path / "out"))
    assert any(name.startswith("maps/") and name.endswith(".png") for name in there)
    drawn = go_on(fv, tmp_path / "out", monkeypatch)
    assert not any(
        Addresses(["first", "second"]).concept_maps(row.layer, row.concept) in there for row in drawn if row.layer
    )
    assert set(files(tmp_path / "out")) == set(files(atlas))
    assert_same_maps(tmp_path / "out", atlas)


@pytest.mark.parametrize("every", [0.0, 60.0], ids=["at-once", "at-the-end"])
def test_heatmaps_of_files_that_are_not_complete_are_not_drawn_again(fv, tmp_path, monkeypatch, every):
    monkeypatch.setattr(unfinished, "_EVERY", every)
    whole = report(fv, tmp_path / "whole", n_sample_concepts=0)
    # (those of whole samples, and of the first layer's, those that begin at the output)
    first = interrupt(fv, tmp_path / "out", monkeypatch, 2, n_sample_concepts=0)
    there = files(tmp_path / "out")
    assert [name for name in there if name.endswith(".unfinished.npz")]
    assert not [name for name in there if name.startswith(("maps/first", "maps/second")) and name.endswith(".png")]
    (tmp_path / "out/maps/0.unfinished.npz").write_bytes(b"broken")
    second = go_on(fv, tmp_path / "out", monkeypatch, n_sample_concepts=0)
    assert first
    assert not set(first) & set(second)
    assert set(files(tmp_path / "out")) == set(files(whole))  # (no unfinished file is left)
    assert_same_maps(tmp_path / "out", whole)


def test_no_heatmap_is_computed_twice(fv, tmp_path, monkeypatch):
    rows = go_on(fv, tmp_path / "out", monkeypatch)
    maps = chain((tmp_path / "out").glob("maps/first/*.png"), (tmp_path / "out").glob("maps/second/*.png"))
    shown = sum(len(read_facts(file)["rows"]) for file in (*maps, *(tmp_path / "out").glob("maps/samples/*.png")))
    assert len(rows) == len(set(rows)) < shown  # (a sample shows some of its concepts' heatmaps, too)


def test_parts_draw_the_rows_of_their_samples_and_no_row_twice(fv, atlas, tmp_path, monkeypatch):
    parts = [go_on(fv, tmp_path / "out", monkeypatch, part=(part, 3)) for part in (2, 0, 1)]
    samples = [{row.sample for row in rows} for rows in parts]
    assert sum(map(len, samples)) == len(set.union(*samples))
    assert all(len(rows) > sum(map(len, parts)) / 6 for rows in parts)  # (half of a third, at least)
    # (files of heatmaps that no part had all rows of are written by the last one, which draws nothing)
    assert go_on(fv, tmp_path / "out", monkeypatch) == []
    assert set(files(tmp_path / "out")) == set(files(atlas))
    assert_same_maps(tmp_path / "out", atlas)


def test_the_rows_of_a_part_that_was_not_drawn_are_drawn_at_the_end(fv, atlas, tmp_path, monkeypatch):
    first = go_on(fv, tmp_path / "out", monkeypatch, part=(0, 2))
    last = go_on(fv, tmp_path / "out", monkeypatch)
    assert first
    assert last
    assert not {row.sample for row in first} & {row.sample for row in last}
    assert_same_maps(tmp_path / "out", atlas)


def test_what_a_smaller_report_has_no_more_is_deleted(fv, tmp_path):
    report(fv, tmp_path / "out", n_references=5)
    (tmp_path / "out/notes.txt").write_text("mine")
    report(fv, tmp_path / "out", n_references=1, layers=["second"])
    names = set(files(tmp_path / "out"))
    report(fv, tmp_path / "other", n_references=1, layers=["second"])
    assert names == {*files(tmp_path / "other"), "notes.txt"}


def test_a_folder_of_something_else_is_left_alone(fv, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds 'thesis.tex', and no atlas.json. Nothing was changed"):
        report(fv, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]


@pytest.mark.parametrize("inside", ["", "below/atlas"])
def test_a_file_is_no_folder(fv, tmp_path, inside):
    (tmp_path / "thesis").write_text("x")
    with pytest.raises(InputError, match=r"thesis.* cannot be a folder, since it is, or is in, a file; give another"):
        report(fv, tmp_path / "thesis" / inside)
    assert (tmp_path / "thesis").read_text() == "x"


def test_another_model_is_refused(fv, tmp_path):
    other = make_fv(tmp_path, net=make_net(1))
    other.path, other.RelMax, other.ActMax = fv.path, fv.RelMax, fv.ActMax
    with pytest.raises(ValueError, match="was mined with another model"):
        report(other, tmp_path / "out")


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_pictures_of_several_sizes_are_drawn(tmp_path, monkeypatch, large):
    if large:  # (whose rows are with those of other samples, where a sample has few)
        monkeypatch.setattr(picture_rows, "SMALL", 1)
        monkeypatch.setattr(picture_rows, "_SHARING", 1000)

    class Uneven(Images):
        def __getitem__(self, index):
            data, label = super().__getitem__(index)
            return data[:, : 6 - index % 2], label

    net = nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(1, 4, 3),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            out=nn.Linear(4, 3),
        )
    )
    fv = make_fv(tmp_path / "mined", Uneven(), net=net.double().eval(), layers=["relu"])
    fv.run(EpsilonPlus(), 0, 12, progress=False, mixed_shapes=True)
    folder = report(fv, tmp_path / "out")
    best = top_k(Table.open(fv.path), "relu", k=3)
    assert {i % 2 for i in best.sample.flat} == {0, 1}, "references of both sizes"
    for sample in np.unique(best.sample):
        assert (folder / f"sample/{sample}.html").is_file()
    first = (folder / "index.html").read_text()
    assert "no suspects were looked for" in first and ">Suspects</a></h2>" not in first


# ---- hostile names


def test_hostile_names_stay_text_and_nothing_is_outside(tmp_path):
    layers = OrderedDict(make_net().named_children())
    evil = "layer <b>'\"& " + "y" * 280
    net = nn.Sequential(
        OrderedDict((evil if name == "second" else name, module) for name, module in layers.items())
    ).eval()
    fv = mined(tmp_path / "mined", net=net, layers={evil: ChannelConcept(), "first": ChannelConcept()})
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "a" / "out"
    finding = Finding(EVIL, [EVIL], [(EVIL, EVIL)], [], (0, evil, 0))
    names = {(evil, 0): EVIL, ("first", 1): "../../../x"}
    options = {"class_names": [EVIL, "../../x", ""], "concept_names": names, "findings": [finding]}
    report(fv, out, title=EVIL, lead=EVIL, **options)
    assert {path for path in set(tmp_path.rglob("*")) - before if not path.is_relative_to(fv.path)} == {
        tmp_path / "a",
        out,
        *out.rglob("*"),
    }
    for page in out.rglob("*.html"):
        parsed = Parsed(page)
        tags = [tag for tag, _ in parsed.elements]
        assert tags.count("script") <= 2 and "b" not in {tag for tag, at in parsed.elements if "onload" in at}
        assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
        assert not [address for address in parsed.all("href") if re.match(r"[a-z]+:", address)]
    assert EVIL in Parsed(out / "index.html").text
    single = write_report(fv, EpsilonPlus(), tmp_path / "one.html", verbose=False, n_references=1, **options)
    parsed = Parsed(single)
    assert [tag for tag, _ in parsed.elements].count("script") == 2 and EVIL in parsed.text


@pytest.mark.parametrize("name", ["a/b", "..", "", ".", "A", "é", "con<", "x" * 200, "a b", "aux", "con.0", "COM1"])
def test_slugs_are_safe_and_differ(name):
    found = slug(name)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,80}", found)
    assert not re.match(r"(aux|con|com1)\b(?!-)", found, re.IGNORECASE)  # (devices of Windows)
    assert len({slug(other) for other in (name, name + "!", name + "?", name.lower() + "#")}) == 4
    assert slug("layer4.2.relu") == "layer4.2.relu"
    assert slug("auxiliary") == "auxiliary"


# ---- single file


@pytest.mark.parametrize("layer", ["classes", "samples", "texts", "Classes", "a-part2"])
def test_no_layer_has_the_place_of_something_else(layer: str) -> None:
    found = Addresses(["a", layer])
    own = {found.layer(layer), found.concept_maps(layer, 3), found.concept_maps(layer, 3).partition(f"/{3}")[0]}
    others = {found.layer("a", 1), found.label_maps(3), "maps/classes", "maps/samples", "maps/texts"}
    assert not {address.lower() for address in own} & others
    assert found.layer("a") == "layer/a.html"


def test_a_single_file_holds_each_picture_once(fv, tmp_path):
    path = write_report(fv, EpsilonPlus(), tmp_path / "r" / "report.html", verbose=False, n_references=2)
    assert path == tmp_path / "r" / "report.html"
    assert [one.name for one in tmp_path.joinpath("r").iterdir()] == ["report.html"]
    pictures = re.findall(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", path.read_text())
    assert len(pictures) == len(set(pictures)) > 10


def test_a_report_needs_no_composite(fv, tmp_path):
    assert fv.report(tmp_path / "r.html", verbose=False, n_references=1).is_file()


# ---- options


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_references": 0}, ValueError, "n_references must be a whole number of at least 1, not 0"),
        ({"n_mean": -1}, ValueError, "n_mean must be a whole number of at least 0, not -1"),
        ({"classes": [7]}, KeyError, "no sample of class 7 was mined; the classes are"),
        ({"layers": ["third"]}, KeyError, "'third' not found in the table"),
        ({"layers": []}, ValueError, "layers must name at least one layer"),
        ({"class_names": {0: "a"}}, ValueError, r"has 1 name, and none for the classes \[1, 2\]"),
        ({"class_names": "abc"}, TypeError, "class_names must be a list of names, or a dict {class: name}, not 'abc'"),
        ({"class_names": ["a"]}, ValueError, "class_names has 1 name, and the model 3 outputs; a dict {class: name}"),
        ({"class_names": ["background", *NAMES]}, ValueError, "class_names has 4 names, and the model 3 outputs"),
    ],
    ids=["references", "mean", "class", "layer", "no layer", "no name", "a word", "few names", "many names"],
)
def test_options_are_checked(fv, tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        report(fv, tmp_path / "out", **options)


def test_tiles_of_another_size_are_refused(fv):
    with pytest.raises(ValueError, match=r"got \(1, 6, 6\) and \(3, 3\)"):
        make_tile(fv.dataset.data[0], torch.zeros(3, 3), "")
    with pytest.raises(ValueError, match=r"got \(2, 3, 6, 6\) and \(3, 6, 6\)"):
        make_tile(torch.rand(2, 3, 6, 6), torch.zeros(3, 6, 6), "")


@pytest.mark.parametrize("size", [0, "large", 2.5])
def test_tiles_have_a_size_in_pixels(fv, size):
    with pytest.raises(ValueError, match=f"size must be a whole number of at least 1, not {size!r}"):
        make_tile(fv.dataset.data[0], torch.zeros(6, 6), "", size=size)
    tile = make_tile(fv.dataset.data[0].repeat(1, 2, 1), torch.zeros(12, 6), "", size=4)
    assert [Image.open(io.BytesIO(content)).size for content in tile[:2]] == [(2, 4)] * 2


def test_tiles_are_averages_of_what_they_show():
    columns = torch.arange(12).remainder(2).double().expand(3, 12, 12)
    tile = make_tile(columns, torch.zeros(12, 12), "", size=4)
    shown = np.asarray(Image.open(io.BytesIO(tile.sample)).convert("L")).astype(int)
    assert shown.shape == (4, 4) and np.ptp(shown) < 80 and abs(shown.mean() - 127.5) < 2
    thin = make_tile(torch.rand(3, 2, 50), torch.zeros(2, 50), "", size=10)
    assert [Image.open(io.BytesIO(content)).size for content in thin[:2]] == [(10, 1)] * 2


def test_references_are_counted_by_the_relevant_ones():
    assert ReportOptions(n_references=3).counts == {"relevance": 3, "activation": 3, "negative": 2}
    given = ReportOptions(n_references=3, n_active=0, n_negative=0)
    assert given.counts == {"relevance": 3, "activation": 0, "negative": 0}


@pytest.mark.parametrize("single", [False, True], ids=["folder", "one file"])
def test_names_that_no_encoding_has_are_shown_with_a_question_mark(tmp_path, single):
    """As those of files whose names are no UTF-8."""
    footer, path = "caf\udce9.png", tmp_path / "new" / "atlas.html"
    if single:
        renderer = SingleRenderer(tmp_path, footer, False, True, path, "x")
    else:
        renderer, path = Renderer(tmp_path / "new", footer, False), tmp_path / "new" / "index.html"
    renderer.page("index.html", "suspects.html", "x", page={"trail": [], "lead": "", "suspects": []})
    assert renderer.finish() == path
    assert "caf?.png" in path.read_text(encoding="utf-8")


def test_pages_that_are_as_they_were_are_not_written(tmp_path):
    renderer, times = Renderer(tmp_path, "", False), []
    for lead in ("a", "a", "b"):
        renderer.page("index.html", "suspects.html", "x", page={"trail": [], "lead": lead, "suspects": []})
        times.append((tmp_path / "index.html").stat().st_mtime_ns)
        os.utime(tmp_path / "index.html", ns=(10**18, 10**18))
    assert [time == 10**18 for time in times] == [False, True, False]


# ---- parts


def test_a_wide_layer_is_in_parts_which_tell_what_they_leave_out(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "CARDS", 2)
    net = make_net()
    with torch.no_grad():
        net.hidden.weight[:, 2 * 9 : 3 * 9] = 0  # (nothing comes back to channel 2)
    fv = mined(tmp_path, net=net, layers=["second"])
    atlas = report(fv, tmp_path / "out", n_references=1, n_negative=0, n_mean=0, n_sample_concepts=0)
    means = class_means(Table.open(fv.path), "second")
    order = np.argsort(-(means.value * means.rows[:, None]).sum(0), kind="stable").tolist()
    for part, name in enumerate(("second", "second-part2", "second-part3")):
        text, chosen = (atlas / f"layer/{name}.html").read_text(), order[2 * part : 2 * part + 2]
        assert re.findall(r'data-number="(\d+)"', text) == [str(concept) for concept in chosen if concept != 2]
        assert ("1 concept here is relevant for no sample, and left out." in text) == (2 in chosen)
        assert re.findall(r'class="chip word"[^>]*>([^<]+)<', text) == ["1 to 2", "3 to 4", "5 to 5"]


def test_the_search_tells_shares_as_pages_do(fv, atlas):
    index = json.loads(re.search(r'id="index"[^>]*>(.*?)</script>', (atlas / "search.html").read_text())[1])
    for layer, _, _, shares in index["layers"]:
        means = class_means(Table.open(fv.path), layer)
        wanted = (means.value * means.rows[:, None]).sum(0) / means.rows.sum()
        assert list(map(percent, shares)) == list(map(percent, wanted))


def test_classes_without_a_page_have_their_names(fv, tmp_path):
    """As what is predicted for a sample of another class; they were told by their numbers."""
    atlas = report(fv, tmp_path / "out", classes=[0])
    told = " ".join(Parsed(page).text for page in atlas.rglob("*.html"))
    assert re.search(rf"✗ ({'|'.join(NAMES[1:])}) \d", told) and not re.search(r"✗ \d+ \d", told)


def test_every_link_leads_to_a_page_where_some_classes_have_none(tmp_path):
    """Suspects are of all classes."""
    atlas = report(mined(tmp_path, Images(40)), tmp_path / "out", classes=[1])
    pages = list(atlas.rglob("*.html"))
    lost = {(page.name, href) for page in pages for href in Parsed(page).all("href")
            if not (page.parent / href.partition("#")[0]).exists()}  # fmt: skip
    assert len(pages) > 9 and lost == set()
    assert "of its relevance lies" in Parsed(atlas / "suspects.html").text


def test_long_names_are_broken_between_their_parts_and_numbers_are_not():
    assert _breaking("blocks.5.attn · <b>/40.png") == "blocks.5.<wbr>attn · &lt;b&gt;/<wbr>40.<wbr>png"
    assert _breaking("12.5 % of 3.25") == "12.5 % of 3.25"


def test_a_map_keeps_the_shape_of_the_picture():
    found = square_map(np.ones((8, 16)), 32)
    assert (found[8:24] == 1).all() and (found[:8] == 0).all() and (found[24:] == 0).all()
    assert read_facts(Path("nothing.png")) is None


def test_the_colours_of_a_map_are_those_of_the_pictures(tmp_path):
    (tmp_path / "m.png").write_bytes(encode_maps([np.array([[1.0, -1.0], [0.0, 0.5]])], {"key": "k"}))
    with Image.open(tmp_path / "m.png") as image:
        pixels = np.asarray(image.convert("RGBA")).reshape(4, 4).tolist()
    assert pixels[:2] == [[204, 23, 28, 255], [33, 89, 191, 255]]
    assert pixels[2][3] == 0 and pixels[3][3] == round(255 * (64 / 127) ** 0.7)
    assert read_facts(tmp_path / "m.png") == {"key": "k"}


def test_what_was_drawn_of_something_else_is_drawn_again(fv, tmp_path):
    for identity, is_drawn in (("one model", False), ("one model", True), ("another", False)):
        drawer = PictureDrawer(fv, EpsilonPlus(), ["second"], tmp_path, identity, ReportOptions())
        (job,) = drawer.files({"maps/one.png": [Row(0, 0)]}, (0, 1))
        assert drawer.is_drawn(job) == is_drawn
        assert list(drawer.draw([job]))[-1] == 1


def test_the_mean_of_a_class_is_that_of_all_its_batches(fv, tmp_path):
    samples = [0, 3, 6]
    drawer = PictureDrawer(fv, EpsilonPlus(), ["second"], tmp_path, "", ReportOptions(batch_size=2))
    drawer.draw_mean(0, samples)
    shown = drawer.mean(0, "")
    assert shown.lines == [("mean over 3 samples", "")]
    with Image.open(tmp_path / shown.picture) as picture:
        wanted = np.mean([as_picture(fv.dataset.data[i])[..., 0] for i in samples], axis=0)
        assert np.abs(np.asarray(picture) / 255 - wanted).max() <= 0.5 / 255 + 1e-9
    heat = fv.attribution(fv.dataset.data[samples], [{"y": [0]}], EpsilonPlus()).heatmap.detach()
    mean = (heat / heat.abs().sum((1, 2), keepdim=True)).mean(0).numpy()
    with Image.open(tmp_path / shown.maps) as image:
        assert np.abs((np.asarray(image, int) - 127) / 127 - square_map(mean, 64)).max() <= 0.5 / 127 + 1e-6


def test_pages_tell_for_which_classes_a_concept_speaks(fv, atlas):
    means = class_means(Table.open(fv.path), "second")
    value, mean = means.value, (means.value * means.rows[:, None]).sum(0) / means.rows.sum()
    layer = (atlas / "layer/second.html").read_text()
    cards = dict(re.findall(r'data-number="(\d+)">(.*?)</figure>', layer, re.DOTALL))
    orders = re.findall(r'data-share="(.*?)" data-specific="(.*?)" .*? data-number="(\d+)"', layer)
    assert sorted(cards) == sorted(number for *_, number in orders) == list("01234")
    for share, specific, number in orders:
        concept = int(number)
        most = value[:, concept].argmax()
        assert f"{percent(mean[concept])}, most for {NAMES[most]}" in cards[number]
        assert float(share) == pytest.approx(mean[concept], abs=1e-6)
        assert float(specific) == pytest.approx(value[most, concept] / max(mean[concept], 1e-9), rel=1e-3, abs=1e-3)
        page = atlas / f"concept/second/{number}.html"
        text = Parsed(page).text
        order = np.argsort(-value[:, concept], kind="stable").tolist()
        best = " and ".join(NAMES[row] for row in order[:2] if value[row, concept] > 0)
        told = f"Carries {percent(mean[concept])} of the relevance of an average sample"
        assert told + (f"; most of it for {best}." if best else ".") in text
        rank = int((value[most] > value[most, concept]).sum()) + 1
        for words in (f"{percent(value[most, concept])}of the relevance of", f"#{rank} of 5for"):
            assert f"{words} {NAMES[most]}" in text
        table = page.read_text().partition("<h2>Share of the relevance</h2>")[2].partition("</table>")[0]
        assert re.findall(r'class/(\d)\.html">\w+</a>.*?class="num">(.*?)<', table) == [
            (str(row), percent(value[row, concept])) for row in order
        ]


def test_large_pictures_are_made_smaller_and_small_ones_lose_nothing():
    down, across = torch.linspace(0, 1, 160)[:, None], torch.linspace(0, 1, 80)
    whole = torch.stack([down.expand(160, 80), across.expand(160, 80), down * across])
    for picture, size, suffix, shape in (
        (whole, 100, "webp", (50, 100)),
        (whole[:, ::4], 100, "webp", (80, 40)),
        (whole[:, :60, :30], 100, "png", (30, 60)),
    ):
        content, found = picture_file(picture, size)
        with Image.open(io.BytesIO(content)) as shown:
            assert (found, shown.size) == (suffix, shape)
            pixels = np.asarray(shown.convert("RGB"), float) / 255
        wanted = resized(np.asarray(picture.mean(0)), shape[::-1])
        assert np.abs(pixels.mean(-1) - wanted).max() < (0.05 if suffix == "webp" else 0.005)


def test_a_crop_is_a_square_around_the_relevance():
    heatmap = np.zeros((100, 50))
    heatmap[80:90, 10:20] = 1
    left, top, side = crop_of(heatmap)
    assert left <= 0.35 and top <= 0.8 and left + side >= 0.45 and top + side >= 0.9 and side < 0.35
    assert crop_of(np.zeros((4, 4))) == (0, 0, 1)


def test_probabilities_are_given_only_where_they_are_some():
    outputs = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    before, predicted = scores(outputs, [1, -1])
    assert before == [pytest.approx(float(outputs.softmax(1)[0, 1])), None] and predicted == [1, 0]
    assert scores(torch.tensor([[0.2, 0.8]]), [0])[0] == [pytest.approx(0.2)]
    rounded = torch.tensor([[0.3, 0.3, 0.4]]).bfloat16()  # (whose sum is 1 to three digits)
    assert scores(rounded, [2])[0] == [float(rounded[0, 2])]
    assert scores(torch.tensor([[7.0]]), [0]) == ([7.0], [None])
    assert scores(torch.zeros(1, 2, 3), [0]) == ([None], [None])


def test_parts_of_pictures_are_called_by_their_place():
    parts, (height, width) = _parts_of_pictures("layer", 8, 12, (4, 4)), (8, 12)
    places = [(0, 0), (0, 11), (7, 0), (height - 1, width - 1), (2, 3), (5, 11), (1, 8)]
    block = SimpleNamespace(position=np.array([[row * width + column for row, column in places]]))
    assert [parts.name(cell) for cell in parts.of(block)[0].tolist()] == [
        "at the top left",
        "at the top right",
        "at the bottom left",
        "at the bottom right",
        "in row 2 of 4, column 2 of 4",
        "in row 3 of 4 right",
        "at the top, column 3 of 4",
    ]


def test_a_concept_in_one_place_of_some_samples_is_the_first_suspect(tmp_path):
    """Class 0 has a bright corner on half of its pictures; nothing else depends on the place."""
    images = Images(60)
    generator = torch.Generator().manual_seed(0)
    images.data = torch.rand(60, 1, 12, 12, generator=generator, dtype=torch.float64) * 0.1
    for i in range(60):
        row, column = torch.randint(1, 10, (2,), generator=generator).tolist()
        images.data[i, 0, row : row + 2, column : column + 2] = 1
    images.data[0::6, 0, :2, :2] = torch.eye(2, dtype=torch.float64) * 3
    parts = {"first": nn.Conv2d(1, 2, 2), "relu": nn.ReLU(), "channels_last": Permute([0, 2, 3, 1])}
    parts |= {"back": Permute([0, 3, 1, 2]), "flat": nn.Flatten(), "out": nn.Linear(242, 3)}
    net = nn.Sequential(OrderedDict(parts)).double().eval()
    with torch.no_grad():
        net.first.weight.copy_(torch.tensor([[[[1.0, -1], [-1, 1]]], [[[1.0, 1], [1, 1]]]]))
        net.first.bias.copy_(torch.tensor([-3.0, 0]))
        net.out.weight.fill_(0.1)
        net.out.weight[0, :121] = 2.0
    fv = mined(tmp_path, images, net=net, layers={"relu": ChannelConcept(), "channels_last": AxisConcept(-1)})
    first = find_suspects(Table.open(fv.path), {"relu": (11, 11)}, [0, 1, 2])[0]
    assert (first.layer, first.concept, first.target) == ("relu", 0, 0)
    assert first.inside == 1 and first.expected < 0.2 and first.rows == pytest.approx(0.5, abs=0.01)
    assert first.reason == (
        f"{percent(1.0)} of its relevance lies at the top left, where its layer has {percent(first.expected)}; "
        f"it is carried by {percent(first.rows)} of the samples"
    )
    message = r"layer 'relu' holds values at position \d+, and \d+ x \d+ positions are 0 to \d+"
    for space in ((5, 11), (2, 2), (1, 1)):  # (positions were clipped to the last row)
        with pytest.raises(ValueError, match=message):
            find_suspects(fv.path, {"relu": space}, [0, 1, 2])
    with pytest.raises(KeyError, match=r"no sample of class 7 was mined; the classes are \[0, 1, 2\]"):
        find_suspects(fv.path, {"relu": (11, 11)}, [0, 7])
    drawer = PictureDrawer(fv, EpsilonPlus(), list(fv.layer_map), tmp_path, "", ReportOptions())
    of_both = drawer.find_suspects(Table.open(fv.path), [0, 1, 2])
    assert {one._replace(layer="relu") for one in of_both if one.layer == "channels_last"} == {
        one for one in of_both if one.layer == "relu"
    }
    assert first in of_both
    assert find_suspects(fv) == of_both
    assert f"score={first.score!r}, share=" in repr(find_suspects(fv, n=1)), "numbers are plain"


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (1, 4, ["on the left", "in column 2 of 4", "in column 3 of 4", "on the right"]),
        (4, 1, ["at the top", "in row 2 of 4", "in row 3 of 4", "at the bottom"]),
        (2, 2, ["at the top left", "at the top right", "at the bottom left", "at the bottom right"]),
    ],
)
def test_places_are_told_along_the_axes_that_there_are(height: int, width: int, words: list[str]) -> None:
    cells = _parts_of_pictures("a", height, width, (height, width))
    assert [cells.name(place) for place in range(cells.n)] == words


@pytest.mark.promise("Tables", "A report that cannot be written is refused before anything is computed")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody can write to")
@pytest.mark.parametrize("name", ["absent/report.html", "absent/report", "self/report.html"])
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_computed(name):
    with pytest.raises(OSError, match="/proc/"):
        write_report(object(), None, Path("/proc") / name)
