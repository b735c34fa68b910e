"""Samples of a dataset as `FeatureVisualization` reads them, and the fingerprints of model, data and preparation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crp.attribution import CondAttribution
from crp.concepts import Concept, as_ids
from crp.engine.attached import put_on
from crp.engine.taps import check_layers, in_call_order
from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.flags import check_flags
from crp.notices import warn
from crp.visualization.decoding import decoder_mark
from crp.visualization.mining.datasets import read
from crp.visualization.mining.encoded import files_of, on_device
from crp.visualization.mining.identity import check_dataset
from crp.visualization.mining.marks import Source, source_of
from crp.visualization.mining.preparation import Preparation
from crp.visualization.mining.recipe import fingerprint_attribution
from crp.visualization.mining.targets import count_outputs
from crp.visualization.mining.text_batches import Asked
from crp.visualization.mining.texts import Texts, texts_in
from crp.visualization.table.fingerprint import fingerprint, fingerprint_dataset, fingerprint_model
from crp.visualization.table.store import Table
from crp.visualization.text_references import read_text


class SampleAccess:
    """How samples are read, prepared and labelled; the part of `FeatureVisualization` that subclasses override."""

    attribution: CondAttribution
    dataset: Any
    preprocess_fn: Callable[[Tensor], Tensor] | None
    device: torch.device
    layer_map: Mapping[str, Concept]
    _fingerprints: dict[str, tuple[object, str]]

    def preprocess_data(self, data: Tensor) -> Tensor:
        """Prepare samples of shape (samples, ...) for the model: apply ``preprocess_fn``."""
        return self.preprocess_fn(data) if callable(self.preprocess_fn) else data

    def file_of(self, index: int) -> str:
        """Name of a sample's file in the dataset's folder; ``""`` where the dataset does not tell it."""
        return getattr(source_of(self.dataset, index), "name", "")

    def attribution_fingerprint(self) -> str:
        """Of an attribution of one's own; empty for a plain `CondAttribution`."""
        return fingerprint_attribution(self.attribution)

    def _prepare_each(self, data: Tensor) -> Tensor:
        """Prepare each of some samples by itself, as mining does: of a batch, a function might look at all of it."""
        return Preparation(self.preprocess_data).each(data)

    def multitarget_to_single(self, multi_target: Any) -> Iterable[Any]:
        """Classes of a sample's label, one after the other; override it for labels that are not one class.

        A sample is mined once for each class, and not at all if there is none.
        """
        return [multi_target]

    def get_data_sample(self, index: int, preprocessing: bool = True) -> tuple[Tensor, Any]:
        """One sample of the dataset; override it for datasets that do not give a pair of a tensor and a class.

        Parameters
        ----------
        index : int
        preprocessing : bool
            Whether `preprocess_data` is applied. Without it, the sample is as it is shown.

        Returns
        -------
        data : Tensor of shape (1, ...)
            On ``device``; it requires a gradient, unless it holds integers that `preprocess_data` is to
            convert.
        target : object
            The label.

        Raises
        ------
        TypeError
            If the dataset gives anything else; the message says what to do.
        """
        check_flags(preprocessing=preprocessing)
        (number,) = as_ids([index], what="a sample's index")
        n = _length(self.dataset)
        if not -n <= number < n:
            raise OutOfRangeError(f"the dataset has {n} samples, 0 to {n - 1}; there is no sample {number}")
        sample = read(on_device(self.dataset, self.device), number)
        if sample.problem is not None:
            raise sample.problem.error or InputTypeError(
                f"sample {index}: {sample.problem.reason}, or override FeatureVisualization.get_data_sample"
            )
        data = sample.data.to(self.device).unsqueeze(0)
        if preprocessing:
            data = self.preprocess_data(data)
            if not data.is_floating_point():
                raise InputTypeError(
                    f"sample {index}: it is a tensor of {data.dtype} after preprocess_data, and relevance needs a "
                    "floating-point tensor. Convert it there, and explain tokens from their embedding on"
                )
        return data.detach().requires_grad_(data.is_floating_point()), sample.label

    def get_data_concurrently(self, indices: Any, preprocessing: bool = False) -> tuple[Tensor, Any]:
        """Samples of the dataset as a batch, read one after the other: a dataset need not be safe for threads.

        Parameters
        ----------
        indices : sequence, array or tensor of int
        preprocessing : bool
            As in `get_data_sample`.

        Returns
        -------
        data : Tensor of shape (samples, ...)
        labels : list, or the label itself for a single sample

        Raises
        ------
        ValueError
            If there are no indices, or the samples differ in shape; the message names the sample.
        """
        check_flags(preprocessing=preprocessing)
        numbers = as_ids(indices, what="indices")
        if not numbers:
            raise InputError("indices is empty; name at least one sample")
        samples, labels = zip(*(self.get_data_sample(i, preprocessing) for i in numbers), strict=True)
        return stacked(samples, numbers), labels[0] if len(labels) == 1 else list(labels)

    def in_call_order(self, layers: Sequence[str], sample: int) -> list[str]:
        """Layers in the order in which a sample goes through them, none before what it is computed from."""
        check_layers(self.attribution.model, layers, "layers")
        asked = self._asked(sample)
        with torch.no_grad(), put_on(None, self.attribution.model) as model:
            return in_call_order(model, layers, asked.run)

    def _count_outputs(self, sample: int) -> int | None:
        """Number of the model's outputs, by a sample; None where it tells none."""
        return count_outputs(self.attribution, self._asked(sample))

    def _asked(self, sample: int) -> Asked:
        """What the model is asked for a sample."""
        if self.texts is not None:
            return read_text(self.dataset, sample, self.device)
        return Asked.of(self.get_data_sample(sample)[0].detach(), None)

    def _tell_missing(self, table: Table) -> None:
        """Warn that a table does not hold all samples of its dataset."""
        if missing := sum(stop - start for start, stop in table.coverage().missing):
            seen = f"{table.n_samples - missing} of {table.n_samples} samples"
            warn(f"the table in {table.path} covers {seen}, and so do answers until the others are mined")

    def _check_table(self, table: Table) -> None:
        """Raise a `TableMismatchError` unless a table is of this model, dataset, preparation and these concepts."""
        found = self._identity(table.layers, dataset=not table.header.probes)
        output = self.attribution.output
        # (tables of before have the output in words only)
        if output is not None and ("output" in table.fingerprints or "output" not in table.header.recipe):
            found["output"] = self._remembered("output", _Same(output), lambda: fingerprint(output))
        elif output is None and "output" in table.fingerprints:
            found["output"] = "none"
        decoding = _Same(self.dataset), torch.device(self.device).type, str(table.path), table.header.identity
        if mark := self._remembered(
            "decoder", decoding, lambda: decoder_mark(table.fingerprints, on_device(self._samples_mined(), self.device))
        ):
            table.check(decoder=mark)
        if table.header.probes:
            state = _Same(self.dataset), _length(self.dataset), str(table.path), table.header.identity
            self._remembered("samples", state, lambda: check_dataset(table, files_of(self._samples_mined())))
        table.check(**found)

    @property
    def texts(self) -> Texts | None:
        """The dataset, if its samples are texts."""
        return texts_in(self.dataset)

    def _is_of_ids(self) -> bool:
        """Whether samples are texts, which nothing prepares."""
        own = function_of(self.preprocess_data) is not SampleAccess.preprocess_data
        return self.texts is not None and not own and not callable(self.preprocess_fn)

    def _samples_mined(self) -> Any:
        """Dataset as it is mined."""
        is_plain = type(self).get_data_sample is SampleAccess.get_data_sample
        return self.dataset if is_plain else _PreparedSamples(self)

    def _identity(self, layers: Iterable[str] = (), dataset: bool = True) -> dict[str, str]:
        """Fingerprints of what samples are, how they are prepared, the model that sees them, and the layers' concepts.

        Parameters
        ----------
        layers : iterable of str
            All layers of a table. Its concepts have one fingerprint; where ``layer_map`` lacks one of the layers, they
            cannot be compared, which a warning says.
        dataset : bool
            Whether the dataset is asked, of which a few samples are read.
        """
        model = self.attribution.model
        # The fingerprint reads all weights. Whether they have changed since is seen faster, by their versions.
        state = repr(model), _states([*model.parameters(), *model.buffers()])
        found = {
            "model": self._remembered("model", state, lambda: fingerprint_model(model)),
            "preprocess": self._preparation(),
        }
        if dataset:
            kept = _Same(self.dataset), _length(self.dataset)
            found["dataset"] = self._remembered("dataset", kept, lambda: fingerprint_dataset(self.dataset))
        if lacking := [layer for layer in layers if layer not in self.layer_map]:
            warn(
                f"layer_map lacks {', '.join(map(repr, lacking))}, which were mined, too: whether the concepts are "
                "those that were mined cannot be told; give all layers of the table",
            )
        elif concepts := {layer: self.layer_map[layer] for layer in layers}:
            # A concept may count its uses, which would change its fingerprint: only its tensors are watched.
            states = [(layer, _Same(c), _states(_tensors_of(c))) for layer, c in concepts.items()]
            found["layers"] = self._remembered("layers", states, lambda: fingerprint(concepts))
        return found

    def _preparation(self) -> str:
        own = [
            None if function is default else function
            for function, default in (
                (type(self).get_data_sample, SampleAccess.get_data_sample),
                (function_of(self.preprocess_data), SampleAccess.preprocess_data),
            )
        ]
        return fingerprint(self.preprocess_fn if own == [None, None] else (*own, self.preprocess_fn))

    def _remembered(self, name: str, state: object, compute: Callable[[], Any]) -> Any:
        if self._fingerprints.get(name, (None,))[0] != state:
            self._fingerprints[name] = state, compute()
        return self._fingerprints[name][1]


def _length(dataset: Any) -> int:
    """Number of samples; an error where there is no dataset."""
    if dataset is None:
        raise InputTypeError(
            "the dataset is None: it has samples to show, and what was mined must be of it; give the dataset, or "
            "check=False to read statistics without one"
        )
    return len(dataset)


class _Same:
    """An object compared by identity. It is kept alive, so that no other object can have its id."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    __hash__ = None  # type: ignore[assignment]


def _tensors_of(concept: Concept) -> list[Tensor]:
    return [value for value in getattr(concept, "__dict__", {}).values() if isinstance(value, Tensor)]


def _states(tensors: Iterable[Tensor]) -> list[tuple[int, int, float]]:
    """What changes when a tensor is replaced or written to."""
    known = list(tensors)
    glimpses: dict[torch.device, list[Tensor]] = {}
    for tensor in known:
        glimpses.setdefault(tensor.device, []).append(_glimpse(tensor))
    # The host waits for a device once, and not for each tensor.
    sums = {device: iter(torch.stack(of_device).tolist()) for device, of_device in glimpses.items()}
    return [(tensor.data_ptr(), tensor._version, next(sums[tensor.device])) for tensor in known]


def _glimpse(tensor: Tensor) -> Tensor:
    """Sum of about a thousand entries, to notice writes through ``.data``, which no version counts."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // 1024)].sum(dtype=torch.float64)


def stacked(samples: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """Samples of shape (1, ...) as one batch; a `ValueError` names the dataset index of one that does not fit."""
    for index, sample in zip(indices, samples, strict=True):
        if sample.shape != samples[0].shape:
            raise InputError(
                f"dataset[{index}] has shape {tuple(sample.shape[1:])}, but dataset[{indices[0]}] has "
                f"{tuple(samples[0].shape[1:])}; resize the samples to one shape, in the dataset or in preprocess_data"
            )
    return torch.cat(list(samples))


class _PreparedSamples:
    """Dataset of what an overridden `get_data_sample` gives."""

    def __init__(self, visualization: SampleAccess) -> None:
        self._visualization = visualization

    def __len__(self) -> int:
        return len(self._visualization.dataset)

    def source(self, index: int) -> Source | None:
        """File of a sample, where the dataset tells it."""
        return source_of(self._visualization.dataset, index)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        data, target = self._visualization.get_data_sample(index, preprocessing=True)
        return data[0].detach(), target


class LabelTargets:
    """`SampleAccess.multitarget_to_single`, and what it raised last."""

    def __init__(self, method: Callable[[Any], Iterable[Any]]) -> None:
        self._method = method
        self.error: Exception | None = None

    def __call__(self, label: Any) -> list[Any]:
        """Classes of a label."""
        try:
            return list(self._method(label))
        except Exception as error:
            self.error = error
            raise


def function_of(method: Any) -> Any:
    """Function behind a bound method, whose fingerprint does not depend on the object."""
    return getattr(method, "__func__", method)
