"""The atlas of a dataset of texts: an overview, a search, a page for every class, layer, concept and reference text.

A text is shown token by token, in the colours of `crp.image`; whatever it holds is shown as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crp.errors import StateError
from crp.visualization.report.addresses import Addresses
from crp.visualization.report.class_pages import class_layers, class_page
from crp.visualization.report.first_page import finding_of
from crp.visualization.report.render import Renderer, percent
from crp.visualization.report.search import write_search
from crp.visualization.report.text_atlas import TextAtlas
from crp.visualization.table.store import Table

#: Classes or tokens in a concept's table, concepts of a layer on the overview, and texts on a class's page.
_CLASSES, _FEW, _TEXTS = 24, 4, 24


def write_texts(
    atlas: TextAtlas, renderer: Renderer, table: Table, composite: str, best: Mapping[int, Mapping[str, Any]]
) -> Path:
    """Render all pages of an atlas of texts, and tell the first."""
    _first_page(atlas, renderer, table, composite)
    for layer in atlas.facts:
        _layer_page(atlas, renderer, layer)
    for layer, concept in atlas.cells:
        _concept_page(atlas, renderer, layer, concept)
    for target in atlas.class_names:
        _class_page(atlas, renderer, target)
    for sample, target in atlas.samples.items():
        _sample_page(atlas, renderer, sample, target, best[sample])
    names = atlas.options.concept_names
    write_search(renderer, atlas.addresses, atlas.facts, atlas.class_names, atlas.sample_names, names, {})
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
        "findings": [finding_of(one, atlas.addresses, _no_pictures) for one in atlas.options.findings],
        "figures": [
            (f"{len(atlas.class_names)}", atlas.classes),
            (f"{len(atlas.facts)}", "layers"),
            (f"{len(atlas.cells)}", "concepts"),
            (f"{table.n_samples - missing} of {table.n_samples}", "texts looked at"),
        ],
        "notes": [f"{missing} of {table.n_samples} texts were not mined yet."] if missing else [],
        "layers": layers,
        "heading": atlas.classes.capitalize(),
        "classes": [(name, Addresses.label(target)) for target, name in atlas.class_names.items()],
        "provenance": [
            ("Heatmaps by", composite),
            ("Content of the index", table.digest),
            *((f"Fingerprint: {key}", value) for key, value in sorted(table.fingerprints.items())),
        ],
        "skipped": list(coverage.skipped.items())[:50],
    }
    renderer.page("index.html", "text_index.html", atlas.options.title, page=page)


def _no_pictures(content: bytes, suffix: str) -> str:
    """Findings of texts have none."""
    raise StateError(f"a {suffix} of {len(content)} bytes in an atlas of texts")


def _row(atlas: TextAtlas, layer: str, concept: int) -> dict[str, Any]:
    """A concept in a list, with its first reference."""
    share = float(atlas.facts[layer].mean[concept])
    largest = float(atlas.facts[layer].mean.max()) or 1.0
    return _listed(atlas, layer, concept, percent(share), share / largest)


def _listed(
    atlas: TextAtlas, layer: str, concept: int, line: str, width: float, target: int | None = None
) -> dict[str, Any]:
    """A concept with its first reference, of a class if there is one, and what is said of its share."""
    return {
        "label": atlas.label(layer, concept).removeprefix(f"{layer} · "),
        "href": atlas.addresses.concept(layer, concept),
        "line": line,
        "width": min(max(width, 0.0), 1.0),
        "texts": atlas.references(layer, concept, "relevance", 1, target),
    }


def _class_page(atlas: TextAtlas, renderer: Renderer, target: int) -> None:
    name, layers = atlas.class_names[target], []
    for one in class_layers(atlas.facts, target, name, atlas.options.n_concepts):
        most = max((share for _, share, _ in one.concepts), default=0.0) or 1.0
        rows = [_listed(atlas, one.layer, c, line, share / most, target) for c, share, line in one.concepts]
        layers.append({"name": one.layer, "href": atlas.addresses.layer(one.layer), "note": one.note, "rows": rows})
    samples = [sample for sample, of in atlas.samples.items() if of == target]
    page = class_page(atlas.facts, atlas.class_names, target, "texts") | {
        "layers": layers,
        "samples": [atlas.whole(sample)._replace(href=Addresses.sample(sample)) for sample in samples[:_TEXTS]],
    }
    renderer.page(Addresses.label(target), "text_class.html", f"{name} — concept atlas", page=page)


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
            (
                atlas.name(int(facts.shares.targets[row])),
                _class_address(atlas, int(facts.shares.targets[row])),
                float(shares[row]),
                max(float(shares[row]), 0.0) / largest,
            )
            for row in order
        ],
    }
    title = f"{atlas.label(layer, concept)} — concept atlas"
    renderer.page(atlas.addresses.concept(layer, concept), "text_concept.html", title, page=page)


def _class_address(atlas: TextAtlas, target: int) -> str:
    return Addresses.label(target) if target in atlas.class_names else ""


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
        "trail": [
            ("Atlas", "index.html"),
            *([(atlas.name(target), _class_address(atlas, target))] if target in atlas.class_names else []),
            (f"text {sample}", ""),
        ],
        "title": f"Why {atlas.name(target)}?" if target >= 0 else f"Text {sample}",
        "lead": f"Text {sample} of the dataset, explained for {atlas.name(target)}." if target >= 0 else "",
        "text": atlas.whole(sample),
        "concepts": concepts,
        "layers": layers,
    }
    renderer.page(Addresses.sample(sample), "text_sample.html", f"text {sample} — concept atlas", page=page)
