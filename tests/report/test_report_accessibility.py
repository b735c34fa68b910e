"""Whether everybody can use the atlas: axe-core's rules, the keyboard, and what people ask of their system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from browser import Browser, broken_rules, find_browser, needs_axe, one_of_each_kind
from feature_net import Images, mined
from zennit.composites import EpsilonPlus

from crp.visualization.report import Finding, make_tile, write_report
from crp.visualization.report.explained import ExplainedConcept, ExplainedGraph, ExplainedPicture, write_explained

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fv = mined(tmp_path_factory.mktemp("mined"), Images(30))
    tile = make_tile(fv.dataset.data[0], fv.dataset.data[0][0], "a tile")
    finding = Finding("A finding", ["Text."], [("1 %", "of it")], [("Some", [tile])], (0, "second", 1))
    folder = tmp_path_factory.mktemp("atlas") / "out"
    names = {"class_names": ["apple", "pear", "plum"], "findings": [finding], "n_references": 3, "verbose": False}
    return write_report(fv, EpsilonPlus(), folder, **names).parent


@needs_axe
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desktop", "dark phone"])
def test_no_rule_of_axe_is_broken(browser: Browser, atlas: Path, width: int, dark: bool) -> None:
    found = {}
    for page in one_of_each_kind(atlas):
        browser.resize(width, 900, dark=dark)
        browser.open(page.as_uri())
        if violations := broken_rules(browser):
            found[page.relative_to(atlas).as_posix()] = violations
    assert found == {}
    assert len(one_of_each_kind(atlas)) >= 7


def press(browser: Browser, key: str) -> None:
    codes = {"Tab": 9, "Enter": 13, "ArrowRight": 39}
    for kind in ("keyDown", "keyUp"):
        text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)


def test_the_keyboard_reaches_everything(browser: Browser, atlas: Path) -> None:
    browser.resize(1280)
    browser.open((atlas / "concept/second/1.html").as_uri())
    browser.call("Page.bringToFront")
    focus = "(e => [e.tagName, e.textContent.trim(), e.getBoundingClientRect().left])(document.activeElement)"
    press(browser, "Tab")
    tag, text, left = browser.evaluate(focus)
    assert (tag, text) == ("A", "To the content") and left >= 0, "the first stop leads past the navigation, and is seen"
    wanted = browser.evaluate("document.querySelectorAll('a[href], input:not([type=radio]), select, summary').length")
    seen = set()
    place = "[...document.querySelectorAll('*')].indexOf(document.activeElement)"
    mark = f"document.activeElement === document.body ? -1 : {place}"
    for _ in range(2 * wanted):
        seen.add(browser.evaluate(mark))
        outlined = "getComputedStyle(document.activeElement.closest('label') || document.activeElement).outlineStyle"
        if browser.evaluate(mark) >= 0:
            assert browser.evaluate(outlined) == "solid", browser.evaluate(focus)
        press(browser, "Tab")
    assert len(seen - {-1}) == wanted + 1, "each link and field, and the choice of forms once"
    browser.evaluate("document.getElementById('as-masked').focus()")
    press(browser, "ArrowRight")
    assert browser.evaluate("document.getElementById('as-picture').checked"), "the arrows choose a form"
    browser.evaluate("document.getElementById('as-masked').click()")


def test_landmarks_and_languages_are_there(browser: Browser, atlas: Path) -> None:
    for page in one_of_each_kind(atlas):
        browser.open(page.as_uri())
        one_each = "['header', 'main', 'footer', 'h1'].map(tag => document.querySelectorAll(tag).length)"
        assert browser.evaluate(one_each) == [1, 1, 1, 1], page
        assert browser.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize(("wish", "seconds"), [("reduce", "0s"), ("no-preference", "0.15s")])
def test_nothing_moves_for_those_who_do_not_want_it(browser: Browser, atlas: Path, wish: str, seconds: str) -> None:
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": wish}])
    browser.open((atlas / "index.html").as_uri())
    assert browser.evaluate("getComputedStyle(document.querySelector('.tile')).transitionDuration") == seconds


def test_a_printed_page_has_no_navigation(browser: Browser, atlas: Path) -> None:
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    browser.open((atlas / "index.html").as_uri())
    assert not browser.evaluate("document.querySelector('header.top').checkVisibility()")
    assert browser.evaluate("document.querySelector('main').checkVisibility()")
    browser.call("Emulation.setEmulatedMedia", media="", features=[])


@needs_axe
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desktop", "dark phone"])
def test_the_page_of_one_picture_breaks_no_rule(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    heat = torch.linspace(-1, 1, 64).reshape(8, 8)
    columns = [{"y": ("pear", None)}, {("Conv2", 1): ("Conv2 · 1", heat), ("Conv2", 4): ("Conv2 · 4", -heat)}]
    graph = ExplainedGraph(columns, {("y", ("Conv2", 1)): 0.6, ("y", ("Conv2", 4)): -0.2}, ["Conv2"])
    concepts = [ExplainedConcept("1", 0.6, heat), ExplainedConcept("4", -0.2, -heat)]
    shown = ExplainedPicture(
        "a.png", torch.rand(3, 8, 8), heat, "pear", [("pear", 0.9), ("plum", 0.1)], "Predicted pear", "EpsilonPlus",
        "Net", "Conv2", concepts, graph,
    )  # fmt: skip
    browser.resize(width, 900, dark=dark)
    browser.open(write_explained(shown, tmp_path / "why.html").as_uri())
    assert broken_rules(browser) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # (names of layers are case-sensitive)
    assert browser.evaluate("getComputedStyle(document.querySelector('h2 .as-is')).textTransform") == "none"
