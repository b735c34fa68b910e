"""Mining: one pass over a dataset that records how relevant and active every concept was on every sample.

The work is cut into shards, each a job that needs nothing but its range (`mine_shard`), so that an interrupted run goes
on where it was, and any number of machines can share a dataset. A shard's content depends on its range alone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zennit.core import Composite

import crp
from crp.attribution import CondAttribution
from crp.concepts import Concept
from crp.engine.forward import check_layers
from crp.visualization.mining.batches import Job
from crp.visualization.mining.datasets import indexed
from crp.visualization.mining.loading import SampleError as SampleError
from crp.visualization.mining.loading import read
from crp.visualization.mining.targets import Targets, check_targets
from crp.visualization.mining.workers import mine_all, mine_part
from crp.visualization.mining.workers import mine_shard as mine_shard
from crp.visualization.table.fingerprint import (
    fingerprint,
    fingerprint_composite,
    fingerprint_dataset,
    fingerprint_model,
)
from crp.visualization.table.manifest import KINDS, MODES, TableHeader
from crp.visualization.table.store import Table

#: Batches in a shard, by default.
SHARD_BATCHES = 64


def mine(
    attribution: CondAttribution,
    dataset: Any,
    layer_map: Mapping[str, Concept],
    composite: Composite | None,
    path: str | Path,
    *,
    start: int = 0,
    stop: int | None = None,
    batch_size: int = 32,
    shard_size: int | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    single_targets: Callable[[Any], Iterable[int]] | None = None,
    modes: Sequence[str] = MODES,
    kinds: Sequence[str] = KINDS,
    num_workers: int = 0,
    on_device: torch.device | str | None = None,
    device: torch.device | str | None = None,
    on_error: str = "stop",
    retry_skipped: bool = False,
    progress: bool = True,
    overwrite: bool = False,
    fingerprints: Mapping[str, str] | None = None,
    targets: Targets = "label",
    mixed_shapes: bool = False,
    part: tuple[int, int] | None = None,
    client: Any = None,
) -> Table:
    """Mine a range of a dataset into a folder; what the folder holds already is not computed again.

    Parameters
    ----------
    attribution : CondAttribution
    dataset : Dataset
        Gives pairs (tensor of shape (channels, *space), label) by index, and has a length;
        `crp.visualization.Pairs` makes such a dataset of others. Of a DataLoader, its dataset is mined, in the
        dataset's order.
    layer_map : dict of str to Concept
        What to record.
    composite : zennit.core.Composite, optional
        One of ours or of zennit's; None is the plain gradient.
    path : str or Path
        Folder of the table; made if need be.
    start, stop : int
        Range of dataset indices; to the end of the dataset by default.
    batch_size : int
        Samples that are loaded, and rows that are attributed, at once.
    shard_size : int, optional
        Samples in a file, which is what an interruption can lose; 64 batches by default. A file that reaches 128 MiB
        before is closed earlier, so that memory is bounded.
    preprocess : callable, optional
        Function of a sample of shape (1, channels, *space), on the device.
    single_targets : callable, optional
        Function of a label that gives its classes, for datasets with several per sample; a sample of none has no rows.
    modes, kinds : sequences of str
        What to record of ``"relevance"`` and ``"activation"``, and of ``"sum"`` and ``"max"``. A label of None is
        allowed if relevance is not recorded.
    num_workers : int
        Processes that read the dataset; 0 reads it in this one, sample after sample.
    on_device : torch.device or str, optional
        Where relevances and activations are moved before they are scored.
    device : torch.device or str, optional
        Where the data is moved; that of the model by default.
    on_error : {"stop", "skip"}
        What to do about a sample that cannot be read or attributed, or has another shape: raise a `SampleError`, or
        list it as skipped. A sample with values that are not finite is always skipped.
    retry_skipped : bool
        Mine shards with skipped samples again.
    progress : bool
        Whether to show a progress bar.
    overwrite : bool
        Discard what the folder holds.
    fingerprints : dict of str to str, optional
        In place of those computed for ``"model", "composite", "dataset", "layers", "preprocess", "single_targets"``.
    targets : {"label", "prediction", "top-5", "all"} or sequence of int
        Classes whose relevance is recorded, each in a row of its own: those of the sample's label, the predicted one,
        the five (or any number of) highest ones, all outputs, or these. All but the first need no labels.
    mixed_shapes : bool
        Whether samples may differ in shape. Those of equal shape are attributed together; positions count within the
        sample's own shape.
    part : (int, int), optional
        Of ``(i, n)``, mine only the shards of process i out of n, counted from 0. All write into the same folder, at
        the same time if need be, and each merges what there is in the end.
    client : distributed.Client, optional
        Mine by the workers of a Dask cluster, which must see the same folder.

    Returns
    -------
    Table

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is wrong; before anything is written.
    TableMismatchError
        If the folder holds a table of another model, composite, dataset, ...; the message says of what.
    TableLockedError
        If another run writes into the folder.
    SampleError
        If a sample cannot be mined, unless it is to be skipped. The shards before it are kept.
    """
    job = prepare(
        attribution,
        dataset,
        layer_map,
        composite,
        path,
        batch_size=batch_size,
        shard_size=shard_size,
        preprocess=preprocess,
        single_targets=single_targets,
        modes=modes,
        kinds=kinds,
        num_workers=num_workers,
        on_device=on_device,
        device=device,
        on_error=on_error,
        fingerprints=fingerprints,
        targets=targets,
        mixed_shapes=mixed_shapes,
    )
    n = job.header.n_samples
    stop = n if stop is None else stop
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop <= n):
        raise ValueError(f"the range {start} to {stop} must be within the dataset, 0 to {n}, and not empty")
    if Table.exists(job.path) and not overwrite:
        table = Table.open(job.path)
        if part is not None or not table.is_empty:
            table.check_header(job.header)
    if part is None:
        return mine_all(job, start, stop, retry_skipped, progress, overwrite, client)
    if not (len(part) == 2 and all(type(i) is int for i in part) and 0 <= part[0] < part[1]):
        raise ValueError(f"part must be (i, n) with i from 0 to n - 1, not {part!r}")
    if overwrite or client is not None:
        raise ValueError("part shares the folder with other processes: it goes with neither overwrite nor client")
    return mine_part(job, start, stop, part, retry_skipped, progress)


def prepare(
    attribution: CondAttribution,
    dataset: Any,
    layer_map: Mapping[str, Concept],
    composite: Composite | None,
    path: str | Path,
    *,
    batch_size: int = 32,
    shard_size: int | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    single_targets: Callable[[Any], Iterable[int]] | None = None,
    modes: Sequence[str] = MODES,
    kinds: Sequence[str] = KINDS,
    num_workers: int = 0,
    on_device: torch.device | str | None = None,
    device: torch.device | str | None = None,
    on_error: str = "stop",
    fingerprints: Mapping[str, str] | None = None,
    targets: Targets = "label",
    mixed_shapes: bool = False,
) -> Job:
    """Check the arguments of `mine` and put them into a job; nothing is written."""
    dataset = indexed(dataset)
    if not isinstance(layer_map, Mapping) or not layer_map:
        raise ValueError(f"layer_map must map layers to concepts, such as ChannelConcept(); not {layer_map!r}")
    check_layers(attribution.model, list(layer_map), "layer_map")
    for layer, concept in layer_map.items():
        if isinstance(concept, type) or not hasattr(concept, "scores"):
            raise TypeError(f"layer_map[{layer!r}] must be a concept, such as ChannelConcept(); not {concept!r}")
    if composite is not None and not isinstance(composite, Composite):
        raise TypeError(f"composite must be a zennit or crp composite, or None; not {composite!r}")
    shard_size = SHARD_BATCHES * batch_size if shard_size is None else shard_size
    sizes = {"batch_size": (batch_size, 1), "shard_size": (shard_size, 1), "num_workers": (num_workers, 0)}
    for name, (value, least) in sizes.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    choices = {"modes": (modes, MODES), "kinds": (kinds, KINDS), "on_error": ([on_error], ("stop", "skip"))}
    for name, (given, known) in choices.items():
        if isinstance(given, str) or not given or not set(given) <= set(known):
            raise ValueError(f"{name} must be among {', '.join(map(repr, known))}; not {given!r}")
    chosen = check_targets(targets)
    if single_targets is not None and chosen != "label":
        raise ValueError(f"single_targets is about labels, and targets={targets!r} are not those of labels")
    order = list(dict(attribution.model.named_modules()))
    layers = sorted(layer_map, key=lambda layer: order.index(layer if layer in order else layer.rpartition("#")[0]))
    device = torch.device(attribution.device if device is None else device)
    first = _get_first(dataset, preprocess, device)
    made: dict[str, Callable[[], str]] = {
        "model": lambda: fingerprint_model(attribution.model),
        "composite": lambda: fingerprint_composite(composite),
        "dataset": lambda: fingerprint_dataset(dataset),
        "layers": lambda: fingerprint({layer: layer_map[layer] for layer in layers}),
        "preprocess": lambda: fingerprint(preprocess),
        "single_targets": lambda: fingerprint(single_targets),
    }
    if chosen != "label":
        made["targets"] = lambda: fingerprint(chosen)
    if mixed_shapes:
        made["shapes"] = lambda: fingerprint("mixed")
    prints = dict(fingerprints or {})
    header = TableHeader(
        n_samples=len(dataset),
        layers=tuple(layers),
        modes=tuple(mode for mode in MODES if mode in modes),
        kinds=tuple(kind for kind in KINDS if kind in kinds),
        fingerprints={key: prints[key] if key in prints else make() for key, make in made.items()} | prints,
        versions=_versions(),
    )
    return Job(
        attribution=attribution,
        dataset=dataset,
        concepts={layer: layer_map[layer] for layer in layers},
        composite=composite,
        path=Path(path),
        header=header,
        shape=None if mixed_shapes else tuple(first.shape[1:]),
        dtype=first.dtype,
        batch_size=batch_size,
        shard_size=shard_size,
        preprocess=preprocess,
        single_targets=single_targets,
        num_workers=num_workers,
        device=device,
        on_device=on_device,
        on_error=on_error,
        targets=chosen,
    )


def _get_first(dataset: Any, preprocess: Callable[[Tensor], Tensor] | None, device: torch.device) -> Tensor:
    """First sample that can be read, as the model gets it, of shape (1, ...): all others must be like it."""
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    failed = None
    for index in range(min(len(dataset), 100)):
        sample = read(dataset, index)
        if sample.problem is None:
            data = sample.data[None].to(device)
            ready = data if preprocess is None else preprocess(data)
            if not isinstance(ready, Tensor) or len(ready) != 1:
                got = tuple(ready.shape) if isinstance(ready, Tensor) else f"a {type(ready).__name__}"
                raise TypeError(f"preprocess must make a sample of shape (1, ...) of {tuple(data.shape)}, not {got}")
            return ready
        if sample.problem.error is None:  # no fault of the sample: the dataset is of another kind
            raise TypeError(f"sample {index}: {sample.problem.reason}")
        failed = failed or SampleError(index, sample.problem.reason)
    raise failed or AssertionError


def _versions() -> dict[str, str]:
    names = ("torch", "zennit", "numpy")
    return {"crp": crp.__version__, "python": platform.python_version()} | {name: _version(name) for name in names}


# (each search takes milliseconds)
_version = cache(version)
