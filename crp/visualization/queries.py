"""Questions to what was mined: reference samples of concepts, with their heatmaps, and statistics of classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from zennit.core import Composite

from crp.compat.accumulators import Maximization, Statistics
from crp.compat.folders import FolderName
from crp.compat.results import read_class_statistics, read_references, table_of
from crp.concepts import Concept, mask_of
from crp.image import vis_img_heatmap, vis_opaque_img
from crp.layers import LayerNotFoundError
from crp.visualization import references as refs
from crp.visualization.cache import Cache
from crp.visualization.references import ConceptId, cache_reference
from crp.visualization.samples import SampleAccess
from crp.visualization.table.ranking import References
from crp.visualization.table.store import Table

PlotFn = Callable[[Tensor, Tensor, bool], Any]


class ReferenceQueries(SampleAccess):
    """What `FeatureVisualization` answers once a dataset was mined."""

    layer_map: Mapping[str, Concept]
    RelMax: Maximization
    ActMax: Maximization
    RelStats: Statistics
    ActStats: Statistics
    Cache: Cache | None
    _check: bool

    cache_reference = staticmethod(cache_reference)

    @cache_reference
    def get_max_reference(
        self,
        concept_ids: Any,
        layer_name: str,
        mode: str = "relevance",
        r_range: tuple[int, int] = (0, 8),
        composite: Composite | None = None,
        rf: bool = False,
        plot_fn: PlotFn | None = vis_img_heatmap,
        batch_size: int = 32,
        *,
        init: Literal["activation", "relevance"] = "activation",
        targets: Any = None,
    ) -> dict[Any, Any]:
        """Reference samples of concepts: those for which a concept was most relevant, or most active.

        Parameters
        ----------
        concept_ids : int, or sequence, array or tensor of int (of any shape), or sequence of tuples
            Tuples are for concepts with a method ``column``.
        layer_name : str
        mode : {"relevance", "activation"}
        r_range : (int, int)
            Ranks: (0, 8) are the best eight. Ranks after the last reference are left out.
        composite : zennit Composite, optional
            Rules for the heatmaps; without it, there are none.
        rf : bool
            Restrict the heatmaps to the concept's strongest position, hence to its receptive field.
        plot_fn : callable, optional
            ``(samples, heatmaps, rf) -> value``; the samples are not preprocessed. None gives the tensors.
        batch_size : int
            Samples per attribution.
        init : {"activation", "relevance"}
            Whether a heatmap starts from the concept's activation, whatever the class, or shows the part of a class's
            relevance that flows through the concept.
        targets : int or sequence of int, optional
            With ``init="relevance"``: class whose relevance is shown (of several, the sum). By default, the class for
            which the reference was mined.
        overwrite : bool, keyword-only
            Compute again what the cache holds.

        Returns
        -------
        dict of concept id to value
            Without a composite, the samples, of shape (references, ...). Without a plot function, a pair of samples
            and heatmaps on the CPU. Otherwise what ``plot_fn`` returned.

        Raises
        ------
        KeyError
            If the layer was not mined.
        IndexError
            If the layer has no such concept.
        ValueError
            If ``r_range`` begins after the last reference, or a setting is none of those allowed.
        FileNotFoundError
            If nothing was mined yet.
        TableMismatchError
            If another model, dataset or preprocessing was mined.
        """
        self._warn_without_heatmaps(rf, composite)
        top, ranks = self._lookup(layer_name, mode, r_range)
        references = {}
        for concept_id in refs.concept_list(concept_ids):
            chosen = self._chosen(top, ranks, concept_id, layer_name, mode)
            start = refs.row_targets(init, targets, chosen.target, layer_name)
            references[concept_id] = self._load_ref_and_attribution(
                chosen.sample, concept_id, chosen.position, layer_name, composite, rf, plot_fn, batch_size, **start
            )
        return references

    @cache_reference
    def get_stats_reference(
        self,
        concept_id: Any,
        layer_name: str,
        targets: Any,
        mode: str = "relevance",
        r_range: tuple[int, int] = (0, 8),
        composite: Composite | None = None,
        rf: bool = False,
        plot_fn: PlotFn | None = vis_img_heatmap,
        batch_size: int = 32,
        *,
        init: Literal["activation", "relevance"] = "activation",
    ) -> dict[str, Any]:
        """Reference samples of one concept among the samples of single classes.

        Parameters
        ----------
        concept_id : int, 0-d tensor, or tuple
        layer_name : str
        targets : int, or sequence, array or tensor of int
            Classes, such as `compute_stats` returns.
        mode, r_range, composite, rf, plot_fn, batch_size, init
            As in `get_max_reference`; with ``init="relevance"``, heatmaps show the relevance of the respective class.
        overwrite : bool, keyword-only
            Compute again what the cache holds.

        Returns
        -------
        dict of str to value
            Keys are ``"concept_id:target"``; values as in `get_max_reference`. It raises the same errors.
        """
        self._warn_without_heatmaps(rf, composite)
        (concept,) = refs.concept_list([concept_id])
        references = {}
        for target in refs.target_list(targets):
            top, ranks = self._lookup(layer_name, mode, r_range, target)
            chosen = self._chosen(top, ranks, concept, layer_name, mode)
            start = refs.row_targets(init, target if init == "relevance" else None, chosen.target, layer_name)
            references[f"{concept}:{target}"] = self._load_ref_and_attribution(
                chosen.sample, concept, chosen.position, layer_name, composite, rf, plot_fn, batch_size, **start
            )
        return references

    def compute_stats(
        self,
        concept_id: Any,
        layer_name: str,
        mode: str = "relevance",
        top_N: int = 5,
        mean_N: int = 10,
        norm: bool = False,
    ) -> tuple[np.ndarray, Tensor]:
        """Classes for whose samples a concept is most relevant, or most active.

        Parameters
        ----------
        concept_id : int, 0-d tensor, or tuple
        layer_name : str
        mode : {"relevance", "activation"}
        top_N : int
            Number of classes returned, at most.
        mean_N : int
            Number of each class's best samples that are averaged.
        norm : bool
            Divide by the (absolute) value of the first class.

        Returns
        -------
        targets : ndarray of shape (classes,), int64
        values : Tensor of shape (classes,)
            In descending order.
        """
        (concept,) = refs.concept_list([concept_id])
        folder = self._results(mode, per_target=True).PATH
        self._table(folder)
        index = partial(refs.column, self._concept(layer_name), concept, layer_name)
        targets, means = read_class_statistics(folder, layer_name, index, mean_N)
        values = torch.from_numpy(np.array(means[:top_N]))
        if norm and len(values):
            values = values / values[0].abs().clamp_min(torch.finfo(values.dtype).tiny)
        return np.array(targets[:top_N]), values

    def precompute_ref(
        self,
        layer_c_ind: Mapping[str, Any],
        composite: Composite,
        rf: bool = True,
        stats: bool = False,
        top_N: int = 4,
        mean_N: int = 10,
        mode: str = "relevance",
        r_range: tuple[int, int] = (0, 8),
        plot_list: Sequence[PlotFn] = (vis_opaque_img,),
        batch_size: int = 32,
    ) -> None:
        """Fill the cache with the pictures that `get_max_reference` and `get_stats_reference` will ask for.

        Parameters
        ----------
        layer_c_ind : mapping of layer name to concept ids
        composite : zennit Composite
        stats : bool
            Whether to add the references of each concept's ``top_N`` classes.
        plot_list : sequence of plot functions
            Heatmaps are computed once for all of them.
        rf, top_N, mean_N, mode, r_range, batch_size
            As in `get_max_reference` and `compute_stats`.

        Raises
        ------
        ValueError
            Without a cache or a composite.
        """
        if self.Cache is None:
            raise ValueError("precompute_ref needs a cache: FeatureVisualization(..., cache=ImageCache(path))")
        if composite is None:
            raise ValueError("precompute_ref needs a composite: without it, there are no heatmaps")
        for layer, concept_ids in layer_c_ind.items():
            for concept_id in tqdm(refs.concept_list(concept_ids), desc=layer, dynamic_ncols=True):
                _, ranks = self._lookup(layer, mode, r_range)
                ((samples, heatmaps),) = self.get_max_reference(
                    [concept_id], layer, mode, ranks, composite, rf, None, batch_size
                ).values()
                self._save_precomputed(
                    samples, heatmaps, concept_id, plot_list, layer, mode, ranks, composite, rf, "get_max_reference"
                )
                for target in self.compute_stats(concept_id, layer, mode, top_N, mean_N)[0] if stats else ():
                    _, ranks = self._lookup(layer, mode, r_range, int(target))
                    ((key, (samples, heatmaps)),) = self.get_stats_reference(
                        concept_id, layer, int(target), mode, ranks, composite, rf, None, batch_size
                    ).items()
                    self._save_precomputed(
                        samples, heatmaps, key, plot_list, layer, mode, ranks, composite, rf, "get_stats_reference"
                    )

    def _save_precomputed(
        self, s_tensor: Tensor, h_tensor: Tensor, index: Any, plot_list: Sequence[PlotFn], layer_name: str, mode: str,
        r_range: tuple[int, int], composite: Composite, rf: bool, f_name: str,
    ) -> None:  # fmt: skip
        assert self.Cache is not None
        for plot_fn in plot_list:
            name = self._plot_name(plot_fn, layer_name, mode, {})
            self.Cache.save(
                {index: plot_fn(s_tensor, h_tensor, rf)}, layer_name, mode, r_range, composite, rf, f_name, name
            )

    def _load_ref_and_attribution(
        self, d_indices: Any, c_id: ConceptId, n_indices: Any, layer_name: str, composite: Composite | None, rf: bool,
        plot_fn: PlotFn | None, batch_size: int, **targets: Any,
    ) -> Any:  # fmt: skip
        """Value of the references ``d_indices`` of a concept, whose strongest positions are ``n_indices``."""
        data, _ = self.get_data_concurrently(d_indices, preprocessing=False)
        if not composite:
            return data.detach().cpu()
        heatmaps = self._attribution_on_reference(
            self.preprocess_data(data), c_id, layer_name, composite, rf, n_indices, batch_size, **targets
        )
        if callable(plot_fn):
            return plot_fn(data.detach(), heatmaps.detach(), rf)
        return data.detach().cpu(), heatmaps.detach().cpu()

    def _attribution_on_reference(
        self, data: Tensor, concept_id: ConceptId, layer_name: str, composite: Composite | None, rf: bool = False,
        neuron_ids: Sequence[int] = (), batch_size: int = 32, *, targets: Sequence[Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """Heatmaps of a concept, of shape (samples, *space).

        They start from the concept's activation or, with ``targets`` for each sample, from the relevance of these
        classes.
        """
        if rf and len(neuron_ids) != len(data):
            raise ValueError(
                f"length of 'neuron_ids' must be equal to the length of 'data': {len(neuron_ids)} and {len(data)}"
            )
        concept = self._concept(layer_name)
        conditions: list[dict[str, Any]] = []
        for i in range(len(data)):
            start = {} if targets is None else {self.attribution.MODEL_OUTPUT_NAME: targets[i]}
            conditions.append({**start, layer_name: {concept_id: int(neuron_ids[i])} if rf else [concept_id]})
        heatmaps = [
            self.attribution(
                data[i : i + batch_size].detach(),
                conditions[i : i + batch_size],
                composite,
                mask_map=mask_of(concept, "mask_rf" if rf else "mask"),
                start_layer=layer_name if targets is None else None,
                on_device=self.device,
                # From the output, relevance could pass by the concept in a parallel branch.
                exclude_parallel=targets is not None,
            ).heatmap
            for i in range(0, len(data), batch_size)
        ]
        return torch.cat(heatmaps)

    def _chosen(
        self, top: References, ranks: tuple[int, int], concept_id: ConceptId, layer: str, mode: str
    ) -> References:
        """References of one concept at some ranks: arrays of shape (references,)."""
        index = refs.column(self._concept(layer), concept_id, layer, top.sample.shape[1])
        chosen = References(*(array[slice(*ranks), index] for array in top))
        if not np.any(chosen.value):
            warnings.warn(
                f"concept {concept_id} of layer {layer!r} has {mode} 0 on its references; their order means nothing",
                stacklevel=4,
            )
        return chosen

    @staticmethod
    def _warn_without_heatmaps(rf: bool, composite: Composite | None) -> None:
        if rf and not composite:
            warnings.warn("rf=True restricts heatmaps, and without a composite there are none", stacklevel=4)

    def _lookup(
        self, layer: str, mode: str, r_range: tuple[int, int], target: int | None = None
    ) -> tuple[References, tuple[int, int]]:
        """Best samples of a layer's concepts (of one class), and those of the ranks asked for that exist."""
        results = self._results(mode, per_target=target is not None)
        self._concept(layer)
        self._table(results.PATH)
        top = read_references(results.PATH, layer, max(results.SAMPLE_SIZE, int(r_range[1])), target)
        of_class = "" if target is None else f" and class {target}"
        return top, refs.clip(r_range, len(top.sample), f"layer {layer!r}{of_class}")

    def _results(self, mode: str, per_target: bool) -> Maximization | Statistics:
        if mode not in ("relevance", "activation"):
            raise ValueError(f"`mode` must be `relevance` or `activation`, not {mode!r}")
        if per_target:
            return self.RelStats if mode == "relevance" else self.ActStats
        return self.RelMax if mode == "relevance" else self.ActMax

    def _concept(self, layer: str) -> Concept:
        if layer not in self.layer_map:
            raise LayerNotFoundError(layer, self.layer_map, "layer_name")
        return self.layer_map[layer]

    def _table(self, folder: Path) -> tuple[Table, FolderName] | None:
        """Table behind a result folder, checked to be of this model and data; None where there is none."""
        found = table_of(folder)
        if found is not None and self._check:
            found[0].check(**self._identity())
        return found

    def _plot_name(self, plot_fn: PlotFn, layer: str, mode: str, options: Mapping[str, Any]) -> str:
        """Name of a plot function with a digest of all that its pictures depend on, except the composite."""
        results = self._results(mode, per_target=False)
        found = self._table(results.PATH)
        origin = read_references(results.PATH, layer) if found is None else found[0].digest
        content = [
            self._identity(),
            self._concept(layer),
            origin,
            results.sub_folder,
            dict(options),
        ]
        return refs.plot_name(plot_fn, content)
