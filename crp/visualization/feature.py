"""Feature visualization: concepts, shown by the samples of a dataset in which they matter most."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.checks import check_number
from crp.compat import folders
from crp.compat.accumulators import InMemoryAnalysis, Maximization, Statistics, methods_not_called
from crp.concepts import ChannelConcept, Concept, as_ids
from crp.concepts.base import check_is_concept
from crp.engine.door import check_attribution, check_device
from crp.engine.taps import check_layers
from crp.errors import InputError, InputTypeError, LoadingError
from crp.flags import check_flags, check_function
from crp.kinds import as_path, check_kind
from crp.notices import warn
from crp.visualization.cache import Cache
from crp.visualization.mining.datasets import SampleError, of_loader
from crp.visualization.mining.job import SHARD_BATCHES, MiningKeywords, RunKeywords
from crp.visualization.mining.recipe import in_words
from crp.visualization.mining.run import mine
from crp.visualization.opening import make_layer_map, open_recipe
from crp.visualization.queries import ReferenceQueries
from crp.visualization.samples import LabelTargets, SampleAccess, function_of
from crp.visualization.table.fingerprint import fingerprint
from crp.visualization.table.ranking import list_targets
from crp.visualization.table.store import Table, TableError
from crp.wording import counted, shortened

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Keywords(RunKeywords, total=False):
    part: tuple[int, int] | None
    client: Any


class FeatureVisualization(InMemoryAnalysis, ReferenceQueries):
    """Reference samples of concepts.

    `run` looks once at every sample of a dataset and keeps, in a table below ``path``, how relevant and how active
    every concept was. `get_max_reference`, `get_stats_reference` and `compute_stats` are then questions to the table.

    Parameters
    ----------
    attribution : CondAttribution
    dataset : Dataset
        ``dataset[i]`` is a pair of a tensor (not normalized, so that it can be shown) and its class, an int.
    layer_map : mapping of layer name to Concept, or sequence of layer names
        Of names alone, the concepts are channels.
    preprocess_fn : callable, optional
        Prepares samples of shape (samples, ...) for the model, such as a normalization.
    max_target : {"sum", "max"}
        Rank samples by the sum over a concept's positions, or by the maximum.
    abs_norm : bool
        Rank by shares: a sample's values are divided by the sum of their absolute values over the concepts. An
        activation's share ranks differently from the activation itself.
    path : str or Path
        Folder of the table; made by the first run.
    device : torch.device or str, optional
        Where samples are moved; the device of ``attribution`` by default.
    cache : Cache, optional
        Keeps pictures, so that they are made once.
    check : bool, keyword-only
        Whether a table of another model, dataset or preprocessing is refused.

    Attributes
    ----------
    RelMax, ActMax : Maximization
        Their ``PATH`` is what `crp.helper.load_maximization` takes. Another `Maximization` may take their place, for
        example to rank activations by their own value: the table holds sums, maxima and norms.
    RelStats, ActStats : Statistics
        The same for `crp.helper.load_statistics`.
    Cache : Cache or None
    saved_checkpoints : dict of str to list of str
        What `run_distributed` returned last.

    Notes
    -----
    Relevance and Activation Maximization: Achtibat et al., "From attribution maps to human-understandable explanations
    through Concept Relevance Propagation", Nature Machine Intelligence 5 (2023).

    Subclasses may override `get_data_sample`, `preprocess_data` and `multitarget_to_single`.
    """

    def __init__(
        self,
        attribution: CondAttribution,
        dataset: Any,
        layer_map: Mapping[str, Concept] | Sequence[str],
        preprocess_fn: Callable[[Tensor], Tensor] | None = None,
        max_target: str = "sum",
        abs_norm: bool = True,
        path: str | Path = "FeatureVisualization",
        device: torch.device | str | None = None,
        cache: Cache | None = None,
        *,
        check: bool = True,
    ) -> None:
        check_flags(abs_norm=abs_norm, check=check)
        check_attribution(attribution)
        if cache is not None and not hasattr(cache, "load"):
            raise InputTypeError(f"cache must be a Cache, such as ImageCache(path), or None; not {shortened(cache)}")
        is_iterable = isinstance(layer_map, Iterable) and not isinstance(layer_map, str)
        if not is_iterable or any(isinstance(layer, tuple) for layer in layer_map):
            raise InputTypeError(
                "layer_map must be layers and their concepts, or a list of layers; not "
                f"{shortened(layer_map)}: give a dict, such as {{'features.40': ChannelConcept()}}"
            )
        check_layers(attribution.model, list(layer_map), "layer_map")
        if not isinstance(layer_map, Mapping):
            layer_map = {layer: ChannelConcept() for layer in layer_map}
        for layer, concept in layer_map.items():
            check_is_concept(f"layer_map[{layer!r}]", concept)
        check_function("preprocess_fn", preprocess_fn, "samples")
        self.dataset = of_loader(dataset)
        self.layer_map = layer_map
        self.preprocess_fn = preprocess_fn
        self.attribution = attribution
        self.device = check_device(device, "device") or attribution.device
        self.path = as_path("path", path)
        self.RelMax = Maximization("relevance", max_target, abs_norm, path)
        self.ActMax = Maximization("activation", max_target, abs_norm, path)
        self.RelStats = Statistics("relevance", max_target, abs_norm, path)
        self.ActStats = Statistics("activation", max_target, abs_norm, path)
        self.Cache = cache
        self.saved_checkpoints: dict[str, list[str]] = {}
        self._check = check
        self._fingerprints: dict[str, tuple[object, str]] = {}

    def __repr__(self) -> str:
        layers = counted(len(self.layer_map), "layer")
        return f"{type(self).__name__}({self.attribution!r}, {layers}, path={str(self.path)!r})"

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: nn.Module | None = None,
        dataset: Any = None,
        layer_map: Mapping[str, Concept] | None = None,
        preprocess_fn: Callable[[Tensor], Tensor] | None = None,
        output: Callable[[Any], Any] | None = None,
        **settings: Any,
    ) -> FeatureVisualization:
        """Feature visualization of a table that was mined.

        Of a table that ``crp mine`` made, model, dataset and preparation are loaded as they were then, so that nothing
        but the folder is needed. Modules of the user's own that the table names are imported: open tables you trust.

        Parameters
        ----------
        path : str or Path
            Folder of the table.
        model : nn.Module, optional
            With ``dataset``, for a table that was mined by Python code.
        dataset : Dataset, optional
        layer_map : mapping of layer name to Concept, optional
            By default, the concepts that were mined; those of the user's own must be given.
        preprocess_fn : callable, optional
            With ``model`` and ``dataset``.
        output : callable, optional
            With ``model``, what is explained of what it returns, as for `CondAttribution`.
        **settings
            Further ones of the class, such as ``max_target``, ``device`` and ``cache``.

        Raises
        ------
        TableNotFoundError
            If nothing was mined there.
        LoadingError
            If the table does not say enough; the message says what to give.
        """
        recipe = Table.open(path).header.recipe
        if (model is None) != (dataset is None) or (model is None and not preprocess_fn is output is None):
            raise InputError("model, dataset, preprocess_fn and output are given together, or loaded from the table")
        if model is None:
            model, dataset, preprocess_fn, _, output = open_recipe(recipe)
        elif output is None and isinstance(recipe.get("output"), Mapping):
            raise LoadingError(
                f"the table was mined with output={recipe['output'].get('function')}; give output= with the model"
            )
        layer_map = make_layer_map(recipe) if layer_map is None else layer_map
        return cls(CondAttribution(model, output=output), dataset, layer_map, preprocess_fn, path=path, **settings)

    def run(
        self,
        composite: Composite | None,
        data_start: int = 0,
        data_end: int | None = None,
        batch_size: int = 32,
        checkpoint: int = 500,
        on_device: torch.device | str | None = None,
        **options: Unpack[_Keywords],
    ) -> dict[str, list[str]]:
        """Look at the samples of a range, and add them to the table.

        What is in the table already is not computed again: an interrupted run goes on where it was, a finished one does
        nothing, and another range is added. The model is untouched afterwards, also after an exception.

        Parameters
        ----------
        composite : zennit Composite, or None for the plain gradient
        data_start, data_end : int
            Range of the dataset; ``data_end`` is excluded.
        batch_size : int
            Samples per attribution.
        checkpoint : int
            Number of batches after which results are saved; at most 64.
        on_device : torch.device or str, optional
            Where results are reduced.
        **options
            As in `run_distributed`.

        Returns
        -------
        dict of str to list of str
            As `collect_results`.
        """
        return self.collect_results(
            self.run_distributed(composite, data_start, data_end, batch_size, checkpoint, on_device, **options)
        )

    def run_distributed(
        self,
        composite: Composite | None,
        data_start: int = 0,
        data_end: int | None = None,
        batch_size: int = 16,
        checkpoint: int = 500,
        on_device: torch.device | str | None = None,
        **options: Unpack[_Keywords],
    ) -> dict[str, list[str]]:
        """Look at the samples of a range, as `run` does, without asking whether the table is complete.

        Parameters
        ----------
        composite, data_start, data_end, batch_size, checkpoint, on_device
            As in `run`.
        **options
            ``num_workers``, ``overwrite``, ``modes``, ``kinds``, ``on_error``, ``progress``, ``targets``,
            ``mixed_shapes``, ``retry_skipped``, ``storage`` and ``recipe``, as in
            `crp.visualization.mining.job.MiningOptions`; ``part`` and ``client``, as in `crp.visualization.mine`.

        Returns
        -------
        dict of str to list of str
            Paths of the table's parts, for `collect_results`, under the keys ``r_max``, ``a_max``, ``r_stats`` and
            ``a_stats``. Those of several calls may be joined.

        Raises
        ------
        TableMismatchError
            If the table was mined with another model, composite or dataset, and is not to be overwritten.
        """
        if uncalled := methods_not_called(self):
            warn(
                f"mining fills a table, and does not call {', '.join(uncalled)}. To have them called, override "
                "run_distributed as for zennit-crp; or give layer_map a Concept with scores of its own, or override "
                "get_data_sample",
            )
        is_plain = type(self).get_data_sample is SampleAccess.get_data_sample
        if (num_workers := options.get("num_workers", 0)) and not is_plain:
            raise InputError(
                f"num_workers={num_workers} loads dataset[i] in other processes, where {type(self).__name__}."
                "get_data_sample does not run; wrap the dataset instead, or load with num_workers=0"
            )
        for name, number in (("checkpoint", checkpoint), ("batch_size", batch_size)):
            check_number(name, number, 1, whole=True)
        (begin,) = as_ids([data_start], what="data_start")
        (stop,) = as_ids([len(self.dataset) if data_end is None else data_end], what="data_end")
        own = function_of(self.multitarget_to_single)
        labels = None if own is SampleAccess.multitarget_to_single else LabelTargets(self.multitarget_to_single)
        marks = {**self._identity(dataset=False), "single_targets": fingerprint(None if labels is None else own)}
        settings: MiningKeywords = {
            "batch_size": batch_size,
            "shard_size": min(checkpoint, SHARD_BATCHES) * batch_size,
            "preprocess": self.preprocess_data if is_plain and not self._is_of_ids() else None,
            "single_targets": labels,
            "on_device": on_device,
            "device": torch.device(self.device),
            "fingerprints": marks,
        }
        if taken := [name for name in options if name in settings]:
            raise InputTypeError(f"{taken[0]} is said by FeatureVisualization itself; mine() takes it")
        check_kind("recipe", options.get("recipe"), (Mapping, type(None)), "a dict")
        recipe = {"preprocess": in_words(self.preprocess_fn)} | dict(options.get("recipe") or {})
        keywords: dict[str, Any] = {**settings, **options, "start": begin, "stop": stop, "recipe": recipe}
        try:
            table = mine(self.attribution, self._samples_mined(), self.layer_map, composite, self.path, **keywords)
        except SampleError as error:
            if labels is None or labels.error is None or error.__cause__ is not labels.error:
                raise
            error.__cause__ = None
            raise labels.error from error
        parts = [str(table.path / "shards" / s.file) for s in table.shards if s.start < stop and s.stop > begin]
        self.saved_checkpoints = {key: list(parts) for key in ("r_max", "a_max", "r_stats", "a_stats")}
        return self.saved_checkpoints

    def collect_results(
        self, checkpoints: Mapping[str, Sequence[str]], d_index: tuple[int, int] | None = None
    ) -> dict[str, list[str]]:
        """Check that what several runs have mined is complete.

        Parameters
        ----------
        checkpoints : mapping of str to list of str
            What `run_distributed` returned; lists of several calls may be joined.
        d_index : (int, int), optional
            Range that must be covered; by default, from the first to the last sample of the checkpoints.

        Returns
        -------
        dict of str to list of str
            For each layer (and class), the name of its results; their folders are ``RelMax.PATH`` and so on.

        Raises
        ------
        TableError
            If a checkpoint is not in the table, is damaged, or samples are missing; the message says which.

        Notes
        -----
        The checkpoints of a ``run_distributed`` of one's own, which `Maximization` and `Statistics` wrote as files, are
        joined as in zennit-crp.
        """
        paths = [part for parts in checkpoints.values() for part in parts]
        if paths and not any(path.endswith(".safetensors") for path in paths):
            return self._collect_files(checkpoints, d_index)
        table = Table.open(self.path)
        _check_complete(table, {Path(path).name for path in paths}, d_index)
        return self._names_of_results(table)

    def _names_of_results(self, table: Table) -> dict[str, list[str]]:
        """For each layer (and class), what zennit-crp calls its results; and how many samples they have is written."""
        targets = list_targets(table).tolist()
        names: dict[str, list[str]] = {}
        for key, best, stats in (("r", self.RelMax, self.RelStats), ("a", self.ActMax, self.ActStats)):
            for results in (best, stats):
                folders.write_size(results.folder, results.SAMPLE_SIZE)
            layers = table.layers if best.mode in table.modes else ()
            names[f"{key}_max"] = [folders.max_prefix(best.folder, layer) for layer in layers]
            names[f"{key}_stats"] = [n for one in layers for n in folders.stats_prefixes(stats.folder, one, targets)]
        return names

    def report(self, path: str | Path, composite: Composite | None = None, **options: Any) -> Path:
        """Write the concept atlas: pages that show what was mined.

        Parameters
        ----------
        path : str or Path
            A folder, in which only what is missing is drawn; or a file that ends in ``.html``, for small atlases.
        composite : zennit Composite, or None for the plain gradient
            Rules for the heatmaps.
        **options
            As the attributes of `crp.visualization.report.options.ReportOptions`, such as ``n_references=4``.

        Returns
        -------
        Path
            The first page.
        """
        # (by name: a report asks feature visualizations, which need none)
        return Path(importlib.import_module("crp.visualization.report").write_report(self, composite, path, **options))


def table_of(fv: Any, *layers: str) -> Table:
    """Table of a `FeatureVisualization` in which layers are; anything else is refused."""
    check_kind("fv", fv, FeatureVisualization, "a FeatureVisualization")
    table = Table.open(fv.path)
    for layer in layers:
        fv._concept(layer)
        table.n_concepts(layer)
    return table


def _check_complete(table: Table, files: set[str], covered: tuple[int, int] | None) -> None:
    """Raise a `TableError` unless a table has these files, is sound, and covers a range: by default theirs."""
    shards = {shard.file: shard for shard in table.shards}
    if lost := sorted(files - set(shards)):
        raise TableError(f"{lost} are not in the table at {str(table.path)!r}, which holds {sorted(shards)}")
    if problems := table.damaged():
        raise TableError(f"the table at {str(table.path)!r} is damaged: {'; '.join(problems)}")
    if covered is None and files:
        covered = min(shards[n].start for n in files), max(shards[n].stop for n in files)
    if covered is not None and (missing := table.coverage(*covered).missing):
        raise TableError(f"samples {missing} of {tuple(covered)} were not mined; run these ranges, then collect again")
