"""Shapley values, by sampling permutations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.attributors.base import ROWS_FORWARD, Attributor
from crp.attributors.baselines import Baseline, _all_baselines
from crp.attributors.target import Target
from crp.checks import check_number
from crp.concepts.ids import as_ids, as_numbers
from crp.engine.door import check_seed
from crp.engine.inputs import Inputs, Tensors
from crp.errors import InputError


class ShapleySampling(Attributor):
    r"""Estimated Shapley values: what a player adds to the score of those before it, averaged over permutations.

    Castro, Gómez and Tejada, "Polynomial calculation of the Shapley value based on sampling" (Computers & Operations
    Research 36, 2009). A player is absent when it has the value of the baseline. Efficient: for any number
    of permutations, the result of all players sums to :math:`f(x) - f(x_0)`. All samples share the permutations. Takes
    ``samples * (players + 1)`` scores of each sample. A composite has no effect, as no gradient is used.

    Parameters
    ----------
    model, composite, attr_output, batch_size
        As in `Attributor`; a call scores 64 coalitions in one pass through the model by default.
    samples : int
        Number of permutations.
    sampling_dims : int or sequence of int, optional
        Axes of the data (the batch axis is 0) whose indices are the players: (2, 3) makes one of each pixel of an
        image, with all of its channels. Every axis by default, so that each feature is a player. What it adds stands at
        each of its features. With several inputs, each has players of its own.
    baseline : number, Tensor, callable or None
        As in `IntegratedGradients`. None is 0. Of several, the values are means, and sum to the difference from the
        mean of their scores; it takes as many times the scores.
    seed : int or None
        Of the permutations; None takes torch's global generator.
    permutations : Tensor of shape (samples, players), optional
        These permutations, in place of random ones.

    Raises
    ------
    ValueError
        Before the model runs, if the axes are not in the data, or permutations are none of the players.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Any = None,
        *,
        samples: int = 5,
        sampling_dims: int | Sequence[int] | None = None,
        baseline: Baseline = None,
        seed: int | None = 0,
        permutations: Tensor | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, composite, attr_output, batch_size=batch_size)
        check_number("samples", samples, 1, whole=True)
        if seed is not None:
            check_seed(seed)
        self.samples, self.sampling_dims, self.baseline = samples, sampling_dims, baseline
        self.seed, self.permutations = seed, permutations

    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output and Shapley values."""
        absent = _all_baselines(self.baseline, inputs, self.model)
        explained = inputs.explained
        players = self._players(explained)
        n_players = 1 + max(int(numbers.max()) for numbers in players)
        given = self._orders(n_players)
        orders = given.repeat(len(absent[0]), 1)  # (the same for each baseline)
        n_samples, coalitions = len(inputs), n_players + 1
        scores = torch.zeros(n_samples, len(orders) * coalitions, dtype=torch.float64)
        # Place of each player in each permutation.
        ranks = orders.argsort(1)
        with self.scoring(target) as score:
            for sample, time in self.rows(n_samples, len(orders) * coalitions, target, ROWS_FORWARD):
                order, size = time // coalitions, time % coalitions
                number = order // len(given)
                present = ranks[order] < size[:, None]  # (rows, players)
                made = []
                for data, other, numbers in zip(explained, absent, players, strict=True):
                    rows = sample.to(data.device)
                    inside = present[:, numbers.flatten()].view(len(sample), *numbers.shape).to(data.device)
                    made.append(torch.where(inside, data[rows], other[number.to(rows), rows]))
                scores[sample, time] = score(inputs.having(made, sample), target.rows(sample)).to(scores)
        added = scores.view(n_samples, len(orders), coalitions).diff(dim=2)
        values = added.gather(2, ranks.expand(n_samples, -1, -1)).mean(1)  # (samples, players)
        shares = (
            values[:, numbers.flatten()].view(n_samples, *numbers.shape).expand(data.shape).to(data)
            for data, numbers in zip(explained, players, strict=True)
        )
        return self.output(inputs, target.select), tuple(part.contiguous() for part in shares)

    def _players(self, inputs: Tensors) -> list[Tensor]:
        """Number of the player that each feature belongs to; axes that are no players have length 1."""
        numbered, count = [], 0
        dims = None if self.sampling_dims is None else as_ids(self.sampling_dims, what="sampling_dims")
        for data in inputs:
            axes = list(range(1, data.dim())) if dims is None else dims
            if not axes or len(set(axes)) < len(axes) or not all(0 < axis < data.dim() for axis in axes):
                raise InputError(
                    f"sampling_dims must name axes from 1 to {data.dim() - 1} (0 is the batch) of data of shape "
                    f"{tuple(data.shape)}, each once, not {self.sampling_dims!r}"
                )
            shape = [n if axis in axes else 1 for axis, n in enumerate(data.shape)][1:]
            numbers = torch.arange(count, count + torch.Size(shape).numel()).view(shape)
            count += numbers.numel()
            numbered.append(numbers)
        return numbered

    def _orders(self, n_players: int) -> Tensor:
        if self.permutations is None:
            generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
            return torch.stack([torch.randperm(n_players, generator=generator) for _ in range(self.samples)])
        given = torch.from_numpy(as_numbers("permutations", self.permutations))
        players = torch.arange(n_players)
        if given.dim() != 2 or given.shape[1] != n_players or (given.sort(1).values != players).any():
            raise InputError(
                f"permutations must have the shape (samples, {n_players}) and hold every player from 0 to "
                f"{n_players - 1} in each row; got the shape {tuple(given.shape)}"
            )
        return given
