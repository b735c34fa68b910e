"""Heatmaps of pictures, computed so that what rows have in common is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.concepts import mask_of
from crp.errors import StateError
from crp.visualization.report.drawing import Drawer, Drawn, Row, scores, top_classes
from crp.visualization.report.maps import crop_of, shrunk
from crp.visualization.report.options import check_image
from crp.visualization.starting import starting_masks, starts_from_one
from crp.visualization.table.manifest import Array
from crp.visualization.without import predict_without

#: Rows of a sample from which on they share a forward pass of its own.
_SHARING = 4
#: The same of small pictures, and of one layer, as a batch of them is one fast call.
_SHARING_OF_SMALL = 16
#: Side up to which pictures are small.
SMALL = 64

_Heatmap = tuple[Array, Drawn]


class PictureRows:
    """What computes rows of pictures; ``data`` gives that of a sample, (channels, height, width)."""

    def __init__(self, drawer: Drawer, data: Callable[[int], Tensor]) -> None:
        self._drawer, self._data = drawer, data
        self._attribution, self._size = drawer.fv.attribution, drawer.options.batch_size
        self._order = {layer: number for number, layer in enumerate([None, *drawer.layers])}
        self._masks = {layer: mask_of(concept) for layer, concept in drawer.fv.layer_map.items()}
        self._starts = starts_from_one(self._attribution, drawer.composite)
        self._reached: dict[str, bool] = {}

    def draw(self, rows: Sequence[Row]) -> Iterator[tuple[list[Row], list[_Heatmap]]]:
        """Compute rows, and give them in parts; those of a sample share its forward pass, where they are several."""
        others: dict[Any, list[Row]] = {}
        ordered = sorted(rows, key=lambda row: (row.sample, self._order[row.layer], *self._kind(row)[1:]))
        for sample, of_sample in groupby(ordered, key=lambda row: row.sample):
            shape = tuple(self._data(sample).shape)
            is_small = max(shape[-2:]) <= SMALL
            several: list[Row] = []
            for kind, alike in groupby(of_sample, key=self._kind):
                # (those of small pictures, and those that cannot start beside others, stay with their layer)
                some, alone = list(alike), is_small or (kind[1] and not self._starts_beside(kind[0], sample))
                enough = self._size if not alone else _SHARING_OF_SMALL if is_small else _SHARING
                if len(some) >= enough:
                    yield from self._in_parts(some, self._of_layer)
                elif alone:
                    others.setdefault((*kind, shape), []).extend(some)
                else:
                    several += some
            if len(several) >= _SHARING:
                yield from self._in_parts(several, self._of_sample)
            else:
                for row in several:
                    others.setdefault((*self._kind(row), shape), []).append(row)
            for waiting in others.values():
                while len(waiting) >= self._size:
                    yield from self._in_parts(waiting[: self._size], self._of_layer)
                    del waiting[: self._size]
        for waiting in others.values():
            if waiting:
                yield from self._in_parts(waiting, self._of_layer)

    def _starts_beside(self, layer: str | None, sample: int) -> bool:
        """Whether rows that start in a layer can share a pass with others: relevance of the output must come there."""
        if layer is None or not self._starts or layer in self._drawer.by_code:
            return False
        if layer not in self._reached:
            condition = {self._attribution.MODEL_OUTPUT_NAME: [0], layer: (0,)}
            data, masks = self._prepared([sample]), starting_masks(self._drawer.fv.layer_map)
            try:
                self._attribution(data, [condition], self._drawer.composite, mask_map=masks)
                self._reached[layer] = True
            except StateError:
                self._reached[layer] = False
        return self._reached[layer]

    def _kind(self, row: Row) -> tuple[str | None, bool, int]:
        """What is equal for rows that are computed alike: layer, whether they start there, and the concept's code."""
        return row.layer, row.target < 0, self._drawer.code_of(row)

    def _in_parts(
        self, rows: Sequence[Row], compute: Callable[[Sequence[Row]], Iterator[list[_Heatmap]]]
    ) -> Iterator[tuple[list[Row], list[_Heatmap]]]:
        for start, part in zip(range(0, len(rows), self._size), compute(rows), strict=True):
            yield list(rows[start : start + self._size]), part

    def _of_layer(self, rows: Sequence[Row]) -> Iterator[list[_Heatmap]]:
        """Rows of one kind: of one sample, by one forward pass; or of several, which are one part."""
        layer, started = rows[0].layer, rows[0].target >= 0
        below = self._drawer.below_of(layer)
        init_rel = self._drawer.init_of(rows[0])
        conditions = [{} if init_rel else self._condition(row, started) for row in rows]
        samples = [row.sample for row in rows]
        data = self._prepared(samples if len(set(samples)) > 1 else samples[:1])
        parts = self._attribution.generate(
            data,
            conditions,
            self._drawer.composite,
            record_layer=[] if below is None else [below],
            mask_map=self._masks,
            start_layer=None if started or layer is None else layer,
            init_rel=init_rel,
            batch_size=self._size,
            exclude_parallel=started,
            verbose=False,
        )
        for start, part in zip(range(0, len(rows), self._size), parts, strict=True):
            yield self._about(rows[start : start + self._size], part, data)

    def _of_sample(self, rows: Sequence[Row]) -> Iterator[list[_Heatmap]]:
        """Rows of one sample and several layers, by one forward pass."""
        drawer, output = self._drawer, self._attribution.MODEL_OUTPUT_NAME
        data = self._prepared([rows[0].sample])
        target = next((row.target for row in rows if row.target >= 0), 0)
        conditions = []
        for row in rows:
            if row.target >= 0 or row.layer is None:
                conditions.append(self._condition(row, True))
            else:  # (it begins in its layer, whatever arrives there)
                conditions.append({output: [target], row.layer: (row.concept,)})
        parts = self._attribution.generate(
            data,
            conditions,
            drawer.composite,
            record_layer=drawer.layers_below(rows),
            mask_map=starting_masks(drawer.fv.layer_map) if self._starts else self._masks,
            batch_size=self._size,
            exclude_parallel=True,
            verbose=False,
        )
        for start, part in zip(range(0, len(rows), self._size), parts, strict=True):
            found: list[_Heatmap] = []
            places = range(start, min(start + self._size, len(rows)))
            for _, alike in groupby(places, key=lambda i: (rows[i].layer, rows[i].target < 0)):
                numbers = list(alike)
                found += self._about([rows[i] for i in numbers], part, data, [i - start for i in numbers])
            yield found

    def _prepared(self, samples: Sequence[int]) -> Tensor:
        stacked = torch.stack([self._data(sample) for sample in samples])
        return self._drawer.fv._prepare_each(stacked.to(self._drawer.fv.device)).detach()

    def _condition(self, row: Row, started: bool) -> dict[str, Any]:
        condition: dict[str, Any] = {self._attribution.MODEL_OUTPUT_NAME: [row.target]} if started else {}
        return condition if row.layer is None else {**condition, row.layer: [row.concept]}

    def _about(
        self, rows: Sequence[Row], result: Any, data: Tensor, numbers: Sequence[int] | None = None
    ) -> list[_Heatmap]:
        """What is shown of rows of one layer, which have these numbers in a result: heatmaps, and what is known."""
        drawer, layer, targets = self._drawer, rows[0].layer, [row.target for row in rows]
        places = list(range(len(rows)) if numbers is None else numbers)
        heatmaps = result.heatmap[places].detach().cpu().double()
        for row, heatmap in zip(rows, heatmaps, strict=True):
            check_image(self._data(row.sample), heatmap)
        below = drawer.below_of(layer)
        lower = [] if below is None else drawer.shares(result, below, places)
        is_output = targets[0] >= 0 or layer is None  # (not the activation of a layer where relevance started)
        prediction = result.prediction[places] if is_output and isinstance(result.prediction, Tensor) else None
        before, predicted = scores(prediction, targets)
        if not drawer.exclusive:
            before = [None] * len(rows)
        after: list[float | None] = [None] * len(rows)
        if layer is not None and targets[0] >= 0 and drawer.exclusive:
            after = self._without(data, rows, layer)
        drawn = []
        for i, heatmap in enumerate(heatmaps.numpy()):
            facts = Drawn(crop_of(heatmap), lower[i] if below else [], before[i], after[i], predicted[i])
            if layer is None and drawer.exclusive:
                facts = facts._replace(top=top_classes(prediction, i))
            shares = heatmap / (np.abs(heatmap).sum() or 1.0)
            drawn.append((shrunk(shares, drawer.options.map_size), facts))
        return drawn

    def _without(self, data: Tensor, rows: Sequence[Row], layer: str) -> list[float | None]:
        """Scores of the targets when each row's concept is switched off."""
        masks = [self._masks[layer](i, [row.concept], layer) for i, row in enumerate(rows)]
        prediction = predict_without(self._attribution, data, layer, masks)
        if prediction is None:
            return [None] * len(rows)
        return scores(prediction, [row.target for row in rows])[0]
