r"""Clusters of a class's explanations: spectral relevance analysis (SpRAy).

Explanations of one class are points; those of k nearest neighbours are joined, and the spectrum of the graph's
normalised Laplacian :math:`L = 1 - D^{-1/2} A D^{-1/2}` says into how many parts it falls: as many as there are
eigenvalues before the largest gap. A class that falls into parts is predicted for several reasons, one of which may be
a shortcut.

Lapuschkin et al., "Unmasking Clever Hans predictors and assessing what machines really learn", Nature Communications 10
(2019); von Luxburg, "A tutorial on spectral clustering", Statistics and Computing 17 (2007).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from crp.audit.asked import _check_found
from crp.audit.heatmaps import kept_heatmaps
from crp.audit.prototypes import _padded
from crp.checks import check_choice, check_number
from crp.concepts.ids import as_numbers
from crp.errors import InputError, OutOfRangeError
from crp.flags import check_flags
from crp.kinds import as_path
from crp.visualization.analysis import RowSelection
from crp.visualization.table.derived import keep_result
from crp.visualization.table.store import Table
from crp.wording import shortened

#: Samples are in several clusters only where an eigenvalue is so many times that before it: a continuum has gaps, too.
_MIN_GAP = 4.0
#: Eigenvalues below are 0 but for rounding: there are as many as the graph has parts.
_ZERO = 1e-10


class Clusters(NamedTuple):
    """Clusters of explanations, the largest first.

    Attributes
    ----------
    label : ndarray of shape (samples,), int64
        Cluster of each sample.
    sample : ndarray of shape (samples,), int64
        Their numbers in the data set; 0, 1, 2, ... where none were given.
    eigenvalues : ndarray of shape (n,)
        Smallest eigenvalues of the Laplacian, ascending.
    embedding : ndarray of shape (samples, n)
        Their eigenvectors; of several clusters, with rows of unit length.
    separation : float
        Mean silhouette coefficient in the embedding, from -1 to 1: how well clusters are separated; 0 for one cluster.
    vectors : ndarray of shape (samples, features)
        What was clustered.
    seed : int
        With which they were found.
    """

    label: np.ndarray
    sample: np.ndarray
    eigenvalues: np.ndarray
    embedding: np.ndarray
    separation: float
    vectors: np.ndarray
    seed: int

    def __repr__(self) -> str:
        return f"Clusters(sizes={self.sizes}, separation={self.separation:.2f}, vectors={self.vectors.shape})"

    @property
    def sizes(self) -> list[int]:
        """Number of samples in each cluster."""
        return [int(number) for number in np.bincount(self.label)]

    def members(self, cluster: int) -> np.ndarray:
        """Samples of a cluster, those nearest to its mean first: in the embedding; at one place there, by vectors."""
        inside = np.flatnonzero(self._is_in(cluster))
        apart, in_embedding = (
            np.linalg.norm(rows[inside] - rows[inside].mean(0), axis=1) for rows in (self.vectors, self.embedding)
        )
        order = np.lexsort((apart, in_embedding.round(9))) if len(self.sizes) > 1 else apart.argsort(kind="stable")
        return np.asarray(self.sample[inside[order]])

    def strongest(self, cluster: int, k: int = 5) -> list[tuple[int, float]]:
        """Features, such as concepts, by which a cluster exceeds the other samples most: with the difference of means.

        The list is shorter where less than ``k`` features exceed. Where there are no other samples, the means count.
        """
        check_number("k", k, 0, whole=True)
        inside = self._is_in(cluster)
        others = self.vectors[~inside].mean(0) if not inside.all() else np.zeros(self.vectors.shape[1])
        difference = self.vectors[inside].mean(0) - others
        best = np.argsort(-difference, kind="stable")[:k]
        return [(int(i), float(difference[i])) for i in best if difference[i] > 0]

    def _is_in(self, cluster: int) -> np.ndarray:
        inside: np.ndarray = self.label == check_number("cluster", cluster, whole=True)
        if not inside.any():
            raise OutOfRangeError(f"there are the clusters 0 to {len(self.sizes) - 1}; there is no {cluster!r}")
        return inside


def clusters(
    source: Table | Any,
    layer: str | None = None,
    of_class: int | None = None,
    *,
    what: str = "relevance",
    n: int | None = None,
    n_neighbours: int = 10,
    largest: int = 8,
    normed: bool = True,
    seed: int = 0,
) -> Clusters:
    """Cluster explanations of one class.

    Parameters
    ----------
    source : Table or its folder, or array or Tensor of shape (samples, ...)
        A mined table, or explanations such as heatmaps (which are smaller, and easier to compare, after pooling).
    layer : str
        Of the table; not needed for heatmaps.
    of_class : int
        Of the table.
    what : {"relevance", "activation", "heatmap"}
        Of the table: what samples are compared by. Their concepts, or what `keep_heatmaps` has kept.
    n : int, optional
        Number of clusters; by default, the one before the largest gap between eigenvalues, where that is wide enough.
    n_neighbours : int
        Neighbours that each explanation is joined with.
    largest : int
        Largest number of clusters that is looked for.
    normed : bool
        Whether only the direction of a vector counts: of a table its shares, of an array each divided by its length.
    seed : int

    Returns
    -------
    Clusters

    Raises
    ------
    ValueError
        If there are not more samples than neighbours, or neighbours join them in more parts than there are to be
        clusters, or values are not finite.
    """
    check_flags(normed=normed)
    for name, number in (("n", 1 if n is None else n), ("n_neighbours", n_neighbours), ("largest", largest)):
        check_number(name, number, 1, whole=True)
    seed = check_number("seed", seed, 0, whole=True)
    vectors, samples = _vectors(source, layer, of_class, what, normed)
    if len(vectors) <= n_neighbours:
        raise InputError(
            f"{len(vectors)} samples have not {n_neighbours} neighbours each; give a smaller n_neighbours "
            "(--neighbours)"
        )
    if n is not None and n >= len(vectors):
        raise InputError(f"{len(vectors)} samples cannot be in {n} clusters; give a smaller n")
    values, basis = _spectrum(vectors, n_neighbours)
    if (n_parts := int((values < _ZERO).sum())) > (n or largest) > 1:
        raise InputError(
            f"the explanations fall into {n_parts} parts, which no neighbours join; which of them {n or largest} "
            "clusters hold would be by chance. Give more n_neighbours (--neighbours), or the number n (--n)"
        )
    most = max(largest, n or 1) + 1
    values, basis = values[:most], basis[:, :most]
    if n is None:
        gaps = np.where(values[:-1] < values[1:] / _MIN_GAP, np.diff(values), 0.0)
        n = 1 + int(gaps.argmax())
    label, embedding, separation = _assign(basis, n, seed)
    return Clusters(label, samples, values, embedding, separation, vectors, seed)


def save_clusters(
    table: Table | str | Path, found: Clusters, layer: str, of_class: int, *, what: str = "relevance", k: int = 8
) -> Path:
    """Keep the clusters of a class beside the table, where ``crp report`` finds them until the table changes.

    Parameters
    ----------
    table : Table, or its folder
    found : Clusters
        Of samples of the table, by their concepts or their heatmaps.
    layer : str
        Of the table.
    of_class : int
    what : {"relevance", "activation", "heatmap"}
        What was clustered.
    k : int
        Number of concepts that are kept of each cluster.

    Returns
    -------
    Path
        The file.
    """
    _check_found(found, Clusters)
    check_choice("what", what, Literal["relevance", "activation", "heatmap"])
    named = with_concepts(table, found, layer, of_class) if what == "heatmap" else found
    each = range(len(found.sizes))
    strongest = [named.strongest(i, k) for i in each]
    arrays = {
        "sample": found.sample,
        "label": found.label,
        "eigenvalues": found.eigenvalues,
        "embedding": found.embedding,
        "members": _padded([found.members(i)[:k].tolist() for i in each], -1),
        "strongest": _padded([[concept for concept, _ in concepts] for concepts in strongest], -1),
        "difference": _padded([[difference for _, difference in concepts] for concepts in strongest], 0.0),
    }
    settings = {"what": what, "separation": found.separation, "seed": found.seed}
    return keep_result(table, "clusters", layer, arrays, settings, of_class)


def with_concepts(table: Table | str | Path, found: Clusters, layer: str, of_class: int) -> Clusters:
    """The same clusters of a table's samples with the shares of a layer's concepts as vectors, for `strongest`."""
    _check_found(found, Clusters)
    vectors, samples = RowSelection(layer, of_class=of_class, samples=found.sample.tolist()).read(table)
    rows = {sample: row for row, sample in enumerate(samples.tolist())}
    if not rows.keys() >= set(found.sample.tolist()):
        raise InputError(f"the clusters have samples without rows of class {of_class} in {table!r}")
    return found._replace(vectors=vectors[[rows[sample] for sample in found.sample.tolist()]])


def export_corelay(
    path: str | Path,
    found: Clusters,
    heatmaps: Any | None = None,
    *,
    name: str = "spectral",
    predictions: Any | None = None,
    labels: Any | None = None,
) -> None:
    """Write clusters as an analysis file of ViRelAy, in HDF5, as pipelines of CoRelAy write one; needs h5py.

    Heatmaps are written into a file of their own, as ViRelAy and CoRelAy read them: ``classes.attribution.h5`` beside
    ``classes.h5``.

    Parameters
    ----------
    path : str or Path
        A new file.
    found : Clusters
    heatmaps : array of shape (samples, height, width) or (samples, channels, height, width), optional
        In the order of ``found.sample``; with ``predictions`` and ``labels``. One channel is spread over three, whose
        sum it is, as ViRelAy draws these.
    name : str
        Of the analysis, such as that of the class.
    predictions : array of shape (samples, classes), optional
        Outputs of the model.
    labels : array of shape (samples,), optional
        Classes; or of shape (samples, classes), boolean.

    Raises
    ------
    ValueError
        If heatmaps, predictions and labels are not given together, or are not of the clusters' samples; labels are no
        classes; or a file is there already. Nothing is written then.
    """
    import h5py

    _check_found(found, Clusters)
    path = as_path("path", path)
    beside = path.with_name(f"{path.stem}.attribution{path.suffix}")
    given = {"attribution": heatmaps, "prediction": predictions, "label": labels}
    arrays = {
        key: _as_labels(value) if key == "label" else np.float32(np.atleast_1d(as_numbers(f"{key}s", value)))
        for key, value in given.items()
        if value is not None
    }
    if arrays and (missing := sorted(set(given) - set(arrays))):
        raise InputError(f"heatmaps, predictions and labels are given together; {' and '.join(missing)} are missing")
    n_samples = len(found.sample)
    if wrong := [f"{key}s are of {len(array)}" for key, array in arrays.items() if len(array) != n_samples]:
        raise InputError(f"the clusters are of {n_samples} samples; {', '.join(wrong)}")
    if there := [one for one in (path, beside)[: 1 + bool(arrays)] if one.exists()]:
        raise InputError(f"{there[0]} is there already; name a new file")
    with h5py.File(path, "x") as file:
        group = file.create_group(name)
        group["index"] = found.sample.astype(np.uint32)
        n = found.embedding.shape[1]
        embedding = group.create_dataset("embedding/spectral", data=found.embedding.astype(np.float32))
        embedding.attrs["eigenvalue"] = found.eigenvalues[:n].astype(np.float32)
        clustering = group.create_dataset("cluster/spectral", data=found.label.astype(np.uint32))
        clustering.attrs.update(embedding="spectral", k=len(found.sizes), index=np.arange(n, dtype=np.uint32))
    if arrays:
        maps = arrays["attribution"]
        with h5py.File(beside, "x") as file:
            file["index"] = found.sample.astype(np.uint32)
            maps = maps[:, None] if maps.ndim == 3 else maps
            # (ViRelAy adds channels up, and draws one alone by some of its colour maps only)
            file["attribution"] = np.repeat(maps / 3, 3, axis=1) if maps.shape[1] == 1 else maps
            file["prediction"], file["label"] = arrays["prediction"], arrays["label"]


def _vectors(
    source: Any, layer: str | None, of_class: int | None, what: str, normed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What is clustered, (samples, features), and the samples' numbers."""
    if not isinstance(source, Table | str | Path):
        array = as_numbers("explanations", source)
        if not array.ndim:
            raise InputError("explanations must be of shape (samples, ...), not one number")
        samples = np.arange(len(array))
    elif of_class is None or (layer is None and what != "heatmap"):
        raise InputError("clusters of a table need layer= and of_class=; those of its heatmaps of_class= alone")
    elif what == "heatmap":
        samples, array = kept_heatmaps(source, of_class)
    else:
        return RowSelection(layer or "", what, normed=normed, of_class=of_class).read(source)
    vectors = array.reshape(len(array), math.prod(array.shape[1:]))
    return _directions_of(vectors) if normed else vectors, samples


def _directions_of(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length; zeros stay zeros."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300))


def _as_labels(values: Any) -> np.ndarray:
    """Classes in the numbers that ViRelAy reads, or booleans, as they are."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.dtype == bool and array.ndim == 2:
        return array
    classes = as_numbers("labels", array)
    if classes.ndim != 1 or not np.isin(classes, np.arange(2**16)).all():
        raise InputError(
            f"labels must be classes from 0 to {2**16 - 1}, one for each sample, or boolean of shape (samples, "
            f"classes), not {shortened(values)}"
        )
    return classes.astype(np.uint16)


def _spectrum(vectors: np.ndarray, n_neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of the neighbours' graph, ascending, and their eigenvectors."""
    from sklearn.neighbors import kneighbors_graph

    joined = kneighbors_graph(vectors, n_neighbours, mode="connectivity").toarray()
    joined = np.maximum(joined, joined.T)
    root = 1 / np.sqrt(joined.sum(1))
    return np.linalg.eigh(np.eye(len(vectors)) - root[:, None] * joined * root)


def _assign(basis: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Clusters in the span of the first eigenvectors: labels by size, embedding, and separation."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    embedding = basis[:, :n]
    if n == 1:
        return np.zeros(len(basis), np.int64), embedding, 0.0
    rows = _directions_of(embedding)  # (samples of one part of the graph are then one point)
    found = KMeans(n, n_init=10, random_state=seed).fit_predict(rows)
    rank = np.argsort(np.argsort(-np.bincount(found, minlength=n), kind="stable"), kind="stable")
    return rank[found].astype(np.int64), rows, float(silhouette_score(rows, found))
