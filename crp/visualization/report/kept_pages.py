"""Pages of results kept beside the table: prototypes, audits, clusters, meanings, interventions and context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from crp.visualization.report.addresses import Addresses
from crp.visualization.report.kept import (
    CLASSES_A_PART,
    UNUSUAL,
    _histogram_of_shares,
    changed_how,
    classes_of,
    mean_scores,
    pairs_of,
    ways_of,
)
from crp.visualization.report.pages import CARDS, FEW, Atlas
from crp.visualization.report.tiles import AnyShown
from crp.visualization.table.derived import KeptResult
from crp.wording import counted, percent

#: Texts on the page of meanings, points in a drawing, and colours of clusters.
_TEXTS, _POINTS, _COLOURS = 60, 1500, 8


def write_kept(atlas: Atlas) -> list[dict[str, Any]]:
    """Render all pages of kept results, and tell what the overview says of each."""
    pages = {
        "prototypes": _prototypes,
        "audit": _audit,
        "clusters": _clusters,
        "meanings": _meanings,
        "interventions": _interventions,
        "context": _context,
    }
    return [pages[kept.kind](atlas, kept) for kept in atlas.kept.results if kept.kind in pages]


def _prototypes(atlas: Atlas, kept: KeptResult) -> dict[str, Any]:
    targets = classes_of(kept)
    parts = [targets[i : i + CLASSES_A_PART] for i in range(0, len(targets), CLASSES_A_PART)] or [[]]
    labels = [f"{atlas.class_name(part[0])} to {atlas.class_name(part[-1])}" for part in parts if part]
    n_ways = 0
    for number, part in enumerate(parts):
        classes = []
        for target in part:
            ways = [
                {
                    "here": _sample(atlas, way["sample"], target),
                    "label": f"Prototype {way['number']}",
                    "note": f"{percent(way['weight'])} of the samples",
                    "concepts": _chips(atlas, kept.layer, [(c, percent(share)) for c, share in way["concepts"]]),
                    "more": _chips(atlas, kept.layer, [(c, f"{100 * more:+.1f}") for c, more in way["more"]]),
                    "than": "the class as a whole",
                    "others": _samples(atlas, way["members"][: atlas.kept.beside], target),
                }
                for way in ways_of(kept, target)
            ]
            n_ways += len(ways)
            classes.append((atlas.class_name(target), Addresses.label(target), ways))
        page = {
            **_head(atlas, kept),
            "classes": classes,
            "parts": [
                (label, atlas.addresses.kept("prototypes", kept.layer, part=p), p == number)
                for p, label in enumerate(labels)
            ],
        }
        address = atlas.addresses.kept("prototypes", kept.layer, part=number)
        atlas.renderer.page(address, "prototypes.html", "Prototypes — concept atlas", page=page)
    note = f"{counted(n_ways, 'way')} of predicting {counted(len(targets), 'class', 'classes')}"
    return _link(atlas, kept, note)


def _audit(atlas: Atlas, kept: KeptResult) -> dict[str, Any]:
    columns = {name: array[:UNUSUAL].tolist() for name, array in kept.arrays.items()}
    rows = []
    for i, sample in enumerate(columns["sample"]):
        target = columns["target"][i]
        uses = [
            _chips(
                atlas,
                kept.layer,
                [(c, f"{100 * d:+.1f}") for c, d in pairs_of(columns[name][i], columns[f"{name}_difference"][i])],
            )
            for name in ("over", "under")
        ]
        rows.append(
            {
                "here": _sample(atlas, sample, target),
                "name": atlas.sample_names.get(sample, f"sample {sample}"),
                "class_name": atlas.class_name(target),
                "class_href": Addresses.label(target),
                "percentile": f"{columns['percentile'][i]:.1f}",
                "prototype": columns["prototype"][i],
                "nearest": _samples(atlas, [columns["nearest"][i]], target),
                "over": uses[0],
                "under": uses[1],
            }
        )
    n = len(kept.arrays["sample"])
    return _written(atlas, kept, {"n": n, "rows": rows}, f"the {len(rows)} least usual of {n} samples")


def _clusters(atlas: Atlas, kept: KeptResult) -> dict[str, Any]:
    arrays, target = kept.arrays, kept.of_class or 0
    sizes = np.bincount(arrays["label"], minlength=len(arrays["members"])).tolist()
    groups = []
    for i, size in enumerate(sizes):
        members = [m for m in arrays["members"][i].tolist() if m >= 0]
        concepts = pairs_of(arrays["strongest"][i], arrays["difference"][i])
        more = _chips(atlas, kept.layer, [(c, f"{d:+.3f}") for c, d in concepts[:FEW]])
        groups.append(
            {
                "here": _sample(atlas, members[0], target) if members else None,
                "label": f"Cluster {i}",
                "note": counted(size, "sample"),
                "concepts": more if len(sizes) == 1 else [],
                "more": more if len(sizes) > 1 else [],
                "than": "other samples",
                "others": _samples(atlas, members[1 : 1 + atlas.kept.beside], target),
                "colour": i % _COLOURS,
            }
        )
    values = arrays["eigenvalues"].tolist()
    largest = max(values, default=0.0) or 1.0
    bars = [(round(420 * i / len(values), 1), round(96 * v / largest, 1)) for i, v in enumerate(values)]
    embedding = arrays["embedding"]
    page = {
        "class_name": atlas.class_name(target),
        "class_href": Addresses.label(target),
        "what": kept.settings["what"],
        "n": len(arrays["label"]),
        "separation": f"{kept.settings['separation']:.2f}",
        "groups": groups,
        "bars": [(x, round(97 - h, 1), h, round(420 / len(bars) - 4, 1)) for x, h in bars],
        "largest": f"{largest:.3g}",
        "points": _points(embedding[:, -2], embedding[:, -1], arrays["label"] % _COLOURS)
        if embedding.shape[1] > 1
        else [],
    }
    return _written(atlas, kept, page, _finding_of(atlas, kept, sizes), f"Clusters of {atlas.class_name(target)}")


def _finding_of(atlas: Atlas, kept: KeptResult, sizes: list[int]) -> str:
    """What clusters say of a class, in a sentence."""
    name = atlas.class_name(kept.of_class or 0)
    if len(sizes) == 1:
        return f"{name} is predicted in one way: its {sizes[0]} samples do not fall apart"
    parts = []
    for size, ids, values in zip(sizes, kept.arrays["strongest"], kept.arrays["difference"], strict=True):
        strongest = [
            f"with more of concept {atlas.short_label(kept.layer, c)} ({d:+.3f})"
            for c, d in pairs_of(ids[:1], values[:1])
        ]
        parts.append(" ".join([counted(size, "sample"), *strongest]))
    return f"{name} is predicted in {len(sizes)} ways: {'; '.join(parts)}"


def _meanings(atlas: Atlas, kept: KeptResult) -> dict[str, Any]:
    arrays, texts = kept.arrays, atlas.kept.texts()
    ids = arrays["concept"].tolist()
    order = np.argsort(-arrays["clarity"], kind="stable").tolist()
    rows = []
    for i in order[:CARDS]:
        chip = atlas.chip(kept.layer, ids[i], "")
        scores = [f"{arrays[name][i]:.2f}" for name in ("clarity", "redundancy", "polysemanticity")]
        rows.append((chip, texts.get((kept.layer, ids[i]), ""), scores))
    searches = []
    for text, row in list(zip(kept.settings["texts"], arrays["similarity"], strict=True))[:_TEXTS]:
        best = np.argsort(-row, kind="stable")[: FEW + 1].tolist()
        searches.append((str(text), _chips(atlas, kept.layer, [(ids[i], f"{row[i]:.2f}") for i in best])))
    page = {
        "rows": rows,
        "more": max(0, len(order) - CARDS),
        "searches": searches,
        "means": [f"{arrays[name].mean():.2f}" for name in ("clarity", "redundancy", "polysemanticity")],
    }
    note = f"{counted(len(ids), 'concept')}, {counted(len(kept.settings['texts']), 'text')}"
    return _written(atlas, kept, page, note)


def _interventions(atlas: Atlas, kept: KeptResult) -> dict[str, Any]:
    arrays = kept.arrays
    ids = arrays["concept"].tolist()
    relevance, change = arrays["relevance"].mean(0), arrays["change"].mean(0)
    order = np.argsort(change, kind="stable").tolist()
    largest = float(np.abs(change).max(initial=0.0)) or 1.0
    rows = []
    for i in order[:CARDS]:
        chip = atlas.chip(kept.layer, ids[i], "")
        kind = "" if change[i] < 0 else "neg"
        rows.append((chip, f"{relevance[i]:.3g}", f"{change[i]:+.3g}", abs(float(change[i])) / largest, kind))
    n = len(arrays["sample"])
    page = {
        "rows": rows,
        "more": max(0, len(order) - CARDS),
        "n": n,
        "agreement": f"{kept.settings['agreement']:.2f}",
        "how": changed_how(kept),
        "points": _points(relevance, -change, np.zeros(len(ids), np.int64)),
        "ends": [f"{value:.3g}" for value in (relevance.min(), relevance.max(), -change.max(), -change.min())],
    }
    note = f"{counted(len(ids), 'concept')} {page['how']} on {counted(n, 'sample')}"
    return _written(atlas, kept, page, f"{note}; rank correlation {page['agreement']}")


def _context(atlas: Atlas, kept: KeptResult) -> dict[str, Any]:
    ids, score, means = kept.arrays["concept"].tolist(), kept.arrays["score"], mean_scores(kept)
    order = [i for i in np.argsort(-means, kind="stable").tolist() if means[i] >= 0]
    rows = []
    for i in order[:CARDS]:
        chip = atlas.chip(kept.layer, ids[i], "")
        rows.append((chip, float(means[i]), int((score[:, i] >= 0).sum())))
    n, outside = len(score), int((means > 0.5).sum())
    page = {
        "rows": rows,
        "more": max(0, len(order) - CARDS),
        "silent": len(ids) - len(order),
        "n": n,
        "outside": outside,
        "concepts": len(order),
        "histogram": _histogram_of_shares(means),
        "samples": _histogram_of_shares(score.ravel()),
    }
    note = f"{outside} of {len(order)} concepts have more than half of their relevance outside of the object"
    return _written(atlas, kept, page, f"{note}, on {counted(n, 'sample')}")


def _written(atlas: Atlas, kept: KeptResult, content: dict[str, Any], note: str, name: str = "") -> dict[str, Any]:
    """Render the page of a result, which is called after its kind, and give the link to it."""
    link, title = _link(atlas, kept, note, name), f"{kept.kind.capitalize()} — concept atlas"
    atlas.renderer.page(link["href"], f"{kept.kind}.html", title, page=_head(atlas, kept) | content)
    return link


def _head(atlas: Atlas, kept: KeptResult) -> dict[str, Any]:
    layer, href = kept.layer, atlas.addresses.layer(kept.layer)
    trail = [("Atlas", "index.html"), (layer, href), (kept.kind.capitalize(), "")]
    return {"layer": layer, "layer_href": href, "trail": trail, "seed": kept.settings.get("seed")}


def _link(atlas: Atlas, kept: KeptResult, note: str, name: str = "") -> dict[str, Any]:
    href = atlas.addresses.kept(kept.kind, kept.layer, kept.of_class)
    return {"name": name or kept.kind.capitalize(), "layer": kept.layer, "href": href, "note": note}


def _sample(atlas: Atlas, sample: int, target: int) -> AnyShown | None:
    """Tile of a sample, which says so where it is explained for another class than the one that it is shown for."""
    explained_for = atlas.explained_for.get(sample, ())
    if target in explained_for or not explained_for:
        return atlas.whole(sample, target) if explained_for else None
    tile = atlas.whole(sample, explained_for[0])
    words = f"explained for {atlas.class_name(explained_for[0])}"
    return None if tile is None else tile._replace(lines=[*tile.lines, (words, "")])


def _samples(atlas: Atlas, samples: Iterable[int], target: int) -> list[AnyShown]:
    """Tiles of the samples that are explained for a class; they stand without words."""
    tiles = (atlas.whole(one, target) for one in samples if target in atlas.explained_for.get(one, ()))
    return [tile for tile in tiles if tile is not None]


def _chips(atlas: Atlas, layer: str, concepts: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    return [atlas.chip(layer, concept, note) for concept, note in concepts]


def _points(x: Any, y: Any, colour: Any) -> list[tuple[float, float, int]]:
    """Points of a drawing of 420 by 300, at most so many, evenly chosen."""
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).round().astype(int))
    places = []
    for values, side in ((x, 410), (y, -290)):
        low, width = values.min(), (values.max() - values.min()) or 1.0
        scaled = (values[chosen] - low) / width * side
        places.append((scaled + (5 if side > 0 else 295)).round(1).tolist())
    return list(zip(*places, colour[chosen].tolist(), strict=True))
