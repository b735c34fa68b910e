"""The atlas in a real browser, opened from disk: errors, requests, links, search, toggles, sizes, contrast."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CONTRAST, find_browser, visit_all
from feature_net import Images, mined
from kept_cases import keep_everything
from PIL import Image
from zennit.composites import EpsilonPlus

from crp.image.forms import draw_contour
from crp.visualization.report import Finding, make_tile, write_report
from crp.visualization.report.maps import encode_maps
from crp.visualization.report.render import Renderer
from crp.visualization.table.derived import read_kept
from crp.visualization.table.store import Table

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt-get install chromium")

NAMES = ["apple", "<script>alert(1)</script> pear", "plum"]


@pytest.fixture(scope="module")
def fv(tmp_path_factory):
    made = mined(tmp_path_factory.mktemp("mined"), Images(30))
    keep_everything(made, texts={"upper": [1.0, 0, 0, 0, 0], "<b>dots</b>": [0.0, 1, 0, 0, 1]})
    return made


def options(fv) -> dict:
    tile = make_tile(fv.dataset.data[0], fv.dataset.data[0][0], "a tile")
    finding = Finding("A finding", ["Text."], [("1 %", "of it")], [("Some", [tile])], (0, "second", 1))
    names = {("first", 1): "stripes <b>"}
    return {"class_names": NAMES, "concept_names": names, "n_references": 3, "findings": [finding], "verbose": False}


@pytest.fixture(scope="module")
def atlas(fv, tmp_path_factory) -> Path:
    return write_report(fv, EpsilonPlus(), tmp_path_factory.mktemp("atlas") / "out", **options(fv)).parent


@pytest.fixture(scope="module")
def single(fv, tmp_path_factory) -> Path:
    return write_report(fv, EpsilonPlus(), tmp_path_factory.mktemp("single") / "atlas.html", **options(fv))


def test_every_page_is_whole_and_asks_only_for_its_own_folder(browser, atlas):
    visit_all(browser, atlas)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_have_contrast_and_no_page_is_wider_than_a_phone(browser, atlas, dark):
    wanted = [
        "index.html",
        "concept/second/1.html",
        "class/0.html",
        "layer/second.html",
        "suspects.html",
        "search.html",
        "prototypes/second.html",
        "audit/second.html",
        "clusters/second/0.html",
        "meanings/second.html",
        "interventions/second.html",
        "context/second.html",
    ]
    wanted.append(f"sample/{min(int(p.stem) for p in (atlas / 'sample').iterdir())}.html")
    for page in wanted:
        browser.resize(390, 800, dark=dark)
        browser.open((atlas / page).as_uri())
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390, page
        assert browser.evaluate(CONTRAST) == [], page


def test_a_long_name_of_a_layer_stays_in_its_column(browser, atlas):
    browser.resize(1280)
    browser.open((atlas / "index.html").as_uri())
    browser.evaluate(
        "p = document.querySelector('.stratum div p'); p.textContent = 'transformer.h.0.attn.c_proj.input'"
    )
    assert browser.evaluate("p.scrollWidth <= p.clientWidth")


def test_the_toggle_shows_pictures_in_another_form_and_keeps_it(browser, atlas):
    browser.resize(1280)
    browser.open((atlas / "concept/second/1.html").as_uri())
    style = "getComputedStyle(document.querySelector('.tile.free {}')).{}"
    picture, heat = style.format(".stack>img", "visibility"), style.format(".map", "display")
    assert browser.evaluate(style.format(".map", "filter")).startswith("url(")
    browser.evaluate("document.getElementById('as-heatmap').click()")
    assert (browser.evaluate(picture), browser.evaluate(style.format(".map", "filter"))) == ("hidden", "none")
    browser.evaluate("document.getElementById('as-picture').click()")
    assert (browser.evaluate(picture), browser.evaluate(heat)) == ("visible", "none")
    browser.open((atlas / "concept/second/2.html").as_uri())
    assert browser.evaluate("document.getElementById('as-picture').checked")
    browser.evaluate("document.getElementById('as-crop').click()")
    scale = browser.evaluate(style.format(".stack", "transform"))
    assert scale.startswith("matrix(") and float(scale[7:].split(",")[0]) >= 1
    browser.evaluate("document.getElementById('as-masked').click()")


def shot_of_a_tile(
    browser, folder: Path, form: str, colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)
) -> tuple[np.ndarray, int]:
    """Pixels of a tile, and its side. Its map speaks for the concept at 16 to 32 of 64, and against it at 40 to 56."""
    relevance = np.zeros((2, 64, 64))
    relevance[1, 16:32, 16:32], relevance[1, 40:56, 40:56] = 1, -1
    (folder / "m.png").write_bytes(encode_maps(list(relevance), {}))
    Image.new("RGB", size, colour).save(folder / "p.png")
    tile = {"picture": "p.png", "maps": "m.png", "cell": 1, "cells": 2, "href": "", "crop": (0, 0, 1), "alt": "a"}
    suspect = {"here": tile, "others": [], "href": "", "label": "", "score": "", "reason": ""}
    shown = {"trail": [], "lead": "", "suspects": [suspect | {"class_name": "", "class_href": ""}]}
    renderer = Renderer(folder, "", False)
    renderer.page("index.html", "suspects.html", "x", page=shown)
    renderer.finish()
    browser.resize(1280)
    browser.open((folder / "index.html").as_uri())
    browser.evaluate(f"document.getElementById('as-{form}').click()")
    place = "(({x, y, width}) => [x, y, width])(document.querySelector('.tile').getBoundingClientRect())"
    left, top, side = (int(length) for length in browser.evaluate(place))
    browser.screenshot(folder / "shot.png")
    browser.evaluate("document.getElementById('as-masked').click()")
    pixels = np.asarray(Image.open(folder / "shot.png").convert("RGB")).astype(int)
    return pixels[top : top + side, left : left + side], side


def test_a_crop_is_the_part_that_the_page_names(browser, atlas):
    """The square of the class ``k<left>-<top>-<side>``, in hundredths of the picture, fills the tile."""
    browser.resize(1280)
    browser.open((atlas / "concept/second/3.html").as_uri())
    browser.evaluate("document.getElementById('as-crop').click()")
    script = """[...document.querySelectorAll('.free .stack')].map(one => {
        const whole = one.getBoundingClientRect(), tile = one.parentElement.getBoundingClientRect();
        const part = [tile.left - whole.left, tile.top - whole.top, tile.width];
        return [part.map(length => 100 * length / whole.width), one.className]; })"""
    found = browser.evaluate(script)
    browser.evaluate("document.getElementById('as-masked').click()")
    named = [[int(number) for number in re.search(r"k(\d+)-(\d+)-(\d+)", name).groups()] for _, name in found]
    assert any(left != top and side < 100 for left, top, side in named)
    np.testing.assert_allclose([shown for shown, _ in found], named, atol=1.5)


@pytest.mark.parametrize("file", ["out", "atlas.html"], ids=["folder", "single"])
def test_each_reference_has_its_own_heatmap_however_many_there_are(browser, tmp_path, file):
    fv = mined(tmp_path, Images(40))
    first = write_report(fv, EpsilonPlus(), tmp_path / file, layers=["second"], n_references=40, verbose=False)
    page, shown = "concept/second/1.html", ""
    if file == "out":
        address = (first.parent / page).as_uri()
    else:
        address, shown = f"{first.as_uri()}#{page}", ".page:target "
    browser.resize(1280)
    browser.open(address)
    script = """[...document.querySelectorAll("PAGE.row .map img")].map(one => {
        const map = one.getBoundingClientRect(), tile = one.parentElement.getBoundingClientRect();
        return [Math.round(map.width / tile.width), Math.round((tile.left - map.left) / tile.width)]; })"""
    places = browser.evaluate(script.replace("PAGE", shown))
    assert len(places) > 64 and places == [[len(places), place] for place in range(len(places))]


def test_masked_shows_the_relevant_part_and_whitens_the_rest(browser, tmp_path):
    pixels, side = shot_of_a_tile(browser, tmp_path, "masked", (0, 0, 0))
    grey = pixels.mean(-1)
    assert grey[24 * side // 64, 24 * side // 64] < 40, "what speaks for the concept is shown"
    assert grey[48 * side // 64, 48 * side // 64] > 220, "what speaks against it is not"
    assert grey[56 * side // 64, 8 * side // 64] > 220, "nor is the rest"


def test_contour_outlines_the_relevant_part_and_dims_the_rest(browser, tmp_path):
    """As `draw_contour` does, but for the width of a soft edge."""
    pixels, side = shot_of_a_tile(browser, tmp_path, "contour", (200, 200, 200))
    relevance = np.zeros((64, 64))
    relevance[16:32, 16:32], relevance[40:56, 40:56] = 1, -1
    wanted = np.asarray(draw_contour(torch.full((3, side, side), 200 / 255), relevance)).astype(int)
    inner = slice(4, side - 4)  # (the tile's corners are round)
    off = np.abs(pixels - wanted).max(-1)[inner, inner] > 40
    edge = (wanted[..., 0] - wanted[..., 2] > 100)[inner, inner]
    near = np.array([np.roll(edge, step, axis) for step in range(-3, 4) for axis in (0, 1)]).any(0)
    assert edge.any() and not (off & ~near).any()
    yellow = pixels[..., 0] - pixels[..., 2] > 60
    assert yellow[:, 24 * side // 64].sum() >= 2 and yellow[24 * side // 64].sum() >= 2


@pytest.mark.parametrize("size", [(64, 40), (12, 64), (63, 64)], ids=str)
def test_contour_leaves_the_margins_of_a_picture_alone(browser, tmp_path, size):
    pixels, side = shot_of_a_tile(browser, tmp_path, "contour", (200, 200, 200), size)
    across, down = (round((64 - length) / 2 / 64 * side) for length in size)
    inner = pixels[5 : side - 5, 5 : side - 5]  # (the tile's corners are round)
    beside = np.ones((side, side), bool)
    beside[max(0, down - 2) : side - down + 2, max(0, across - 2) : side - across + 2] = False
    assert (inner[beside[5 : side - 5, 5 : side - 5]] > 250).all(), "margins are white"
    of_picture = pixels[down + 5 : side - down - 5, across + 5 : side - across - 5]
    assert (np.abs(of_picture[-1] - 110).max() < 4) and (np.abs(of_picture[0] - 110).max() < 4), (
        "it is dimmed to its ends"
    )


def test_search_finds_concepts_classes_and_samples(browser, atlas, fv):
    browser.open((atlas / "search.html").as_uri() + "?q=second:3")
    found = "[...document.querySelectorAll('#results a')].map(a => [a.textContent, a.getAttribute('href')])"
    assert browser.evaluate(found)[0] == ["second · 3", "concept/second/3.html"]
    sample = f"sample {min(int(page.stem) for page in (atlas / 'sample').iterdir())}"
    fits = read_kept(Table.open(fv.path), "meanings", "second").arrays["similarity"].argmax(0).tolist().index(1)
    by_text = ("reads as “<b>dots", f"second · {fits}")
    for query, text in (("stripes", "first · 1 stripes <b>"), ("pear", NAMES[1]), (sample, sample), by_text):
        browser.evaluate(f"query.value = {query!r}; query.dispatchEvent(new Event('input'))")
        assert text in [one[0] for one in browser.evaluate(found)]
    browser.open((atlas / "index.html").as_uri())
    browser.evaluate(
        "document.querySelector('[name=q]').value = 'plum'; document.querySelector('form').requestSubmit(); 0"
    )
    while not browser.requests or "search.html?q=plum" not in " ".join(browser.requests):
        browser._next()
    assert browser.errors == []


def test_cards_are_sorted_and_keys_turn_pages(browser, atlas):
    browser.open((atlas / "layer/second.html").as_uri())
    browser.evaluate(
        "{ const s = document.querySelector('select'); s.value = 'number'; s.dispatchEvent(new Event('change')); }"
    )
    numbers = browser.evaluate("[...document.querySelectorAll('[data-number]')].map(e => +e.dataset.number)")
    assert numbers == sorted(numbers) and len(numbers) > 1
    browser.open((atlas / "concept/second/1.html").as_uri())
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: %r, bubbles: true, cancelable: true}))"
    browser.evaluate(press % "/")
    assert browser.evaluate("document.activeElement.name") == "q"
    browser._loaded = False
    browser.evaluate("document.activeElement.blur();" + press % "ArrowRight")
    while not browser._loaded:
        browser._next()
    assert browser.evaluate("location.pathname").endswith("concept/second/2.html")


def test_everything_can_be_read_without_scripts(browser, atlas):
    browser.allow_scripts(False)
    try:
        browser._loaded = False
        browser.call("Page.navigate", url=(atlas / "search.html").as_uri())
        while not browser._loaded:
            browser._next()
        document = browser.call("DOM.getDocument", depth=-1)["root"]
        text = browser.call("DOM.getOuterHTML", nodeId=document["nodeId"])["outerHTML"]
    finally:
        browser.allow_scripts(True)
    assert "concepts are found by their layer" in text and 'href="layer/second.html"' in text


def test_a_single_file_shows_one_page_at_a_time(browser, single):
    browser.resize(390, 800)
    browser.open(single.as_uri())
    assert browser.errors == [] and [one for one in browser.requests if one.startswith("file:")] == [single.as_uri()]
    shown = "[...document.querySelectorAll('.page')].filter(e => e.checkVisibility()).map(e => e.id)"
    assert browser.evaluate(shown) == ["index.html"]
    browser.evaluate("location.hash = '#concept/second/1.html'; 0")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert browser.evaluate(shown) == ["concept/second/1.html"]
    tiles = "document.getElementById('concept/second/1.html').querySelectorAll('.stack>img')"
    width = f"[...{tiles}].map(i => i.getBoundingClientRect().width)"
    assert (
        all(one > 20 for one in browser.evaluate(width))
        and browser.evaluate("document.documentElement.scrollWidth") <= 390
    )
    links = set(browser.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href').slice(1))"))
    ids = set(browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
    assert links - ids == set()
