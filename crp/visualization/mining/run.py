"""Mining: one pass over a dataset that records how relevant and active every concept was on every sample.

The work is cut into shards, each a job that needs nothing but its range (`mine_shard`), so that an interrupted run goes
on where it was, and any number of machines can share a dataset. A shard's content depends on its range alone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from zennit.core import Composite

import crp
from crp.attribution import CondAttribution
from crp.concepts import Concept
from crp.engine.forward import check_layers
from crp.visualization.mining.batches import Job
from crp.visualization.mining.datasets import SampleError as SampleError
from crp.visualization.mining.datasets import indexed, read
from crp.visualization.mining.options import SHARD_BATCHES, MiningKeywords, MiningOptions
from crp.visualization.mining.targets import parse_targets
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

if TYPE_CHECKING:
    from typing_extensions import Unpack


def mine(
    attribution: CondAttribution,
    dataset: Any,
    layer_map: Mapping[str, Concept],
    composite: Composite | None,
    path: str | Path,
    *,
    start: int = 0,
    stop: int | None = None,
    part: tuple[int, int] | None = None,
    client: Any = None,
    **options: Unpack[MiningKeywords],
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
    part : (int, int), optional
        Of ``(i, n)``, mine only the shards of process i out of n, counted from 0. All write into the same folder, at
        the same time if need be, and each merges what there is in the end.
    client : distributed.Client, optional
        Mine by the workers of a Dask cluster, which must see the same folder.
    **options
        As the attributes of `crp.visualization.mining.options.MiningOptions`, such as ``batch_size=64``.

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
    job = prepare(attribution, dataset, layer_map, composite, path, **options)
    overwrite = job.options.overwrite
    n = job.header.n_samples
    stop = n if stop is None else stop
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop <= n):
        raise ValueError(f"the range {start} to {stop} must be within the dataset, 0 to {n}, and not empty")
    if Table.exists(job.path) and not overwrite:
        table = Table.open(job.path)
        if part is not None or not table.is_empty:
            table.check_header(job.header)
    if part is None:
        return mine_all(job, start, stop, client)
    if not (len(part) == 2 and all(type(i) is int for i in part) and 0 <= part[0] < part[1]):
        raise ValueError(f"part must be (i, n) with i from 0 to n - 1, not {part!r}")
    if overwrite or client is not None:
        raise ValueError("part shares the folder with other processes: it goes with neither overwrite nor client")
    return mine_part(job, start, stop, part)


def prepare(
    attribution: CondAttribution,
    dataset: Any,
    layer_map: Mapping[str, Concept],
    composite: Composite | None,
    path: str | Path,
    **options: Unpack[MiningKeywords],
) -> Job:
    """Check the arguments of `mine` and put them into a job; nothing is written."""
    dataset = indexed(dataset)
    concepts = _in_order(attribution, layer_map)
    if composite is not None and not isinstance(composite, Composite):
        raise TypeError(f"composite must be a zennit or crp composite, or None; not {composite!r}")
    checked = MiningOptions.of(options)
    device = torch.device(attribution.device if checked.device is None else checked.device)
    first = _get_first(dataset, checked.preprocess, device)
    return Job(
        attribution=attribution,
        dataset=dataset,
        concepts=concepts,
        composite=composite,
        path=Path(path),
        header=_header(attribution, dataset, concepts, composite, checked),
        shape=None if checked.mixed_shapes else tuple(first.shape[1:]),
        dtype=first.dtype,
        device=device,
        shard_size=SHARD_BATCHES * checked.batch_size if checked.shard_size is None else checked.shard_size,
        targets=parse_targets(checked.targets),
        options=checked,
    )


def _in_order(attribution: CondAttribution, layer_map: Mapping[str, Concept]) -> dict[str, Concept]:
    """The layer map, checked, in the order of the model."""
    if not isinstance(layer_map, Mapping) or not layer_map:
        raise ValueError(f"layer_map must map layers to concepts, such as ChannelConcept(); not {layer_map!r}")
    check_layers(attribution.model, list(layer_map), "layer_map")
    for layer, concept in layer_map.items():
        if isinstance(concept, type) or not hasattr(concept, "scores"):
            raise TypeError(f"layer_map[{layer!r}] must be a concept, such as ChannelConcept(); not {concept!r}")
    order = list(dict(attribution.model.named_modules()))
    layers = sorted(layer_map, key=lambda layer: order.index(layer if layer in order else layer.rpartition("#")[0]))
    return {layer: layer_map[layer] for layer in layers}


def _header(
    attribution: CondAttribution,
    dataset: Any,
    concepts: Mapping[str, Concept],
    composite: Composite | None,
    options: MiningOptions,
) -> TableHeader:
    """What all rows of the table share. This is where a table says what it is of."""
    targets = parse_targets(options.targets)
    make: dict[str, Callable[[], str]] = {
        "model": lambda: fingerprint_model(attribution.model),
        "composite": lambda: fingerprint_composite(composite),
        "dataset": lambda: fingerprint_dataset(dataset),
        "layers": lambda: fingerprint(dict(concepts)),
        "preprocess": lambda: fingerprint(options.preprocess),
        "single_targets": lambda: fingerprint(options.single_targets),
    }
    if targets != "label":
        make["targets"] = lambda: fingerprint(targets)
    if options.mixed_shapes:
        make["shapes"] = lambda: fingerprint("mixed")
    known = dict(options.fingerprints or {})
    return TableHeader(
        n_samples=len(dataset),
        layers=tuple(concepts),
        modes=tuple(mode for mode in MODES if mode in options.modes),
        kinds=tuple(kind for kind in KINDS if kind in options.kinds),
        fingerprints={key: known[key] if key in known else one() for key, one in make.items()} | known,
        versions=_versions(),
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
