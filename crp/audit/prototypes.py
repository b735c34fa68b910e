r"""Prototypes of a class: the ways in which a model predicts it, as a mixture over relevance of concepts.

Of each class, the vectors of concept relevance :math:`\nu` of its samples are modelled by
:math:`p(\nu) = \sum_i \pi_i\, N(\nu; \mu_i, \Sigma_i)`. A sample far from every prototype is an outlier: its prediction
is made in an unusual way. What differs, :math:`\nu - \mu_i`, are the concepts that it uses more, or less, than usual.

Dreyer et al., "Understanding the (Extra-)Ordinary: Validating Deep Model Decisions with Prototypical Concept-based
Explanations", CVPR Workshops (2024).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from crp.checks import check_choice, check_number
from crp.concepts.ids import as_ids, as_numbers
from crp.errors import InputError, NameNotFoundError
from crp.flags import check_flags
from crp.visualization.analysis import RowSelection
from crp.visualization.table.derived import keep_result, read_kept
from crp.visualization.table.files import write_atomic
from crp.visualization.table.store import Table
from crp.wording import counted

Covariance = Literal["full", "diag"]
#: Samples of a prototype that are kept with it beside a table.
_MEMBERS = 8


class _Mixture(NamedTuple):
    """Prototypes of one class.

    Attributes
    ----------
    weights : ndarray of shape (prototypes,)
    means : ndarray of shape (prototypes, concepts)
    covariances : ndarray of shape (prototypes, concepts, concepts), or (prototypes, concepts) of the diagonals
    sample : ndarray of shape (prototypes,), int64
        Sample nearest to each mean, of those that belong to the prototype.
    log_density : ndarray of shape (samples,)
        Of the samples from which the prototypes were made, ascending.
    """

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    sample: np.ndarray
    log_density: np.ndarray


@dataclass(frozen=True)
class Prototypes:
    """Prototypes of classes; made by `prototypes`.

    Attributes
    ----------
    layer : str
    normed : bool
        Whether vectors are shares of the layer's relevance.
    classes : dict of int to _Mixture
    seed : int or None
        With which they were found; None where an earlier version has saved them without it.
    """

    layer: str
    normed: bool
    classes: Mapping[int, _Mixture]
    seed: int | None = None

    def __repr__(self) -> str:
        n = sum(len(mixture.weights) for mixture in self.classes.values())
        return f"Prototypes({n} of {counted(len(self.classes), 'class', 'classes')}, layer={self.layer!r})"

    def score(self, vectors: Any, of_class: int) -> np.ndarray:
        """Log density of vectors of shape (samples, concepts), as predictions of a class: (samples,)."""
        return _log_density(self._joint(vectors, of_class)[0])

    def percentile(self, vectors: Any, of_class: int) -> np.ndarray:
        """Share, in percent, of the samples behind the prototypes that are no more likely than each vector."""
        known, found = self._mixture(of_class).log_density, self.score(vectors, of_class)
        # (a sample behind them is no less likely than itself, though it is rounded otherwise beside fewer others)
        return np.asarray(100.0 * np.searchsorted(known, found + 1e-9 * np.abs(found), side="right") / len(known))

    def assign(self, vectors: Any, of_class: int) -> np.ndarray:
        """Most likely prototype of each vector: (samples,), int64."""
        return np.asarray(self._joint(vectors, of_class)[0].argmax(1))

    def deviation(self, vectors: Any, of_class: int) -> np.ndarray:
        """Difference from the most likely prototype: (samples, concepts); positive where a concept is used more."""
        joint, array = self._joint(vectors, of_class)
        return np.asarray(array - self._mixture(of_class).means[joint.argmax(1)])

    def save(self, place: str | Path | Table) -> Path:
        """Write them into a ``.safetensors`` file, or beside the table from which they were made.

        Beside a table, ``crp audit`` and ``crp report`` find them, until the table changes.

        Parameters
        ----------
        place : path of a file; or Table, or its folder

        Returns
        -------
        Path
            The file.
        """
        arrays = {
            f"{of_class}/{name}": np.ascontiguousarray(value)
            for of_class, mixture in self.classes.items()
            for name, value in mixture._asdict().items()
        }
        if not isinstance(place, Table) and not Table.exists(place):
            about = {"layer": self.layer, "normed": str(self.normed), "seed": json.dumps(self.seed)}
            write_atomic(Path(place), save(arrays, about))
            return Path(place)
        place = Table.open(place)
        arrays |= {f"{of_class}/members": self._members(place, of_class) for of_class in self.classes}
        return keep_result(place, "prototypes", self.layer, arrays, {"normed": self.normed, "seed": self.seed})

    @classmethod
    def load(cls, place: str | Path | Table, layer: str | None = None) -> Prototypes:
        """Read what `save` has written.

        Parameters
        ----------
        place : path of a file; or Table, or its folder
        layer : str, optional
            Of the table.

        Raises
        ------
        TableNotFoundError
            If none are kept beside the table.
        TableMismatchError
            If the table has changed since they were made.
        """
        if isinstance(place, Table) or Table.exists(place):
            if layer is None:
                raise InputError("prototypes that are kept beside a table need layer=")
            kept = read_kept(place, "prototypes", layer)
            return cls(layer, bool(kept.settings["normed"]), _mixtures(kept.arrays), kept.settings.get("seed"))
        try:
            with safe_open(place, "np") as file:
                about = file.metadata()
            layer, normed, seed = about["layer"], about["normed"] == "True", json.loads(about.get("seed", "null"))
            return cls(layer, normed, _mixtures(load_file(place)), seed)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{place} is no file that Prototypes.save has written, or is damaged ({error})") from error

    def _members(self, table: Table, of_class: int) -> np.ndarray:
        """Samples nearest to the mean of each prototype among those that belong to it, (prototypes, k); -1 for none."""
        vectors, samples = RowSelection(self.layer, normed=self.normed, of_class=of_class).read(table)
        means, belongs = self._mixture(of_class).means, self.assign(vectors, of_class)
        members = []
        for i, mean in enumerate(means):
            inside = np.flatnonzero(belongs == i)
            order = np.argsort(np.linalg.norm(vectors[inside] - mean, axis=1), kind="stable")[:_MEMBERS]
            members.append(samples[inside[order]].tolist())
        return _padded(members, -1)

    def _mixture(self, of_class: int) -> _Mixture:
        (number,) = as_ids([of_class], what="a class")
        if number not in self.classes:
            raise NameNotFoundError(f"there are no prototypes of class {number}; there are of {sorted(self.classes)}")
        return self.classes[number]

    def _joint(self, vectors: Any, of_class: int) -> tuple[np.ndarray, np.ndarray]:
        """Log density of each vector and prototype together, and the vectors."""
        array, mixture = as_numbers("vectors", vectors), self._mixture(of_class)
        n_concepts = mixture.means.shape[1]
        if array.ndim != 2 or array.shape[1] != n_concepts:
            raise InputError(f"vectors are of shape {array.shape}; layer {self.layer!r} has {n_concepts} concepts")
        return _joint(*mixture[:3], array), array


def prototypes(
    table: Table | str | Path,
    layer: str,
    n: int | Sequence[int] = (1, 2, 3, 4, 5, 6),
    *,
    classes: Sequence[int] | None = None,
    covariance: Covariance = "diag",
    normed: bool = True,
    regularization: float = 1e-2,
    seed: int = 0,
) -> Prototypes:
    """Find the prototypes of classes in a mined table, by scikit-learn's `GaussianMixture`.

    Parameters
    ----------
    table : Table, or its folder
        With relevance.
    layer : str
    n : int or sequence of int
        Number of prototypes of each class; of several numbers the one with the least BIC is taken.
    classes : sequence of int, optional
        All that the table has by default.
    covariance : {"full", "diag"}
        A full one needs many more samples than concepts.
    normed : bool
        Whether vectors are shares of the layer's relevance.
    regularization : float
        Added to variances, as a share of the mean variance of the class's vectors; without it, a prototype of few
        samples is infinitely dense.
    seed : int

    Returns
    -------
    Prototypes

    Raises
    ------
    ValueError
        If a class has fewer than two samples, or none as many as prototypes; or its vectors are all the same.
    """
    check_flags(normed=normed)
    check_choice("covariance", covariance, Covariance)
    table = Table.open(table)
    numbers = as_ids(n, what="numbers of prototypes")
    if not numbers or min(numbers) < 1:
        raise InputError(f"n must be at least 1, not {n!r}")
    check_number("regularization", regularization, 0)
    seed = check_number("seed", seed, 0, whole=True)
    chosen = table.rows().target.tolist() if classes is None else as_ids(classes, what="classes")
    found = {}
    for of_class in sorted(set(chosen)):
        vectors, samples = RowSelection(layer, normed=normed, of_class=of_class).read(table)
        found[of_class] = _fit(vectors, samples, numbers, covariance, regularization, seed, f"class {of_class}")
    return Prototypes(layer, normed, found, seed)


def _padded(rows: Sequence[Sequence[float]], none: float) -> np.ndarray:
    """Rows of different lengths as one array, filled up by a number that stands for none."""
    width = max(map(len, rows), default=0)
    filled = [[*row, *[none] * (width - len(row))] for row in rows]
    return np.array(filled, np.int64 if isinstance(none, int) else np.float64).reshape(len(rows), width)


def _mixtures(arrays: Mapping[str, np.ndarray]) -> dict[int, _Mixture]:
    classes = sorted({int(key.partition("/")[0]) for key in arrays})
    return {i: _Mixture(*(arrays[f"{i}/{name}"] for name in _Mixture._fields)) for i in classes}


def _fit(
    vectors: np.ndarray, samples: np.ndarray, numbers: Sequence[int], covariance: Covariance, share: float, seed: int,
    what: str,
) -> _Mixture:  # fmt: skip
    from sklearn.mixture import GaussianMixture

    if min(numbers) > len(vectors):
        raise InputError(f"{what} has {len(vectors)} samples, too few for {min(numbers)} prototypes; give a smaller n")
    numbers = [number for number in numbers if number <= len(vectors)]
    variance = vectors.var(0).mean()
    # (less than float32, in which they were mined, can tell from none)
    if len(vectors) < 2 or variance <= (1e-7 * np.abs(vectors).max()) ** 2:
        raise InputError(
            f"{what} has {len(vectors)} samples of mean variance {variance:.3g}, which are too few, or too alike, for "
            "prototypes"
        )
    how = {"covariance_type": covariance, "reg_covar": share * variance, "random_state": seed}
    try:
        models = [GaussianMixture(number, **how).fit(vectors) for number in numbers]
    except ValueError as error:  # a prototype of one sample, or of samples that are alike
        raise InputError(
            f"{what} has {len(vectors)} samples, of which no prototypes can be made with regularization={share}; give "
            "a greater one, or a smaller n"
        ) from error
    best = min(models, key=lambda model: model.bic(vectors))
    found = best.weights_, best.means_, best.covariances_
    joint = _joint(*found, vectors)
    belongs = joint.argmax(1)[:, None] == np.arange(joint.shape[1])
    distances = np.linalg.norm(vectors[:, None] - best.means_, axis=2)
    # (a prototype to which no sample belongs has the nearest one of all)
    distances = np.where(belongs | ~belongs.any(0), distances, np.inf)
    return _Mixture(*found, samples[distances.argmin(0)].astype(np.int64), np.sort(_log_density(joint)))


def _joint(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Log density of each vector and prototype together, (samples, prototypes)."""
    parts = []
    for weight, mean, covariance in zip(weights, means, covariances, strict=True):
        difference = vectors - mean
        if covariance.ndim == 1:
            distance, volume = (difference**2 / covariance).sum(1), np.log(covariance).sum()
        else:
            factor = np.linalg.cholesky(covariance)
            distance = (np.linalg.solve(factor, difference.T) ** 2).sum(0)
            volume = 2 * np.log(np.diag(factor)).sum()
        parts.append(np.log(weight) - (distance + volume + len(mean) * np.log(2 * np.pi)) / 2)
    return np.stack(parts, 1)


def _log_density(joint: np.ndarray) -> np.ndarray:
    """Of each vector, whatever its prototype, (samples,)."""
    return np.asarray(np.logaddexp.reduce(joint, axis=1))
