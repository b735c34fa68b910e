"""Two tables of one data set, such as of a model before and after it was corrected, pruned or trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from crp.checks import check_choice, check_number
from crp.errors import InputError
from crp.kinds import check_kind
from crp.visualization.analysis import cosines
from crp.visualization.references import once_each
from crp.visualization.table.columns import SampleColumns
from crp.visualization.table.ranking import once_per_sample, top_k
from crp.visualization.table.recipe import tell_part
from crp.visualization.table.store import Table

#: Samples whose values are read at once.
_AT_ONCE = 4096
_Tables = tuple[Table, Table]


class LayerComparison(NamedTuple):
    """Concepts of a layer in both tables, by their numbers.

    Attributes
    ----------
    share : array of shape (2, concepts), float64
        Mean share of each concept before and after, over the rows that both tables have.
    common : array of shape (concepts,), int64
        How many of its references before are references after.
    n_references : int
        How many each has.
    correlation : array of shape (concepts,), float64
        How much its values before and after go together over the samples; 0 where one of them never varies.
    partner : array of shape (concepts,), int64
        The concept after that goes together with it most. A concept that has stayed what it was is its own partner;
        those of models that were trained apart have no common numbers.
    partner_correlation : array of shape (concepts,), float64
    """

    share: np.ndarray
    common: np.ndarray
    n_references: int
    correlation: np.ndarray
    partner: np.ndarray
    partner_correlation: np.ndarray

    @property
    def changed(self) -> np.ndarray:
        """All concepts, those with the fewest references in common first, and of these the largest share."""
        return np.lexsort((-np.abs(self.share).max(0), self.common))

    @property
    def kept(self) -> int:
        """How many concepts go together with themselves most."""
        return int(((self.partner == np.arange(len(self.partner))) & (self.correlation > 0)).sum())


class Comparison(NamedTuple):
    """What `compare` gives.

    Attributes
    ----------
    layers : dict of str to LayerComparison
    sample : array of shape (samples,), int64
        Those in both tables.
    n_rows : int
        Pairs of sample and target in both.
    label : list
        Of each sample.
    prediction : array of shape (2, samples), int64
        Class before and after; -1 where the model gives no scores of classes.
    """

    layers: dict[str, LayerComparison]
    sample: np.ndarray
    n_rows: int
    label: list[Any]
    prediction: np.ndarray

    @property
    def moved(self) -> np.ndarray:
        """Whether another class is predicted for each sample."""
        return np.asarray(self.prediction[0] != self.prediction[1])

    @property
    def accuracy(self) -> tuple[float, float] | None:
        """Share of samples whose label is predicted, before and after; None where labels are not classes."""
        if not all(type(label) is int for label in self.label) or (self.prediction < 0).any():
            return None
        before, after = (self.prediction == np.array(self.label)).mean(1).tolist()
        return before, after


def compare(
    before: Table | str | Path,
    after: Table | str | Path,
    layers: Sequence[str] | None = None,
    *,
    mode: Literal["relevance", "activation"] = "relevance",
    n_references: int = 8,
) -> Comparison:
    """Compare what two models make of the same samples: which concepts have other references and other shares.

    Parameters
    ----------
    before, after : Table, or its folder
        Of the same samples, by the same composite and concepts.
    layers : sequence of str, optional
        All that both tables have by default.
    mode : {"relevance", "activation"}
        What shares and references are of. Whether concepts go together is told by activations, where both have them.
    n_references : int
        How many references of each concept are compared.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        If samples, classes, composites or concepts differ, or nothing is in both tables.
    KeyError
        If a layer was not mined.
    """
    check_choice("mode", mode, Literal["relevance", "activation"])
    check_number("n_references", n_references, 1, whole=True)
    check_kind("layers", layers, (Sequence, type(None)), "a list of layers")
    tables = Table.open(before), Table.open(after)
    names = [name for name in tables[0].layers if name in tables[1].layers] if layers is None else list(layers)
    if not names:
        raise _unlike(tables, "no layer", " and ".join(", ".join(table.layers) for table in tables))
    _check_alike(tables, names, mode)
    columns = _samples(tables)
    sample, found, n_rows = columns[0].sample, dict[str, LayerComparison](), 0
    by = "activation" if all("activation" in table.modes for table in tables) else mode
    for layer in names:
        share, n_rows = _shares(tables, layer, mode, sample)
        asks = [partial(top_k, table, layer, mode, _kind(tables), True, samples=sample) for table in tables]
        best = [once_each(ask, n_references).sample for ask in asks]
        common = np.array([len(np.intersect1d(*pair)) for pair in zip(best[0].T, best[1].T, strict=True)])
        together = cosines(_paired(tables, layer, by, sample, False), True)
        own, most = together.diagonal().copy(), together.max(1)
        partner = np.where(own == most, np.arange(len(own)), together.argmax(1))
        found[layer] = LayerComparison(share, common, min(map(len, best)), own, partner, most)
    return Comparison(found, sample, n_rows, columns[0].label, np.stack([one.prediction for one in columns]))


def _check_alike(tables: _Tables, layers: Sequence[str], mode: str) -> None:
    """Raise a `ValueError` unless equal numbers mean the same in both tables: classes, and concepts of the layers."""
    recipes = [table.header.recipe for table in tables]
    for part in ("composite", "output") if mode == "relevance" else ():
        if len({table.fingerprints.get(part) for table in tables}) > 1:
            raise _unlike(tables, part, " and ".join(tell_part(recipe, part) or "none" for recipe in recipes))
    names = [table.header.class_names for table in tables]
    if all(names) and list(names[0]) != list(names[1]):
        raise _unlike(tables, "class names", " and ".join(f"{len(one)} with {one[0]!r} first" for one in names))
    for layer in layers:
        numbers = [table.n_concepts(layer) for table in tables]
        kinds = [(recipe.get("layers") or {}).get(layer) for recipe in recipes]
        if numbers[0] != numbers[1] or (all(kinds) and kinds[0] != kinds[1]):
            raise _unlike(tables, f"concepts of layer {layer!r}", f"{numbers[0]} and {numbers[1]}")
    if tables[0].layers == tables[1].layers and len({table.fingerprints.get("layers") for table in tables}) > 1:
        raise _unlike(tables, "concepts", "their fingerprints differ")


def _unlike(tables: _Tables, what: str, told: str) -> InputError:
    paths = " and ".join(str(table.path) for table in tables)
    differs = "is in both" if what == "no layer" else "must be the same to be compared"
    return InputError(f"the tables in {paths}: {what} {differs} ({told})")


def _samples(tables: _Tables) -> list[SampleColumns]:
    """Columns of the samples that both tables have; a `ValueError` if one of them is not the same."""
    columns = [table.samples() for table in tables]
    sample, *places = np.intersect1d(columns[0].sample, columns[1].sample, assume_unique=True, return_indices=True)
    if not len(sample):
        raise InputError(f"the tables in {tables[0].path} and {tables[1].path} have no sample in common")
    chosen = []
    for one, at in zip(columns, places, strict=True):
        source, label = ([values[i] for i in at] for values in (one.source, one.label))
        chosen.append(SampleColumns(sample, source, label, *(values[at] for values in one[3:])))
    one, other = chosen
    for i, number in enumerate(sample.tolist()):
        # (a file is the same at another size; without files, the content decides)
        is_file = one.source[i] and one.source[i] == other.source[i] and one.stamp[i] == other.stamp[i] != 0
        if one.label[i] != other.label[i] or not (is_file or one.content[i] == other.content[i]):
            told = (f"{side.source[i] or 'its content'}, label {side.label[i]!r:.60}" for side in (one, other))
            raise _unlike(tables, f"sample {number}", " and ".join(told))
    return chosen


def _kind(tables: _Tables) -> str:
    return next((kind for kind in tables[0].kinds if kind in tables[1].kinds), "sum")


def _paired(
    tables: _Tables, layer: str, mode: str, sample: np.ndarray, normed: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Values of the rows that both tables have, some at a time; of activations, one row of each sample."""
    for start in range(0, len(sample), _AT_ONCE):
        keys, values = [], []
        for table in tables:
            blocks = table.blocks(layer, mode, _kind(tables), normed, samples=sample[start : start + _AT_ONCE])
            parts = list(once_per_sample(blocks) if mode == "activation" else blocks)
            values.append(np.concatenate([part.value for part in parts]).astype(np.float64))
            target = [part.target if mode == "relevance" else 0 for part in parts]
            keys.append(np.concatenate([part.sample * 2**32 + one for part, one in zip(parts, target, strict=True)]))
        _, *places = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
        if len(places[0]):
            yield values[0][places[0]], values[1][places[1]]


def _shares(tables: _Tables, layer: str, mode: str, sample: np.ndarray) -> tuple[np.ndarray, int]:
    """Mean shares of concepts before and after, and the number of rows."""
    sums = [(len(one), one.sum(0), other.sum(0)) for one, other in _paired(tables, layer, mode, sample, True)]
    if not (n := sum(rows for rows, *_ in sums)):
        raise InputError(f"the tables in {tables[0].path} and {tables[1].path} explain no sample for the same class")
    return np.stack([np.sum([part[side] for part in sums], axis=0) / n for side in (1, 2)]), n
