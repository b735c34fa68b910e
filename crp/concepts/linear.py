r"""Directions and subspaces of a layer's channels as concepts.

With a dictionary of directions :math:`d_k` and their duals :math:`e_k`, where :math:`e_k \cdot d_l = 1` for
:math:`k = l` and else 0, activation is :math:`a_p = \sum_k (e_k \cdot a_p)\, d_k + r_p` at every position :math:`p`.
So relevance, the product of activation and multiplier, is

.. math:: R_{kp} = (e_k \cdot a_p)(d_k \cdot m_p), \qquad R_{\mathrm{rest},p} = r_p \cdot m_p,

which add up to that of the layer. For orthonormal directions :math:`e_k = d_k`. Relevance of channels is not enough:
where an entry of :math:`a` is 0, so is its relevance, and its part of :math:`d_k \cdot m` is lost.

Orthonormal directions: Chormai et al., "Disentangled Explanations of Neural Network Predictions by Finding Relevant
Subspaces", IEEE TPAMI (2024). Subspaces: Vielhaben et al., "Multi-dimensional Concept Discovery", TMLR (2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crp.concepts.base import Concept, _InTurn
from crp.concepts.ids import as_ids, as_numbers, check_alike, check_axis, in_range
from crp.errors import InputError, InputTypeError
from crp.flags import check_flags
from crp.types import MaskFn


class SubspaceConcept(Concept):
    """Blocks of directions are concepts: the part of a layer's channels that lies in the span of a block.

    Parameters
    ----------
    blocks : sequence of array or Tensor of shape (directions of the block, channels)
        Directions of each block. Together they are a dictionary; they need not be orthogonal.
    dual : sequence of array or Tensor of the same shapes, optional
        For each direction the vector that reads its coefficient from an activation; such as the filter of a concept
        activation vector whose direction is a pattern, or the encoder of an autoencoder without an activation. By
        default, the pseudo-inverse of all directions: what explains activation with the smallest error.
    rest : bool
        Whether a last concept is what no direction explains, so that the relevance of all concepts adds up to that of
        the layer.
    axis : int
        Axis of the channels in the layer's output: 1, or -1 for tokens of shape (batch, token, channel).
    names : sequence of str, optional
        What the concepts are called, without the rest.

    Attributes
    ----------
    directions, dual : Tensor of shape (directions, channels), float64
        All blocks, one below the other.
    sizes : tuple of int
        Number of directions of each block.
    rest : bool
    axis : int

    Raises
    ------
    ValueError
        If blocks are empty, of different numbers of channels, are all zeros, or hold values that are not finite.
    """

    needs_multiplier = True
    noun = "subspace"

    def __init__(
        self,
        blocks: Sequence[Any],
        dual: Sequence[Any] | None = None,
        rest: bool = True,
        *,
        axis: int = 1,
        names: Sequence[str] | None = None,
    ) -> None:
        check_flags(rest=rest)
        self.directions, self.sizes = _stacked(blocks, "blocks")
        if dual is None:
            self.dual = torch.linalg.pinv(self.directions).mT.contiguous()
        else:
            self.dual, sizes = _stacked(dual, "dual")
            if sizes != self.sizes or self.dual.shape != self.directions.shape:
                raise InputError(
                    f"dual has blocks of {sizes} vectors of {self.dual.shape[1]} channels; the directions have "
                    f"{self.sizes} of {self.directions.shape[1]}"
                )
        for i, (begin, end) in enumerate(self._spans()):
            if not (self.directions[begin:end].any() and self.dual[begin:end].any()):
                raise InputError(f"{self.noun} {i} is all zeros, or its dual is, which points nowhere; leave it out")
        check_axis(axis)
        are_listed = isinstance(names, Sequence) and not isinstance(names, str) and len(names) == len(self.sizes)
        if names is not None and not (are_listed and all(isinstance(name, str) for name in names)):
            raise InputError(f"names must be a list of {len(self.sizes)} names, one for each concept, not {names!r}")
        self.rest, self.axis = rest, axis
        self.names = None if names is None else tuple(names)

    def __len__(self) -> int:
        """Return the number of concepts, the rest included."""
        return len(self.sizes) + self.rest

    def __repr__(self) -> str:
        n, channels = self.directions.shape
        rest = ", rest=False" if not self.rest else ""
        return f"{type(self).__name__}({len(self.sizes)} of {channels} channels, {n} directions{rest})"

    def code(self, activation: Tensor) -> Tensor:
        """How active each concept is, of shape (batch, concepts, *positions).

        The coefficient of a block's only direction; the length of a longer block's part of the activation, and of the
        rest.
        """
        values = self._flat(activation)
        directions, dual = self.directions.to(values), self.dual.to(values)
        coefficients = dual @ values
        found = coefficients
        if max(self.sizes) > 1:
            parts = [directions[begin:end].mT @ coefficients[:, begin:end] for begin, end in self._spans()]
            lengths = torch.stack([part.norm(dim=1) for part in parts], 1)
            firsts = coefficients[:, [begin for begin, _ in self._spans()]]
            single = torch.tensor(self.sizes, device=values.device)[:, None] == 1
            found = torch.where(single, firsts, lengths)
        if self.rest:
            found = torch.cat([found, (values - directions.mT @ coefficients).norm(dim=1, keepdim=True)], 1)
        return self._shaped(found, activation)

    def relevance(self, activation: Tensor, multiplier: Tensor) -> Tensor:
        """How relevant each concept is, of shape (batch, concepts, *positions): the equation above."""
        check_alike(activation, multiplier)
        values, multipliers = self._flat(activation), self._flat(multiplier)
        directions, dual = self.directions.to(values), self.dual.to(values)
        found = (dual @ values) * (directions @ multipliers.to(values))
        if max(self.sizes) > 1:
            found = torch.stack([found[:, begin:end].sum(1) for begin, end in self._spans()], 1)
        if self.rest:
            whole = (values * multipliers).sum(1, keepdim=True)
            found = torch.cat([found, whole - found.sum(1, keepdim=True)], 1)
        return self._shaped(found, activation)

    def mask(self, batch_id: int, concept_ids: Any, layer_name: str | None = None) -> MaskFn:
        """Keep only some concepts of one row: multipliers ``m`` become the sum over their directions of ``(d m) e``.

        Parameters
        ----------
        batch_id : int
            Row of the gradient.
        concept_ids : int, or sequence, array or tensor of int
            Concepts to keep. The last one is the rest, if there is one; negative ids count from the end.
        layer_name : str, optional
            Named in error messages.

        Returns
        -------
        callable
            Function of a gradient of shape (rows, *layer shape); it works in place and returns the gradient.
        """
        ids = in_range(as_ids(concept_ids, layer_name), len(self), layer_name, "concept")
        return _KeepSpans(self, ((batch_id, frozenset(i % len(self) for i in ids)),), layer_name)

    def describe(self, concept_id: int) -> str:
        """What a concept is called: its name, such as ``"subspace 5"``, or ``"rest"``."""
        number = concept_id + len(self) if concept_id < 0 else concept_id
        return "rest" if self.rest and number == len(self.sizes) else super().describe(number)

    def _spans(self) -> list[tuple[int, int]]:
        """First direction of each block, and the one after its last."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def _flat(self, tensor: Tensor, layer_name: str | None = None) -> Tensor:
        """View, or copy, of shape (batch, channels, positions) of a tensor of shape (batch, *layer shape)."""
        channels = self.directions.shape[1]
        if not -tensor.dim() < self.axis < tensor.dim() or tensor.shape[self.axis] != channels:
            layer = "the layer" if layer_name is None else f"layer {layer_name!r}"
            raise InputError(
                f"{layer} gives {tuple(tensor.shape)}; {self!r} needs {channels} channels on axis {self.axis}"
            )
        values = tensor.movedim(self.axis, 1)
        return values.reshape(*values.shape[:2], -1)

    def _shaped(self, found: Tensor, like: Tensor) -> Tensor:
        """(batch, concepts, positions) to (batch, concepts, *positions) of a layer's output."""
        return found.reshape(*found.shape[:2], *like.movedim(self.axis, 1).shape[2:])


class DirectionConcept(SubspaceConcept):
    """Directions of a layer's channels as concepts.

    Parameters
    ----------
    directions : array or Tensor of shape (directions, channels)
        They need be neither orthogonal nor of unit length; relevance does not depend on their lengths.
    dual : array or Tensor of shape (directions, channels), optional
        For each direction the vector that reads its coefficient from an activation; by default, the pseudo-inverse.
    rest : bool
        Whether a last concept is what no direction explains.
    axis : int
        Axis of the channels: 1, or -1 for tokens.
    names : sequence of str, optional

    Attributes
    ----------
    As those of `SubspaceConcept`.

    Examples
    --------
    >>> concept = DirectionConcept([[0.6, 0.8]])
    >>> activation, multiplier = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 5.0]])
    >>> concept.relevance(activation, multiplier)
    tensor([[ 2.7600, -1.7600]])
    """

    noun = "direction"

    def __init__(
        self,
        directions: Any,
        dual: Any = None,
        rest: bool = True,
        *,
        axis: int = 1,
        names: Sequence[str] | None = None,
    ) -> None:
        check_flags(rest=rest)
        rows = list(_matrix(directions, "directions"))
        duals = None if dual is None else list(_matrix(dual, "dual"))
        super().__init__(rows, duals, rest, axis=axis, names=names)


@dataclass(frozen=True)
class _KeepSpans:
    """Mask function that keeps only some subspaces, of some rows.

    Attributes
    ----------
    concept : SubspaceConcept
    kept : tuple of (int, frozenset of int)
        Row and concepts; a row that is named twice is masked twice.
    layer_name : str or None
        Named in error messages.
    """

    concept: SubspaceConcept
    kept: tuple[tuple[int, frozenset[int]], ...]
    layer_name: str | None

    def __call__(self, grad: Tensor) -> Tensor:
        """Mask multipliers of shape (rows, *layer shape), in place."""
        todo = list(self.kept)
        while todo:
            now = dict(reversed(todo))
            for row in now:
                todo.remove((row, now[row]))
            grad[list(now)] = self._masked(grad[list(now)], list(now.values()))
        return grad

    def _masked(self, grad: Tensor, kept: Sequence[frozenset[int]]) -> Tensor:
        concept = self.concept
        values = concept._flat(grad, self.layer_name)
        directions, dual = concept.directions.to(values), concept.dual.to(values)
        keeps = [[i in ids for i, size in enumerate(concept.sizes) for _ in range(size)] for ids in kept]
        keep = torch.tensor(keeps, device=values.device).to(values.dtype)[..., None]
        rest = torch.tensor([len(concept.sizes) in ids for ids in kept], device=values.device).to(values.dtype)
        rest = rest[:, None, None]
        # The rest keeps what the directions do not take: m - sum of (d m) e over all of them.
        masked: Tensor = values * rest + dual.mT @ ((directions @ values) * (keep - rest))
        return masked.reshape(grad.movedim(concept.axis, 1).shape).movedim(1, concept.axis)

    @staticmethod
    def together(masks: Sequence[_KeepSpans]) -> MaskFn:
        """One function that does what several of one layer do one after the other."""
        if any(mask.concept is not masks[0].concept for mask in masks):
            return _InTurn(tuple(masks))
        return _KeepSpans(masks[0].concept, tuple(kept for mask in masks for kept in mask.kept), masks[0].layer_name)


def _matrix(rows: Any, what: str) -> Tensor:
    matrix = torch.from_numpy(as_numbers(what, rows))
    matrix = matrix[None] if matrix.dim() == 1 else matrix
    if matrix.dim() != 2 or 0 in matrix.shape:
        raise InputError(f"{what} must be vectors of shape (directions, channels), not {tuple(matrix.shape)}")
    return matrix


def _stacked(blocks: Sequence[Any], what: str) -> tuple[Tensor, tuple[int, ...]]:
    if isinstance(blocks, str | Mapping) or not isinstance(blocks, Iterable):
        raise InputTypeError(f"{what} must be a list of blocks of directions, not {blocks!r}")
    matrices = [_matrix(block, f"{what}[{i}]") for i, block in enumerate(blocks)]
    if not matrices:
        raise InputError(f"{what} is empty; give at least one block of directions")
    if len({matrix.shape[1] for matrix in matrices}) > 1:
        raise InputError(f"{what} have different numbers of channels: {[matrix.shape[1] for matrix in matrices]}")
    return torch.cat(matrices), tuple(map(len, matrices))
