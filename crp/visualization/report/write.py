"""A page that shows what a model looks at: for each class its most relevant concepts, and what these stand for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from zennit.core import Composite

from crp.visualization.feature import FeatureVisualization
from crp.visualization.report.page import (
    ClassSection,
    ConceptCard,
    Finding,
    LayerSection,
    Link,
    Page,
    Place,
    Tile,
    percent,
    render,
)
from crp.visualization.report.pictures import heatmap_picture, sample_picture
from crp.visualization.table.files import write_atomic
from crp.visualization.table.fingerprint import fingerprint_composite
from crp.visualization.table.ranking import ClassMeans, ReferenceSamples, class_means, top_k
from crp.visualization.table.store import Table

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Number of other classes that a concept's card names.
ELSEWHERE = 3


class ReportKeywords(TypedDict, total=False):
    """Options of `write_report`; `ReportOptions` says what they mean."""

    class_names: Sequence[str] | Mapping[int, str] | None
    classes: Sequence[int] | None
    layers: Sequence[str] | None
    n_concepts: int
    n_references: int
    n_mean: int
    findings: Sequence[Finding]
    title: str
    lead: str
    picture_size: int
    batch_size: int
    verbose: bool


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    Attributes
    ----------
    class_names : sequence of str, or mapping of class to str, optional
        Numbers by default.
    classes : sequence of int, optional
        Classes to show; all by default.
    layers : sequence of str, optional
        Layers to show; all that were mined by default.
    n_concepts, n_references : int
        How many concepts are shown for a class and layer, and how many samples for a concept, at most.
    n_mean : int
        How many samples of a class its mean heatmap is taken of, at most.
    findings : sequence of Finding
        What is said at the top.
    title, lead : str
        Headline, and a paragraph below it.
    picture_size : int
        Number of pixels on a picture's side, at most.
    batch_size : int
        Samples per attribution.
    verbose : bool
        Show the progress.
    """

    class_names: Sequence[str] | Mapping[int, str] | None = None
    classes: Sequence[int] | None = None
    layers: Sequence[str] | None = None
    n_concepts: int = 4
    n_references: int = 6
    n_mean: int = 64
    findings: Sequence[Finding] = ()
    title: str = "What the model looks at"
    lead: str = ""
    picture_size: int = 96
    batch_size: int = 32
    verbose: bool = True

    def __post_init__(self) -> None:
        for name in ("n_concepts", "n_references", "n_mean", "picture_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def write_report(
    fv: FeatureVisualization, composite: Composite | None, path: str | Path, **options: Unpack[ReportKeywords]
) -> Path:
    """Write one static HTML file: the classes, their concepts, and the concepts' reference samples.

    Parameters
    ----------
    fv : FeatureVisualization
        Of a dataset of images that was mined: ``fv.run(composite)``.
    composite : zennit Composite, or None for the plain gradient
        Rules for the heatmaps.
    path : path
        The file; its folder is made where there is none.
    **options
        As the attributes of `ReportOptions`, such as ``n_concepts=4``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    FileNotFoundError
        If nothing was mined.
    TableMismatchError
        If another model or dataset was mined.
    KeyError
        If a class or layer was not mined.
    IndexError
        If a finding is about a concept that its layer does not have.
    ValueError
        If a number is not positive, a class has no name, or the samples are no images.
    """
    chosen = ReportOptions(**options)
    shares = _shares(Table.open(fv.path), chosen.layers)
    targets = next(iter(shares.values())).targets.tolist()
    shown = targets if chosen.classes is None else list(chosen.classes)
    for target in shown:
        if target not in targets:
            raise KeyError(f"no sample of class {target!r} was mined; the classes are {targets}")
    names = _names(chosen.class_names, targets)
    wanted = [finding.concept for finding in chosen.findings if finding.concept is not None]
    places = _places(shares, shown, chosen.n_concepts, wanted)
    maker = _Maker(fv, composite, names, shares, places, chosen)
    bar = tqdm(shown, desc="Report", unit="class", disable=not chosen.verbose, dynamic_ncols=True)
    page = Page(
        title=chosen.title,
        lead=chosen.lead,
        pixelated=maker.largest_side() < chosen.picture_size,
        findings=[(finding, "" if finding.concept is None else places[finding.concept]) for finding in chosen.findings],
        classes=[maker.class_section(target) for target in bar],
        provenance=maker.provenance(),
        skipped=sorted(maker.table.coverage().skipped.items()),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(page).encode())
    return path


def make_tile(sample: Tensor, heatmap: Tensor, caption: str, tip: str = "", *, size: int = 96) -> Tile:
    """Sample beside its heatmap, for example for a `Finding`.

    Parameters
    ----------
    sample : Tensor of shape (channels, height, width)
    heatmap : Tensor of shape (height, width)
    caption, tip : str
        What is written below the pictures, and what is shown when the pointer is on them.
    size : int
        Number of pixels on a picture's side, at most.

    Returns
    -------
    Tile

    Raises
    ------
    ValueError
        If the sample is no image, or the heatmap has another size.
    """
    if sample.dim() != 3 or heatmap.shape != sample.shape[1:]:
        raise ValueError(
            "a report shows images of shape (channels, height, width) with heatmaps of shape (height, width), got "
            f"{tuple(sample.shape)} and {tuple(heatmap.shape)}; resize images in the dataset, not in preprocess_fn"
        )
    return Tile(sample_picture(sample, size), heatmap_picture(heatmap, sample, size), caption, tip)


class _Maker:
    """Maker of a report's sections."""

    def __init__(
        self,
        fv: FeatureVisualization,
        composite: Composite | None,
        names: Mapping[int, str],
        shares: Mapping[str, ClassMeans],
        places: Mapping[Place, str],
        options: ReportOptions,
    ) -> None:
        self.fv = fv
        self.table = Table.open(fv.path)
        self.composite = composite
        self.names = names
        self.shares = shares
        self.places = places
        self.options = options
        self.of_findings = [finding.concept for finding in options.findings]
        self.rows = self.table.rows()
        self.active: dict[tuple[str, int], list[Tile]] = {}
        self.best: dict[tuple[str, str, int | None], ReferenceSamples] = {}

    def largest_side(self) -> int:
        sample, _ = self.fv.get_data_sample(int(self.rows.sample[0]), preprocessing=False)
        return max(sample.shape[-2:])

    def class_section(self, target: int) -> ClassSection:
        samples = self.rows.sample[self.rows.target == target]
        chosen = samples[np.linspace(0, len(samples) - 1, min(self.options.n_mean, len(samples))).round().astype(int)]
        return ClassSection(
            anchor=f"class-{target}",
            name=self.names[target],
            n_rows=len(samples),
            n_mean=len(chosen),
            mean=self._mean(chosen, target),
            layers=[self._layer_section(target, layer) for layer in reversed(list(self.shares))],
        )

    def provenance(self) -> list[tuple[str, str]]:
        table, coverage = self.table, self.table.coverage()
        missing = ", ".join(f"{start} to {stop - 1}" for start, stop in coverage.missing) or "none"
        seen = table.n_samples - sum(stop - start for start, stop in coverage.missing)
        ranked = f"{self.fv.RelMax.max_target} over positions, {'shares' if self.fv.RelMax.abs_norm else 'values'}"
        return [
            ("Samples", f"{seen} of {table.n_samples} looked at, {len(coverage.skipped)} skipped, missing: {missing}"),
            ("Layers", ", ".join(table.layers)),
            ("References ranked by", ranked),
            ("Heatmaps by", _description(self.composite)),
            ("Content of the index", table.digest),
            *((f"Fingerprint: {key}", value) for key, value in sorted(table.fingerprints.items())),
            ("Versions", ", ".join(f"{key} {value}" for key, value in sorted(table.versions.items()))),
        ]

    def _mean(self, samples: np.ndarray, target: int) -> Tile:
        """Mean over samples of a class: of the images, and of the heatmaps, which all have the same weight."""
        image: Any = 0
        heat: Any = 0
        for start in range(0, len(samples), self.options.batch_size):
            data, _ = self.fv.get_data_concurrently(samples[start : start + self.options.batch_size])
            attribution = self.fv.attribution
            conditions = [{attribution.MODEL_OUTPUT_NAME: [target]}]
            prepared = self.fv.preprocess_data(data.detach())
            found = attribution(prepared, conditions, self.composite).heatmap.cpu().double()
            total = found.abs().flatten(1).sum(1).clamp(min=torch.finfo(found.dtype).tiny)
            heat = heat + (found / total.reshape(-1, *[1] * (found.dim() - 1))).sum(0)
            image = image + data.detach().cpu().double().sum(0)
        n = len(samples)
        return make_tile(image / n, heat / n, "", f"mean over {n} samples", size=2 * self.options.picture_size)

    def _layer_section(self, target: int, layer: str) -> LayerSection:
        own = [place for place in self.places if place[:2] == (target, layer)]
        cards = [self._card(place) for place in sorted(own, key=lambda place: (-self._share(place), place[2]))]
        is_last = layer == list(self.shares)[-1]
        has_finding = any(place in self.of_findings for place in own)
        share = sum(card.share for card in cards)
        return LayerSection(layer, is_last or has_finding, cards, share, self.shares[layer].value.shape[1])

    def _card(self, place: Place) -> ConceptCard:
        target, layer, concept = place
        key = layer, concept
        if key not in self.active:
            self.active[key] = self._references(layer, concept, "activation", None)
        others = [(t, layer, concept) for t in self.names if t != target]
        best = sorted(others, key=lambda other: (-self._share(other), other[0]))[:ELSEWHERE]
        return ConceptCard(
            anchor=self.places[place],
            layer=layer,
            concept=concept,
            share=self._share(place),
            most_relevant=self._references(layer, concept, "relevance", target),
            most_active=self.active[key],
            elsewhere=[Link(self.names[o[0]], self._share(o), self.places.get(o, "")) for o in best],
        )

    def _references(self, layer: str, concept: int, mode: str, target: int | None) -> list[Tile]:
        """Best samples of a concept: the most relevant ones of a class, or the most active ones of all classes."""
        fv, ranks = self.fv, (0, self.options.n_references)
        options: dict[str, Any] = {"composite": self.composite, "plot_fn": None, "batch_size": self.options.batch_size}
        results = fv.RelMax if mode == "relevance" else fv.ActMax
        key = layer, mode, target
        if key not in self.best:
            settings = results.max_target, results.abs_norm, self.options.n_references
            self.best[key] = top_k(self.table, layer, mode, *settings, of_class=target)
        best = ReferenceSamples(*(column[:, concept] for column in self.best[key]))
        if target is None:
            (found,) = fv.get_max_reference([concept], layer, mode, ranks, **options).values()
        else:
            (found,) = fv.get_stats_reference(concept, layer, target, mode, ranks, init="relevance", **options).values()
        tiles = []
        for (sample, heatmap), index, value, label in zip(
            zip(*found, strict=True), best.sample, best.value, best.target, strict=True
        ):
            if value != 0:  # the concept has no further references
                name = self.names.get(int(label), str(label))
                amount = percent(value) if results.abs_norm else f"{value:.3g}"
                what = f"{amount} of the sample's {mode}" if results.abs_norm else f"{mode} {amount}"
                caption = name if target is None else amount
                tip = f"sample {index}, class {name}: {what}"
                tiles.append(make_tile(sample, heatmap, caption, tip, size=self.options.picture_size))
        return tiles

    def _share(self, place: Place) -> float:
        return _share(self.shares, place)


def _description(composite: Composite | None) -> str:
    """Name of a composite, with its settings where it tells them, and its fingerprint."""
    if composite is None:
        return "the plain gradient"
    name = repr(composite) if hasattr(composite, "describe") else type(composite).__qualname__
    return f"{name}, fingerprint {fingerprint_composite(composite)}"


def _shares(table: Table, layers: Sequence[str] | None) -> dict[str, ClassMeans]:
    """Concepts' shares in the relevance of the classes, for each layer in the order of the model."""
    for layer in layers or ():
        table.n_concepts(layer)  # raises where it was not mined
    chosen = [layer for layer in table.layers if layers is None or layer in layers]
    if not chosen:
        raise ValueError("layers must name at least one layer")
    return {layer: class_means(table, layer, "relevance", "sum", normed=True, cache=True) for layer in chosen}


def _share(shares: Mapping[str, ClassMeans], place: Place) -> float:
    target, layer, concept = place
    means = shares[layer]
    return float(means.value[np.searchsorted(means.targets, target), concept])


def _names(class_names: Sequence[str] | Mapping[int, str] | None, targets: Collection[int]) -> dict[int, str]:
    if class_names is None:
        return {target: str(target) for target in targets}
    known = class_names if isinstance(class_names, Mapping) else dict(enumerate(class_names))
    if nameless := [target for target in targets if target not in known]:
        raise ValueError(f"class_names has {len(known)} names, and none for the classes {nameless}")
    return {target: str(known[target]) for target in targets}


def _places(
    shares: Mapping[str, ClassMeans], targets: Sequence[int], n_concepts: int, wanted: Sequence[Place]
) -> dict[Place, str]:
    """Where concepts are shown, with their anchors: the most relevant of each class and layer, and those wanted."""
    chosen: list[Place] = []
    for place in wanted:
        target, layer, concept = place
        if target not in targets or layer not in shares:
            raise KeyError(f"a finding is about {place}; classes shown are {list(targets)}, layers {list(shares)}")
        if not 0 <= concept < (n := shares[layer].value.shape[1]):
            raise IndexError(f"a finding is about {place}; layer {layer!r} has the concepts 0 to {n - 1}")
        chosen.append(place)
    for layer, means in shares.items():
        for target in targets:
            value = means.value[np.searchsorted(means.targets, target)]
            best = np.argsort(-value, kind="stable")[:n_concepts]
            chosen += [(target, layer, int(concept)) for concept in best if value[concept] > 0]
    numbers = {layer: number for number, layer in enumerate(shares)}
    return {place: f"class-{place[0]}-layer-{numbers[place[1]]}-concept-{place[2]}" for place in chosen}
