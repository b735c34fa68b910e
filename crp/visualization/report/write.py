"""The concept atlas: pages that show what a model looks at, from a table that was mined.

A folder of static pages: an overview, a page for every class, layer, concept and reference sample, suspects and a
search. It opens from disk, needs no network, and can be read without scripts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm
from zennit.core import Composite

from crp.errors import InputError, InputTypeError, NameNotFoundError, OutOfRangeError
from crp.visualization.feature import FeatureVisualization, table_of
from crp.visualization.maximized import check_can_be_shown, keep_maximized
from crp.visualization.report.addresses import Addresses, is_one_file
from crp.visualization.report.concept_pages import get_flow, write_concept, write_sample
from crp.visualization.report.drawing import Drawer, Row
from crp.visualization.report.facts import LayerFacts, References, _chosen, concepts_of_samples, get_facts
from crp.visualization.report.first_page import first_page
from crp.visualization.report.folder import claim, remove_others
from crp.visualization.report.kept import KeptResults, get_kept
from crp.visualization.report.kept_pages import write_kept
from crp.visualization.report.options import Finding, ReportKeywords, ReportOptions, Tile
from crp.visualization.report.options import make_tile as make_tile
from crp.visualization.report.pages import Atlas
from crp.visualization.report.picture_drawing import PictureDrawer
from crp.visualization.report.render import Renderer, SingleRenderer
from crp.visualization.report.spliced import unexplained_of
from crp.visualization.report.text_drawing import TextDrawer
from crp.visualization.table.files import make_folder
from crp.visualization.table.fingerprint import fingerprint_composite
from crp.visualization.table.ranking import list_targets
from crp.visualization.table.store import Table
from crp.wording import counted

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Finding", "ReportOptions", "Tile", "make_tile", "write_report"]


def write_report(
    fv: FeatureVisualization, composite: Composite | None, path: str | Path, **options: Unpack[ReportKeywords]
) -> Path:
    """Write the concept atlas of what was mined.

    Parameters
    ----------
    fv : FeatureVisualization
        Of a dataset of images or texts that was mined: ``fv.run(composite)``.
    composite : zennit Composite, or None for the plain gradient
        Rules for the heatmaps.
    path : path
        A folder; or a file that ends in ``.html``, which then holds all pages and pictures, for small atlases. What the
        folder holds of an earlier report is drawn again only where it would be different.
    **options
        As the attributes of `ReportOptions`, such as ``n_references=4``.

    Returns
    -------
    Path
        The first page; with ``part``, the folder.

    Raises
    ------
    FileNotFoundError
        If nothing was mined.
    TableMismatchError
        If another model or dataset was mined.
    KeyError
        If a class or layer was not mined.
    IndexError
        If a finding is about a concept that its layer does not have, or one has a name.
    ValueError
        If the folder holds something else than an atlas, or is a file; a number is not positive, a class has no name,
        or the samples are no images.
    """
    if unknown := [name for name in options if name not in ReportKeywords.__annotations__]:
        known = ", ".join(ReportKeywords.__annotations__)
        raise InputTypeError(f"a report has no option {unknown[0]!r}; there are {known}")
    if not isinstance(path, str | Path):
        raise InputTypeError(f"path must be a folder or a file that ends in .html, not {path!r}")
    chosen = ReportOptions(**options)
    path = Path(path)
    if not is_one_file(path):
        claim(path)
        return _write(fv, composite, path, None, chosen)
    if chosen.part is not None:
        raise InputError(f"part draws into a folder, and {path} is one file")
    make_folder(path.parent)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OSError(f"the report cannot be written to {path}: {'a folder' if path.is_dir() else 'no permission'}")
    with TemporaryDirectory(prefix="crp-report-") as folder:
        return _write(fv, composite, Path(folder), path, chosen)


def _write(
    fv: FeatureVisualization, composite: Composite | None, folder: Path, file: Path | None, options: ReportOptions
) -> Path:
    table = table_of(fv)
    layers = _layers(table, options.layers)
    fv._lookup(layers[0], "relevance", (0, 1))  # refuses another model, dataset or preprocessing
    layers = fv.in_call_order(layers, int(table.rows().sample[0]))
    targets = list_targets(table).tolist()
    names = _names(fv, table, targets, options.class_names)
    shown = _chosen(targets, options.classes)
    _check_said(options, targets, table, layers)
    check_can_be_shown(fv, options.n_maximized)
    questions = {"relevance": fv.RelMax.question, "activation": fv.ActMax.question}
    bar = {"disable": not options.verbose, "dynamic_ncols": True}
    facts = {layer: get_facts(table, layer, questions, options.counts) for layer in tqdm(layers, desc="Table", **bar)}
    cells = _cells(facts, options.counts)
    identity = _identity(fv, table, composite)
    drawer = (PictureDrawer if fv.texts is None else TextDrawer)(fv, composite, layers, folder, identity, options)
    addresses = Addresses(layers)
    suspects = drawer.find_suspects(table, targets) if options.part is None else []
    kept = _maximize(fv, table, facts, shown, options)
    samples = _samples(cells, kept.samples())
    strongest = {layer: concepts_of_samples(table, layer, samples, options.n_sample_concepts) for layer in layers}
    _draw(drawer, _wanted(addresses, cells, samples, layers[-1], strongest[layers[-1]]), shown, table, bar)
    if options.part is not None:
        return folder
    footer = f"{type(fv.attribution.model).__name__}, {_description(composite)}; table {table.digest[:12]}."
    look = footer, drawer.pixelated, drawer.pictures
    renderer = Renderer(folder, *look) if file is None else SingleRenderer(folder, *look, file, options.title)
    file_names, labels, predictions = _about_samples(table, drawer, samples)
    atlas = Atlas(
        drawer=drawer,
        renderer=renderer,
        options=options,
        addresses=addresses,
        facts=facts,
        cells=cells,
        suspects=suspects,
        names=names,
        class_names={target: drawer.class_name(target, names) for target in shown},
        explained_for=samples,
        strongest=strongest,
        sample_names=file_names,
        labels=labels,
        predictions=predictions,
        kept=kept,
        unexplained=unexplained_of(fv, composite, table, layers),
    )
    _render(atlas, table, composite, bar)
    first = renderer.finish()
    if file is None:
        remove_others(folder, renderer.written | drawer.used)
    return first


def _cells(facts: Mapping[str, LayerFacts], counts: Mapping[str, int]) -> dict[tuple[str, int], References]:
    """References of every concept."""
    return {
        (layer, concept): one.references(concept, counts)
        for layer, one in facts.items()
        for concept in range(one.n_concepts)
    }


def _maximize(
    fv: FeatureVisualization,
    table: Table,
    facts: Mapping[str, LayerFacts],
    classes: Sequence[int],
    options: ReportOptions,
) -> KeptResults:
    """What is kept beside the table, after pictures of the strongest concepts are made up where they were missing."""
    part, n_parts = options.part or (0, 1)
    for layer in list(facts)[part::n_parts] if options.n_maximized else ():
        strongest = np.argsort(-facts[layer].mean, kind="stable")[: options.n_maximized].tolist()
        keep_maximized(fv, layer, strongest, seed=options.seed, steps=options.steps, add=True, verbose=options.verbose)
    return get_kept(table, list(facts), classes)


def _wanted(
    addresses: Addresses,
    cells: Mapping[tuple[str, int], References],
    samples: Mapping[int, Sequence[int]],
    top: str,
    strongest: Mapping[tuple[int, int], Sequence[tuple[int, float]]],
) -> dict[str, list[Row]]:
    """Heatmaps that pages show: of the references of concepts, and of samples, with those of the highest layer."""
    wanted = {}
    for (layer, concept), references in cells.items():
        if rows := [Row(sample, target, layer, concept) for sample, target in references.rows()]:
            wanted[addresses.concept_maps(layer, concept)] = rows
    for sample, target in ((sample, target) for sample, targets in samples.items() for target in targets):
        through = [Row(sample, target, top, concept) for concept, _ in strongest[sample, target]]
        wanted[Addresses.sample_maps(sample, target)] = [Row(sample, target), *through]
    return wanted


def _draw(
    drawer: Drawer, wanted: Mapping[str, list[Row]], classes: Sequence[int], table: Table, bar: Mapping[str, Any]
) -> None:
    """Draw the heatmaps and pictures that are missing."""
    part, n_parts = drawer.options.part or (0, 1)
    jobs = drawer.files(wanted, (part, n_parts))
    # (rows of one layer stand together, so that they are drawn together)
    with tqdm(total=sum(len(job.places) for job in jobs), desc="Heatmaps", **bar) as shown:
        for n_rows in drawer.draw(jobs):
            shown.update(n_rows)
    if (n_mean := drawer.options.n_mean) and drawer.pictures:
        rows = table.rows()
        for target in tqdm(classes[part::n_parts], desc="Classes", **bar):
            samples = rows.sample[rows.target == target]
            chosen = samples[np.linspace(0, len(samples) - 1, min(n_mean, len(samples))).round().astype(int)]
            drawer.draw_mean(target, chosen.tolist())


def _render(atlas: Atlas, table: Table, composite: Composite | None, bar: Mapping[str, Any]) -> None:
    first_page(atlas, table, _description(composite), fingerprint_composite(composite), write_kept(atlas))
    atlas.write()
    flow = get_flow(atlas)
    for layer, concept in tqdm(atlas.cells, desc="Pages", **bar):
        write_concept(atlas, flow, layer, concept)
    for sample, targets in atlas.explained_for.items():
        for target in targets:
            write_sample(atlas, sample, target)


def _layers(table: Table, layers: Sequence[str] | None) -> list[str]:
    """Layers to show, in the order of the table."""
    if "relevance" not in table.modes:
        raise InputError(f"an atlas shows relevance, and {table.path} has {', '.join(table.modes)} alone; mine it, too")
    for layer in layers or ():
        table.n_concepts(layer)  # raises where it was not mined
    chosen = [layer for layer in table.layers if layers is None or layer in layers]
    if not chosen:
        raise InputError("layers must name at least one layer")
    return chosen


def _names(
    fv: FeatureVisualization,
    table: Table,
    targets: Collection[int],
    class_names: Sequence[str] | Mapping[int, str] | None,
) -> dict[int, str]:
    """What classes are called; by the table's recipe where that is not said, and by numbers."""
    if class_names is None:
        return {target: str(target) for target in targets} | dict(enumerate(table.header.class_names))
    if isinstance(class_names, str):
        raise InputTypeError(f"class_names must be a list of names, or a dict {{class: name}}, not {class_names!r}")
    n_outputs = fv._count_outputs(int(table.rows().sample[0]))
    known = class_names if isinstance(class_names, Mapping) else dict(enumerate(class_names))
    if known is not class_names and n_outputs not in (None, len(known)):
        raise InputError(
            f"class_names has {counted(len(known), 'name')}, and the model {counted(n_outputs or 0, 'output')}; a dict "
            "{class: name} may name some of them"
        )
    if nameless := [target for target in targets if target not in known]:
        raise InputError(f"class_names has {counted(len(known), 'name')}, and none for the classes {nameless}")
    return {target: str(known[target]) for target in known}


def _check_said(options: ReportOptions, targets: Sequence[int], table: Table, layers: Sequence[str]) -> None:
    """Refuse findings and names of what is not there."""
    for place in (finding.concept for finding in options.findings if finding.concept is not None):
        target, layer, concept = place
        if target not in targets or layer not in layers:
            raise NameNotFoundError(f"a finding is about {place}; classes are {list(targets)}, layers {list(layers)}")
        _check_concept(table, layer, concept, f"a finding is about {place}")
    for layer, concept in options.concept_names:
        _check_concept(table, layer, concept, f"concept_names has {(layer, concept)}")


def _check_concept(table: Table, layer: str, concept: int, what: str) -> None:
    n = table.n_concepts(layer)
    if not 0 <= concept < n:
        raise OutOfRangeError(f"{what}; layer {layer!r} has the concepts 0 to {n - 1}")


def _samples(cells: Mapping[Any, References], kept: Mapping[int, int]) -> dict[int, list[int]]:
    """Samples that are shown, each with the classes for which it is; the first has the page of other links."""
    found: dict[int, list[int]] = {}
    for references in cells.values():
        for one in (*references.relevant, *references.negative):
            if one.target not in found.setdefault(one.sample, []):
                found[one.sample].append(one.target)
    # (what a concept is active for has no class)
    others = {**kept} | {one.sample: one.target for references in cells.values() for one in references.active}
    found |= {sample: [target] for sample, target in others.items() if sample not in found}
    return dict(sorted(found.items()))


def _about_samples(
    table: Table, drawer: Drawer, samples: Iterable[int]
) -> tuple[dict[int, str], dict[int, int], dict[int, tuple[int, float]]]:
    """What samples are called, by file where it is told; labels that are one class; and predictions."""
    columns, has_labels = table.samples(), drawer.has_labels(table)
    rows = {int(sample): row for row, sample in enumerate(columns.sample)}
    names, labels, predictions = {}, {}, {}
    for sample in samples:
        row = rows[sample]
        name = columns.source[row] or drawer.fv.file_of(sample)
        names[sample] = name or f"{drawer.sample_word} {sample}"
        if has_labels and isinstance(columns.label[row], int):
            labels[sample] = columns.label[row]
        if columns.prediction[row] >= 0:
            probability = float(columns.probability[row]) if drawer.exclusive else 0.0
            predictions[sample] = int(columns.prediction[row]), probability
    return names, labels, predictions


def _identity(fv: FeatureVisualization, table: Table, composite: Composite | None) -> str:
    """What every heatmap depends on."""
    known = {name: table.fingerprints.get(name) for name in ("model", "dataset", "preprocess", "layers")}
    known |= {name: mark for name, mark in table.fingerprints.items() if name == "output"}
    known |= {"attribution": own} if (own := fv.attribution_fingerprint()) else {}
    content = [known, None if composite is None else fingerprint_composite(composite)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _description(composite: Composite | None) -> str:
    """Name of a composite, with its settings where it tells them."""
    if composite is None:
        return "the plain gradient"
    return repr(composite) if hasattr(composite, "describe") else type(composite).__qualname__
