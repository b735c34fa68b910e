"""Pages of what is kept beside the table: they show what was found, are linked, and names in them stay text."""

from __future__ import annotations

import re

import numpy as np
import pytest
from feature_net import Images, make_fv, mined
from kept_cases import TEXTS, keep_everything
from report_cases import EVIL, NAMES, Parsed, report
from zennit.composites import EpsilonPlus

from crp.audit import Prototypes, clusters, save_clusters
from crp.visualization.report import write_report
from crp.visualization.report.kept import PAGED, changed_how
from crp.visualization.table.derived import KEPT_KINDS, KeptResult, keep_result, read_kept
from crp.visualization.table.store import Table
from crp.wording import percent

PAGES = {
    "prototypes": "prototypes/second.html",
    "audit": "audit/second.html",
    "clusters": "clusters/second/0.html",
    "meanings": "meanings/second.html",
    "interventions": "interventions/second.html",
    "context": "context/second.html",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    fv = mined(tmp_path_factory.mktemp("mined"), Images(30))
    return fv, keep_everything(fv), report(fv, tmp_path_factory.mktemp("atlas") / "out")


def links_to(page, folder):
    """Addresses within the folder to which a page links."""
    hrefs = [href.partition("#")[0] for href in Parsed(page).all("href")]
    return {(page.parent / href).resolve().relative_to(folder.resolve()).as_posix() for href in hrefs if href}


def test_every_kind_has_a_page_that_the_overview_links(found):
    _, results, folder = found
    assert set(PAGES) == set(PAGED) == set(KEPT_KINDS) - {"heatmaps", "pictures"}
    assert set(PAGES.values()) <= links_to(folder / "index.html", folder)
    text = Parsed(folder / "index.html").text
    assert "How classes are predicted" in text and "Clusters of apple" in text
    assert all("more concept" not in (folder / page).read_text() for page in PAGES.values()), "all are listed"
    parts = [f"{size} samples with more of concept {c} ({d:+.3f})" for size, (c, d) in zip(
        results["clusters"].sizes, (results["clusters"].strongest(i)[0] for i in (0, 1)), strict=True
    )]  # fmt: skip
    assert f"apple is predicted in 2 ways: {'; '.join(parts)}" in text
    for page in folder.rglob("*.html"):
        assert all((folder / address).is_file() for address in links_to(page, folder)), page
        sources = [(page.parent / one).resolve() for one in Parsed(page).all("src")]
        assert all(one.is_file() for one in sources), page


def test_prototypes_are_shown_by_their_nearest_sample_and_concepts(found):
    _, results, folder = found
    text = (folder / PAGES["prototypes"]).read_text()
    sections = text.split('<section class="way">')[1:]
    mixtures = results["prototypes"].classes
    assert len(sections) == sum(len(mixture.weights) for mixture in mixtures.values())
    place = 0
    for of_class, mixture in mixtures.items():
        assert f'href="../class/{of_class}.html">{NAMES[of_class]}</a></h2>' in text
        for i in np.argsort(-mixture.weights, kind="stable"):
            section = sections[place]
            assert f"<h3>Prototype {i}</h3><p>{percent(mixture.weights[i])} of the samples</p>" in section
            assert re.search(r'href="../sample/(\d+).html', section)[1] == str(mixture.sample[i])
            top = int(mixture.means[i].argmax())
            assert f"{top}<small>{percent(mixture.means[i].max())}</small>" in section
            more = mixture.means[i] - mixture.weights @ mixture.means
            part = section.partition("uses more than the class as a whole")[2]
            shown = re.findall(r"<span>(\d+)<small>([+-][\d.]+)</small>", part)
            order = np.argsort(-more, kind="stable")
            assert shown == [(str(c), f"{100 * more[c]:+.1f}") for c in order[:6] if more[c] > 5e-4]
            place += 1


def test_the_audit_lists_the_least_usual_samples_first(found):
    _, results, folder = found
    text = (folder / PAGES["audit"]).read_text()
    sections = text.split('<section class="way">')[1:]
    assert "30 samples were compared" in text and len(sections) == 24
    for one, section in zip(results["audit"], sections, strict=False):
        assert f'<h3><a href="../sample/{one.sample}.html">sample {one.sample}</a></h3>' in section
        assert f"<b>percentile {one.percentile:.1f}</b>" in section
        more, _, less = section.partition("less of")
        for uses, part in ((one.over, more), (one.under, less)):
            shown = re.findall(r"<span>(\d+)<small>([+\N{MINUS SIGN}][\d.]+)</small>", part)
            told = [f"{100 * use.difference:+.1f}".replace("-", "\N{MINUS SIGN}") for use in uses]
            assert shown == [(str(use.concept), words) for use, words in zip(uses, told, strict=True)]


def test_clusters_show_their_samples_and_what_sets_them_apart(found):
    _, results, folder = found
    text = (folder / PAGES["clusters"]).read_text()
    clusters = results["clusters"]
    assert f"{clusters.separation:.2f}</b><span>separation" in text and "10 samples of" in text
    for i, section in enumerate(text.split('<section class="way">')[1:]):
        assert f"<h3>Cluster {i}</h3><p>{clusters.sizes[i]} samples</p>" in section
        shown = [int(sample) for sample in re.findall(r"\.\./sample/(\d+)\.html", section)]
        assert shown == clusters.members(i)[:5].tolist()
        concept, more = clusters.strongest(i)[0]
        assert f"{concept}<small>{more:+.3f}</small>" in section
    drawing = text.partition('class="points"')[2].partition("</svg>")[0]
    assert [drawing.count(f'class="c{i}"') for i in (0, 1)] == clusters.sizes
    assert text.count("<rect x=") == len(clusters.eigenvalues)


def test_samples_of_several_classes_say_for_which_they_are_explained(tmp_path):
    fv = make_fv(tmp_path, layers=["second"])
    fv.run_distributed(EpsilonPlus(), 0, 12, targets="all", modes=["relevance"], progress=False)
    table = Table.open(fv.path)
    for target in (0, 1):
        save_clusters(table, clusters(table, "second", target, n=2, n_neighbours=3), "second", target)
    folder = report(fv, tmp_path / "out", n_references=1, n_negative=0, n_mean=0, n_sample_concepts=0)
    n_told = 0
    for target, name in enumerate(NAMES[:2]):
        page = (folder / "clusters" / "second" / f"{target}.html").read_text()
        for section in page.split('<section class="way">')[1:]:
            first, *others = [
                re.search("<h1>Why (.*)[?]", (folder / "sample" / f"{sample}.html").read_text())[1]
                for sample in re.findall(r"\.\./sample/([\d.]+)\.html", section)
            ]
            assert re.findall("explained for ([^<]*)<", section) == [first] * (first != name)
            assert set(others) <= {name}  # (those have no words beside them)
            n_told += first != name
    assert n_told
    told = "".join(page.read_text() for page in (folder / "concept" / "second").glob("*.html"))
    assert all(f"in cluster {i} of {name}<" in told for i in (0, 1) for name in NAMES[:2])


def test_a_single_cluster_is_compared_with_no_others(tmp_path):
    fv = mined(tmp_path / "mined", Images(30))
    alone = clusters(fv.path, "second", of_class=0, n=1, n_neighbours=3)
    save_clusters(fv.path, alone, "second", 0)
    page = Parsed(report(fv, tmp_path / "out") / PAGES["clusters"]).text
    concept, mean = alone.strongest(0)[0]
    assert f"{concept}{mean:+.3f}" in page and "uses more than" not in page and "1cluster" in page


def test_pages_of_prototypes_and_clusters_say_their_seed(found):
    _, results, folder = found
    assert (results["prototypes"].seed, results["clusters"].seed) == (3, 5)
    assert "Found with seed 3." in Parsed(folder / PAGES["prototypes"]).text
    assert "Found with seed 5." in Parsed(folder / PAGES["clusters"]).text


def test_what_was_kept_without_a_seed_is_shown_without_one(tmp_path):
    fv = mined(tmp_path / "mined", Images(30))
    keep_everything(fv)
    for kind, of_class in (("prototypes", None), ("clusters", 0)):
        kept = read_kept(fv.path, kind, "second", of_class)
        settings = {name: value for name, value in kept.settings.items() if name != "seed"}
        keep_result(fv.path, kind, "second", kept.arrays, settings, of_class)
    assert Prototypes.load(fv.path, "second").seed is None
    folder = report(fv, tmp_path / "out")
    assert all("seed" not in Parsed(folder / PAGES[kind]).text for kind in ("prototypes", "clusters"))


def test_meanings_are_listed_by_text_and_by_clarity(found):
    _, results, folder = found
    page = folder / PAGES["meanings"]
    meant, text = results["meanings"], page.read_text()
    for name in TEXTS:
        part = text.partition(f"<h3>{name}</h3>")[2].partition("</section>")[0]
        shown = re.findall(r"<span>(\d+)<small>(\N{MINUS SIGN}?[\d.]+)</small>", part)
        assert shown == [(str(c), f"{s:.2f}".replace("-", "\N{MINUS SIGN}")) for c, s in meant.best(name, 6)]
    rows = text.partition("By clarity")[2].split("<tr>")[2:]
    order = np.argsort(-meant.clarity, kind="stable")
    best = [list(TEXTS)[i] for i in meant.similarity.argmax(0)]
    for row, i in zip(rows, order, strict=True):
        assert f"../concept/second/{i}.html" in row and f"<td>{best[i]}</td>" in row
        assert re.findall(r'class="num">([\d.-]+)<', row) == [
            f"{scores[i]:.2f}" for scores in (meant.clarity, meant.redundancy, meant.polysemanticity)
        ]
    assert f'"texts":{{"second:0":"{best[0]}"' in (folder / "search.html").read_text(), "concepts are found by text"


def test_interventions_are_listed_by_what_the_output_loses(found):
    _, results, folder = found
    tested, text = results["interventions"], (folder / PAGES["interventions"]).read_text()
    change, relevance = tested.change.mean(0), tested.relevance.mean(0)
    rows = text.split("<tr>")[2:]
    for row, i in zip(rows, np.argsort(change, kind="stable"), strict=True):
        assert f"../concept/second/{i}.html" in row
        assert re.findall(r'class="num">([^<]+)<', row) == [f"{relevance[i]:.3g}", f"{change[i]:+.3g}"]
    assert f"<b>{tested.agreement:.2f}</b>" in text and "was switched off" in text
    assert text.partition('class="points"')[2].partition("</svg>")[0].count("<circle") == len(change)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": 0.0}, "switched off"),
        ({"scale": 2.0}, "multiplied by 2"),
        ({"scale": 1.0, "patched": True}, "patched from other samples"),
        ({"scale": 0.5, "patched": True}, "patched from other samples and multiplied by 0.5"),
    ],
)
def test_what_was_done_to_a_concept_is_told(settings, words):
    assert changed_how(KeptResult("interventions", "second", None, "", settings, {})) == words


def test_context_is_listed_by_what_is_outside_of_the_object(found):
    _, results, folder = found
    seen, text = results["context"], (folder / PAGES["context"]).read_text()
    mean, known = seen.mean, np.isfinite(seen.score)
    rows, order = text.split("<tr>")[2:], np.argsort(-np.where(known.any(0), mean, -1), kind="stable")
    assert len(rows) == known.any(0).sum() >= 3
    for row, i in zip(rows, order, strict=False):
        assert f"../concept/second/{i}.html" in row
        assert re.findall(r'class="num">([^<]+)<', row) == [percent(mean[i]), str(known[:, i].sum())]
    outside = f"{(mean > 0.5).sum()} of {len(rows)} concepts have more than half of their relevance outside"
    assert outside in Parsed(folder / "index.html").text
    histograms = [part.partition("</svg>")[0] for part in text.split('<svg class="hist"')[1:]]
    wanted = [np.count_nonzero(np.histogram(v[np.isfinite(v)], 40, (0, 1))[0]) for v in (mean, seen.score)]
    assert [drawing.count("<rect") for drawing in histograms] == wanted
    page = (folder / f"concept/second/{order[0]}.html").read_text()
    assert f"{percent(mean[order[0]])} of its relevance is outside of the object (mean of 3 samples)" in page
    assert "Outside of the object: histogram from 0 to 1" in page


def test_pages_of_concepts_and_classes_say_what_is_kept(found):
    _, results, folder = found
    mixture = results["prototypes"].classes[0]
    concept = int(mixture.means[0].argmax())
    aside = Parsed(folder / f"concept/second/{concept}.html")
    meant, tested = results["meanings"], results["interventions"]
    for text in (
        f"{percent(mixture.means[0].max())} of prototype 0 of apple",
        f"clarity {meant.clarity[concept]:.2f}; reads as “{list(TEXTS)[meant.similarity[:, concept].argmax()]}”",
        f"output {tested.change[:, concept].mean():+.3g} when it is switched off, relevance "
        f"{tested.relevance[:, concept].mean():+.3g} (mean of 3 samples)",
    ):
        assert text in aside.text
    assert set(PAGES.values()) - {PAGES["audit"], PAGES["clusters"]} <= links_to(
        folder / f"concept/second/{concept}.html", folder
    )
    text = Parsed(folder / "class/0.html").text
    shares = ", ".join(percent(weight) for weight in sorted(mixture.weights, reverse=True))
    assert f"prototypes in second: {shares} of the samples" in text
    assert f"clusters in second: {', '.join(map(str, results['clusters'].sizes))} samples" in text
    assert "How it is predicted" in text and "clusters" not in Parsed(folder / "class/1.html").text


def test_samples_that_are_shown_have_pages(found):
    _, results, folder = found
    wanted = {int(sample) for mixture in results["prototypes"].classes.values() for sample in mixture.sample}
    wanted |= {one.sample for one in results["audit"][:24]}
    assert all((folder / f"sample/{sample}.html").is_file() for sample in wanted)


def test_results_of_an_earlier_table_are_named_and_not_shown(tmp_path):
    fv = make_fv(tmp_path / "mined", Images(30))
    fv.run(EpsilonPlus(), 0, 30, batch_size=5, checkpoint=3, progress=False)
    table = Table.open(fv.path)
    keep_everything(fv)
    shards = table.shards
    table._change(shards[:-1])
    with pytest.warns(UserWarning, match="covers 15 of 30 samples"):
        folder = report(fv, tmp_path / "out")
    parsed = Parsed(folder / "index.html")
    for kind in PAGED:
        command = KEPT_KINDS[kind]
        assert f"The {kind} of layer 'second'" in parsed.text and command in parsed.text
        assert not (folder / kind).exists()
    assert "How classes are predicted" not in parsed.text
    table._change(shards)
    assert (report(fv, tmp_path / "out") / PAGES["audit"]).is_file(), "the table is as it was"
    folder = report(fv, tmp_path / "out", classes=[1], layers=["second"])
    assert not (folder / PAGES["clusters"]).exists(), "class 0 has no page"
    text = (folder / PAGES["prototypes"]).read_text()
    assert ">pear</a>" in text and ">apple</a>" not in text
    text = (folder / PAGES["audit"]).read_text()
    assert "10 samples were compared" in text and text.count('class/1.html">pear</a>') == 10
    assert 'class/0.html">' not in text and 'class/2.html">' not in text
    assert report(fv, tmp_path / "out", layers=["first"])
    assert not (folder / PAGES["audit"]).exists(), "what a smaller report has no more is deleted"


def test_many_classes_are_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("crp.visualization.report.kept.CLASSES_A_PART", 2)
    monkeypatch.setattr("crp.visualization.report.kept_pages.CLASSES_A_PART", 2)
    monkeypatch.setattr("crp.visualization.report.pages.CLASSES_A_PART", 2)
    fv = mined(tmp_path / "mined", Images(30))
    keep_everything(fv)
    folder = report(fv, tmp_path / "out")
    first, second = (folder / f"prototypes/second{part}.html" for part in ("", "-part2"))
    headings = [re.findall(r'\.html">(\w+)</a></h2>', page.read_text()) for page in (first, second)]
    assert headings == [["apple", "pear"], ["plum"]]
    assert "prototypes/second-part2.html" in links_to(folder / "class/2.html", folder)
    assert "prototypes/second-part2.html" in links_to(first, folder)


def test_hostile_names_stay_text(tmp_path):
    fv = mined(tmp_path / "mined", Images(30))
    keep_everything(fv, texts={EVIL: [1.0, 0, 0, 0, 1], "</script><b>": [0.0, 1, 0, 0, 0]})
    table = Table.open(fv.path)
    keep_result(table, "meanings", "first", Meant(4), {"texts": [EVIL]})
    names = {"class_names": [EVIL, "../../x", ""], "concept_names": {("second", 1): EVIL}}
    folder = report(fv, tmp_path / "out", **names)
    for page in folder.rglob("*.html"):
        parsed = Parsed(page)
        assert [tag for tag, _ in parsed.elements].count("script") <= 2
        assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
        assert not [address for address in parsed.all("href") if re.match(r"[a-z]+:", address)]
    for page in PAGES.values():
        assert EVIL in Parsed(folder / page).text, page
    single = write_report(fv, EpsilonPlus(), tmp_path / "one.html", verbose=False, n_references=1, **names)
    parsed = Parsed(single)
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    ids = set(parsed.all("id"))
    assert {href[1:] for href in parsed.all("href") if href.startswith("#")} <= ids


class Meant(dict):
    """Arrays of meanings of so many concepts."""

    def __init__(self, n: int) -> None:
        ones = {name: np.ones(n) for name in ("clarity", "redundancy", "polysemanticity")}
        super().__init__(concept=np.arange(n), similarity=np.ones((1, n)), **ones)
