"""Content of the pages of concepts and samples, with their graphs and histograms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from crp.visualization.report.addresses import Addresses
from crp.visualization.report.drawing import Drawn
from crp.visualization.report.facts import Reference
from crp.visualization.report.graphs import DrawnNode, _draw_histogram, draw_columns
from crp.visualization.report.kept import context_histograms
from crp.visualization.report.pages import CLASSES, FEW, Atlas
from crp.visualization.report.tiles import AnyShown
from crp.wording import counted, percent

#: Edges of a concept's graph on either side.
EDGES = 5
Link = dict[tuple[str, int], list[tuple[int, float]]]


class _Flow(NamedTuple):
    """Where concepts get their relevance from and hand it to: means over their references."""

    below: Link
    above: Link


def get_flow(atlas: Atlas) -> _Flow:
    """Gather from what was drawn how much relevance concepts hand to those of the layer below."""
    below: Link = {}
    above: Link = defaultdict(list)
    layers = list(atlas.facts)
    for number, layer in enumerate(layers):
        if not number:
            continue
        for concept in range(atlas.facts[layer].n_concepts):
            total: dict[int, float] = defaultdict(float)
            known = [one for one in atlas.known_relevant(layer, concept) if one.below]
            for one in known:
                for lower, share in one.below:
                    total[lower] += share / len(known)
            best = sorted(total.items(), key=lambda pair: -pair[1])[:EDGES]
            below[layer, concept] = best
            for lower, share in best:
                # What a concept hands down counts as much as the concept itself does.
                above[layers[number - 1], lower].append((concept, share * float(atlas.facts[layer].mean[concept])))
    return _Flow(below, {key: sorted(found, key=lambda pair: -pair[1])[:EDGES] for key, found in above.items()})


def write_concept(atlas: Atlas, flow: _Flow, layer: str, concept: int) -> None:
    """Render the page of a concept."""
    facts = atlas.facts[layer]
    chosen = atlas.cells[layer, concept]
    shares = facts.shares.value[:, concept]
    order = np.argsort(-shares, kind="stable").tolist()
    classes = []
    largest = float(np.abs(shares).max(initial=0.0)) or 1.0
    for row in order[:CLASSES]:
        target, share = int(facts.shares.targets[row]), float(shares[row])
        classes.append((atlas.class_name(target), atlas.class_address(target), share, abs(share) / largest))
    rows = _references(atlas, layer, concept)
    turns = [
        (str(other), atlas.addresses.concept(layer, other)) if 0 <= other < facts.n_concepts else None
        for other in (concept - 1, concept + 1)
    ]
    page = {
        "layer": layer,
        "concept": concept,
        "name": atlas.options.concept_names.get((layer, concept), ""),
        "trail": [("Atlas", "index.html"), (layer, atlas.addresses.layer(layer)), (str(concept), "")],
        "before": turns[0],
        "after": turns[1],
        "lead": _lead(atlas, layer, concept, order),
        "figures": _figures(atlas, layer, concept, order),
        "notes": [
            f"Suspect for {atlas.class_of(one)}: {one.reason}."
            for one in atlas.suspects
            if (one.layer, one.concept) == (layer, concept)
        ]
        + ([] if rows else [f"It is relevant for no {atlas.drawer.sample_word}, so there are no references."])
        + atlas.notes(layer),
        "rows": rows,
        "classes": classes,
        "more": max(0, len(order) - CLASSES),
        "maximized": atlas.maximized(layer, concept),
        "plain": "plain pixels" if atlas.renderer.pixelated else "plain",
        "kept": atlas.about.get((layer, concept), []),
        "histograms": [
            *_histograms(atlas, layer, concept, (*chosen.relevant, *chosen.negative), chosen.active),
            *context_histograms(atlas.kept, layer, concept),
        ],
        "alike": _alike(atlas, layer, concept),
        **_graph_of(atlas, flow, layer, concept),
    }
    title = f"{atlas.label(layer, concept)} — concept atlas"
    atlas.renderer.page(atlas.addresses.concept(layer, concept), "concept.html", title, page=page)


def _references(atlas: Atlas, layer: str, concept: int) -> list[tuple[str, list[AnyShown], str, str]]:
    """Headings with the tiles of references, a note on each, and the form of the pictures."""
    rows, place, chosen = [], 0, atlas.cells[layer, concept]
    fv = atlas.drawer.fv
    of_relevance, of_activation = ("its share of the layer's" if m.abs_norm else "its" for m in (fv.RelMax, fv.ActMax))
    notes = (
        f"Figures: {of_relevance} relevance.",
        f"Where the concept is most active, whichever class it speaks for. Figures: {of_activation} activation.",
        "Where it speaks most against the class: blue.",
    )
    headings = {"Most relevant": "relevance", "Most active": "activation", "Most negative": "relevance"}
    for (heading, mode), references, note in zip(headings.items(), chosen, notes, strict=True):
        found = [
            atlas.reference(layer, concept, place + i, one, _value(atlas, mode, one.value))
            for i, one in enumerate(references)
        ]
        place += len(references)
        tiles = [one for one in found if one is not None]
        if heading == "Most relevant" and references and references[0].value < 0:
            least = f"these are the {atlas.drawer.sample_word}s in which it speaks least against"
            note = f"Its relevance is negative everywhere: {least}. {note}"
        if tiles:
            # (masked pictures show what speaks for a class alone)
            rows.append((heading, tiles, note, "as-overlay" if heading == "Most negative" else "free"))
    return rows


def write_sample(atlas: Atlas, sample: int, target: int) -> None:
    """Render the page of a sample."""
    address, drawer = Addresses.sample_maps(sample, target), atlas.drawer
    best = {layer: of_samples[sample, target] for layer, of_samples in atlas.strongest.items()}
    known = drawer.known(address)
    if not known:
        return
    layers = list(atlas.facts)
    top = layers[-1]
    name = f"{atlas.sample_names[sample]}, {atlas.class_name(target)}"
    concepts: list[dict[str, Any]] = []
    largest = max((share for _, share in best[top]), default=1.0)
    for cell, ((concept, share), drawn) in enumerate(zip(best[top], known[1:], strict=True), start=1):
        concepts.append(
            {
                "here": drawer.whole(address, cell, name)._replace(href=atlas.addresses.concept(top, concept)),
                "apart": drawer.apart(address, cell, name),
                "label": atlas.label(top, concept),
                "href": atlas.addresses.concept(top, concept),
                "share": share,
                "width": share / largest,
                "others": atlas.best(top, concept, FEW),
                "below": drawn.below,
                "concept": concept,
            }
        )
    lists = []
    for layer in reversed(layers[:-1]):
        most = max((share for _, share in best[layer]), default=1.0)
        shown = [(atlas.short_label(layer, c), atlas.addresses.concept(layer, c), s, s / most) for c, s in best[layer]]
        lists.append({"name": layer, "href": atlas.addresses.layer(layer), "rows": shown})
    first, label = known[0], atlas.class_name(target)
    said = _explained(atlas, sample, label, first)
    if concepts:
        part = sum(one["share"] for one in concepts)
        said += f" {percent(part)} of the relevance in {top} is that of {counted(len(concepts), 'concept')}."
    page = {
        "trail": [("Atlas", "index.html"), (label, atlas.class_address(target)), (atlas.sample_names[sample], "")],
        "title": f"Why {label}?" if target >= 0 else "What it sees",
        "name": atlas.sample_names[sample],
        "prediction": _prediction(atlas, sample, first),
        "lead": said,
        "far": drawer.far(sample),
        "others": [
            (atlas.class_name(one), atlas.sample_page(sample, one))
            for one in atlas.explained_for[sample]
            if one != target
        ],
        "whole": drawer.whole(address, 0, name),
        "concepts": concepts,
        "layers": lists,
        "graph": _graph_of_sample(atlas, target, concepts, layers) if concepts else None,
        "graph_note": f"From the class to {top}" + (f" to {layers[-2]}" if len(layers) > 1 else "") + "; widths are "
        "shares of relevance.",
    }
    title = f"{page['title']} {page['name']} — concept atlas"
    atlas.renderer.page(atlas.sample_page(sample, target), "sample.html", title, page=page)


def _explained(atlas: Atlas, sample: int, label: str, first: Drawn) -> str:
    """What is predicted of a sample, and the class for which it is explained, in words."""
    chance = "" if first.before is None else f" ({_score(first, first.before)})"
    if first.predicted is None:
        return f"Explained for {label}{chance}."
    true = atlas.labels.get(sample)
    right = "" if true is None else ", as labelled" if first.predicted == true else f", not {atlas.class_name(true)}"
    return f"Predicted {atlas.class_name(first.predicted)}{right}; explained for {label}{chance}."


def _prediction(atlas: Atlas, sample: int, first: Drawn) -> list[tuple[str, str, float]]:
    """Most probable classes of a sample: name, address, probability; the label is marked."""
    label = atlas.labels.get(sample)
    return [
        (
            atlas.class_name(one) + ("\N{NO-BREAK SPACE}(label)" if one == label else ""),
            atlas.class_address(one),
            probability,
        )
        for one, probability in first.top
    ]


def _value(atlas: Atlas, mode: str, value: float) -> str:
    fv = atlas.drawer.fv
    normed = (fv.RelMax if mode == "relevance" else fv.ActMax).abs_norm
    return percent(value) if normed else f"{value:.3g}"


def _lead(atlas: Atlas, layer: str, concept: int, order: Sequence[int]) -> str:
    facts = atlas.facts[layer]
    text = f"Carries {percent(float(facts.mean[concept]))} of the relevance of an average {atlas.drawer.sample_word}"
    best = [row for row in order[:2] if facts.shares.value[row, concept] > 0]
    if not best:
        return text + "."
    names = " and ".join(atlas.class_name(int(facts.shares.targets[row])) for row in best)
    return f"{text}; most of it for {names}."


def _figures(atlas: Atlas, layer: str, concept: int, order: Sequence[int]) -> list[tuple[str, str]]:
    facts = atlas.facts[layer]
    figures: list[tuple[str, str]] = []
    if order:
        row = order[0]
        name = atlas.class_name(int(facts.shares.targets[row]))
        values = facts.shares.value[row]
        rank = int((values > values[concept]).sum()) + 1
        figures.append((percent(float(values[concept])), f"of the relevance of {name}"))
        figures.append((f"#{rank} of {facts.n_concepts}", f"for {name} in this layer"))
    return figures + _switched_off(atlas.known_relevant(layer, concept))


def _switched_off(known: Sequence[Drawn]) -> list[tuple[str, str]]:
    """What references are predicted with without a concept, as a figure and what it is; nothing where it is unknown."""
    pairs = [(one.before, one.after) for one in known if one.before is not None and one.after is not None]
    if not pairs:
        return []
    before, after = (_score(known[0], float(np.mean([pair[i] for pair in pairs]))) for i in (0, 1))
    what = "output" if known[0].predicted is None else "probability"
    return [(f"{before} → {after}", f"mean {what} of its references when it is switched off")]


def _score(drawn: Drawn, value: float) -> str:
    """Probability in percent; the value itself where there is one output, and so no predicted class."""
    return f"{value:.3g}" if drawn.predicted is None else percent(value)


def _histograms(
    atlas: Atlas, layer: str, concept: int, relevant: Sequence[Reference], active: Sequence[Reference]
) -> list[tuple[dict[str, Any], str, bool]]:
    shown, found = [], atlas.facts[layer].histograms
    for mode, references in (("relevance", relevant), ("activation", active)):
        if mode not in found:
            continue
        low, high = float(found[mode].low[concept]), float(found[mode].high[concept])
        if not np.isfinite([low, high]).all():
            continue
        width = (high - low) or 1.0
        ticks = [(one.value - low) / width for one in references]
        ends = [_value(atlas, mode, end) for end in (low, high)]
        shown.append(
            (
                _draw_histogram(found[mode].height[concept], ends[0], ends[1], ticks),
                mode.capitalize(),
                mode == "activation",
            )
        )
    return shown


def _alike(atlas: Atlas, layer: str, concept: int) -> list[dict[str, Any]]:
    pairs = zip(*(part[concept].tolist() for part in atlas.facts[layer].alike), strict=True)
    return [atlas.chip(layer, other, f"{percent(cosine)} alike") for other, cosine in pairs if cosine > 0.05]


def _graph_of(atlas: Atlas, flow: _Flow, layer: str, concept: int) -> dict[str, Any]:
    layers = list(atlas.facts)
    place = layers.index(layer)
    upper = layers[place + 1] if place + 1 < len(layers) else ""
    lower = layers[place - 1] if place else ""
    above, below = flow.above.get((layer, concept), []), flow.below.get((layer, concept), [])
    if not upper:
        above = _best_classes(atlas, layer, concept)
    if not above and not below:
        return {"graph": None, "above": upper, "below": lower}
    middle = layer, concept
    nodes = [{("above", one): _node(atlas, upper, one) for one, _ in above}, {middle: _node(atlas, layer, concept)}]
    nodes.append({("below", one): _node(atlas, lower, one) for one, _ in below})
    edges: dict[tuple[Any, Any], float] = {}
    for side, found in (("above", above), ("below", below)):
        most = max((abs(share) for _, share in found), default=0.0) or 1.0
        for one, share in found:
            ends = ((side, one), middle) if side == "above" else (middle, (side, one))
            edges[ends] = share / most
    return {"graph": draw_columns(nodes, edges, (60, 300, 540), 600), "above": upper, "below": lower}


def _best_classes(atlas: Atlas, layer: str, concept: int) -> list[tuple[int, float]]:
    """Classes for which a concept of the highest layer speaks most."""
    shares = atlas.facts[layer].shares
    order = np.argsort(-shares.value[:, concept], kind="stable")[:EDGES].tolist()
    found = [(int(shares.targets[row]), float(shares.value[row, concept])) for row in order]
    return [(target, share) for target, share in found if share > 0 and target in atlas.class_names]


def _node(atlas: Atlas, layer: str, one: int) -> DrawnNode:
    """Node of a concept; of a class, where there is no layer."""
    if layer:
        address, name = atlas.addresses.concept(layer, one), atlas.label(layer, one)
        return DrawnNode(str(one), address, atlas.first(layer, one), name=name)
    name = atlas.class_name(one)
    return DrawnNode(name[:18], atlas.class_address(one), name=name)


def _graph_of_sample(
    atlas: Atlas, target: int, concepts: Sequence[dict[str, Any]], layers: Sequence[str]
) -> dict[str, Any]:
    lower = layers[-2] if len(layers) > 1 else ""
    wanted: dict[int, float] = defaultdict(float)
    for one in concepts:
        for concept, share in one["below"]:
            wanted[concept] += share * one["share"]
    kept = sorted(wanted, key=lambda concept: -wanted[concept])[:EDGES]
    most = max(one["share"] for one in concepts)
    start = "", target
    nodes = [{start: _node(atlas, "", target)}, {}, {(lower, one): _node(atlas, lower, one) for one in kept}]
    edges: dict[tuple[Any, Any], float] = {}
    for one in concepts:
        key = layers[-1], one["concept"]
        nodes[1][key] = DrawnNode(str(one["concept"]), one["href"], one["here"], name=one["label"])
        edges[start, key] = one["share"] / most
        edges |= {(key, (lower, c)): share * one["share"] / most for c, share in one["below"] if c in kept}
    return draw_columns(nodes, edges, (45, 165, 285), 330)
