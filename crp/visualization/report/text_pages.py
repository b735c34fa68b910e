"""The atlas of a dataset of texts: an overview, and a page for every layer, concept and reference text.

A text is shown token by token, in the colours of `crp.image`; whatever it holds is shown as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm
from zennit.core import Composite

from crp.image.texts import TextHeatmap, readable
from crp.visualization.feature import FeatureVisualization
from crp.visualization.report.addresses import Addresses
from crp.visualization.report.facts import LayerFacts, References
from crp.visualization.report.options import ReportOptions
from crp.visualization.report.render import TONES, Renderer, percent
from crp.visualization.table.store import Table
from crp.visualization.text_references import TextRow, read_text, text_heatmaps, text_of

#: Tokens on either side of the strongest one, in a window.
REACH = 8
#: Classes or tokens in a concept's table, and concepts of a layer on the overview.
_CLASSES, _FEW = 24, 4


class _Cell(NamedTuple):
    """A reference of a concept: the text, for which class or token, and how much."""

    layer: str
    concept: int
    sample: int
    target: int


class ShownText(NamedTuple):
    """A text on a page.

    Attributes
    ----------
    tokens : list of (str, str)
        Each with the classes of its style.
    href : str
        Page of the text; empty on that page itself.
    value, note : str
        Written beside it.
    """

    tokens: list[tuple[str, str]]
    href: str = ""
    value: str = ""
    note: str = ""


class TextAtlas:
    """What the pages of an atlas of texts show.

    Parameters
    ----------
    fv : FeatureVisualization
        Of a dataset of texts.
    composite : zennit Composite, or None for the plain gradient
    facts : dict of str to LayerFacts
        In the order of the model.
    cells : dict of (layer, concept) to References
    class_names : mapping of int to str
        Of classifiers; tokens are called by their words.
    options : ReportOptions

    Raises
    ------
    ValueError
        If findings or classes are given, which have no page here, or only a part is to be drawn.
    """

    def __init__(
        self,
        fv: FeatureVisualization,
        composite: Composite | None,
        facts: Mapping[str, LayerFacts],
        cells: Mapping[tuple[str, int], References],
        class_names: Mapping[int, str],
        options: ReportOptions,
    ) -> None:
        if options.findings or options.classes is not None:
            raise ValueError("findings and classes have no pages in an atlas of texts; leave them out")
        if options.part is not None:
            raise ValueError("an atlas of texts is written by one process: leave out part (--workers, --part)")
        self.fv, self.composite, self.facts, self.options = fv, composite, facts, options
        self.addresses = Addresses(list(facts))
        self._names = class_names
        self._heat: dict[_Cell | int, Tensor] = {}
        self.cells = cells
        self.samples: dict[int, int] = {}
        for references in self.cells.values():
            for reference in references.samples():
                self.samples.setdefault(reference.sample, reference.target)

    def name(self, target: int) -> str:
        """Name of a class, or the word of a token."""
        texts = self.fv.texts
        if texts is not None and texts.position is not None and target >= 0:
            return repr(readable(texts.word(target)))
        return self._names.get(target, str(target))

    def label(self, layer: str, concept: int) -> str:
        """What a concept is called."""
        own = self.options.concept_names.get((layer, concept), "")
        return f"{layer} · {concept}{f' {own}' if own else ''}"

    def draw(self, best: Mapping[int, Mapping[str, Sequence[tuple[int, float]]]], **bar: Any) -> None:
        """Compute all heatmaps: those of a text share a forward pass."""
        wanted: dict[int, list[_Cell]] = {sample: [] for sample in self.samples}
        for (layer, concept), references in self.cells.items():
            for one in references.samples():
                wanted[one.sample].append(_Cell(layer, concept, one.sample, one.target))
        top = list(self.facts)[-1]
        for sample, target in self.samples.items():
            few = best[sample].get(top, [])[: self.options.n_sample_concepts]
            wanted[sample] += [_Cell(top, concept, sample, target) for concept, _ in few]
        for sample, cells in tqdm(wanted.items(), desc="Heatmaps", **bar):
            asked = read_text(self.fv.dataset, sample, self.fv.device)
            cells = [cell for cell in dict.fromkeys(cells) if cell.target >= 0]
            rows = [TextRow((cell.target,), cell.layer, cell.concept) for cell in cells]
            target = self.samples[sample]
            rows += [TextRow((target,))] if target >= 0 else []
            if not rows:
                continue
            found = text_heatmaps(
                self.fv.attribution, asked, rows, self.fv.layer_map, self.composite, self.options.batch_size
            )
            self._heat |= dict(zip(cells, found, strict=False))
            if target >= 0:
                self._heat[sample] = found[-1]

    def whole(self, sample: int) -> ShownText:
        """A text with the relevance of the class or token that it is shown for."""
        return ShownText(_tokens(text_of(self.fv.dataset, sample, self._heat.get(sample))))

    def through(self, layer: str, concept: int, sample: int, target: int) -> ShownText:
        """A text with the relevance that flows through a concept."""
        heat = self._heat.get(_Cell(layer, concept, sample, target))
        return ShownText(_tokens(text_of(self.fv.dataset, sample, heat)))

    def references(self, layer: str, concept: int, mode: str, n: int | None = None) -> list[ShownText]:
        """Windows about the strongest tokens of a concept's references."""
        facts, chosen = self.facts[layer], self.cells[layer, concept][mode == "activation"]
        found = facts.relevant if mode == "relevance" else facts.active
        assert found is not None
        normed = (self.fv.RelMax if mode == "relevance" else self.fv.ActMax).abs_norm
        places = list(zip(found.sample[:, concept].tolist(), found.target[:, concept].tolist(), strict=True))
        shown = []
        for one in chosen[:n]:
            at = int(found.position[places.index((one.sample, one.target)), concept])
            heat = self._heat.get(_Cell(layer, concept, one.sample, one.target))
            window = text_of(self.fv.dataset, one.sample, heat, at).window(REACH)
            value = percent(one.value) if normed else f"{one.value:.3g}"
            note = f"for {self.name(one.target)}" if one.target >= 0 else ""
            shown.append(ShownText(_tokens(window), Addresses.sample(one.sample), value, note))
        return shown


def _tokens(text: TextHeatmap) -> list[tuple[str, str]]:
    """Words of a text, each with the classes of its style."""
    found = []
    for place, (word, strength) in enumerate(zip(text.words, text.strengths.tolist(), strict=True)):
        step = round(abs(strength) * TONES)
        kinds = [f"{'p' if strength > 0 else 'n'}{step}"] if step else []
        kinds += ["special"] * (place in text.special) + ["strongest"] * (place == text.strongest)
        kinds += ["explained"] * (place == text.explained)
        found.append((readable(word), " ".join(kinds)))
    return found


def write_texts(
    atlas: TextAtlas, renderer: Renderer, table: Table, composite: str, best: Mapping[int, Mapping[str, Any]]
) -> Path:
    """Render all pages of an atlas of texts, and tell the first."""
    _first_page(atlas, renderer, table, composite)
    for layer in atlas.facts:
        _layer_page(atlas, renderer, layer)
    for layer, concept in atlas.cells:
        _concept_page(atlas, renderer, layer, concept)
    for sample, target in atlas.samples.items():
        _sample_page(atlas, renderer, sample, target, best[sample])
    return renderer.finish()


def _first_page(atlas: TextAtlas, renderer: Renderer, table: Table, composite: str) -> None:
    coverage = table.coverage()
    missing = sum(stop - start for start, stop in coverage.missing)
    layers = []
    for layer in reversed(list(atlas.facts)):
        order = np.argsort(-atlas.facts[layer].mean, kind="stable")[:_FEW].tolist()
        rows = [_row(atlas, layer, concept) for concept in order]
        layers.append({"name": layer, "href": atlas.addresses.layer(layer), "rows": rows})
    page = {
        "title": atlas.options.title,
        "lead": atlas.options.lead,
        "figures": [
            (f"{len(atlas.facts)}", "layers"),
            (f"{len(atlas.cells)}", "concepts"),
            (f"{table.n_samples - missing} of {table.n_samples}", "texts looked at"),
        ],
        "notes": [f"{missing} of {table.n_samples} texts were not mined yet."] if missing else [],
        "layers": layers,
        "provenance": [
            ("Heatmaps by", composite),
            ("Content of the index", table.digest),
            *((f"Fingerprint: {key}", value) for key, value in sorted(table.fingerprints.items())),
        ],
        "skipped": list(coverage.skipped.items())[:50],
    }
    renderer.page("index.html", "text_index.html", atlas.options.title, page=page)


def _row(atlas: TextAtlas, layer: str, concept: int) -> dict[str, Any]:
    """A concept in a list, with its first reference."""
    share = float(atlas.facts[layer].mean[concept])
    return {
        "label": atlas.label(layer, concept).removeprefix(f"{layer} · "),
        "href": atlas.addresses.concept(layer, concept),
        "share": share,
        "width": min(max(share, 0.0) / (float(atlas.facts[layer].mean.max()) or 1.0), 1.0),
        "texts": atlas.references(layer, concept, "relevance", 1),
    }


def _layer_page(atlas: TextAtlas, renderer: Renderer, layer: str) -> None:
    order = np.argsort(-atlas.facts[layer].mean, kind="stable").tolist()
    page = {
        "trail": [("Atlas", "index.html"), (layer, "")],
        "title": layer,
        "rows": [_row(atlas, layer, concept) for concept in order],
    }
    renderer.page(atlas.addresses.layer(layer), "text_layer.html", f"{layer} — concept atlas", page=page)


def _concept_page(atlas: TextAtlas, renderer: Renderer, layer: str, concept: int) -> None:
    facts = atlas.facts[layer]
    shares = facts.shares.value[:, concept]
    largest = float(np.abs(shares).max(initial=0.0)) or 1.0
    order = np.argsort(-shares, kind="stable")[:_CLASSES].tolist()
    turns = [
        (str(other), atlas.addresses.concept(layer, other)) if 0 <= other < facts.n_concepts else None
        for other in (concept - 1, concept + 1)
    ]
    groups = [("Most relevant", "relevance"), *([] if facts.active is None else [("Most active", "activation")])]
    page = {
        "trail": [("Atlas", "index.html"), (layer, atlas.addresses.layer(layer)), (str(concept), "")],
        "before": turns[0],
        "after": turns[1],
        "title": atlas.label(layer, concept),
        "lead": f"Carries {percent(float(facts.mean[concept]))} of the relevance of an average text.",
        "rows": [(title, texts) for title, mode in groups if (texts := atlas.references(layer, concept, mode))],
        "classes": [
            (atlas.name(int(facts.shares.targets[row])), float(shares[row]), max(float(shares[row]), 0.0) / largest)
            for row in order
        ],
    }
    title = f"{atlas.label(layer, concept)} — concept atlas"
    renderer.page(atlas.addresses.concept(layer, concept), "text_concept.html", title, page=page)


def _sample_page(
    atlas: TextAtlas, renderer: Renderer, sample: int, target: int, best: Mapping[str, Sequence[tuple[int, float]]]
) -> None:
    top, few = list(atlas.facts)[-1], atlas.options.n_sample_concepts
    concepts = [
        {
            "label": atlas.label(top, concept),
            "href": atlas.addresses.concept(top, concept),
            "share": share,
            "text": atlas.through(top, concept, sample, target),
        }
        for concept, share in best.get(top, [])[:few]
    ]
    layers = []
    for layer in reversed(list(atlas.facts)[:-1]):
        most = max((share for _, share in best.get(layer, [])), default=0.0) or 1.0
        shown = [
            (atlas.label(layer, c).removeprefix(f"{layer} · "), atlas.addresses.concept(layer, c), s, max(s, 0) / most)
            for c, s in best.get(layer, [])
        ]
        layers.append({"name": layer, "href": atlas.addresses.layer(layer), "rows": shown})
    page = {
        "trail": [("Atlas", "index.html"), (f"text {sample}", "")],
        "title": f"Why {atlas.name(target)}?" if target >= 0 else f"Text {sample}",
        "lead": f"Text {sample} of the dataset, explained for {atlas.name(target)}." if target >= 0 else "",
        "text": atlas.whole(sample),
        "concepts": concepts,
        "layers": layers,
    }
    renderer.page(Addresses.sample(sample), "text_sample.html", f"text {sample} — concept atlas", page=page)
