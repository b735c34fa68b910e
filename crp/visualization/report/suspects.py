"""Concepts that may be shortcuts: their relevance stays in one place of the picture, and on some samples of a class.

A concept of the depicted thing is on every picture of its class and moves with it. A mark, a watermark or a tag is on
some of them, always in one place, where little else is looked at. For every class and concept, the relevance of all
rows is added up on a coarse grid, each row at the place of its maximum. The score is a product of three factors:

- the concept's share of the class's relevance, so that harmless concepts of no weight come last;
- how much more is known of its place than of that of all else in its layer, in nats: the Kullback-Leibler divergence of
  the two distributions over the grid;
- the share of the class's rows that hold none of its relevance, at least `LEAST`: a mark may be on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from crp.visualization.table.manifest import Array
from crp.visualization.table.store import Table

#: Parts of a side of the grid.
GRID = 4
#: No more numbers than this are held; with more, concepts are looked at for all classes together.
_LARGEST = 64_000_000
LEAST = 0.1
#: A class with fewer rows than this shows nothing.
FEWEST = 5


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
        text = f"{self.inside:.0%} of its relevance lies {self.where}, where its layer has {self.expected:.0%}"
        few = f"; it is carried by {self.rows:.0%} of the samples" if self.rows < 0.75 else ""
        return text + few


def find_suspects(
    table: Table, spaces: Mapping[str, Sequence[int]], targets: Sequence[int], n: int = 60
) -> list[Suspect]:
    """Concepts that may be shortcuts, most suspicious first.

    Parameters
    ----------
    table : Table
    spaces : mapping of layer to (height, width)
        Of layers that have these axes, as they were when the table was mined.
    targets : sequence of int
        Classes.
    n : int
        How many, at most; none with less than a tenth of the first one's score.

    Returns
    -------
    list of Suspect
        Empty where no class has `FEWEST` rows, or samples are of several shapes, whose places cannot be compared.

    Raises
    ------
    KeyError
        If a layer was not mined.
    """
    found: list[Suspect] = []
    if table.header.recipe.get("mixed_shapes"):
        return found
    kind = "sum" if "sum" in table.kinds else table.kinds[0]
    for layer, (height, width) in spaces.items():
        concepts = table.n_concepts(layer)
        grid = min(GRID, height), min(GRID, width)
        if grid == (1, 1):
            continue
        apart = len(targets) * concepts * grid[0] * grid[1] <= _LARGEST
        known = np.asarray(sorted(targets) if apart else [-1])
        held = np.zeros((len(known), concepts, grid[0] * grid[1]))
        square, rows, share = np.zeros(held.shape[:2]), np.zeros(len(known)), np.zeros(held.shape[:2])
        for block in table.blocks(layer, "relevance", kind, normed=True):
            row, column = block.position // width, block.position % width
            cell = (row * grid[0] // height).clip(0, grid[0] - 1) * grid[1] + column * grid[1] // width
            weight = np.clip(block.value, 0, None).astype(np.float64)
            of = np.searchsorted(known, block.target) if apart else np.zeros(len(block.target), np.int64)
            inside = np.isin(block.target, known) if apart else np.ones(len(block.target), bool)
            for i in np.unique(of[inside]):
                mine = inside & (of == i)
                flat = (cell[mine] + np.arange(concepts) * held.shape[2]).ravel()
                held[i] += np.bincount(flat, weight[mine].ravel(), held[i].size).reshape(held[i].shape)
                square[i] += (weight[mine] ** 2).sum(0)
                share[i] += block.value[mine].sum(0)
                rows[i] += mine.sum()
        found += _of_layer(layer, known, held, square, rows, share, grid)
    found.sort(key=lambda one: (-one.score, one.layer, one.concept))
    return [one for one in found[:n] if one.score >= found[0].score / 10]


def _of_layer(
    layer: str, known: Array, held: Array, square: Array, rows: Array, share: Array, grid: tuple[int, int]
) -> list[Suspect]:
    found = []
    everything = held.sum((0, 1))
    for i in np.flatnonzero(rows >= FEWEST):
        total = held[i].sum(1, keepdims=True)
        of_concept = held[i] / np.where(total > 0, total, 1)
        rest = np.clip(everything - held[i], 0, None)
        # (a small share for each part, so that a part where nothing else is looked at is not infinitely surprising)
        of_layer = rest / np.where(rest.sum(1, keepdims=True) > 0, rest.sum(1, keepdims=True), 1) + 1e-3
        known_better = of_concept * np.log(np.where(of_concept > 0, of_concept, 1) / of_layer)
        part = share[i] / rows[i]
        effective = total[:, 0] ** 2 / np.where(square[i] > 0, square[i], 1) / rows[i]
        score = np.clip(part, 0, None) * np.clip(known_better.sum(1), 0, None) * np.clip(1 - effective, LEAST, 1)
        for concept in np.argsort(-score, kind="stable")[:20].tolist():
            place = int(known_better[concept].argmax())
            if score[concept] > 0:
                figures = of_concept[concept, place], of_layer[concept, place], _words(place, grid), effective[concept]
                found.append(Suspect(layer, concept, int(known[i]), score[concept], part[concept], *figures))
    return found


def _words(cell: int, grid: tuple[int, int]) -> str:
    row, column = divmod(cell, grid[1])
    vertical = "at the top" if row == 0 else "at the bottom" if row == grid[0] - 1 else f"in row {row + 1} of {grid[0]}"
    if column == 0:
        return f"{vertical} left"
    if column == grid[1] - 1:
        return f"{vertical} right"
    return f"{vertical}, column {column + 1} of {grid[1]}"
