"""The page of an atlas that searches for layers, concepts, classes and samples; it can be read without scripts, too."""

from __future__ import annotations

import json
from collections.abc import Mapping

from markupsafe import Markup

from crp.visualization.report.addresses import Addresses
from crp.visualization.report.facts import LayerFacts
from crp.visualization.report.render import Renderer


def write_search(
    renderer: Renderer,
    addresses: Addresses,
    facts: Mapping[str, LayerFacts],
    class_names: Mapping[int, str],
    sample_names: Mapping[int, str],
    concept_names: Mapping[tuple[str, int], str],
    meanings: Mapping[tuple[str, int], str],
) -> None:
    """Render the page; names are of all classes and samples that have one, ``meanings`` are what describes concepts."""
    to = ("#{}" if renderer.single else "{}").format  # (the page is beside the first one)
    index = {
        "layers": [
            [
                layer,
                to(addresses.layer(layer)),
                to(addresses.concept(layer, 0)).replace("/0.html", "/{}.html"),
                [float(f"{float(share):.4g}") for share in one.mean],
            ]
            for layer, one in facts.items()
        ],
        "classes": [[name, to(Addresses.label(target))] for target, name in class_names.items()],
        "names": {f"{layer}:{i}": name for (layer, i), name in concept_names.items()},
        "texts": {f"{layer}:{i}": text for (layer, i), text in meanings.items()},
        "samples": [[name, to(Addresses.sample(sample))] for sample, name in sample_names.items()],
    }
    text = json.dumps(index, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    page = {
        "trail": [("Atlas", "index.html"), ("Search", "")],
        "layers": [(layer, addresses.layer(layer)) for layer in facts],
        "index": Markup(text),
    }
    renderer.page("search.html", "search.html", "Search — concept atlas", page=page)
