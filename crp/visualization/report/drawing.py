"""What a report takes from the model: heatmaps of samples and concepts, and what happens without a concept.

Everything drawn is a file in the report's folder with a key of what it depends on. A file whose key is still right is
not drawn again, so that an interrupted report goes on, and a table that has grown costs what is new in it. How pictures
and texts are drawn is in files of their own; pages know them by what is here.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from zennit.core import Composite

from crp.concepts.reading import LayerValues, initial_relevance_of, relevance_sums, starts_by_code
from crp.engine.probabilities import are_shares
from crp.visualization.feature import FeatureVisualization
from crp.visualization.report.addresses import Addresses
from crp.visualization.report.options import ReportOptions
from crp.visualization.report.suspects import Suspect
from crp.visualization.report.tiles import AnyShown
from crp.visualization.table.files import write_atomic
from crp.visualization.table.store import Table

#: Concepts below that are kept of each.
_BELOW = 5
#: Classes of a prediction that are kept.
_TOP = 4


class Row(NamedTuple):
    """A heatmap: of a sample, for a target (-1 for none), through a concept of a layer or through all of them."""

    sample: int
    target: int
    layer: str | None = None
    concept: int = 0


class HeatmapFile(NamedTuple):
    """A file of heatmaps to draw: its address, what it depends on, and a row for each heatmap.

    ``places`` are those of the rows that this process draws, which are all unless several share the work.
    """

    address: str
    key: str
    rows: list[Row]
    places: Sequence[int]

    @property
    def of_sample(self) -> bool:
        """Whether it begins with the heatmap of a whole sample, and is not of one concept."""
        return self.rows[0].layer is None


class Drawn(NamedTuple):
    """What is known of a row once it is drawn.

    Attributes
    ----------
    crop : (left, top, side)
        Shares of the longer side; of a text, all of it.
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


class Drawer(ABC):
    """Drawer of a report's files; ``identity`` is what every heatmap depends on, layers ascend to the output."""

    #: Whether samples are pictures, and what a sample and a target are called.
    pictures = True
    sample_word = "sample"
    class_word = "classes"
    #: What the page of suspects says about them, in full and in short.
    about_suspects: str
    suspects_in_short: str

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
        #: Addresses of all files that the pages need.
        self.used: set[str] = set()
        self._rows: dict[str, list[Row]] = {}
        #: Layers whose concepts' activation is explained by their code.
        self.by_code = {layer for layer, concept in fv.layer_map.items() if starts_by_code(concept)}

    # --- what is drawn

    @abstractmethod
    def files(self, wanted: Mapping[str, list[Row]], part: tuple[int, int]) -> list[HeatmapFile]:
        """Files of the rows that pages ask for, by addresses; or what part i of n of the work draws of them."""

    @abstractmethod
    def draw(self, jobs: Sequence[HeatmapFile]) -> Iterator[int]:
        """Draw what is missing, and yield now and then how many more heatmaps are there."""

    def draw_mean(self, target: int, samples: Sequence[int]) -> None:  # noqa: B027  (texts have none)
        """Draw the mean of some samples of a class, where there is one."""

    # --- what pages show

    @abstractmethod
    def known(self, address: str) -> list[Drawn]:
        """What is known of the rows that were asked for by an address; nothing where they are not drawn."""

    @abstractmethod
    def tile(self, address: str, place: int, alt: str, at: int | None = None) -> AnyShown:
        """Row in a place, of those that were asked for by an address: what is relevant in it.

        ``at`` is where the concept is strongest.
        """

    def whole(self, address: str, place: int, alt: str) -> AnyShown:
        """The same, as it is on the page of its sample: a picture is always shown as a whole."""
        return self.tile(address, place, alt)

    def far(self, sample: int) -> int:
        """Tokens on either side of the strongest one, where a sample is too long to be shown whole for its concepts."""
        return 0

    @abstractmethod
    def apart(self, address: str, place: int, alt: str) -> AnyShown:
        """What sets a concept apart: where a larger part of its relevance lies than of all relevance, the first row."""

    def mean(self, target: int, alt: str) -> AnyShown | None:
        """Mean of a class, where there is one."""
        return None

    @abstractmethod
    def find_suspects(self, table: Table, targets: Sequence[int]) -> list[Suspect]:
        """Concepts that may be shortcuts, most suspicious first."""

    @property
    def pixelated(self) -> bool:
        """Whether pictures are smaller than on the screen."""
        return False

    def missing(self, table: Table) -> list[tuple[str, str]]:
        """What pages do not show of this table, and why."""
        found = []
        if "activation" not in table.modes:
            found.append(("Most active references", "activations were not mined"))
        if "sum" not in table.kinds:
            found.append(
                ("Most negative references", "the table keeps the largest value among positions, and no sum over them")
            )
        return found

    def has_labels(self, table: Table) -> bool:
        """Whether labels are of the classes that are predicted, so that both can be compared."""
        return True

    def class_name(self, target: int, names: Mapping[int, str]) -> str:
        """How a class is called."""
        return names.get(target, str(target) if target >= 0 else "no class")

    def found_by(self, sample: int, name: str) -> str:
        """What the search finds a sample by."""
        return name

    # --- what both kinds share

    def job(self, address: str, rows: Sequence[Row]) -> HeatmapFile:
        """File of heatmaps, with the key of all it depends on."""
        self.used.add(address)
        return HeatmapFile(address, self._key(rows), list(rows), range(len(rows)))

    def _key(self, rows: Sequence[Row]) -> str:
        content = [*self._settings(), [self.below_of(row.layer) for row in rows], rows]
        content += [] if self.exclusive else ["scores"]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @abstractmethod
    def _settings(self) -> list[Any]:
        """What all heatmaps depend on: the version of the file, the identity, and sizes."""

    def init_of(self, row: Row) -> Callable[[Tensor], Tensor] | None:
        """Initial relevance of a row that starts in its layer, where the concept's code alone tells it."""
        if self.code_of(row) < 0 or row.layer is None:
            return None
        return partial(initial_relevance_of, self.fv.layer_map[row.layer], concept_id=row.concept)

    def code_of(self, row: Row) -> int:
        """Concept whose code tells where a row starts: rows that start by the same one are alike; -1 for all others."""
        return row.concept if row.target < 0 and row.layer in self.by_code else -1

    def below_of(self, layer: str | None) -> str | None:
        """The layer below; None of the first one, and of a row through all concepts."""
        place = 0 if layer is None else self.layers.index(layer)
        return self.layers[place - 1] if place else None

    def layers_below(self, rows: Iterable[Row]) -> list[str]:
        """Layers below those of some rows, each once."""
        return sorted({below for row in rows if (below := self.below_of(row.layer)) is not None})

    def shares(self, result: Any, layer: str, rows: Sequence[int]) -> list[list[tuple[int, float]]]:
        """Of some rows of a result, the concepts of a recorded layer with the largest shares."""
        values = LayerValues.of(result, layer).rows(rows)
        found = relevance_sums(self.fv.layer_map[layer], values, layer).detach().cpu().double().numpy()
        best = np.argsort(-found, axis=1, kind="stable")[:, :_BELOW]
        return [
            [(c, round(float(found[i, c]), 4)) for c in row if found[i, c] > 0] for i, row in enumerate(best.tolist())
        ]

    def store(self, content: bytes, suffix: str) -> str:
        """Write a picture unless one of the same content is there."""
        address = Addresses.picture(content, suffix)
        self.used.add(address)
        if not self.holds(address):
            (self.folder / address).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / address, content)
        return address

    def holds(self, address: str) -> bool:
        """Whether a picture is there as a whole, and was not cut by a copy, say: its name tells its content."""
        path = self.folder / address
        return path.is_file() and Addresses.picture(path.read_bytes(), path.suffix[1:]) == address

    def _write_file(self, job: HeatmapFile, content: bytes) -> None:
        path = self.folder / job.address
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)


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


def top_classes(prediction: Any, row: int) -> list[tuple[int, float]]:
    """Most probable classes of a row, and their probabilities; nothing where the output is no classes."""
    if not isinstance(prediction, Tensor) or prediction.dim() != 2 or prediction.shape[1] < 2:
        return []
    values, classes = _probabilities(prediction[row : row + 1])[0].topk(min(_TOP, prediction.shape[1]))
    return [(c, round(v, 4)) for c, v in zip(classes.tolist(), values.tolist(), strict=True)]


def _probabilities(prediction: Tensor) -> Tensor:
    values = prediction.detach().cpu()
    return values.double() if are_shares(values) else values.double().softmax(1)
