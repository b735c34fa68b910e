"""Best samples of every concept, gathered batch by batch in memory and saved as zennit-crp's files.

`FeatureVisualization` ranks from its table instead; these classes are for analyses in memory (one call of
`analyze_layer` per batch), and say under which folder name the table can be read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from crp.checks import check_choice
from crp.compat import folders
from crp.compat.folders import SAMPLE_SIZE
from crp.concepts import Concept
from crp.errors import InputError
from crp.flags import check_flags
from crp.kinds import as_path
from crp.visualization.table.manifest import TableError
from crp.visualization.table.question import Question
from crp.visualization.table.store import Table


class _Ranking(NamedTuple):
    """Samples of every concept, best first: three tensors of shape (samples, concepts)."""

    sample: Tensor
    value: Tensor
    position: Tensor

    def best(self, size: int) -> _Ranking:
        """First ``size`` samples by value, in descending order; ties by sample."""
        order = self.sample.argsort(dim=0, stable=True)
        order = order.gather(0, self.value.gather(0, order).argsort(dim=0, descending=True, stable=True))[:size]
        return _Ranking(*(tensor.gather(0, order) for tensor in self))

    def joined(self, other: _Ranking) -> _Ranking:
        """Samples of both."""
        return _Ranking(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


class _Accumulator:
    """Rankings in memory, and their files; what `Maximization` and `Statistics` share."""

    _per_target: bool

    def __init__(
        self, mode: str = "relevance", max_target: str = "sum", abs_norm: bool = False, path: str | Path | None = None
    ) -> None:
        check_flags(abs_norm=abs_norm)
        check_choice("max_target", max_target, Literal["sum", "max"])
        self.question = Question(mode, max_target, bool(abs_norm), self._per_target)
        self.mode, self.max_target, self.abs_norm = mode, max_target, bool(abs_norm)
        self.sub_folder = Path(folders.folder_name(self.question))
        self.folder = as_path("path", "" if path is None else path) / self.sub_folder
        self.SAMPLE_SIZE = SAMPLE_SIZE
        self._rankings: dict[Any, _Ranking] = {}

    @property
    def PATH(self) -> Path:
        """Result folder, which is made when it is asked for; one that is set says by its name what is asked."""
        return folders._make_listed(self.folder)

    @PATH.setter
    def PATH(self, path: str | Path) -> None:
        self.folder = Path(path)
        self.question = folders.question_of(self.folder.name) or self.question

    def delete_result_arrays(self) -> None:
        """Forget what was gathered."""
        self._rankings = {}

    def collect_results(self, path_list: Sequence[str], d_index: tuple[int, int] | None = None) -> list[str]:
        """Join partial results into one, and delete their files once it is saved.

        Parameters
        ----------
        path_list : sequence of str
            What `_save_results` returned for ranges of the dataset.
        d_index : (int, int), optional
            Range of the joint result, if it is a partial one again.

        Returns
        -------
        list of str
            Path of each ranking's files, up to ``data.npy``.
        """
        self.delete_result_arrays()
        # (relative paths may have been written on Windows)
        path_list = [prefix if "/" in prefix else prefix.replace("\\", "/") for prefix in map(str, path_list)]
        keys = [self._key(prefix) for prefix in path_list]
        for key, prefix in tqdm(list(zip(keys, path_list, strict=True)), desc="Collecting", dynamic_ncols=True):
            top = folders.read_top(prefix)
            self._add(key, _Ranking(*(torch.from_numpy(np.array(array)) for array in top)))
        saved = self._save_results(d_index)
        for prefix in set(path_list) - set(saved):
            folders.remove_top(prefix)
        return saved

    def _save_results(self, d_index: tuple[int, int] | None = None) -> list[str]:
        saved = []
        for key, ranking in self._rankings.items():
            arrays = (tensor.cpu().numpy() for tensor in ranking)
            saved.append(folders.write_top(self._prefix(key, d_index), folders.Top(*arrays)))
        self.delete_result_arrays()
        return saved

    def _add(self, key: Any, ranking: _Ranking) -> None:
        known = self._rankings.get(key)
        self._rankings[key] = (ranking if known is None else ranking.joined(known)).best(self.SAMPLE_SIZE)

    def _key(self, prefix: str) -> Any:
        raise NotImplementedError

    def _prefix(self, key: Any, d_index: tuple[int, int] | None) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        name, path = type(self).__name__, str(self.folder.parent)
        return f"{name}({self.mode!r}, {self.max_target!r}, {self.abs_norm}, {path!r})"


class Maximization(_Accumulator):
    """Best samples of every concept of a layer.

    Parameters
    ----------
    mode : {"relevance", "activation"}
    max_target : {"sum", "max"}
        Rank by the sum over a concept's positions, or by their maximum.
    abs_norm : bool
        Rank by shares: each sample's values are divided by the sum of their absolute values.
    path : str or Path, optional
        Folder in which the result folder lies; the working directory by default.

    Attributes
    ----------
    PATH, folder : Path
        Result folder; ``PATH`` makes it, and leaves it empty while samples are missing.
    SAMPLE_SIZE : int
        Samples kept for each concept, 40 by default.
    question : Question
        What the results answer.
    """

    _per_target = False

    @property
    def d_c_sorted(self) -> dict[str, Tensor]:
        """Samples of each layer, each of shape (samples, concepts), best first."""
        return {layer: ranking.sample for layer, ranking in self._rankings.items()}

    @property
    def rel_c_sorted(self) -> dict[str, Tensor]:
        """Values of each layer."""
        return {layer: ranking.value for layer, ranking in self._rankings.items()}

    @property
    def rf_c_sorted(self) -> dict[str, Tensor]:
        """Positions of the maximum of each layer."""
        return {layer: ranking.position for layer, ranking in self._rankings.items()}

    def analyze_layer(
        self, rel: Tensor, concept: Concept, layer_name: str, data_indices: Any, targets: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add a batch.

        Parameters
        ----------
        rel : Tensor of shape (batch, *layer shape)
            Relevance or activation. Rows that are not finite are left out.
        concept : Concept
        layer_name : str
        data_indices : sequence, array or tensor of int, of shape (batch,)
            Dataset index of each row.
        targets : sequence, array or tensor of int, of shape (batch,)

        Returns
        -------
        sample, value, position, target : Tensors of shape (rows, concepts)
            The whole batch, sorted for each concept.
        """
        finite = torch.isfinite(rel.flatten(1)).all(1)
        indices, labels = (torch.as_tensor(x, device=rel.device)[finite] for x in (data_indices, targets))
        order, value, position = concept.reference_sampling(rel[finite], layer_name, self.max_target, self.abs_norm)
        result = indices[order], value, position, labels[order]
        self.concatenate_with_results(layer_name, *result[:3])
        return result

    def concatenate_with_results(
        self, layer_name: str, d_c_sorted: Tensor, rel_c_sorted: Tensor, rf_c_sorted: Tensor
    ) -> None:
        """Add samples, values and positions of shape (samples, concepts) to a layer's, and keep the best."""
        self._add(layer_name, _Ranking(d_c_sorted, rel_c_sorted, rf_c_sorted))

    def sort_result_array(self, layer_name: str) -> None:
        """Sort a layer's samples and keep the best."""
        self._rankings[layer_name] = self._rankings[layer_name].best(self.SAMPLE_SIZE)

    def _key(self, prefix: str) -> str:
        return _partial(prefix)

    def _prefix(self, key: str, d_index: tuple[int, int] | None) -> str:
        return folders.max_prefix(self.PATH, key, d_index)


class Statistics(_Accumulator):
    """Best samples of every concept of a layer, for each target apart; made as `Maximization` is."""

    _per_target = True

    @property
    def d_c_sorted(self) -> dict[int, dict[str, Tensor]]:
        """Samples of each target and layer, each of shape (samples, concepts), best first."""
        return self._nested("sample")

    @property
    def rel_c_sorted(self) -> dict[int, dict[str, Tensor]]:
        """Values of each target and layer."""
        return self._nested("value")

    @property
    def rf_c_sorted(self) -> dict[int, dict[str, Tensor]]:
        """Positions of the maximum of each target and layer."""
        return self._nested("position")

    def analyze_layer(
        self, d_c_sorted: Tensor, rel_c_sorted: Tensor, rf_c_sorted: Tensor, t_c_sorted: Tensor, layer_name: str
    ) -> None:
        """Add a batch as `Maximization.analyze_layer` returns it: four tensors of shape (rows, concepts)."""
        for target in sorted(set(t_c_sorted[:, 0].tolist())):
            # Every column holds the same rows in another order, hence each target equally often.
            chosen = (t_c_sorted == target).t()
            parts = (x.t()[chosen].view(len(chosen), -1).t() for x in (d_c_sorted, rel_c_sorted, rf_c_sorted))
            self.concatenate_with_results(layer_name, int(target), *parts)

    def concatenate_with_results(
        self, layer_name: str, target: int, d_c_sorted: Tensor, rel_c_sorted: Tensor, rf_c_sorted: Tensor
    ) -> None:
        """Add samples, values and positions of shape (samples, concepts) to a target's, and keep the best."""
        self._add((target, layer_name), _Ranking(d_c_sorted, rel_c_sorted, rf_c_sorted))

    def sort_result_array(self, layer_name: str, target: int) -> None:
        """Sort a target's samples and keep the best."""
        self._rankings[target, layer_name] = self._rankings[target, layer_name].best(self.SAMPLE_SIZE)

    def _save_results(self, d_index: tuple[int, int] | None = None) -> list[str]:
        targets = {target for target, _ in self._rankings}
        saved = super()._save_results(d_index)
        if d_index is None:
            folders.write_targets(self.PATH, targets)
        return saved

    def _key(self, prefix: str) -> tuple[int, str]:
        return int(_partial(prefix)), folders.layer_name(Path(prefix).parent.name)

    def _prefix(self, key: tuple[int, str], d_index: tuple[int, int] | None) -> str:
        target, layer = key
        return folders.stats_prefix(self.PATH, layer, target, d_index)

    def _nested(self, field: str) -> dict[int, dict[str, Tensor]]:
        nested: dict[int, dict[str, Tensor]] = {}
        for (target, layer), ranking in self._rankings.items():
            nested.setdefault(target, {})[layer] = getattr(ranking, field)
        return nested


def _partial(prefix: str) -> str:
    """Name before the range in ``<name>_<start>_<stop>_``, where the name may end like a range itself."""
    match = re.fullmatch(r"(.+)_\d+_\d+_", Path(prefix).name)
    if match is None:
        raise InputError(f"{prefix!r} is no partial result; it must end in '_<start>_<stop>_'")
    return folders.layer_name(match[1])


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
    owner = next((kind for kind in type(instance).__mro__ if method in vars(kind)), _Accumulator)
    return method in getattr(instance, "__dict__", ()) or owner.__module__.partition(".")[0] != "crp"
