"""Attributions as repeated computations: what in a call a recording reads, and what it depends on."""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from zennit.core import Composite

from crp.engine.attached import is_on
from crp.engine.call import Call
from crp.engine.conditions import Grid, Rows
from crp.engine.encoding import Propagation, is_product, propagation_of, starts_at_one
from crp.engine.inputs import Inputs
from crp.engine.masks import Given, apply_masks, row_masks
from crp.engine.model_state import is_traced, is_watched, reads_of
from crp.engine.recordings import Recorder, Tensors
from crp.engine.replay import Computation, Replays
from crp.engine.results import Part
from crp.engine.settings import Settings
from crp.engine.targets import check_targets_exist, initial_relevance
from crp.engine.turns import TURNS, parts_of
from crp.layers import modules_of
from crp.layers.devices import send_to
from crp.layers.state import undisturbed
from crp.types import AttributionResults

#: Structures of which the shapes are remembered.
_KEPT_SHAPES = 64
_READING = "reading"
#: Seconds that Python takes for each module, about.
_SAVED = 1e-4


class Replayed:
    """Gives results of rows by replays of attributions of the same structure; `Call.shortcut`.

    Parameters
    ----------
    recorder : Recorder, optional
        As in `Replays`.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.replays = Replays(recorder)
        self._recorder = recorder
        self._shapes: dict[Hashable, dict[str | None, torch.Size]] = {}

    def __reduce__(self) -> tuple[type[Replayed], tuple[Recorder | None]]:
        return type(self), (self._recorder,)  # (another process records for itself)

    def __call__(self, call: Call, composite: Composite | None, rows: Rows) -> Part | None:
        """Results of rows; None where they must be computed in the usual way."""
        data, settings, name = call.inputs.data, call.settings, call.settings.output_name
        if not isinstance(data, Tensor) or call.inputs.embedded or not self.replays.serves(data.device):
            return None
        if composite is None or is_on(composite, call.model) or not _is_replayable(call, composite):
            return None
        ahead = self.replays.runs_ahead(data.device)
        is_part = len(rows) < len(call.rows) and not ahead  # (one forward pass serves all parts, then)
        if is_part or len(rows.groups(name)) > 1:
            return None
        samples = sorted({*rows.samples})
        columns = [samples.index(sample) for sample in rows.samples]
        chosen = call.inputs.select(samples).explained[0].detach()
        # (a weak reference equals no other composite's, also where one has the id of one that is gone)
        structure = tuple(columns), tuple(rows.layers(name)), tuple(settings.record), settings.as_computed
        key = (weakref.ref(composite), structure, _form_of(chosen), settings.multipliers, settings.channels_last)
        usual = replace(call, rows=rows, batch_size=None, shortcut=None)
        if (shapes := self._shapes.get(key)) is None:
            return self._learn(key, usual.laid_out(), composite)
        try:
            given = _given_for(rows, columns, settings, shapes, data.device)
        except Exception:  # (it is told by the computation, unless the model has other outputs now)
            return self._learn(key, usual.laid_out(), composite)
        if given is None:
            return None
        # (on a CPU, what is computed outside is computed faster, as values may be looked at)
        reading = settings.reading if ahead else None

        def prepare() -> Computation | None:
            if is_watched(call.model):
                return None
            # (asked by the usual computation, which comes first: while recording, a model is watched)
            laid_out = cache(usual.laid_out)

            def read(part: Part | None) -> Tensors | None:
                if part is None:
                    return None
                results = _flattened(*part)
                return results if reading is None else results | {_READING: reading(part[0])}

            def compute(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                masks = {layer: tensors[f"mask {layer}"] for layer in given.masks}
                inner = replace(
                    laid_out(),
                    inputs=Inputs.of(tensors["data"], settings.explain),
                    rows=Rows.of(columns, [dict.fromkeys(condition, ()) for condition in rows.conditions]),
                    settings=replace(laid_out().settings, shared_start=given.shared),
                    given=Given(tensors["start"], masks, given.shared),
                )
                results = read(inner.at_once(composite))
                assert results is not None, "a layer has one entry for each sample, as it had when it was computed"
                return results

            reads, saved = reads_of(call.model, composite), _SAVED * len(modules_of(call.model))
            unnoticed = partial(undisturbed, call.model, later=call.model.parameters())
            return Computation(reads, compute, lambda: read(laid_out().at_once(composite)), saved, unnoticed)

        inputs = {"data": chosen} | _sent(given, chosen)
        only = {"heatmap", "prediction", _READING} if reading is not None else None
        asked = (key, *shapes.items(), given.shared, reading)
        with TURNS.taken(parts_of(call.model)):  # (in its turn, another thread has hooks on it, or other weights in it)
            tensors = self.replays.run(asked, data.device, prepare, inputs, only)
        if tensors is None:
            return None
        part = _restored(tensors, propagation_of(composite), settings.multipliers)
        if not _shapes_of(part[0]).items() <= shapes.items():  # (the model has other outputs now)
            self._shapes.pop(key, None)
        return part

    def _learn(self, key: Hashable, call: Call, composite: Composite) -> Part | None:
        """Compute rows once, to know the shapes of their output and layers; none where they cannot be replayed."""
        while len(self._shapes) >= _KEPT_SHAPES:
            self._shapes.pop(next(iter(self._shapes)), None)  # (other threads do so, too)
        part = call.at_once(composite)
        is_known = part is not None and part[0].prediction.is_floating_point()
        self._shapes[key] = _shapes_of(part[0]) if part is not None and is_known else {}
        return part


#: Entries of what starts in all rows, of which a copy to the device costs less than a replay saves.
_MOST_STARTED = {"cuda": 1 << 28, "cpu": 1 << 18}


def _is_replayable(call: Call, composite: Composite) -> bool:
    """Whether an attribution is nothing but a function of tensors, as far as that can be told.

    Initial relevance is 1 at the targets, no method is overridden, no reference is chosen for each sample, and no mode
    of torch is on. Hooks of others are looked for later.
    """
    if not isinstance(composite, Propagation) or not starts_at_one(composite):
        return False
    kind, settings = type(composite), call.settings
    per_sample = kind.expect is not Propagation.expect or kind.members_for is not Propagation.members_for
    in_flow = not settings.exclude_parallel and bool(call.rows.layers(settings.output_name))
    usual = settings.init_rel is None and settings.start is None and not in_flow
    usual = usual and not torch.is_inference_mode_enabled()  # (which is refused)
    return usual and not (per_sample or call.overrides.are_any) and settings.on_device is None and not is_traced()


def _shapes_of(results: AttributionResults) -> dict[str | None, torch.Size]:
    """Shapes of the output, by None, and of layers."""
    shapes: dict[str | None, torch.Size] = {None: results.prediction.shape}
    return shapes | {layer: activation.shape for layer, activation in results.activations.items()}


def _form_of(tensor: Tensor) -> Hashable:
    """What kernels depend on beside a tensor's values: also the precision in which they run now."""
    kind = tensor.device.type
    usual = torch.get_default_dtype(), torch.get_default_device()
    dtypes = *usual, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    of_cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    attention: Any = (of_cuda.math_sdp_enabled, of_cuda.flash_sdp_enabled, of_cuda.mem_efficient_sdp_enabled)
    exact = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic
    flags = cudnn.allow_tf32, of_cuda.matmul.allow_tf32, *exact, *(enabled() for enabled in attention)
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.stride(), *dtypes, *flags


def _given_for(
    rows: Rows, columns: list[int], settings: Settings, shapes: Mapping[str | None, torch.Size], device: torch.device
) -> Given | None:
    """Start and masks of rows, on the host; None where a mask is no selection of channels, or too much starts.

    ``shapes`` are those of the output, by None, and of the conditioned layers, for these rows.
    """
    if not shapes or math.prod(shapes[None]) > _MOST_STARTED[device.type]:
        return None
    targets, name = rows.targets(settings.output_name), settings.output_name
    check_targets_exist(targets, torch.empty(shapes[None], device="meta"), name, rows.places)
    start = initial_relevance(torch.ones(shapes[None]), targets, None)
    of_slots = Grid(columns, max(columns) + 1, start.device).scatter(start)
    masks = {}
    conditions = dict(enumerate(rows.conditions))
    for layer in rows.layers(name):
        functions = row_masks(conditions, layer, settings.mask_map)
        shape = shapes[layer]
        if len(shape) < 2 or shape[0] != len(rows) or not all(getattr(f, "selects_channels", False) for f in functions):
            return None
        masks[layer] = apply_masks(functions, torch.ones(*shape[:2], *[1] * (len(shape) - 2))) != 0
    return Given(start, masks, bool((of_slots == of_slots[:1]).all()))


def _flattened(results: AttributionResults, relevances: list[Tensor]) -> dict[str, Tensor]:
    """Results of rows as tensors by name."""
    found: dict[str, Tensor] = {"heatmap": results.heatmap, "prediction": results.prediction}
    groups: dict[str, Mapping[str, Tensor]] = {"activations": results.activations, "relevances": results.relevances}
    groups["multipliers"] = results.multipliers or {}
    counted = results.counted or {}
    groups["counted"] = {layer: each for layer, each in counted.items() if each is not results.activations[layer]}
    for group, layers in groups.items():
        found |= {f"{group} {layer}": tensor for layer, tensor in layers.items()}
    return found | {f"input {number}": tensor for number, tensor in enumerate(relevances)}


def _restored(tensors: dict[str, Tensor], asked: Propagation, keeps: bool) -> tuple[AttributionResults, list[Tensor]]:
    """Results of rows from what `_flattened` made of them."""
    names = ("activations", "relevances", "multipliers", "counted", "input")
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, tensor in tensors.items():
        group, _, layer = name.partition(" ")
        if group in groups:
            groups[group][layer] = tensor
    results = AttributionResults(
        tensors["heatmap"],
        groups["activations"],
        groups["relevances"],
        tensors["prediction"],
        encoding=asked.encoding,
        multipliers=groups["multipliers"] if keeps else None,
        counted=groups["activations"] | groups["counted"] if keeps and is_product(asked) else None,
        reading=tensors.get(_READING),
    )
    return results, list(groups["input"].values())


def _sent(given: Given, data: Tensor) -> dict[str, Tensor]:
    """Start and masks beside the data, by name, as a recording reads them."""
    masks = {f"mask {layer}": send_to(data.device, mask) for layer, mask in given.masks.items()}
    return {"start": send_to(data.device, given.start.to(data.dtype))} | masks
