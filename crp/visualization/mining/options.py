"""The options of mining: one list, which `mine`, `FeatureVisualization.run` and ``crp mine`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch
from torch import Tensor

from crp.visualization.mining.targets import Targets, parse_targets
from crp.visualization.table.manifest import KINDS, MODES

#: Batches in a shard, by default.
SHARD_BATCHES = 64


class RunKeywords(TypedDict, total=False):
    """Keywords of `mine` that `FeatureVisualization.run` takes, too; `MiningOptions` says what they mean."""

    modes: Sequence[str]
    kinds: Sequence[str]
    targets: Targets
    mixed_shapes: bool
    num_workers: int
    on_error: str
    retry_skipped: bool
    overwrite: bool
    progress: bool


class MiningKeywords(RunKeywords, total=False):
    """All options of `mine`."""

    batch_size: int
    shard_size: int | None
    preprocess: Callable[[Tensor], Tensor] | None
    single_targets: Callable[[Any], Iterable[Any]] | None
    device: torch.device | str | None
    on_device: torch.device | str | None
    fingerprints: Mapping[str, str] | None


@dataclass(frozen=True)
class MiningOptions:
    """How a dataset is mined.

    Attributes
    ----------
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
    targets : {"label", "prediction", "top-5", "all"} or sequence of int
        Classes whose relevance is recorded, each in a row of its own: those of the sample's label, the predicted one,
        the five (or any number of) highest ones, all outputs, or these. All but the first need no labels.
    mixed_shapes : bool
        Whether samples may differ in shape. Those of equal shape are attributed together; positions count within the
        sample's own shape.
    num_workers : int
        Processes that read the dataset; 0 reads it in this one, sample after sample.
    device : torch.device or str, optional
        Where the data is moved; that of the model by default.
    on_device : torch.device or str, optional
        Where relevances and activations are moved before they are scored.
    on_error : {"stop", "skip"}
        What to do about a sample that cannot be read or attributed, or has another shape: raise a `SampleError`, or
        list it as skipped. A sample with values that are not finite is always skipped.
    retry_skipped : bool
        Mine shards with skipped samples again.
    overwrite : bool
        Discard what the folder holds.
    progress : bool
        Whether to show a progress bar.
    fingerprints : dict of str to str, optional
        In place of those computed for ``"model", "composite", "dataset", "layers", "preprocess", "single_targets"``.
    """

    batch_size: int = 32
    shard_size: int | None = None
    preprocess: Callable[[Tensor], Tensor] | None = None
    single_targets: Callable[[Any], Iterable[Any]] | None = None
    modes: Sequence[str] = MODES
    kinds: Sequence[str] = KINDS
    targets: Targets = "label"
    mixed_shapes: bool = False
    num_workers: int = 0
    device: torch.device | str | None = None
    on_device: torch.device | str | None = None
    on_error: str = "stop"
    retry_skipped: bool = False
    overwrite: bool = False
    progress: bool = True
    fingerprints: Mapping[str, str] | None = None

    @classmethod
    def of(cls, keywords: MiningKeywords) -> MiningOptions:
        """Options of these keywords, checked.

        Raises
        ------
        TypeError
            If there is no such option.
        ValueError
            If the value of one is wrong.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in keywords if name not in known]:
            raise TypeError(f"mining has no option {unknown[0]!r}; there are {', '.join(known)}")
        options = cls(**keywords)
        sizes = [("batch_size", options.batch_size, 1), ("num_workers", options.num_workers, 0)]
        sizes += [] if options.shard_size is None else [("shard_size", options.shard_size, 1)]
        for name, size, least in sizes:
            if not isinstance(size, int) or size < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {size!r}")
        lists = {"modes": (options.modes, MODES), "kinds": (options.kinds, KINDS)}
        lists["on_error"] = [options.on_error], ("stop", "skip")
        for name, (words, known_words) in lists.items():
            if isinstance(words, str) or not words or not set(words) <= set(known_words):
                raise ValueError(f"{name} must be among {', '.join(map(repr, known_words))}; not {words!r}")
        if parse_targets(options.targets) != "label" and options.single_targets is not None:
            raise ValueError(f"single_targets is about labels, and targets={options.targets!r} are not those of labels")
        return options
