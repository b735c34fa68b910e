"""What the page of a class says, whatever its samples are: the concepts of each layer that carry its relevance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from crp.visualization.report.addresses import Addresses
from crp.visualization.report.facts import LayerFacts
from crp.wording import counted, percent


class _ClassLayer(NamedTuple):
    """Concepts of a layer that carry most of a class's relevance.

    Attributes
    ----------
    layer, note : str
    concepts : list of (int, float, str)
        Concept, its share, and a line that says it, with the sum up to there.
    """

    layer: str
    note: str
    concepts: list[tuple[int, float, str]]


def class_layers(facts: Mapping[str, LayerFacts], target: int, name: str, n: int) -> list[_ClassLayer]:
    """Of each layer, from the output to the input, at most ``n`` concepts that carry most of a class's relevance."""
    layers = []
    for layer in reversed(list(facts)):
        shares = facts[layer].of_class(target)
        order = [int(c) for c in np.argsort(-shares, kind="stable")[:n] if shares[c] > 0]
        running, concepts = 0.0, []
        for concept in order:
            running += float(shares[concept])
            line = f"{percent(float(shares[concept]))}; so far {percent(running)}"
            concepts.append((concept, float(shares[concept]), line))
        these = f"{counted(len(order), 'concept')} of {facts[layer].n_concepts}"
        layers.append(
            _ClassLayer(layer, f"{percent(running)} of the relevance of {name} is that of {these}.", concepts)
        )
    return layers


def class_page(
    facts: Mapping[str, LayerFacts], class_names: Mapping[int, str], target: int, what: str
) -> dict[str, Any]:
    """Head of the page of a class: its name, where it is, its neighbours, and how many samples it has."""
    classes = list(class_names)
    place = classes.index(target)
    neighbours = [classes[place - 1] if place else None, classes[place + 1] if place + 1 < len(classes) else None]
    rows = next(iter(facts.values())).shares
    found = int(rows.rows[np.searchsorted(rows.targets, target)]) if target in rows.targets.tolist() else 0
    before, after = (None if t is None else (class_names[t], Addresses.label(t)) for t in neighbours)
    return {
        "name": class_names[target],
        "trail": [("Atlas", "index.html"), (class_names[target], "")],
        "before": before,
        "after": after,
        "lead": f"{found} {what}. For each layer, the concepts that carry most of the class's relevance.",
    }
