"""What is to be mined, and how: the options, checked, and the job that is made of them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor
from zennit.core import Composite

import crp
from crp.attribution import CondAttribution
from crp.checks import check_choice, check_number
from crp.concepts import Concept
from crp.engine.attached import check_composite, composite_on
from crp.engine.door import check_attribution, check_device
from crp.engine.encoding import is_product, propagation_of
from crp.engine.independence import check_independent, check_keeps_nothing
from crp.engine.inputs import Inputs
from crp.engine.taps import check_layers, in_model_order
from crp.errors import InputError, InputTypeError
from crp.flags import check_flags, check_function
from crp.kinds import as_path, check_kind
from crp.notices import kind_of, warn
from crp.visualization.mining.axes import check_axes
from crp.visualization.mining.datasets import SampleError, indexed, read
from crp.visualization.mining.encoded import Encoded, encoded_in, files_of, on_device
from crp.visualization.mining.identity import probe
from crp.visualization.mining.recipe import _precision, fingerprint_attribution, make_recipe
from crp.visualization.mining.targets import Targets, check_has, count_outputs, parse_targets
from crp.visualization.mining.text_batches import Asked
from crp.visualization.mining.texts import Texts, texts_in
from crp.visualization.table.fingerprint import (
    fingerprint,
    fingerprint_composite,
    fingerprint_model,
)
from crp.visualization.table.manifest import KINDS, MODES, Storage, TableHeader

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Options that the recipe tells, beside those that are told apart.
_IN_RECIPE = ("preprocess", "single_targets", "batch_size", "mixed_shapes")
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
    storage: Storage
    recipe: Mapping[str, Any] | None


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
        Function of a sample of shape (1, channels, *space), on the device. It gets a batch of them at once, if the
        first batch shows that this gives the same numbers; otherwise a warning says so.
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
    storage : {"float32", "float16"}
        How values are kept on disk: as computed, or as float16 with a scale for each concept of a shard, in little more
        than half of the space. Of a model that computes in float64, ``"float32"`` keeps float64.
    recipe : dict, optional
        What the table is to say of itself in words, beside what is found by itself: parts such as ``"model"``,
        ``"dataset"``, ``"class_names"``. Plain JSON.
    fingerprints : dict of str to str, optional
        In place of those computed for ``"model", "composite", "dataset", "layers", "preprocess", "single_targets"`` and
        ``"output"``. With one for the dataset, its samples are not compared.
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
    storage: Storage = "float32"
    recipe: Mapping[str, Any] | None = None
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
            raise InputTypeError(f"mining has no option {unknown[0]!r}; there are {', '.join(known)}")
        given: dict[str, Any] = {**keywords}
        for name, least in (("batch_size", 1), ("shard_size", 1), ("num_workers", 0)):
            if name in given and not (name == "shard_size" and given[name] is None):
                given[name] = check_number(name, given[name], least, whole=True)
        options = cls(**given)
        switches = ("mixed_shapes", "retry_skipped", "overwrite", "progress")
        check_flags(**{name: getattr(options, name) for name in switches})
        lists = {"modes": (options.modes, MODES), "kinds": (options.kinds, KINDS)}
        for name, (words, known_words) in lists.items():
            is_list = isinstance(words, Collection) and not isinstance(words, str)
            if not is_list or not len(words) or not all(word in known_words for word in words):
                raise InputError(f"{name} must be among {', '.join(map(repr, known_words))}; not {words!r}")
        for name in ("recipe", "fingerprints"):
            check_kind(name, getattr(options, name), (Mapping, type(None)), "a dict")
        check_choice("on_error", options.on_error, Literal["stop", "skip"])
        check_choice("storage", options.storage, Storage)
        for name, function in (("preprocess", options.preprocess), ("single_targets", options.single_targets)):
            check_function(name, function, "samples" if name == "preprocess" else "labels")
        check_device(options.device, "device")
        check_device(options.on_device, "on_device")
        if parse_targets(options.targets) != "label" and options.single_targets is not None:
            raise InputError(f"single_targets is about labels, and targets={options.targets!r} are not those of labels")
        return options


@dataclass(frozen=True)
class Job:
    """All that mining a range needs; `crp.visualization.mining.job.prepare` makes one.

    Attributes
    ----------
    attribution, dataset, composite, path
        As for `crp.visualization.mining.run.mine`; of an `Encoded` dataset, its files.
    concepts : dict of str to Concept
        The layer map, in the order of the model.
    header : TableHeader
        What the table is about.
    shape, dtype
        Of a sample as the model gets it; the shape is None where samples may differ.
    device, shard_size, targets
        As in the options, with their defaults filled in.
    texts : Texts or None
        What the dataset is of, where its samples are texts.
    encoded : Encoded or None
        The dataset, where its samples are made of files on the device.
    options : MiningOptions
    """

    attribution: CondAttribution
    dataset: Any
    concepts: Mapping[str, Concept]
    composite: Composite | None
    path: Path
    header: TableHeader
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device
    shard_size: int
    targets: str | tuple[int, ...]
    options: MiningOptions
    texts: Texts | None = None
    encoded: Encoded | None = None


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
    check_attribution(attribution)
    concepts = _in_order(attribution, layer_map)
    check_composite(composite)
    checked = MiningOptions.of(options)
    if "relevance" in checked.modes:
        _check_multipliers(attribution, concepts, composite)
    device = torch.device(attribution.device if checked.device is None else checked.device)
    dataset = on_device(dataset, device)
    texts = texts_in(dataset)
    if texts is not None and checked.preprocess is not None:
        raise InputTypeError(f"texts are ids, which preprocess={checked.preprocess!r} cannot prepare; a tokenizer does")
    first = _get_first(dataset, checked.preprocess, device, checked.on_error)
    if texts is None and (first.is_floating_point() or first.is_complex()):  # (others are refused by the sample's name)
        check_axes(attribution.model, first, concepts)
    if (inputs := _inputs_of(attribution, first, texts)) is not None:
        check_keeps_nothing(attribution.model, inputs)
        check_independent(attribution.model, inputs, [range(checked.batch_size)], attribution.select_output)
    shard_size = SHARD_BATCHES * checked.batch_size if checked.shard_size is None else checked.shard_size
    targets = parse_targets(checked.targets)
    if not isinstance(targets, str) and inputs is not None:
        check_has(targets, count_outputs(attribution, Asked.of(first, texts)))
    settings = {name: getattr(checked, name) for name in _IN_RECIPE} | {"shard_size": shard_size, "targets": targets}
    recipe = make_recipe(attribution, dataset, concepts, composite, settings, checked.recipe)
    return Job(
        attribution=attribution,
        dataset=files_of(dataset),
        concepts=concepts,
        composite=composite,
        path=as_path("path", path),
        header=_header(attribution, dataset, concepts, composite, checked, recipe),
        shape=None if checked.mixed_shapes or texts is not None else tuple(first.shape[1:]),
        dtype=first.dtype,
        device=device,
        shard_size=shard_size,
        targets=targets,
        options=checked,
        texts=texts,
        encoded=encoded_in(dataset),
    )


def _check_multipliers(
    attribution: CondAttribution, concepts: Mapping[str, Concept], composite: Composite | None
) -> None:
    """Refuse concepts that need multipliers under composites that have none."""
    asked = propagation_of(composite_on(attribution.model, composite))
    for layer, concept in concepts.items():
        if getattr(concept, "needs_multiplier", False) and not is_product(asked):
            raise InputTypeError(
                f"layer_map[{layer!r}]: {concept!r} needs multipliers, whose product with activation is relevance; "
                f"{composite!r} has none. Use one of crp.composites, such as EpsilonPlus or GradientTimesInput"
            )


def _in_order(attribution: CondAttribution, layer_map: Mapping[str, Concept]) -> dict[str, Concept]:
    """The layer map, checked, in the order of the model."""
    if not isinstance(layer_map, Mapping) or not layer_map:
        raise InputError(f"layer_map must map layers to concepts, such as ChannelConcept(); not {layer_map!r}")
    check_layers(attribution.model, list(layer_map), "layer_map")
    for layer, concept in layer_map.items():
        if isinstance(concept, type) or not hasattr(concept, "scores"):
            raise InputTypeError(f"layer_map[{layer!r}] must be a concept, such as ChannelConcept(); not {concept!r}")
    return {layer: layer_map[layer] for layer in in_model_order(attribution.model, layer_map)}


def _header(
    attribution: CondAttribution,
    dataset: Any,
    concepts: Mapping[str, Concept],
    composite: Composite | None,
    options: MiningOptions,
    recipe: Mapping[str, Any],
) -> TableHeader:
    """What all rows of the table share. This is where a table says what it is of."""
    targets = parse_targets(options.targets)
    make: dict[str, Callable[[], str]] = {
        "model": lambda: fingerprint_model(attribution.model),
        "composite": lambda: fingerprint_composite(composite),
        "dataset": lambda: fingerprint(probes),
        "layers": lambda: fingerprint(dict(concepts)),
        "preprocess": lambda: fingerprint(options.preprocess),
        "single_targets": lambda: fingerprint(options.single_targets),
    }
    if targets != "label":
        make["targets"] = lambda: fingerprint(targets)
    if mark := fingerprint_attribution(attribution):
        make["attribution"] = lambda: mark
    if words := _precision(attribution):
        make["precision"] = lambda: fingerprint(words)
    if attribution.output is not None:
        make["output"] = lambda: fingerprint(attribution.output)
    if (encoded := encoded_in(dataset)) is not None:
        make["decoder"] = encoded.mark
    if options.mixed_shapes:
        make["shapes"] = lambda: fingerprint("mixed")
    known = dict(options.fingerprints or {})
    probes = {} if "dataset" in known else probe(files_of(dataset))
    readings = probes if encoded is None else probe(dataset, map(int, probes))  # (files stay as they are)
    if differing := [index for index, mark in readings.items() if mark.startswith("(")]:
        warn(
            f"dataset[{differing[0]}] gives other data at every reading, as under a random transform: what is "
            "shown later is not what is mined. Take random transforms off the dataset"
        )
    return TableHeader(
        n_samples=len(dataset),
        layers=tuple(concepts),
        modes=tuple(mode for mode in MODES if mode in options.modes),
        kinds=tuple(kind for kind in KINDS if kind in options.kinds),
        fingerprints={key: known[key] if key in known else one() for key, one in make.items()} | known,
        versions=_versions(),
        storage=options.storage,
        probes=probes,
        recipe=recipe,
    )


def _get_first(
    dataset: Any, preprocess: Callable[[Tensor], Tensor] | None, device: torch.device, on_error: str
) -> Tensor:
    """First sample that can be read, as the model gets it, of shape (1, ...): all others must be like it."""
    if len(dataset) == 0:
        raise InputError("the dataset is empty")
    failed, n_read = None, min(len(dataset), 100)
    for index in range(n_read):
        sample = read(dataset, index)
        if sample.problem is None:
            data = sample.data[None].to(device)
            ready = data if preprocess is None else preprocess(data)
            if not isinstance(ready, Tensor) or len(ready) != 1:
                raise InputTypeError(
                    f"preprocess must make a sample of shape (1, ...) of {tuple(data.shape)}, not {kind_of(ready)}"
                )
            return ready
        if sample.problem.error is None:  # no fault of the sample: the dataset is of another kind
            raise InputTypeError(f"sample {index}: {sample.problem.reason}")
        failed = failed or SampleError(index, sample.problem.reason)
    assert failed is not None
    if on_error == "skip":
        raise InputError(f"none of the first {n_read} samples can be read; sample {failed.index}: {failed.reason}")
    raise failed


def _inputs_of(attribution: CondAttribution, first: Tensor, texts: Texts | None) -> Inputs | None:
    """The first sample as inputs, of a text its embeddings; None where it is refused by its name when it is mined."""
    try:
        inputs = (
            Inputs.single(first) if texts is None else Inputs.of(Asked.of(first, texts).data, None, attribution.model)
        )
    except Exception:  # (of a text, the model is run)
        return None
    return inputs if inputs.explained[0].is_floating_point() or inputs.explained[0].is_complex() else None


def _versions() -> dict[str, str]:
    names = ("torch", "zennit", "numpy")
    return {"crp": crp.__version__, "python": platform.python_version()} | {name: _version(name) for name in names}


# (each search takes milliseconds)
_version = cache(version)
