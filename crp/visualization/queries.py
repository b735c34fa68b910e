"""Questions to what was mined: reference samples of concepts, with their heatmaps, and statistics of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from zennit.core import Composite

from crp.checks import check_choice
from crp.compat.accumulators import Maximization, Statistics
from crp.compat.cached import cache_reference
from crp.compat.folders import open_answers
from crp.concepts import Concept
from crp.errors import InputError
from crp.flags import check_flags
from crp.image import vis_img_heatmap, vis_opaque_img
from crp.kinds import check_kind
from crp.layers import LayerNotFoundError
from crp.notices import warn
from crp.visualization import references as refs
from crp.visualization.cache import Cache, from_cache
from crp.visualization.references import ConceptId, PictureRequest, PlotFn
from crp.visualization.samples import SampleAccess
from crp.visualization.table.question import Answers, Question, TableAnswers
from crp.visualization.table.ranking import ReferenceSamples
from crp.visualization.text_references import TextRow, reference_texts

#: ``(concept ids, classes, ranks) -> {id: value}``; there are no classes where samples of all classes are ranked.
_Compute = Callable[[list[Any], list[int], tuple[int, int]], dict[Any, Any]]
#: A concept, and the class whose samples are ranked; None for those of all classes.
_Asked = tuple[ConceptId, int | None]


class ReferenceQueries(SampleAccess):
    """What `FeatureVisualization` answers once a dataset was mined."""

    RelMax: Maximization
    ActMax: Maximization
    RelStats: Statistics
    ActStats: Statistics
    Cache: Cache | None
    _check: bool

    cache_reference = staticmethod(cache_reference)

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
        overwrite: bool = False,
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
        overwrite : bool
            Compute again what the cache holds.

        Returns
        -------
        dict of concept id to value
            Without a composite, the samples, of shape (references, ...). Without a plot function, a pair of samples
            and heatmaps on the CPU. Otherwise what ``plot_fn`` returned. Of texts, a list of
            `crp.image.TextHeatmap`, which a plot function of one's own gets in place of the samples.

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
        options: dict[str, Any] = {} if init == "activation" else {"init": init}
        if targets is not None:
            options["targets"] = targets
        request = PictureRequest("get_max_reference", layer_name, mode, composite, rf, plot_fn, options)
        return self._cached(request, concept_ids, None, r_range, overwrite, self._references(request, batch_size))

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
        overwrite: bool = False,
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
        overwrite : bool
            Compute again what the cache holds.

        Returns
        -------
        dict of str to value
            Keys are ``"concept_id:target"``; values as in `get_max_reference`. It raises the same errors.
        """
        options: dict[str, Any] = {} if init == "activation" else {"init": init}
        request = PictureRequest("get_stats_reference", layer_name, mode, composite, rf, plot_fn, options)
        return self._cached(request, [concept_id], targets, r_range, overwrite, self._references(request, batch_size))

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
        check_flags(norm=norm)
        refs._check_counts(top_N=top_N, mean_N=mean_N)
        index = partial(refs.column, self._concept(layer_name), refs.one_concept(concept_id), layer_name)
        question, answers = self._answers(mode, per_class=True)
        targets, means = answers.class_statistics(question, layer_name, index, mean_N)
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
        check_flags(rf=rf, stats=stats)
        if self.Cache is None:
            raise InputError("precompute_ref needs a cache: FeatureVisualization(..., cache=ImageCache(path))")
        if composite is None:
            raise InputError("precompute_ref needs a composite: without it, there are no heatmaps")
        check_kind("layer_c_ind", layer_c_ind, Mapping, "a dict of concept ids by layer, such as {'features.40': [0]}")
        for layer, concept_ids in layer_c_ind.items():
            of_all: list[_Asked] = [(concept, None) for concept in refs.concept_list(concept_ids)]
            of_classes: list[_Asked] = []
            for concept, _ in of_all if stats else ():
                targets, _ = self.compute_stats(concept, layer, mode, top_N, mean_N)
                of_classes += [(concept, target) for target in targets.tolist()]
            for method, asked in (("get_max_reference", of_all), ("get_stats_reference", of_classes)):
                request, ranks = refs.checked((method, layer, mode, composite, rf, None, {}), r_range)
                found = self._each_reference(request, asked, ranks, batch_size)
                for key, existing, (shown, heat) in tqdm(
                    found, layer, len(asked), dynamic_ncols=True, disable=not asked
                ):
                    self._save_precomputed(shown, heat, key, plot_list, layer, mode, existing, composite, rf, method)

    def _cached(
        self,
        request: tuple[Any, ...],
        concept_ids: Any,
        classes: Any,
        r_range: tuple[int, int],
        overwrite: bool,
        compute: _Compute,
    ) -> dict[Any, Any]:
        """References from the cache; what it lacks is computed, and kept in it.

        ``concept_ids`` and ``classes`` are as users write them; where there are classes, there is one concept, whose
        samples of each class are ranked apart. Tensors, for lack of a composite or a plot function, are not cached.
        """
        picture, r_range = refs.checked(request, r_range)
        check_flags(overwrite=overwrite)
        asked: dict[Any, _Asked] = {concept: (concept, None) for concept in refs.concept_list(concept_ids)}
        if classes is not None:
            concept = refs.one_concept(concept_ids)
            asked = {f"{concept}:{target}": (concept, target) for target in refs.target_list(classes)}

        def computed(keys: Sequence[Any], ranks: tuple[int, int]) -> dict[Any, Any]:
            wanted = [asked[key] for key in keys]
            return compute([c for c, _ in wanted], [t for _, t in wanted if t is not None], ranks)

        if picture.rf and not picture.composite:
            warn("rf=True restricts heatmaps, and without a composite there are none")
        of_texts = self.texts is not None  # (which are no pictures that could be kept)
        if self.Cache is None or picture.composite is None or picture.plot_fn is None or of_texts:
            return computed(list(asked), r_range)
        layer, mode = picture.layer, picture.mode
        name = self._plot_name(picture.plot_fn, layer, mode, picture.options)
        ranks = {key: self._lookup(layer, mode, r_range, target)[1] for key, (_, target) in asked.items()}
        where = layer, mode, picture.composite, picture.rf, picture.method, name
        return from_cache(self.Cache, ranks, where, computed, overwrite)

    def _save_precomputed(
        self, s_tensor: Tensor, h_tensor: Tensor, index: Any, plot_list: Sequence[PlotFn], layer_name: str, mode: str,
        r_range: tuple[int, int], composite: Composite, rf: bool, f_name: str,
    ) -> None:  # fmt: skip
        assert self.Cache is not None
        for plot_fn in plot_list:
            name = self._plot_name(plot_fn, layer_name, mode, {})
            drawn = {index: plot_fn(s_tensor, h_tensor, rf)}
            self.Cache.save(drawn, layer_name, mode, r_range, composite, rf, f_name, name)

    def _load_ref_and_attribution(
        self, d_indices: Any, c_id: ConceptId, n_indices: Any, layer_name: str, composite: Composite | None, rf: bool,
        plot_fn: PlotFn | None, batch_size: int, **targets: Any,
    ) -> Any:  # fmt: skip
        """Value of the references ``d_indices`` of a concept, whose strongest positions are ``n_indices``."""
        if self.texts is not None:
            row, starts = TextRow((), layer_name, c_id), targets.get("targets")
            found = reference_texts(self, d_indices, n_indices, row, composite, rf, starts, batch_size)
            plot: Any = None if plot_fn is vis_img_heatmap or not composite else plot_fn
            return found if plot is None else plot(found, None, rf)
        data, _ = self.get_data_concurrently(d_indices, preprocessing=False)
        if not composite:
            return data.detach().cpu()
        heatmaps = self._attribution_on_reference(
            self._prepare_each(data), c_id, layer_name, composite, rf, n_indices, batch_size, **targets
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
            raise InputError(
                f"length of 'neuron_ids' must be equal to the length of 'data': {len(neuron_ids)} and {len(data)}"
            )
        at = [int(position) for position in neuron_ids] if rf else None
        wanted = refs.OfConcept(self._concept(layer_name), concept_id, layer_name)
        return refs.heatmaps_of(self.attribution, data, wanted, composite, at, targets, batch_size, self.device)

    def _references(self, request: PictureRequest, batch_size: int) -> _Compute:
        """What computes the references that `_cached` lacks."""

        def compute(ids: list[Any], classes: list[int], wanted: tuple[int, int]) -> dict[Any, Any]:
            asked = list(zip(ids, classes or (None,) * len(ids), strict=True))
            return {key: value for key, _, value in self._each_reference(request, asked, wanted, batch_size)}

        return compute

    def _each_reference(
        self, request: PictureRequest, asked: Sequence[_Asked], wanted: tuple[int, int], batch_size: int
    ) -> Iterator[tuple[Any, tuple[int, int], Any]]:
        """Key, ranks that exist, and references of each concept (and class), which are told of before the first."""
        layer, mode, options = request.layer, request.mode, request.options
        init = options.get("init", "activation")
        chosen, best = dict[Any, tuple[tuple[int, int], ReferenceSamples]](), dict[Any, float]()
        keys = {pair: pair[0] if pair[1] is None else f"{pair[0]}:{pair[1]}" for pair in asked}
        for target in dict.fromkeys(target for _, target in asked):
            top, ranks = self._lookup(layer, mode, wanted, target)
            for pair, key in keys.items():
                if pair[1] == target:
                    index = refs.column(self._concept(layer), pair[0], layer, top.sample.shape[1])
                    rows = ReferenceSamples(*(array[slice(*ranks), index].copy() for array in top))
                    chosen[key], best[key] = (ranks, rows), top.value[0, index]
        refs._tell_signs({key: chosen[key][1].value for key in keys.values()}, best, layer, mode)
        for (concept, target), key in keys.items():
            ranks, rows = chosen[key]
            shown = target if init == "relevance" and target is not None else options.get("targets")
            start = refs.row_targets(init, shown, rows.target, layer)
            yield key, ranks, self._load_ref_and_attribution(
                rows.sample, concept, rows.position, layer, request.composite, request.rf, request.plot_fn,
                batch_size, **start,
            )  # fmt: skip

    def _lookup(
        self, layer: str, mode: str, r_range: tuple[int, int], target: int | None = None
    ) -> tuple[ReferenceSamples, tuple[int, int]]:
        """Best samples of a layer's concepts (of one class), and those of the ranks asked for that exist."""
        self._concept(layer)
        question, answers = self._answers(mode, target is not None)
        size = max(self._results(mode, target is not None).SAMPLE_SIZE, int(r_range[1]))
        top = refs.once_each(lambda n: answers.references(question, layer, n, target), size)
        of_class = "" if target is None else f" and class {target}"
        return top, refs.clip(r_range, len(top.sample), f"layer {layer!r}{of_class}")

    def _results(self, mode: str, per_class: bool) -> Maximization | Statistics:
        check_choice("mode", mode, Literal["relevance", "activation"])
        return ((self.RelStats, self.ActStats) if per_class else (self.RelMax, self.ActMax))[mode == "activation"]

    def _concept(self, layer: str) -> Concept:
        if not isinstance(layer, str) or layer not in self.layer_map:
            raise LayerNotFoundError(layer, self.layer_map, "layer_name", "layer_map")
        return self.layer_map[layer]

    def _answers(self, mode: str, per_class: bool) -> tuple[Question, Answers]:
        """What is asked, and the table or the folder that answers, checked to be of this model, data and concepts."""
        results = self._results(mode, per_class)
        answers = open_answers(results.folder)
        if isinstance(answers, TableAnswers):
            table = answers.table
            if self._check:
                self._check_table(table)
            self._remembered("missing", (str(table.path), len(table.shards)), lambda: self._tell_missing(table))
        return results.question, answers

    def _plot_name(self, plot_fn: PlotFn, layer: str, mode: str, options: Mapping[str, Any]) -> str:
        """Name of a plot function with a digest of all that its pictures depend on, except the composite."""
        question, answers = self._answers(mode, per_class=False)
        content = [self._identity(), self._concept(layer), answers.content(question, layer), question, dict(options)]
        return refs.plot_name(plot_fn, [*content, *filter(None, [self.attribution_fingerprint()])])
