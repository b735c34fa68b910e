"""Content of the overview."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from crp.visualization.report.addresses import Addresses
from crp.visualization.report.options import Finding
from crp.visualization.report.pages import FEW, Atlas
from crp.visualization.report.tiles import AnyShown
from crp.visualization.table.recipe import tell_part
from crp.visualization.table.store import Table
from crp.wording import counted, first_few, percent

#: Suspects on the overview, and the number of classes up to which each has a picture there.
SUSPECTS, PICTURED = 7, 60


def first_page(atlas: Atlas, table: Table, composite: str, mark: str, kept: Sequence[dict[str, Any]]) -> None:
    """Render the overview; ``kept`` are links to what is kept beside the table."""
    coverage = table.coverage()
    n_missing = sum(stop - start for start, stop in coverage.missing)
    seen = table.n_samples - n_missing - len(coverage.skipped)
    word = atlas.drawer.sample_word
    n_concepts = sum(one.n_concepts for one in atlas.facts.values())
    layers = []
    for layer in reversed(list(atlas.facts)):
        mean = atlas.facts[layer].mean
        order = np.argsort(-mean, kind="stable")[: 2 * FEW].tolist()
        tiles = [
            tile._replace(value=str(concept), lines=[(percent(float(mean[concept])), "")])
            for concept in order[: 2 * FEW if atlas.drawer.pictures else FEW]
            for tile in atlas.best(layer, concept)
        ]
        address = atlas.addresses.layer(layer)
        layers.append({"name": layer, "href": address, "n": atlas.facts[layer].n_concepts, "tiles": tiles})
    fv = atlas.drawer.fv
    ranked = f"{fv.RelMax.max_target} over positions, {'shares' if fv.RelMax.abs_norm else 'values'}"
    page = {
        "title": atlas.options.title,
        "lead": atlas.options.lead,
        "findings": [_finding_of(one, atlas.addresses, atlas.drawer.store) for one in atlas.options.findings],
        "figures": [
            (f"{len(atlas.class_names)}", atlas.drawer.class_word),
            counted(len(atlas.facts), "layer").split(" "),
            counted(n_concepts, "concept").split(" "),
            (f"{seen} of {table.n_samples}", f"{word}s looked at"),
        ],
        "notes": _notes(atlas, table, n_missing) + _other_composite(table, composite, mark),
        "suspects": _suspects(atlas),
        "suspects_lead": atlas.drawer.suspects_in_short,
        "class_word": atlas.drawer.class_word.capitalize(),
        "sample_word": word,
        "missing": atlas.drawer.missing(table),
        "kept": kept,
        "layers": layers,
        "classes": [
            (name, Addresses.label(target), _class_tile(atlas, target)) for target, name in atlas.class_names.items()
        ],
        "provenance": [
            *_origin(table.header.recipe),
            (f"{word.capitalize()}s", f"{seen} of {table.n_samples} looked at, {len(coverage.skipped)} skipped"),
            ("Layers", ", ".join(atlas.facts)),
            ("References ranked by", ranked),
            ("Heatmaps by", composite),
            ("Versions", ", ".join(f"{key} {value}" for key, value in sorted(table.versions.items()))),
        ],
        "fingerprints": [
            ("Content of the table", table.digest),
            *((f"Fingerprint: {key}", value) for key, value in sorted(table.fingerprints.items())),
        ],
        "skipped": sorted(coverage.skipped.items()),
    }
    atlas.renderer.page("index.html", "index.html", atlas.options.title, page=page)


def _notes(atlas: Atlas, table: Table, n_missing: int) -> list[str]:
    """What is to be said of the table as a whole."""
    notes = []
    if missing := table.coverage().missing:
        ranges = first_few([f"{start} to {stop - 1}" for start, stop in missing], 20, "ranges")
        n, word = table.n_samples, atlas.drawer.sample_word
        notes.append(f"{n_missing} of {n} {word}s were not mined yet: {ranges}.")
    if any(mark.startswith("(") for mark in table.header.probes.values()):
        notes.append("The data differs from reading to reading: what is shown is not exactly what was mined.")
    if table.header.recipe.get("mixed_shapes") and atlas.drawer.pictures:
        notes.append("Samples are of several shapes, so that places cannot be compared: no suspects were looked for.")
    return [*notes, *atlas.kept.notes]


def _other_composite(table: Table, composite: str, mark: str) -> list[str]:
    """That heatmaps are by another composite, of this fingerprint, than the table was mined with."""
    if table.fingerprints.get("composite") in (None, mark):
        return []
    mined = tell_part(table.header.recipe, "composite") or "another composite"
    return [
        f"Shares, references and suspects are by {mined}, with which the table was mined; heatmaps, and the concepts "
        f"of lower layers, are by {composite}."
    ]


def _origin(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was mined, in words, as far as the table says it."""
    rows = [("Model", tell_part(recipe, "model")), ("Data", tell_part(recipe, "dataset"))]
    return [row for row in (*rows, ("Preparation", str(recipe.get("preprocess") or ""))) if row[1]]


def _class_tile(atlas: Atlas, target: int) -> AnyShown | None:
    """Picture of a class: the reference in it of a concept of the highest layer, the strongest that has one there."""
    if len(atlas.class_names) > PICTURED or not atlas.drawer.pictures:
        return None
    layer = list(atlas.facts)[-1]
    order = np.argsort(-atlas.facts[layer].of_class(target), kind="stable").tolist()
    here = (c for c in order if any(one.target == target for one in atlas.cells[layer, c].relevant))
    concept = next(here, None)
    tile = None if concept is None else atlas.first(layer, concept, target)
    return None if tile is None else tile._replace(href="")


def _suspects(atlas: Atlas) -> list[AnyShown]:
    found = []
    for one in atlas.suspects[:SUSPECTS]:
        tiles = atlas.best(one.layer, one.concept, 1, one.target)
        lines = [
            (f"{percent(one.share)} of the relevance of {atlas.class_of(one)}", ""),
            (f"{percent(one.inside)} of it {one.where}", "bad"),
        ]
        lines += [(words, "") for words in [atlas.shown_by_others(one)] if words]
        found += [tile._replace(value=atlas.label(one.layer, one.concept), lines=lines) for tile in tiles]
    return found


def _finding_of(finding: Finding, addresses: Addresses, store: Callable[[bytes, str], str]) -> dict[str, Any]:
    """Content of a finding; ``store`` keeps its pictures, and tells where."""
    tiles = []
    for heading, group in finding.tiles:
        shown = [
            {
                "sample": store(one.sample, "png"),
                "heatmap": store(one.heatmap, "png"),
                "caption": one.caption,
                "alt": one.tip or f"{heading}, {number}",
            }
            for number, one in enumerate(group, start=1)
        ]
        tiles.append((heading, shown))
    href = "" if finding.concept is None else addresses.concept(*finding.concept[1:])
    return {
        "title": finding.title,
        "text": finding.text,
        "figures": finding.figures,
        "tiles": tiles,
        "href": href,
    }
