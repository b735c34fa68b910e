"""What the concepts of a layer mean, by an embedding that the user brings, kept beside the table for its pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from crp.audit.semantics import clarity, embed_references, polysemanticity, redundancy, search
from crp.checks import check_number
from crp.errors import InputTypeError, NameNotFoundError
from crp.flags import check_function
from crp.visualization.feature import FeatureVisualization, table_of
from crp.visualization.table.derived import keep_result
from crp.visualization.table.store import Table
from crp.wording import shortened


class Meanings(NamedTuple):
    """What concepts of a layer mean.

    Attributes
    ----------
    layer : str
    concept : ndarray of shape (concepts,), int64
    clarity, redundancy, polysemanticity : ndarray of shape (concepts,)
    texts : list of str
    similarity : ndarray of shape (texts, concepts)
        Cosine of the angle between each text and the mean embedding of each concept's references, less that of the
        background.
    """

    layer: str
    concept: np.ndarray
    clarity: np.ndarray
    redundancy: np.ndarray
    polysemanticity: np.ndarray
    texts: list[str]
    similarity: np.ndarray

    def best(self, text: str, k: int = 5) -> list[tuple[int, float]]:
        """Concepts that fit a text best, with their similarity."""
        check_number("k", k, 0, whole=True)
        if text not in self.texts:
            raise NameNotFoundError(f"{text!r} is none of the texts, which are {self.texts}")
        row = self.similarity[self.texts.index(text)]
        return [(int(self.concept[i]), float(row[i])) for i in np.argsort(-row, kind="stable")[:k]]

    def save(self, table: Table | str | Path) -> Path:
        """Keep them beside a table, where ``crp report`` finds them until the table changes."""
        arrays = {name: value for name, value in self._asdict().items() if isinstance(value, np.ndarray)}
        return keep_result(table, "meanings", self.layer, arrays, {"texts": self.texts})


def meanings(
    fv: FeatureVisualization,
    layer: str,
    embed: Callable[[Tensor], Any],
    texts: Mapping[str, Any] | Sequence[str] = (),
    *,
    embed_text: Callable[[str], Any] | None = None,
    concept_ids: Sequence[int] | None = None,
    background: Any = None,
    n: int = 16,
    mode: str = "relevance",
) -> Meanings:
    """Score what the concepts of a layer mean, and compare them with texts.

    Parameters
    ----------
    fv : FeatureVisualization
        After a run.
    layer : str
    embed : callable
        Function of samples of shape (samples, ...), as the data set gives them, that returns (samples, features).
    texts : mapping of str to array of shape (features,), or sequence of str
        Texts such as ``"a photo of a wheel"`` with their embeddings, or without them.
    embed_text : callable, optional
        Function of a text that returns its embedding, for texts without.
    concept_ids : sequence of int, optional
        All of the layer by default.
    background : array of shape (features,), optional
        Embedding of a text that says nothing, whose similarity is subtracted.
    n : int
        References of each concept.
    mode : {"relevance", "activation"}

    Returns
    -------
    Meanings

    Raises
    ------
    TypeError
        If texts have no embeddings, and no function makes them.
    """
    check_function("embed_text", embed_text, "a text")
    if not isinstance(texts, Mapping):
        if isinstance(texts, str) or not isinstance(texts, Sequence) or (texts and embed_text is None):
            raise InputTypeError(f"texts {shortened(texts)} need embeddings: give a mapping, or a list and embed_text=")
        texts = {text: embed_text(text) for text in texts} if embed_text is not None else {}
    table = table_of(fv, layer)
    ids = table.concept_ids(layer, range(table.n_concepts(layer)) if concept_ids is None else concept_ids)
    embeddings = embed_references(fv, layer, ids.tolist(), embed, n=n, mode=mode)
    similarity = np.zeros((len(texts), len(ids)))
    for row, vector in zip(similarity, texts.values(), strict=True):
        match = search(embeddings, vector, background)
        row[match.concept] = match.similarity
    scores = clarity(embeddings), redundancy(embeddings), polysemanticity(embeddings)
    return Meanings(layer, ids, *scores, list(texts), similarity)
