r"""Directions of a layer's channels, from vectors of activation and multiplier that were collected at its positions.

Each function takes arrays of shape (vectors, channels) and returns `Directions`, in float64. `pca`, `nmf` and `cav` are
scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from crp.checks import check_choice, check_number
from crp.concepts.ids import as_direction, as_numbers
from crp.concepts.linear import DirectionConcept, SubspaceConcept
from crp.errors import InputError
from crp.flags import check_flags


@dataclass(frozen=True)
class Directions:
    """A dictionary of directions, and how good it is.

    Attributes
    ----------
    directions : ndarray of shape (directions, channels)
    dual : ndarray of the same shape
        For each direction the vector that reads its coefficient from an activation.
    method : str
        What found them.
    quality : dict of str to float or ndarray
        As the method's function says; see also `explained`.
    block : int
        How many directions, one after the other, make one concept.
    """

    directions: np.ndarray
    dual: np.ndarray
    method: str
    quality: Mapping[str, Any] = field(default_factory=dict)
    block: int = 1

    def __post_init__(self) -> None:
        shapes = _vectors(self.directions, "directions").shape, _vectors(self.dual, "dual").shape
        if shapes[0] != shapes[1]:
            raise InputError(f"directions are of shape {shapes[0]} and dual of {shapes[1]}; they belong together")
        check_number("block", self.block, 1, whole=True)
        if shapes[0][0] % self.block:
            raise InputError(f"{shapes[0][0]} directions are no blocks of {self.block}")

    def __repr__(self) -> str:
        n, channels = np.shape(self.directions)
        of = f"{n // self.block} x {self.block}" if self.block > 1 else n
        return f"Directions({of} in {channels} channels, method={self.method!r})"

    def concept(self, rest: bool = True, *, axis: int = 1) -> SubspaceConcept:
        """Concept type of these directions: a `DirectionConcept`, or a `SubspaceConcept` where blocks are longer."""
        check_flags(rest=rest)
        if self.block == 1:
            return DirectionConcept(self.directions, self.dual, rest, axis=axis)
        n_blocks = len(self.directions) // self.block
        blocks, duals = (np.split(each, n_blocks) for each in (self.directions, self.dual))
        return SubspaceConcept(blocks, duals, rest, axis=axis)

    def explained(self, activations: Any, multipliers: Any) -> np.ndarray:
        """Share of the relevance of some vectors that each concept has, of shape (concepts,).

        Parameters
        ----------
        activations, multipliers : array of shape (vectors, channels)
        """
        a, m = _pair(activations, multipliers)
        total = float((a * m).sum())
        if total == 0:
            raise InputError("the relevance of all vectors is 0 in sum; there is nothing to explain")
        of_concepts = self.concept(rest=False).relevance(torch.from_numpy(a), torch.from_numpy(m)).sum(0)
        return np.asarray(of_concepts / total)


def pca(activations: Any, n: int) -> Directions:
    """Principal components: orthonormal directions of the largest variance.

    Parameters
    ----------
    activations : array of shape (vectors, channels)
    n : int
        Number of directions.

    Returns
    -------
    Directions
        Quality: ``variance``, the share of the variance along each direction.
    """
    from sklearn.decomposition import PCA

    a = _vectors(activations)
    _check_n(n, min(a.shape), "principal components")
    if not (a != a[0]).any():
        raise InputError("activations are all the same; there is no direction in which they vary")
    found = PCA(n, svd_solver="full").fit(a)
    return Directions(found.components_, found.components_, "pca", {"variance": found.explained_variance_ratio_})


def prca(activations: Any, multipliers: Any, n: int) -> Directions:
    """Principal relevant components: orthonormal directions of the largest mean relevance.

    Relevance of a unit vector u is (u·a)(u·m), so that these are the top eigenvectors of the symmetric part of E[a mᵀ].
    Chormai et al., "Disentangled Explanations of Neural Network Predictions by Finding Relevant Subspaces", IEEE TPAMI
    (2024).

    Parameters
    ----------
    activations, multipliers : array of shape (vectors, channels)
    n : int
        Number of directions.

    Returns
    -------
    Directions
        Quality: ``relevance``, the mean relevance of each direction, its eigenvalue.
    """
    a, m = _pair(activations, multipliers)
    _check_n(n, a.shape[1], "directions")
    both = a.T @ m / len(a)
    values, vectors = np.linalg.eigh((both + both.T) / 2)
    top = _signed(vectors.T[::-1][:n])
    return Directions(top, top, "prca", {"relevance": values[::-1][:n].copy()})


def nmf(activations: Any, n: int, *, seed: int = 0, steps: int = 2000) -> Directions:
    """Non-negative matrix factorization: directions without negative entries, of unit length.

    Fel et al., "CRAFT: Concept Recursive Activation FacTorization for Explainability", CVPR (2023). Coefficients of an
    activation are those of least squares, by the pseudo-inverse, which may be negative.

    Parameters
    ----------
    activations : array of shape (vectors, channels)
        Without negative entries, as after a ReLU.
    n : int
        Number of directions.
    seed : int
    steps : int
        Iterations at most.

    Returns
    -------
    Directions
        Quality: ``error``, the share of the squared length of the activations that is not explained.

    Raises
    ------
    ValueError
        If an activation is negative.
    """
    from sklearn.decomposition import NMF

    a = _vectors(activations)
    _check_n(n, min(a.shape), "directions")
    check_number("steps", steps, 1, whole=True)
    check_number("seed", seed, 0, whole=True)
    if a.min() < 0:
        raise InputError(f"activations must not be negative, as after a ReLU; the least is {a.min():.4g}")
    model = NMF(n, init="nndsvda", random_state=seed, max_iter=steps, tol=1e-10)
    weights = model.fit_transform(a)
    lengths = np.linalg.norm(model.components_, axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(f"{n} directions are more than the activations have; give a smaller n")
    error = ((a - weights @ model.components_) ** 2).sum() / (a**2).sum()
    directions = model.components_ / lengths
    return Directions(directions, np.linalg.pinv(directions).T, "nmf", {"error": float(error)})


def cav(activations: Any, labels: Any, method: Literal["pattern", "ridge", "svm"] = "pattern") -> Directions:
    """Concept activation vector: the direction in which activations of a concept's examples differ from others.

    Parameters
    ----------
    activations : array of shape (vectors, channels)
    labels : array of shape (vectors,)
        True, or 1, for examples of the concept, and False, or 0, for others.
    method : {"pattern", "ridge", "svm"}
        ``"pattern"``: covariance with the label divided by the label's variance (Pahde et al., "Navigating Neural
        Space: Revisiting Concept Activation Vectors to Overcome Directional Divergence", 2022), the difference of the
        means. ``"ridge"``, ``"svm"``: weights of a linear classifier (Kim et al., "Interpretability Beyond Feature
        Attribution", ICML 2018), which also turn away from what disturbs it.

    Returns
    -------
    Directions
        One of unit length. Quality: ``cosine``, to the difference of the means; ``auc``, how well the coefficient
        tells examples from others (1 is perfect, 0.5 chance); ``norm``, of the vector before it was given unit length.

    Raises
    ------
    ValueError
        If labels are not of two kinds, or the examples do not differ.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.svm import LinearSVC

    check_choice("method", method, Literal["pattern", "ridge", "svm"])
    a = _vectors(activations)
    t = as_numbers("labels", labels).reshape(-1)
    if len(t) != len(a) or set(np.unique(t).tolist()) != {0, 1}:
        raise InputError(
            f"labels must be {len(a)} values of 0 and 1, both among them; not {len(t)} of {np.unique(t)[:5].tolist()}"
        )
    centred = a - a.mean(0)
    pattern = centred.T @ (t - t.mean()) / ((t - t.mean()) ** 2).sum()
    vector = pattern
    if method != "pattern":
        make = RidgeClassifier if method == "ridge" else partial(LinearSVC, random_state=0, max_iter=100_000)
        vector = make(class_weight="balanced").fit(a, t).coef_.reshape(-1)
    norm = np.linalg.norm(vector)
    if norm == 0 or np.linalg.norm(pattern) <= 1e-12 * np.abs(a).max():  # (0 but for rounding)
        raise InputError("the examples of the concept and the others have the same mean; there is no direction")
    unit = vector / norm
    quality = {
        "cosine": float(unit @ pattern / np.linalg.norm(pattern)),
        "auc": float(roc_auc_score(t, a @ unit)),
        "norm": float(norm),
    }
    return Directions(unit[None], unit[None], f"cav ({method})", quality)


def tcav(direction: Any, gradients: Any) -> float:
    """Share of samples whose output grows in a direction: of those with v·∇ > 0.

    Kim et al., "Interpretability Beyond Feature Attribution", ICML (2018), equation 2.

    Parameters
    ----------
    direction : array of shape (channels,)
    gradients : array or Tensor of shape (samples, channels, *space)
        Gradients at the layer, or multipliers; they are summed over space.
    """
    along = as_direction(direction)
    values = as_numbers("gradients", gradients)
    if values.ndim < 2 or values.shape[1] != len(along) or 0 in values.shape:
        raise InputError(f"gradients are of shape {values.shape}; the direction has {len(along)} channels")
    return float((values.reshape(*values.shape[:2], -1).sum(-1) @ along > 0).mean())


def drsa(
    activations: Any,
    multipliers: Any,
    n: int,
    dimension: int = 1,
    *,
    steps: int = 500,
    restarts: int = 10,
    seed: int = 0,
) -> Directions:
    """Disentangled relevant subspaces: orthonormal blocks of directions, each relevant for samples of its own.

    Maximizes a soft minimum over the blocks of how relevant each is, by which no block is left empty: the mean of power
    1/2 over blocks of the mean of power 2 over vectors of relu((U a)·(U m)). Each step goes up the gradient, and makes
    the directions orthonormal again, ``U ← (U Uᵀ)^-½ U``. Chormai et al., "Disentangled Explanations of Neural Network
    Predictions by Finding Relevant Subspaces", IEEE TPAMI (2024).

    Parameters
    ----------
    activations, multipliers : array of shape (vectors, channels)
    n : int
        Number of blocks.
    dimension : int
        Directions in each block; ``n * dimension`` may not be more than the channels.
    steps : int
        Steps of each restart.
    restarts : int
        Random starts, of which the best result is taken: there are optima that are not the best one.
    seed : int

    Returns
    -------
    Directions
        With ``block=dimension``. Quality: ``objective``, and ``relevance``, the mean relevance of each block.
    """
    a, m = (torch.from_numpy(array) for array in _pair(activations, multipliers))
    for name, number in (("dimension", dimension), ("steps", steps), ("restarts", restarts)):
        check_number(name, number, 1, whole=True)
    check_number("seed", seed, 0, whole=True)
    _check_n(n, a.shape[1] // dimension, f"blocks of {dimension} directions")
    generator = torch.Generator().manual_seed(seed)
    best, best_value = None, -float("inf")
    for _ in range(restarts):
        start = torch.randn(n * dimension, a.shape[1], generator=generator, dtype=a.dtype)
        found, value = _climb(_orthonormal(start), a, m, n, steps)
        if value > best_value:
            best, best_value = found, value
    assert best is not None
    of_vectors = ((a @ best.mT) * (m @ best.mT)).reshape(len(a), n, dimension).sum(2)
    if not (of_vectors > 0).any():
        raise InputError("no block has positive relevance; are the multipliers those of these activations?")
    relevance = of_vectors.mean(0)
    order = relevance.argsort(descending=True)
    rows = best.reshape(n, dimension, -1)[order].reshape(n * dimension, -1).numpy()
    quality = {"objective": best_value, "relevance": relevance[order].numpy()}
    return Directions(rows, rows, "drsa", quality, dimension)


def _climb(rows: Tensor, a: Tensor, m: Tensor, n: int, steps: int) -> tuple[Tensor, float]:
    """Directions after some steps of steepest ascent, whose length halves where a step does not lead up."""
    scale = a.norm(dim=1).mean() * m.norm(dim=1).mean()
    if scale == 0:
        return rows, 0.0
    a, m = a / a.norm(dim=1).mean(), m / m.norm(dim=1).mean()
    value, gradient = _objective(rows, a, m, n)
    size = 1.0
    for _ in range(steps):
        # (only what turns the directions counts: the part within the tangent space)
        symmetric = (rows @ gradient.mT + gradient @ rows.mT) / 2
        tangent = gradient - symmetric @ rows
        length = tangent.norm()
        if length <= 1e-13 * (1 + abs(value)) or size < 1e-14:
            break
        there = _orthonormal(rows + size * tangent / length)
        new_value, new_gradient = _objective(there, a, m, n)
        if new_value > value:
            rows, value, gradient, size = there, new_value, new_gradient, size * 1.5
        else:
            size /= 2
    return rows, float(value * scale)


def _objective(rows: Tensor, a: Tensor, m: Tensor, n: int) -> tuple[float, Tensor]:
    leaf = rows.detach().requires_grad_()
    relevance = ((a @ leaf.mT) * (m @ leaf.mT)).reshape(len(a), n, -1).sum(2)
    # (the root has no slope at 0: a block without relevance starts from a tiny one)
    of_blocks = (relevance.clamp_min(0) ** 2).mean(0).add(1e-30).sqrt()
    value = of_blocks.sqrt().mean() ** 2
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient


def _orthonormal(rows: Tensor) -> Tensor:
    """``(U Uᵀ)^-½ U``, the nearest matrix with orthonormal rows."""
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    return torch.as_tensor(left @ right)


def _signed(vectors: np.ndarray) -> np.ndarray:
    """Vectors whose largest entry is positive, since the sign of an eigenvector means nothing."""
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], 1)
    return vectors * np.where(largest < 0, -1.0, 1.0)


def _vectors(values: Any, what: str = "activations") -> np.ndarray:
    array = as_numbers(what, values)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{what} must be of shape (vectors, channels), not {array.shape}")
    return array


def _pair(activations: Any, multipliers: Any) -> tuple[np.ndarray, np.ndarray]:
    a, m = _vectors(activations), _vectors(multipliers, "multipliers")
    if a.shape != m.shape:
        raise InputError(f"activations are of shape {a.shape} and multipliers of {m.shape}; they belong together")
    return a, m


def _check_n(n: int, largest: int, what: str) -> None:
    check_number("n", n, 1, whole=True)
    if n > largest:
        raise InputError(f"there are 1 to {largest} {what} in these vectors, not {n}")
