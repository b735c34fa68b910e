"""Concepts that may be shortcuts: their relevance stays in one place of the picture, and on some samples of a class.

A concept of the depicted thing is on every picture of its class and moves with it. A mark, a watermark or a tag is on
some of them, always in one place, where little else is looked at. For every class and concept, the relevance of all
rows is added up on a coarse grid, each row at the place of its maximum. The score is a product of three factors:

- the concept's share of the class's relevance, so that harmless concepts of no weight come last;
- how much more is known of its place than of that of all else in its layer, in nats: the Kullback-Leibler divergence of
  the two distributions over the grid;
- the share of the class's rows that hold none of its relevance, at least `LEAST`: a mark may be on all of them.

Texts have no place in common. There, a mark is a word: relevance is added up by the word at its maximum, and what
counts is how much more of it lies on one word, against all others, than of all else in the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crp.checks import check_number
from crp.concepts.reading import code_of
from crp.errors import InputError, InputTypeError
from crp.image.texts import readable
from crp.visualization.feature import FeatureVisualization
from crp.visualization.report.facts import _chosen, _main_kind
from crp.visualization.table.manifest import Array, Block
from crp.visualization.table.ranking import list_targets
from crp.visualization.table.store import Table
from crp.visualization.text_references import layers_of_tokens, read_text, token_ids
from crp.wording import percent

#: Parts of a side of the grid.
GRID = 4
#: No more numbers than this are held; with more, concepts are looked at for all classes together.
_LARGEST = 64_000_000
#: Words of texts that have a cell of their own, at least.
_FEWEST_WORDS = 256
LEAST = 0.1
#: A class with fewer rows than this shows nothing.
FEWEST = 5
#: Suspects that are listed.
_MOST = 60


class Suspect(NamedTuple):
    """A concept that may be a shortcut.

    Attributes
    ----------
    layer : str
    concept : int
    target : int
        The class; -1 for all of them together.
    score : float
        The product.
    share : float
        Of the class's relevance.
    inside, expected : float
        Share of the concept's relevance in one part of the picture, and of its layer's in the same part.
    where : str
        The part, in words.
    rows : float
        Share of the class's rows that hold the concept's relevance: 1 if all hold as much, 1 / n if it is one of n.
    """

    layer: str
    concept: int
    target: int
    score: float
    share: float
    inside: float
    expected: float
    where: str
    rows: float

    @property
    def reason(self) -> str:
        """Why it is one, in words."""
        text = (
            f"{percent(self.inside)} of its relevance lies {self.where}, where its layer has {percent(self.expected)}"
        )
        few = f"; it is carried by {percent(self.rows)} of the samples" if self.rows < 0.75 else ""
        return text + few


def find_suspects(
    table: Table | str | Path | FeatureVisualization,
    spaces: Mapping[str, Sequence[int]] | None = None,
    targets: Sequence[int] | None = None,
    n: int = _MOST,
) -> list[Suspect]:
    """Concepts that may be shortcuts, most suspicious first.

    Parameters
    ----------
    table : Table, its folder, or the FeatureVisualization of it
        The last one needs no ``spaces``, as its model tells them, and may be of texts.
    spaces : mapping of layer to (height, width), optional
        Of layers that have these axes, as they were when the table was mined.
    targets : sequence of int, optional
        Classes; all by default.
    n : int
        How many, at most; none with less than a tenth of the first one's score.

    Returns
    -------
    list of Suspect
        Empty where no class has `FEWEST` rows, or samples are of several shapes, whose places cannot be compared.

    Raises
    ------
    KeyError
        If a layer or a class was not mined.
    ValueError
        If a layer holds values outside of the space that is given for it.
    """
    fv, place = (table, table.path) if isinstance(table, FeatureVisualization) else (None, table)
    table = Table.open(place)
    targets = _chosen(list_targets(table).tolist(), targets)
    check_number("n", n, 1, whole=True)
    if spaces is None and fv is not None:
        fv._lookup(next(iter(table.layers)), "relevance", (0, 1))  # (refuses another model or dataset)
        if fv.texts is not None:
            asked = read_text(fv.dataset, int(table.rows().sample[0]), fv.device)
            layers = layers_of_tokens(fv.attribution, asked, list(table.layers))
            return find_text_suspects(table, sorted(layers), targets, partial(token_ids, fv.dataset), fv.texts.word)[:n]
        spaces = _spaces_of(fv, list(table.layers), int(table.rows().sample[0]))
    if not isinstance(spaces, Mapping):
        raise InputTypeError(
            f"spaces must be given by layer, as in {{'features.3': (14, 14)}}, not {spaces!r}; with "
            "FeatureVisualization.open(folder) in place of the table, they are found"
        )
    for layer, space in spaces.items():
        if not isinstance(space, Collection) or len(space) != 2:
            raise InputError(f"the space of layer {layer!r} must be (height, width), not {space!r}")
        for side in space:
            check_number(f"a side of the space of layer {layer!r}", side, 1, whole=True)
    if table.header.recipe.get("mixed_shapes"):
        return []
    found: list[Suspect] = []
    for layer, (height, width) in spaces.items():
        grid = min(GRID, height), min(GRID, width)
        if grid != (1, 1):
            found += _in_layer(table, layer, targets, _parts_of_pictures(layer, height, width, grid))
        else:
            for block in islice(table.blocks(layer, "relevance", table.kinds[0]), 1):
                _check_positions(layer, block, height, width)
    return _first(found, n)


def _spaces_of(fv: FeatureVisualization, layers: Sequence[str], sample: int) -> dict[str, tuple[int, int]]:
    """Height and width of the positions of concepts, in layers that have them."""
    data, _ = fv.get_data_sample(sample)
    found = fv.attribution(data, [{}], None, record_layer=layers, init_rel=1.0).activations
    shapes = {layer: code_of(fv.layer_map[layer], values).shape[2:] for layer, values in found.items()}
    return {layer: (shape[0], shape[1]) for layer, shape in shapes.items() if len(shape) == 2}


def find_text_suspects(
    table: Table | str | Path,
    layers: Sequence[str],
    targets: Sequence[int],
    ids_of: Callable[[int], Array],
    word_of: Callable[[int], str],
) -> list[Suspect]:
    """Concepts of a table of texts that may be shortcuts, most suspicious first.

    Parameters
    ----------
    table : Table, or its folder
    layers : sequence of str
        Those that hold values of single tokens.
    targets : sequence of int
        Classes, or tokens that are predicted.
    ids_of : callable
        Ids of the tokens of a sample, of shape (tokens,). It is asked for every sample that has rows.
    word_of : callable
        What an id stands for.

    Returns
    -------
    list of Suspect
        As from `find_suspects`; empty where no class has `FEWEST` rows.

    Raises
    ------
    KeyError
        If a layer was not mined.
    """
    table = Table.open(table)
    rows = table.rows()
    samples = np.unique(rows.sample)
    ids = [ids_of(sample) for sample in samples.tolist()]
    ends = np.cumsum([len(one) for one in ids])
    starts = dict(zip(samples.tolist(), [0, *ends.tolist()], strict=False))
    tokens, of_place = np.unique(np.concatenate([np.zeros(0, np.int64), *ids]), return_inverse=True)
    common = np.argsort(-np.bincount(of_place.ravel(), minlength=len(tokens)), kind="stable")
    n_classes = max(1, sum(int((rows.target == target).sum()) >= FEWEST for target in set(targets)))
    found: list[Suspect] = []
    for layer in layers if len(samples) else ():
        # (words that are too rare for a cell of their own share the last one)
        n_words = min(len(tokens), max(_FEWEST_WORDS, _LARGEST // (8 * n_classes * table.n_concepts(layer))))
        cell_of_token = np.full(len(tokens), n_words)
        cell_of_token[common[:n_words]] = np.arange(n_words)
        cells = cell_of_token[of_place.ravel()]

        def cell(block: Block, cells: Array = cells) -> Array:
            first = np.array([starts[sample] for sample in block.sample.tolist()])
            found: Array = cells[first[:, None] + block.position]
            return found

        def name(cell: int) -> str:
            return f"on the word {readable(word_of(int(tokens[common[cell]])))!r}"

        found += _in_layer(table, layer, targets, _Cells(n_words + 1, cell, name, alone=True))
    return _first(found)


class _Cells(NamedTuple):
    """Where relevance may lie.

    Attributes
    ----------
    n : int
        Number of cells.
    of : callable
        Cells of a block's values, of shape (rows, concepts).
    name : callable
        What a cell is called.
    alone : bool
        Whether what counts is one cell against all others, of which the last stands for no place.
    """

    n: int
    of: Callable[[Block], Array]
    name: Callable[[int], str]
    alone: bool = False


def _parts_of_pictures(layer: str, height: int, width: int, grid: tuple[int, int]) -> _Cells:
    def cell(block: Block) -> Array:
        _check_positions(layer, block, height, width)
        row, column = block.position // width, block.position % width
        place: Array = (row * grid[0] // height) * grid[1] + column * grid[1] // width
        return place

    return _Cells(grid[0] * grid[1], cell, lambda place: _words(place, grid))


def _check_positions(layer: str, block: Block, height: int, width: int) -> None:
    last = int(block.position.max(initial=0))
    if last >= height * width:
        raise InputError(
            f"layer {layer!r} holds values at position {last}, and {height} x {width} positions are 0 to "
            f"{height * width - 1}; spaces must be the shapes of layers when the table was mined"
        )


def _first(found: list[Suspect], n: int = _MOST) -> list[Suspect]:
    found.sort(key=lambda one: (-one.score, one.layer, one.concept))
    return [one for one in found[:n] if one.score >= found[0].score / 10]


def _in_layer(table: Table, layer: str, targets: Sequence[int], cells: _Cells) -> list[Suspect]:
    """Suspects of a layer. Where classes are too many to be kept apart, they are looked at together."""
    concepts, all_rows = table.n_concepts(layer), table.rows()
    known = np.asarray(sorted(target for target in targets if (all_rows.target == target).sum() >= FEWEST), np.int64)
    if not len(known):
        return []
    if not (apart := len(known) * concepts * cells.n <= _LARGEST):
        known = np.asarray([-1])
    held = np.zeros((len(known), concepts, cells.n))
    everything = np.zeros(cells.n)
    square, rows, share = np.zeros(held.shape[:2]), np.zeros(len(known)), np.zeros(held.shape[:2])
    for block in table.blocks(layer, "relevance", _main_kind(table), normed=True):
        inside = np.isin(block.target, np.asarray(targets))
        cell, value, target = cells.of(block)[inside], block.value[inside], block.target[inside]
        weight = np.clip(value, 0, None).astype(np.float64)
        everything += np.bincount(cell.ravel(), weight.ravel(), cells.n)
        of = np.zeros(len(target), np.int64)
        if apart:
            of = np.where(np.isin(target, known), np.searchsorted(known, target), -1)
        for i in np.unique(of[of >= 0]):
            mine = of == i
            flat, size = (cell[mine] + np.arange(concepts) * cells.n).ravel(), held[i].size
            if size <= flat.size:  # (which is the faster way, where all sums together are not many)
                held[i] += np.bincount(flat, weight[mine].ravel(), size).reshape(held[i].shape)
            else:
                np.add.at(held[i].reshape(-1), flat, weight[mine].ravel())
            square[i] += (weight[mine] ** 2).sum(0)
            share[i] += value[mine].sum(0)
            rows[i] += mine.sum()
    return _of_layer(layer, known, held, everything, square, rows, share, cells)


def _of_layer(
    layer: str, known: Array, held: Array, everything: Array, square: Array, rows: Array, share: Array, cells: _Cells
) -> list[Suspect]:
    found = []
    for i in range(len(known)):
        total = held[i].sum(1, keepdims=True)
        of_concept = held[i] / np.where(total > 0, total, 1)
        rest = np.clip(everything - held[i], 0, None)
        # (a small share for each part, so that a part where nothing else is looked at is not infinitely surprising)
        of_layer = rest / np.where(rest.sum(1, keepdims=True) > 0, rest.sum(1, keepdims=True), 1) + 1e-3
        known_better = _divergence(of_concept, of_layer)
        best = known_better.argmax(1)
        whole = known_better.sum(1)
        if cells.alone:
            known_better += np.where(of_concept > of_layer, _divergence(1 - of_concept, np.clip(1 - of_layer, 0, 1)), 0)
            best = known_better[:, :-1].argmax(1)
            whole = known_better[np.arange(len(best)), best]
        part = share[i] / rows[i]
        effective = total[:, 0] ** 2 / np.where(square[i] > 0, square[i], 1) / rows[i]
        score = np.clip(part, 0, None) * np.clip(whole, 0, None) * np.clip(1 - effective, LEAST, 1)
        for concept in np.argsort(-score, kind="stable")[:20].tolist():
            place = int(best[concept])
            if score[concept] > 0:
                inside, expected = float(of_concept[concept, place]), float(of_layer[concept, place])
                figures = float(score[concept]), float(part[concept]), inside, expected, cells.name(place)
                found.append(Suspect(layer, concept, int(known[i]), *figures, float(effective[concept])))
    return found


def _divergence(one: Array, other: Array) -> Array:
    """What each part adds to the Kullback-Leibler divergence of two distributions, in nats."""
    result: Array = one * np.log(np.where(one > 0, one, 1) / np.where(other > 0, other, 1))
    return result


def _words(cell: int, grid: tuple[int, int]) -> str:
    row, column = divmod(cell, grid[1])
    if grid[0] == 1:
        inside = f"in column {column + 1} of {grid[1]}"
        return "on the left" if column == 0 else "on the right" if column == grid[1] - 1 else inside
    vertical = "at the top" if row == 0 else "at the bottom" if row == grid[0] - 1 else f"in row {row + 1} of {grid[0]}"
    if grid[1] == 1:
        return vertical
    if column == 0:
        return f"{vertical} left"
    if column == grid[1] - 1:
        return f"{vertical} right"
    return f"{vertical}, column {column + 1} of {grid[1]}"
