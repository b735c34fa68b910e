"""What a report takes from the model: pictures of samples, heatmaps of concepts, and what happens without a concept.

Everything drawn is a file in the report's folder with a key of what it depends on. A file whose key is still right is
not drawn again, so that an interrupted report goes on, and a table that has grown costs what is new in it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from zennit.core import Composite

from crp.concepts import mask_of
from crp.image.colours import as_picture
from crp.visualization.feature import FeatureVisualization
from crp.visualization.references import predict_without
from crp.visualization.report.addresses import Addresses
from crp.visualization.report.maps import crop_of, encode_maps, read_facts, shrunk, square_map
from crp.visualization.report.options import ReportOptions, check_image
from crp.visualization.table.files import write_atomic
from crp.visualization.table.manifest import Array

#: Samples that are kept in memory.
_KEPT = 256
#: Concepts below that are kept of each.
_BELOW = 5
#: Files that are drawn together.
_TOGETHER = 64
#: Side up to which pictures are stored without loss.
_SMALL = 64
#: Classes of a prediction that are kept.
_TOP = 4
#: What files of heatmaps hold; those of another version are drawn again.
_VERSION = 2


class HeatmapFile(NamedTuple):
    """A file of heatmaps to draw: its address, what it depends on, and a row for each heatmap."""

    address: str
    key: str
    rows: list[Row]


class Row(NamedTuple):
    """A heatmap: of a sample, for a target (-1 for none), through a concept of a layer or through all of them."""

    sample: int
    target: int
    layer: str | None = None
    concept: int = 0


class Drawn(NamedTuple):
    """What is known of a row once it is drawn.

    Attributes
    ----------
    crop : (left, top, side)
        Shares of the longer side.
    below : list of (concept, share)
        Of the layer below, for a row through a concept.
    before, after : float or None
        Probability of the target, or its output where there is one output only, with the concept and without it.
    predicted : int or None
        Class with the largest output.
    top : list of (class, probability)
        Most probable classes, for a row of a whole sample.
    """

    crop: tuple[float, float, float]
    below: list[tuple[int, float]]
    before: float | None
    after: float | None
    predicted: int | None
    top: Sequence[tuple[int, float]] = ()


class Drawer:
    """Drawer of a report's files.

    Parameters
    ----------
    fv : FeatureVisualization
    composite : zennit Composite or None
    layers : sequence of str
        From the input to the output.
    folder : Path
    identity : str
        What every heatmap depends on: model, data, composite.
    options : ReportOptions
    """

    def __init__(
        self,
        fv: FeatureVisualization,
        composite: Composite | None,
        layers: Sequence[str],
        folder: Path,
        identity: str,
        options: ReportOptions,
    ) -> None:
        self.fv, self.composite, self.layers, self.options = fv, composite, list(layers), options
        self.folder, self.identity = folder, identity
        #: Whether the scores of classes are logits of a softmax; those of pixels or boxes have no probability.
        self.exclusive = fv.attribution.exclusive
        self.labels: dict[int, Any] = {}
        self.smallest_side = 1 << 30
        self.used: set[str] = set()
        self._data: OrderedDict[int, Tensor] = OrderedDict()
        self._pictures: dict[int, str] = {}

    def job(self, address: str, rows: Sequence[Row]) -> HeatmapFile:
        """File of heatmaps, with the key of all it depends on."""
        below = [self._below_of(row.layer) for row in rows]
        content = [_VERSION, self.identity, self.options.map_size, self.options.picture_size, below, rows]
        content += [] if self.exclusive else ["scores"]
        self.used.add(address)
        return HeatmapFile(address, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32], list(rows))

    def is_drawn(self, job: HeatmapFile) -> bool:
        """Whether the file is there, of the same content, and with it the picture that it names."""
        facts = read_facts(self.folder / job.address) or {}
        if facts.get("key") != job.key:
            return False
        if "picture" not in facts:
            return True
        if not (self.folder / facts["picture"]).is_file():
            return False
        self._keep(job, facts)
        return True

    def draw(self, jobs: Sequence[HeatmapFile]) -> Iterator[HeatmapFile]:
        """Draw what is missing, and yield each job when its file is there."""
        for start in range(0, len(jobs), _TOGETHER):
            waiting = []
            for job in jobs[start : start + _TOGETHER]:
                if self.is_drawn(job):
                    yield job
                else:
                    waiting.append(job)
            yield from self._draw_together(waiting)

    def _draw_together(self, jobs: Sequence[HeatmapFile]) -> Iterator[HeatmapFile]:
        """Draw some jobs; rows of one layer are attributed together, whosever they are."""
        places = [(number, place, row) for number, job in enumerate(jobs) for place, row in enumerate(job.rows)]
        places.sort(key=lambda one: (one[2].layer or "", one[2].target < 0))
        found: list[dict[int, tuple[Array, Drawn]]] = [{} for _ in jobs]
        for alike in _batches(places, self.options.batch_size):
            for (number, place, _), drawn in zip(alike, self._draw_rows([row for *_, row in alike]), strict=True):
                found[number][place] = drawn
                if len(found[number]) == len(jobs[number].rows):
                    self._write(jobs[number], [found[number][i] for i in range(len(found[number]))])
                    found[number].clear()
                    yield jobs[number]

    def _draw_rows(self, rows: Sequence[Row]) -> list[tuple[Array, Drawn]]:
        """Draw rows of one layer; those of samples of one shape together."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(tuple(self.data(row.sample).shape), []).append(place)
        found: dict[int, tuple[Array, Drawn]] = {}
        for of_shape in places.values():
            found |= dict(zip(of_shape, self._draw([rows[place] for place in of_shape]), strict=True))
        return [found[place] for place in range(len(rows))]

    def write_mean(self, job: HeatmapFile, heatmap: Array, picture: tuple[bytes, str]) -> None:
        """Write the mean heatmap of a class, and the mean picture that the file names."""
        facts = {"key": job.key, "picture": self.store(*picture), "n": len(job.rows)}
        self._write_file(job, [square_map(heatmap, self.options.map_size)], facts)

    def facts(self, address: str) -> list[Drawn]:
        """What is known of the rows of a file; nothing where it is not drawn."""
        return [Drawn(*row) for row in (read_facts(self.folder / address) or {}).get("rows", [])]

    def picture(self, sample: int) -> str:
        """Address of a sample's picture, which is written if it is not there."""
        if sample not in self._pictures:
            self._pictures[sample] = self.store(*picture_file(self.data(sample), self.options.picture_size))
        return self._pictures[sample]

    def store(self, content: bytes, suffix: str) -> str:
        """Write a picture unless one of the same content is there."""
        address = Addresses.picture(content, suffix)
        self.used.add(address)
        if not (self.folder / address).is_file():
            (self.folder / address).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / address, content)
        return address

    def data(self, sample: int) -> Tensor:
        """Sample as it is shown; its label is kept."""
        if sample in self._data:
            self._data.move_to_end(sample)
            return self._data[sample]
        data, label = self.fv.get_data_sample(sample, preprocessing=False)
        self.labels[sample] = label
        self._data[sample] = data[0].detach().cpu()
        if len(self._data) > _KEPT:
            self._data.popitem(last=False)
        return self._data[sample]

    def spaces(self, sample: int) -> dict[str, tuple[int, int]]:
        """Height and width of the layers that have them."""
        data, _ = self.fv.get_data_sample(sample)
        result = self.fv.attribution(data, [{}], None, record_layer=self.layers, init_rel=1.0)
        shapes = {layer: tuple(found.shape[2:]) for layer, found in result.activations.items()}
        return {layer: (shape[0], shape[1]) for layer, shape in shapes.items() if len(shape) == 2}

    def _draw(self, rows: Sequence[Row]) -> list[tuple[Array, Drawn]]:
        attribution, output = self.fv.attribution, self.fv.attribution.MODEL_OUTPUT_NAME
        layer, targets = rows[0].layer, [row.target for row in rows]
        started = any(target >= 0 for target in targets)
        conditions: list[dict[str, Any]] = []
        for row in rows:
            condition: dict[str, Any] = {output: [row.target]} if started else {}
            conditions.append(condition if layer is None else {**condition, layer: [row.concept]})
        below = self._below_of(layer)
        shown = [self.data(row.sample) for row in rows]
        data = self.fv.preprocess_data(torch.stack(shown).to(self.fv.device)).detach()
        result = attribution(
            data,
            conditions,
            self.composite,
            record_layer=[] if below is None else [below],
            mask_map=mask_of(self.fv.layer_map[layer]) if layer else mask_of(next(iter(self.fv.layer_map.values()))),
            start_layer=None if started or layer is None else layer,
            exclude_parallel=started,
        )
        heatmaps = result.heatmap.detach().cpu().double()
        for sample, heatmap in zip(shown, heatmaps, strict=True):
            check_image(sample, heatmap)
        lower = self._shares(result.relevances, below)
        before, predicted = scores(result.prediction, targets)
        if not self.exclusive:
            before = [None] * len(rows)
        after: list[float | None] = [None] * len(rows)
        if layer is not None and started and self.exclusive:
            after = self._without(data, rows, layer)
        drawn = []
        for i, heatmap in enumerate(heatmaps.numpy()):
            facts = Drawn(crop_of(heatmap), lower[i] if below else [], before[i], after[i], predicted[i])
            if layer is None and self.exclusive:
                facts = facts._replace(top=_top_classes(result.prediction, i))
            shares = heatmap / (np.abs(heatmap).sum() or 1.0)
            drawn.append((shrunk(shares, self.options.map_size), facts))
        return drawn

    def _without(self, data: Tensor, rows: Sequence[Row], layer: str) -> list[float | None]:
        """Scores of the targets when each row's concept is switched off."""
        mask = mask_of(self.fv.layer_map[layer])
        masks = [mask(i, [row.concept], layer) for i, row in enumerate(rows)]
        prediction = predict_without(self.fv.attribution, data, layer, masks)
        if prediction is None:
            return [None] * len(rows)
        return scores(prediction, [row.target for row in rows])[0]

    def _shares(self, relevances: Mapping[str, Tensor], below: str | None) -> list[list[tuple[int, float]]]:
        if below is None:
            return []
        values = self.fv.layer_map[below].attribute(relevances[below], layer_name=below, abs_norm=True)
        found = values.detach().cpu().double().numpy()
        best = np.argsort(-found, axis=1, kind="stable")[:, :_BELOW]
        return [
            [(c, round(float(found[i, c]), 4)) for c in row if found[i, c] > 0] for i, row in enumerate(best.tolist())
        ]

    def _below_of(self, layer: str | None) -> str | None:
        place = 0 if layer is None else self.layers.index(layer)
        return self.layers[place - 1] if place else None

    def _keep(self, job: HeatmapFile, facts: Mapping[str, Any]) -> None:
        """Remember the picture that a file of heatmaps names: that of its sample, or of a class."""
        self.used.add(facts["picture"])
        self.smallest_side = min(self.smallest_side, facts.get("side", self.smallest_side))
        if "side" in facts:
            self._pictures[job.rows[0].sample] = facts["picture"]

    def _write(self, job: HeatmapFile, found: Sequence[tuple[Array, Drawn]]) -> None:
        facts: dict[str, Any] = {"key": job.key, "rows": [drawn for _, drawn in found]}
        if job.rows[0].layer is None:
            sample = job.rows[0].sample
            facts |= {"picture": self.picture(sample), "side": max(self.data(sample).shape[-2:])}
            self._keep(job, facts)
        maps = [one for one, _ in found]
        if job.rows[0].layer is None:
            # What sets a concept apart, h_k / Σ|h_k| - h / Σ|h|: where a larger part of its relevance lies than of all
            # relevance. Heatmaps of one layer's concepts often look alike, and this is in what they differ.
            maps += [one - maps[0] for one in maps[1:]]
        self._write_file(job, [square_map(one, self.options.map_size) for one in maps], facts)

    def _write_file(self, job: HeatmapFile, maps: Sequence[Array], facts: Mapping[str, Any]) -> None:
        path = self.folder / job.address
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, encode_maps(maps, facts))


def _batches(places: Sequence[tuple[int, int, Row]], size: int) -> Iterator[list[tuple[int, int, Row]]]:
    """Neighbours with the same layer, all with a target or all without, at most ``size`` of them."""
    for _, alike in groupby(places, key=lambda one: (one[2].layer, one[2].target < 0)):
        rows = list(alike)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def scores(prediction: Any, targets: Sequence[int]) -> tuple[list[float | None], list[int | None]]:
    """Probabilities of targets, and the predicted classes.

    Where rows of the output are probabilities already, they are taken as they are; others go through a softmax. Of a
    single output, the value itself is given.
    """
    nothing: list[Any] = [None] * len(targets)
    if not isinstance(prediction, Tensor) or prediction.dim() != 2 or not len(targets):
        return nothing, nothing
    if prediction.shape[1] == 1:
        return prediction[:, 0].detach().cpu().double().tolist(), nothing
    values = _probabilities(prediction)
    predicted: list[int | None] = list(values.argmax(1).tolist())
    return [float(row[target]) if target >= 0 else None for row, target in zip(values, targets, strict=True)], predicted


def _top_classes(prediction: Any, row: int) -> list[tuple[int, float]]:
    """Most probable classes of a row, and their probabilities; nothing where the output is no classes."""
    if not isinstance(prediction, Tensor) or prediction.dim() != 2 or prediction.shape[1] < 2:
        return []
    values, classes = _probabilities(prediction[row : row + 1])[0].topk(min(_TOP, prediction.shape[1]))
    return [(c, round(v, 4)) for c, v in zip(classes.tolist(), values.tolist(), strict=True)]


def _probabilities(prediction: Tensor) -> Tensor:
    values = prediction.detach().cpu().double()
    whole = torch.ones(len(values), dtype=values.dtype)
    is_done = (values >= 0).all() and torch.allclose(values.sum(1), whole, atol=1e-4)
    return values if is_done else values.softmax(1)


def picture_file(sample: Tensor, size: int) -> tuple[bytes, str]:
    """Content of a picture's file, and its suffix: small ones without loss, others as WebP."""
    picture = Image.fromarray((as_picture(sample) * 255).round().astype(np.uint8))
    if max(picture.size) > size:
        picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    grey = np.asarray(picture)
    if (grey == grey[..., :1]).all():
        picture = picture.convert("L")
    buffer = io.BytesIO()
    if max(picture.size) <= _SMALL:
        picture.save(buffer, "PNG")
        return buffer.getvalue(), "png"
    picture.convert("RGB").save(buffer, "WEBP", quality=82, method=4)
    return buffer.getvalue(), "webp"
