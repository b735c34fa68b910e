"""Feature visualization: what concepts stand for, shown by the samples of a dataset in which they matter most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.compat import folders
from crp.compat.accumulators import Maximization, Statistics
from crp.concepts import Concept
from crp.engine.forward import check_layers
from crp.visualization.cache import Cache
from crp.visualization.mining.datasets import of_loader
from crp.visualization.mining.run import SHARD_BATCHES, SampleError, mine
from crp.visualization.queries import ReferenceQueries
from crp.visualization.samples import Classes, Prepared, SampleAccess, function_of
from crp.visualization.table.fingerprint import fingerprint
from crp.visualization.table.ranking import list_targets
from crp.visualization.table.store import Table, TableError


class FeatureVisualization(ReferenceQueries):
    """Reference samples of concepts.

    `run` looks once at every sample of a dataset and keeps, in a table below ``path``, how relevant and how active
    every concept was. `get_max_reference`, `get_stats_reference` and `compute_stats` are then questions to the table.

    Parameters
    ----------
    attribution : CondAttribution
    dataset : Dataset
        ``dataset[i]`` is a pair of a tensor (not normalized, so that it can be shown) and its class, an int.
    layer_map : mapping of layer name to Concept
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
        layer_map: Mapping[str, Concept],
        preprocess_fn: Callable[[Tensor], Tensor] | None = None,
        max_target: str = "sum",
        abs_norm: bool = True,
        path: str | Path = "FeatureVisualization",
        device: torch.device | str | None = None,
        cache: Cache | None = None,
        *,
        check: bool = True,
    ) -> None:
        check_layers(attribution.model, list(layer_map), "layer_map")
        for layer, concept in layer_map.items():
            if isinstance(concept, type):
                raise TypeError(f"layer_map[{layer!r}] is a class; it must be an instance: {concept.__name__}()")
        self.dataset = of_loader(dataset)
        self.layer_map = layer_map
        self.preprocess_fn = preprocess_fn
        self.attribution = attribution
        self.device = attribution.device if device is None else torch.device(device)
        self.path = Path(path)
        self.RelMax = Maximization("relevance", max_target, abs_norm, path)
        self.ActMax = Maximization("activation", max_target, abs_norm, path)
        self.RelStats = Statistics("relevance", max_target, abs_norm, path)
        self.ActStats = Statistics("activation", max_target, abs_norm, path)
        self.Cache = cache
        self.saved_checkpoints: dict[str, list[str]] = {}
        self._check = check
        self._fingerprints: dict[str, tuple[object, str]] = {}

    def run(
        self,
        composite: Composite | None,
        data_start: int = 0,
        data_end: int | None = None,
        batch_size: int = 32,
        checkpoint: int = 500,
        on_device: torch.device | str | None = None,
        **options: Any,
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
        *,
        num_workers: int = 0,
        overwrite: bool = False,
        modes: Sequence[Literal["relevance", "activation"]] = ("relevance", "activation"),
        on_error: Literal["stop", "skip"] = "stop",
        progress: bool = True,
        **options: Any,
    ) -> dict[str, list[str]]:
        """Look at the samples of a range, as `run` does, without asking whether the table is complete.

        Parameters
        ----------
        composite, data_start, data_end, batch_size, checkpoint, on_device
            As in `run`.
        num_workers : int
            Processes that load samples, through a `torch.utils.data.DataLoader`; 0 loads in this process.
        overwrite : bool
            Start afresh: discard a table that was mined with another model, composite or dataset.
        modes : sequence of {"relevance", "activation"}
            What is kept.
        on_error : {"stop", "skip"}
            Whether a sample that cannot be loaded ends the run, or is listed as skipped.
        progress : bool
            Whether to show a progress bar.
        **options
            ``kinds``, ``targets``, ``mixed_shapes``, ``retry_skipped``, ``part`` and ``client``, as of
            `crp.visualization.mine`.

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
        is_plain = type(self).get_data_sample is SampleAccess.get_data_sample
        if num_workers and not is_plain:
            raise ValueError(
                f"num_workers={num_workers} loads dataset[i] in other processes, where {type(self).__name__}."
                "get_data_sample does not run; wrap the dataset instead, or load with num_workers=0"
            )
        stop = len(self.dataset) if data_end is None else int(data_end)
        own = function_of(self.multitarget_to_single)
        classes = None if own is SampleAccess.multitarget_to_single else Classes(self.multitarget_to_single)
        try:
            table = mine(
                self.attribution,
                self.dataset if is_plain else Prepared(self),
                self.layer_map,
                composite,
                self.path,
                start=int(data_start),
                stop=stop,
                batch_size=batch_size,
                shard_size=min(checkpoint, SHARD_BATCHES) * batch_size,
                preprocess=self.preprocess_data if is_plain else None,
                single_targets=classes,
                modes=modes,
                num_workers=num_workers,
                on_device=on_device,
                device=self.device,
                on_error=on_error,
                progress=progress,
                overwrite=overwrite,
                **options,
                fingerprints={
                    **self._identity(),
                    "single_targets": fingerprint(None if classes is None else own),
                },
            )
        except SampleError as error:
            if classes is None or classes.error is None or error.__cause__ is not classes.error:
                raise
            error.__cause__ = None
            raise classes.error from error
        parts = [str(table.path / "shards" / s.file) for s in table.shards if s.start < stop and s.stop > data_start]
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
        """
        table = Table.open(self.path)
        shards = {shard.file: shard for shard in table.shards}
        named = {Path(part).name for parts in checkpoints.values() for part in parts}
        if lost := sorted(named - set(shards)):
            raise TableError(f"{lost} are not in the table at {str(self.path)!r}, which holds {sorted(shards)}")
        if problems := table.verify():
            raise TableError(f"the table at {str(self.path)!r} is damaged: {'; '.join(problems)}")
        if d_index is None and named:
            d_index = min(shards[n].start for n in named), max(shards[n].stop for n in named)
        if d_index is not None and (missing := table.coverage(*d_index).missing):
            raise TableError(
                f"samples {missing} of {tuple(d_index)} were not mined; run these ranges, then collect again"
            )
        targets = list_targets(table).tolist()
        names: dict[str, list[str]] = {}
        for key, best, stats in (("r", self.RelMax, self.RelStats), ("a", self.ActMax, self.ActStats)):
            layers = table.layers if best.mode in table.modes else ()
            names[f"{key}_max"] = [folders.max_prefix(best.PATH, layer) for layer in layers]
            names[f"{key}_stats"] = [folders.stats_prefix(stats.PATH, layer, t) for layer in layers for t in targets]
        return names

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
