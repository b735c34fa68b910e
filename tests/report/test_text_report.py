"""The atlas of texts: its pages, what they hold, that hostile texts stay text, and how a browser shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CONTRAST, Browser, broken_rules, find_browser, needs_axe, one_of_each_kind, visit_all
from command_cases import crp
from text_cases import Letters, model_of, texts_of_ids

from crp.attribution import CondAttribution
from crp.composites import AttnLRP
from crp.concepts import AxisConcept
from crp.image.texts import readable
from crp.outputs import Position
from crp.visualization import FeatureVisualization, Table, Texts, write_report
from crp.visualization.report import Finding
from crp.visualization.report.addresses import slug
from crp.visualization.report.drawing import Row
from crp.visualization.report.options import ReportOptions
from crp.visualization.report.text_drawing import TextDrawer
from crp.visualization.table.ranking import class_means, list_targets
from crp.wording import percent

LAYERS = {"transformer.h.0.attn.c_proj.input": AxisConcept(-1, 2), "transformer.h.1.ln_2": AxisConcept(-1)}
#: What ids stand for, as bad as can be.
WORDS = (
    "<s>", "\x00", " $x$", "<script>alert(1)</script>", '" onclick="x', "&amp;", "{{ 7*7 }}", "\u202e", "\n",
    "</p></span>", "'",
)  # fmt: skip


class Hostile(Letters):
    def decode(self, ids: list[int]) -> str:
        return "".join(WORDS[token] for token in ids)


@pytest.fixture(scope="module")
def fv(tmp_path_factory: pytest.TempPathFactory) -> FeatureVisualization:
    texts = Texts(texts_of_ids(12), Hostile(), position=-1)
    made = FeatureVisualization(CondAttribution(model_of("gpt2")), texts, LAYERS, path=tmp_path_factory.mktemp("mined"))
    made.run(AttnLRP(), targets="prediction", batch_size=6, progress=False)
    return made


def written(fv: FeatureVisualization, path: Path, **options: Any) -> Path:
    return write_report(fv, AttnLRP(), path, **{"n_references": 3, "verbose": False, **options})


@pytest.fixture(scope="module")
def atlas(fv: FeatureVisualization, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(fv, tmp_path_factory.mktemp("atlas") / "out", concept_names={(next(iter(LAYERS)), 1): "<b>one</b>"})


class Seen(HTMLParser):
    """Tags, links, and the texts of a page: the words of each, with their classes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.texts: list[list[tuple[str, str]]] = []
        self._inside = self._in_text = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.add(tag)
        assert not [name for name in known if name.startswith("on") or name == "style"]
        if known.get("href"):
            self.links.append(str(known["href"]))
        if tag == "p":
            self._in_text = known.get("class") == "text"
            self.texts += [[]] if self._in_text else []
        self._inside = tag == "span" and self._in_text
        if self._inside:
            self.texts[-1].append(("", known.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside, self._in_text = False, self._in_text and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside and self.texts and self.texts[-1]:
            word, kind = self.texts[-1][-1]
            self.texts[-1][-1] = (word + data, kind)


def test_every_page_is_there_and_links_to_pages_that_are(atlas: Path, fv: FeatureVisualization) -> None:
    folder = atlas.parent
    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    assert len([page for page in pages if page.startswith("concept/")]) == 2 + 8
    assert len([page for page in pages if page.startswith("layer/")]) == 2 and "index.html" in pages
    for page in pages:
        seen = Seen((folder / page).read_text(encoding="utf-8"))
        for link in seen.links:
            assert (folder / page).parent.joinpath(link.partition("#")[0]).resolve().is_file() or link == "#main", link
    assert len([page for page in pages if page.startswith("class/")]) == len(list_targets(Table.open(fv.path)))
    assert (folder / "suspects.html").exists() and not list(folder.rglob("*.png"))


def test_hostile_texts_and_names_stay_text(atlas: Path) -> None:
    for page in atlas.parent.rglob("*.html"):
        content = page.read_text(encoding="utf-8")
        assert not {"\x00", "\u202e"} & set(content)
        assert content.count("<script") == 1 + (page.name == "search.html")
        assert page.name == "search.html" or "<b>one</b>" not in content
        assert "49" not in re.findall(r"\{\{.*?\}\}", content)
        assert Seen(content).tags & {"img", "iframe", "object"} == set()


def test_a_text_is_coloured_by_the_relevance_of_its_tokens(atlas: Path, fv: FeatureVisualization) -> None:
    checked = 0
    for page in (atlas.parent / "sample").glob("*.html"):
        seen = Seen(page.read_text(encoding="utf-8"))
        ids = fv.dataset[int(page.stem)][0][:1]
        data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        target = int(fv.attribution.model(**data).logits[0, -1].argmax())
        heat = fv.attribution(data, [fv_condition(target)], AttnLRP()).heatmap[0]
        strengths = heat / heat.abs().max()
        words = seen.texts[0]
        assert len(words) == ids.shape[1]
        for (_, kind), strength in zip(words, strengths.tolist(), strict=True):
            step = round(abs(strength) * 20)
            assert re.findall(r"\b[pn]\d+", kind) == ([f"{'p' if strength > 0 else 'n'}{step}"] if step else [])
        assert "explained" in words[-1][1]
        checked += 1
    assert checked > 3


def fv_condition(target: int) -> dict[str, Any]:
    return {"y": Position(-1, target)}


def test_what_is_there_is_kept_and_one_file_holds_all(fv: FeatureVisualization, tmp_path: Path) -> None:
    first = written(fv, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.html")}
    assert written(fv, tmp_path / "out") == first
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.html")}
    one = written(fv, tmp_path / "one.html", layers=["transformer.h.1.ln_2"])
    content = one.read_text(encoding="utf-8")
    numbers = [len({*re.findall(rf'id="{part}/(\d+)', content)}) for part in ("sample", "class")]
    assert content.count('class="page') == 1 + 1 + 1 + 1 + 8 + sum(numbers)
    with pytest.raises(ValueError, match="texts have no maximized pictures"):
        write_report(fv, None, tmp_path / "out", n_maximized=1)


def test_what_was_drawn_of_something_else_is_drawn_again(fv: FeatureVisualization, tmp_path: Path) -> None:
    def heatmap(composite: Any, identity: str, is_drawn: bool) -> list[float]:
        drawer = TextDrawer(fv, composite, list(LAYERS), tmp_path, identity, ReportOptions())
        (job,) = drawer.files({"one": [Row(0, 3)]}, (0, 1))
        assert drawer._is_drawn(job) == is_drawn
        assert list(drawer.draw([job])) == [1]
        return drawer._found[job.rows[0]][0].tolist()

    first = heatmap(AttnLRP(), "attn_lrp", False)
    assert heatmap(AttnLRP(), "attn_lrp", True) == first
    assert heatmap(None, "gradient", False) != first


def test_a_class_shows_its_concepts_and_texts_and_findings_are_said(fv: FeatureVisualization, tmp_path: Path) -> None:
    targets = [int(target) for target in list_targets(Table.open(fv.path))]
    said = Finding(
        "<i>Copies</i>", ["It reads one token."], [("3", "heads")], concept=(targets[0], next(iter(LAYERS)), 1)
    )
    folder = written(fv, tmp_path / "out", classes=targets[:2], findings=[said], n_concepts=2).parent
    assert sorted(page.stem for page in (folder / "class").glob("*.html")) == sorted(map(str, targets[:2]))
    first = (folder / "index.html").read_text(encoding="utf-8")
    assert (
        "&lt;i&gt;Copies&lt;/i&gt;" in first and "It reads one token." in first and f"class/{targets[1]}.html" in first
    )
    facts = {layer: class_means(Table.open(fv.path), layer, normed=True) for layer in LAYERS}
    for row, target in enumerate(targets[:2]):
        page = (folder / "class" / f"{target}.html").read_text(encoding="utf-8")
        for layer, means in facts.items():
            best = np.argsort(-means.value[row], kind="stable")[:2]
            wanted = [int(concept) for concept in best if means.value[row, concept] > 0]
            found = re.findall(rf'href="\.\./concept/{slug(layer)}/(\d+)\.html"', page)
            assert list(dict.fromkeys(map(int, found))) == wanted
            assert all(percent(float(means.value[row, concept])) in page for concept in wanted)


def test_parts_are_drawn_apart_and_nothing_twice(
    fv: FeatureVisualization, atlas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    draw = TextDrawer._draw_text
    monkeypatch.setattr(TextDrawer, "_draw_text", lambda self, jobs: computed.append(len(jobs)) or draw(self, jobs))
    names = {"concept_names": {(next(iter(LAYERS)), 1): "<b>one</b>"}}
    for part in (0, 1):
        assert written(fv, tmp_path / "out", part=(part, 2), **names) == tmp_path / "out"
    assert not list((tmp_path / "out").glob("*.html"))
    n_texts = len(computed)
    written(fv, tmp_path / "out", **names)
    assert len(computed) == n_texts == len(list((atlas.parent / "sample").glob("*.html")))
    for page in atlas.parent.rglob("*.html"):
        assert page.read_bytes() == (tmp_path / "out" / page.relative_to(atlas.parent)).read_bytes()
    one = next((tmp_path / "out" / "maps" / "texts").glob("*.json"))
    one.write_text("{}")
    written(fv, tmp_path / "out", **names)
    assert len(computed) == n_texts + 1
    written(fv, tmp_path / "out", n_references=1, **{**names, "layers": ["transformer.h.1.ln_2"]})
    left = {page.stem for page in (tmp_path / "out" / "sample").glob("*.html")}
    assert left == {page.stem for page in (tmp_path / "out" / "maps" / "texts").glob("*.json")}


def test_positions_of_a_text_share_a_forward_pass(tmp_path: Path) -> None:
    texts = Texts(texts_of_ids(3), Letters(), position="each")
    fv = FeatureVisualization(CondAttribution(model_of("gpt2")), texts, LAYERS, path=tmp_path / "mined")
    fv.run(AttnLRP(), batch_size=4, progress=False)
    passes: list[int] = []
    fv.attribution.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    page = written(fv, tmp_path / "out", n_references=8, n_active=0)
    assert sum(passes) == 3
    for sample in (page.parent / "sample").glob("*.html"):
        ids, label = texts[int(sample.stem)]
        at = int((ids[-1] == 2).nonzero())
        data = {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])}
        heat = fv.attribution(data, [{"y": Position(at, label)}], AttnLRP()).heatmap[0]
        words = Seen(sample.read_text(encoding="utf-8")).texts[0]
        strengths = [re.findall(r"\b[pn](\d+)", kind) for _, kind in words]
        assert [int(found[0]) if found else 0 for found in strengths] == [
            round(20 * abs(value)) for value in (heat / heat.abs().max()).tolist()
        ]


def test_the_command_writes_pages_of_a_table_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reading.py").write_text(
        "from text_cases import Letters, model_of\n"
        "def net(): return model_of('bert')\n"
        "def letters(): return Letters()\n"
        "def words(): return [{'text': word, 'label': i} for i, word in enumerate(['abc d', 'ee', 'h fg'])]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "reading", raising=False)
    words = ["--model", "reading:net", "--data", "reading:words", "--tokenizer", "reading:letters", "--out", "table"]
    result = crp("mine", *words, "--layers", "bert.encoder.layer.0.intermediate", "--composite", "cp_lrp", "--quiet")
    assert result.exit_code == 0, result.output
    result = crp("report", "table", "--references", "2", "--quiet", "--part", "0/2")
    assert result.exit_code == 0 and not Path("table/atlas/index.html").exists(), result.output
    result = crp("report", "table", "--references", "2", "--quiet")
    assert result.exit_code == 0, result.output
    page = next(Path("table/atlas/concept").rglob("0.html")).read_text(encoding="utf-8")
    assert "for 0" in page or "for 1" in page or "for 2" in page


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    one = Browser()
    yield one
    one.close()


def test_every_page_is_whole_and_asks_only_for_its_own_folder(browser: Browser, atlas: Path) -> None:
    visit_all(browser, atlas.parent)


@needs_axe
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desktop", "dark phone"])
def test_pages_of_texts_break_no_rule_of_axe(browser: Browser, atlas: Path, width: int, dark: bool) -> None:
    pages = one_of_each_kind(atlas.parent)
    found = {}
    for page in pages:
        browser.resize(width, 900, dark=dark)
        browser.open(page.as_uri())
        if broken := broken_rules(browser):
            found[page.name] = broken
    assert found == {} and len(pages) >= 7


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_have_contrast_and_no_page_is_wider_than_a_phone(browser: Browser, atlas: Path, dark: bool) -> None:
    folders = ("", "class", "concept", "layer", "sample")
    for page in [page for folder in folders for page in sorted((atlas.parent / folder).rglob("*.html"))[:2]]:
        browser.resize(360, 800, dark=dark)
        browser.open(page.as_uri())
        assert browser.evaluate("document.documentElement.scrollWidth") <= 360, page
        assert browser.evaluate(CONTRAST) == [], page


def test_a_browser_shows_hostile_tokens_as_text(browser: Browser, atlas: Path, fv: FeatureVisualization) -> None:
    shown, places = "[...document.querySelector('p.text').children].map(e => e.textContent)", set()
    for page in (atlas.parent / "sample").glob("*.html"):
        browser.resize(1280)
        browser.open(page.as_uri())
        ids = fv.dataset[int(page.stem)][0][0].tolist()
        places |= set(ids)
        assert browser.evaluate(shown) == [readable(WORDS[token]) for token in ids]
        assert browser.evaluate("document.scripts.length") == 1
        coloured = "[...document.querySelectorAll('.text span')].map(e => getComputedStyle(e).backgroundColor)"
        assert len(set(browser.evaluate(coloured))) > 1
    assert {3, 4, 7, 8, 9} <= places, "scripts, quotes, right-to-left, new lines and tags were among them"


def test_search_finds_texts_and_tokens(browser: Browser, atlas: Path) -> None:
    found = "[...document.querySelectorAll('#results a')].map(a => a.getAttribute('href'))"
    sample = min(int(page.stem) for page in (atlas.parent / "sample").glob("*.html"))
    browser.open((atlas.parent / "search.html").as_uri() + f"?q=text+{sample}:")
    assert f"sample/{sample}.html" in browser.evaluate(found) and browser.errors == []
    browser.open((atlas.parent / "search.html").as_uri() + "?q=span")
    assert any(one.startswith("sample/") for one in browser.evaluate(found)), "by the words of a text"
