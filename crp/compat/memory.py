"""Analysis in memory, as zennit-crp does it: for a ``run_distributed`` of a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.compat.accumulators import Maximization, Statistics
from crp.concepts import Concept
from crp.visualization.table.manifest import TableError
from crp.visualization.table.store import Table


class InMemoryAnalysis:
    """The part of `FeatureVisualization` that ranks batches in memory and keeps the results as zennit-crp's files."""

    RelMax: Maximization
    ActMax: Maximization
    RelStats: Statistics
    ActStats: Statistics
    path: Path
    saved_checkpoints: dict[str, list[str]]

    @torch.no_grad()
    def analyze_relevance(
        self, rel: Tensor, layer_name: str, concept: Concept, data_indices: Any, targets: Any
    ) -> None:
        """Rank a batch's relevance in memory, in ``RelMax`` and ``RelStats``, for analyses of one's own.

        Parameters
        ----------
        rel : Tensor of shape (batch, *layer shape)
        layer_name : str
        concept : Concept
        data_indices, targets : sequences of int, of length batch
        """
        ranked = self.RelMax.analyze_layer(rel, concept, layer_name, data_indices, targets)
        self.RelStats.analyze_layer(*ranked, layer_name)

    @torch.no_grad()
    def analyze_activation(
        self, act: Tensor, layer_name: str, concept: Concept, data_indices: Any, targets: Any
    ) -> None:
        """Rank a batch's activation in memory; a sample with several targets counts once in ``ActMax``."""
        indices, labels = (torch.as_tensor(ids).cpu().numpy() for ids in (data_indices, targets))
        _, first = np.unique(indices, return_index=True)
        self.ActMax.analyze_layer(act[first], concept, layer_name, indices[first], labels[first])
        each = Maximization("activation", self.ActStats.max_target, self.ActStats.abs_norm)
        self.ActStats.analyze_layer(*each.analyze_layer(act, concept, layer_name, data_indices, targets), layer_name)

    def _save_results(self, d_index: tuple[int, int] | None = None) -> None:
        """Write what is in memory as files, which ``saved_checkpoints`` then lists; ``d_index`` is their range."""
        for key, results in self._results_by_key().items():
            self.saved_checkpoints.setdefault(key, []).extend(results._save_results(d_index))

    def _collect_files(
        self, checkpoints: Mapping[str, Sequence[str]], d_index: tuple[int, int] | None
    ) -> dict[str, list[str]]:
        """Join files of ranges of the dataset, and delete them; queries then read the joint files."""
        if Table.exists(self.path):
            raise TableError(
                f"{str(self.path)!r} holds a table, which would answer in place of these results; collect them in "
                "another path"
            )
        return {
            key: results.collect_results(checkpoints[key], d_index) if checkpoints.get(key) else []
            for key, results in self._results_by_key().items()
        }

    def _results_by_key(self) -> dict[str, Maximization | Statistics]:
        return {"r_max": self.RelMax, "a_max": self.ActMax, "r_stats": self.RelStats, "a_stats": self.ActStats}


#: What zennit-crp calls while it mines, of a feature visualization and of its results.
_OF_VISUALIZATION = ("analyze_relevance", "analyze_activation", "_save_results", "get_data_concurrently")
_OF_RESULTS = ("analyze_layer", "concatenate_with_results", "sort_result_array", "collect_results", "_save_results")


def methods_not_called(visualization: InMemoryAnalysis) -> list[str]:
    """Overridden methods that zennit-crp calls while it mines, and that mining into a table does not."""
    name = type(visualization).__name__
    found = [f"{name}.{method}" for method in _OF_VISUALIZATION if _is_overridden(visualization, method)]
    for attribute in ("RelMax", "ActMax", "RelStats", "ActStats"):
        results = getattr(visualization, attribute)
        found += [f"{attribute}.{method}" for method in _OF_RESULTS if _is_overridden(results, method)]
    return found


def _is_overridden(instance: object, method: str) -> bool:
    """Whether the object itself, or a class outside of this package, has a method of this name."""
    owners = [kind for kind in type(instance).__mro__ if method in vars(kind)]
    return method in vars(instance) or (bool(owners) and owners[0].__module__.partition(".")[0] != "crp")
