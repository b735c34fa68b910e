r"""What concepts mean, by an embedding of pictures and texts that the user brings, such as CLIP's.

An embedding maps each reference sample of a concept to a vector; nothing is downloaded. Dreyer et al., "Mechanistic
understanding and validation of large AI models with SemanticLens", Nature Machine Intelligence 7 (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crp.audit.asked import _named_concepts
from crp.checks import check_number
from crp.concepts.ids import as_numbers
from crp.errors import InputError, InputTypeError
from crp.visualization.feature import FeatureVisualization, table_of


class Match(NamedTuple):
    """Concepts that fit a text, best first.

    Attributes
    ----------
    concept : ndarray of shape (concepts,), int64
    similarity : ndarray of shape (concepts,)
        Cosine of the angle between text and mean embedding.
    """

    concept: np.ndarray
    similarity: np.ndarray


def embed_references(
    fv: FeatureVisualization,
    layer: str,
    concept_ids: Sequence[int],
    embed: Callable[[Tensor], Any],
    *,
    n: int = 16,
    mode: str = "relevance",
) -> np.ndarray:
    """Embeddings of the reference samples of concepts.

    Parameters
    ----------
    fv : FeatureVisualization
        After a run.
    layer : str
    concept_ids : sequence of int
    embed : callable
        Function of samples of shape (samples, ...), as the data set gives them, that returns (samples, features).
    n : int
        References of each concept.
    mode : {"relevance", "activation"}

    Returns
    -------
    ndarray of shape (concepts, n, features), float64

    Raises
    ------
    TypeError, ValueError
        If ``embed`` is no function, or does not return a vector for each sample.
    """
    check_number("n", n, 1, whole=True)
    if not callable(embed):
        raise InputTypeError(f"embed must be a function of samples, such as CLIP's encode_image: {embed!r}")
    table_of(fv, layer)
    ids = _named_concepts(concept_ids, layer)
    table_of(fv, layer)
    references, found = fv.get_max_reference(ids, layer, mode, (0, n)), []
    for i in ids:
        with torch.no_grad():
            vectors = as_numbers("what embed returns", embed(references[i]))
        if vectors.ndim != 2 or len(vectors) != len(references[i]):
            raise InputError(
                f"embed gives {vectors.shape} for {len(references[i])} samples; it must be (samples, features)"
            )
        found.append(vectors)
    return np.stack(found)


def clarity(embeddings: Any) -> np.ndarray:
    r"""How alike the references of each concept are: the mean cosine between two of them.

    With unit vectors :math:`\hat v_i`, it is
    :math:`\frac{n}{n-1}\left(\left\|\frac1n\sum_i \hat v_i\right\|^2 - \frac1n\right)`: 1 where all are the same.

    Parameters
    ----------
    embeddings : array of shape (concepts, n, features)

    Returns
    -------
    ndarray of shape (concepts,)
    """
    unit = _unit(_embeddings(embeddings))
    n = unit.shape[1]
    if n < 2:
        raise InputError("clarity needs two references of each concept at least")
    return np.asarray(n / (n - 1) * ((unit.mean(1) ** 2).sum(-1) - 1 / n))


def redundancy(embeddings: Any) -> np.ndarray:
    """How alike each concept is to the one that is most alike: the largest cosine between mean embeddings.

    Parameters
    ----------
    embeddings : array of shape (concepts, n, features)

    Returns
    -------
    ndarray of shape (concepts,)
        Its mean is the redundancy of the layer.
    """
    means = _unit(_embeddings(embeddings).mean(1))
    if len(means) < 2:
        raise InputError("redundancy needs two concepts at least")
    similarity = means @ means.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.max(1))


def polysemanticity(embeddings: Any, n_meanings: int = 2, seed: int = 0) -> np.ndarray:
    """How unlike the meanings of each concept are: 1 less the mean cosine between the means of clusters of references.

    Parameters
    ----------
    embeddings : array of shape (concepts, n, features)
    n_meanings : int
        Clusters into which the references of a concept are divided, by k-means of their directions; fewer where there
        are fewer directions.
    seed : int

    Returns
    -------
    ndarray of shape (concepts,)
        0 where all references are alike.
    """
    from sklearn.cluster import KMeans

    check_number("n_meanings", n_meanings, 2, whole=True)
    check_number("seed", seed, 0, whole=True)
    unit = _unit(_embeddings(embeddings))
    found = []
    for vectors in unit:
        n = min(n_meanings, len(np.unique(vectors.round(9), axis=0)))
        if n == 1:
            found.append(0.0)
            continue
        centres = KMeans(n, n_init=10, random_state=seed).fit(vectors).cluster_centers_
        found.append(1.0 - float(clarity(centres[None])[0]))
    return np.array(found)


def search(embeddings: Any, text: Any, background: Any = None) -> Match:
    """Concepts whose references fit a text.

    Parameters
    ----------
    embeddings : array of shape (concepts, n, features)
    text : array of shape (features,)
        Embedding of a text such as "a photo of a wheel".
    background : array of shape (features,), optional
        Embedding of a text that says nothing, such as "a photo", whose similarity is subtracted.

    Returns
    -------
    Match
        All concepts, best first; similarity is the cosine, from -1 to 1.

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    means = _unit(_embeddings(embeddings).mean(1))

    def similarity_to(vector: Any) -> np.ndarray:
        along = as_numbers("a text's embedding", vector).reshape(-1)
        if along.shape != means.shape[1:]:
            raise InputError(f"the text's embedding has {len(along)} features; the concepts' have {means.shape[1]}")
        return np.asarray(means @ _unit(along))

    similarity = similarity_to(text)
    if background is not None:
        similarity = similarity - similarity_to(background)
    order = np.argsort(-similarity, kind="stable")
    return Match(order, similarity[order])


def _embeddings(values: Any) -> np.ndarray:
    array = as_numbers("embeddings", values)
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"embeddings must be of shape (concepts, n, features), not {array.shape}")
    return array


def _unit(vectors: np.ndarray) -> np.ndarray:
    if not (length := np.linalg.norm(vectors, axis=-1, keepdims=True)).all():
        raise InputError("an embedding is 0")
    return np.asarray(vectors / length)
