"""One call of `CondAttribution`: its forward passes, and all rows sent back through them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.engine.attached import attached, composite_on, is_on, rules_by_hand
from crp.engine.backward import Backward
from crp.engine.conditions import Rows, Settings, check_conditions, check_start, check_targets, row_masks
from crp.engine.encoding import Encoding, average
from crp.engine.forward import SINK, ForwardPass, check_layers
from crp.engine.inputs import Data, Inputs, Tensors
from crp.engine.taps import Use
from crp.layers import is_layer
from crp.types import AbsorbedRelevance, AttributionResults, Condition, Sinks

if TYPE_CHECKING:
    from crp.attribution import CondAttribution


@dataclass
class Call:
    """What a call is about, checked before the model runs.

    Attributes
    ----------
    attribution : CondAttribution
        Its methods may be overridden.
    given : tuple of Tensor of shape (samples, *input shape)
        Inputs that are explained, as the user gave them.
    inputs : Inputs
    rows : Rows
    composite : zennit.core.Composite or None
        The one that was given, or that is on the model.
    settings : Settings
    """

    attribution: CondAttribution
    given: Tensors
    inputs: Inputs
    rows: Rows
    composite: Composite | None
    settings: Settings

    @classmethod
    def plan(
        cls,
        attribution: CondAttribution,
        data: Data,
        conditions: Sequence[Condition],
        composite: Composite | None,
        settings: Settings,
    ) -> Call:
        """Check everything that can be checked before the model runs."""
        inputs = Inputs.of(data, settings.explain)
        inputs.check()
        given = inputs.explained
        composite = composite_on(attribution.model, composite)
        if isinstance(settings.record, str) or not isinstance(settings.record, Collection):
            raise TypeError(f"record_layer must be a list of layer names, not {settings.record!r}")
        model, output_name, start = attribution.model, attribution.MODEL_OUTPUT_NAME, settings.start
        if is_layer(model, output_name):
            raise ValueError(
                f"the model has a layer called {output_name!r}, which names the output in conditions; "
                "set attribution.MODEL_OUTPUT_NAME to another name"
            )
        conditions = check_conditions(conditions, output_name, start, settings.init_rel is not None)
        check_layers(model, [] if start is None else [start], "start_layer")
        if not attribution.overrides("broadcast"):
            rows = Rows.broadcast(len(inputs), conditions)
        else:
            data, conditions = attribution.broadcast(inputs.data, conditions)
            inputs = Inputs.of(data, settings.explain)
            inputs.check()
            if len(inputs) != len(conditions):
                raise ValueError(f"broadcast gave {len(inputs)} samples and {len(conditions)} conditions; pair them")
            rows = Rows(tuple(range(len(inputs))), tuple(conditions))
        call = cls(attribution, given, inputs.to(attribution.device), rows, composite, settings)
        for layer in rows.layers(output_name):
            row_masks({}, layer, settings.mask_map, call._multiplies())
        return call

    def all_rows(self) -> tuple[AttributionResults, list[Tensor]]:
        """Results of all rows, and the relevance of each input that is explained, (rows, *input shape)."""
        found = []
        for composite in self._members():
            samples, local = self.rows.distinct(self._masks_in_flow())
            with attached(composite, self.attribution.model) as model:
                passed = self._forward(model, samples, composite)
                found.append(self._results(passed, local, self.settings, last=True))
        return average(found)

    def parts(self, batch_size: int) -> Iterator[AttributionResults]:
        """Results of ``batch_size`` rows at a time."""
        runs = [self._parts(composite, batch_size) for composite in self._members()]
        # (the caller alone keeps a part while the next one is computed)
        return (average([next(run) for run in runs])[0] for _ in self.rows.chunks(batch_size))

    def absorbed(self) -> AbsorbedRelevance:
        """What each layer keeps of the relevance of each row.

        Raises
        ------
        TypeError
            If the composite keeps no account.
        """
        accounting = getattr(self.composite, "accounting", None)
        if accounting is None or self._members() != [self.composite]:
            raise TypeError(f"only a composite of crp.composites accounts for what layers keep, not {self.composite!r}")
        if Encoding.of(self.composite).as_multiplier:
            raise TypeError(f"{self.composite!r} gives multipliers, of which layers keep nothing; it has no relevance")
        # One sample at a time: whose an entry is cannot be told where the first axis is not that of the samples.
        in_flow = self._masks_in_flow()
        samples, local = self.rows.distinct(in_flow)
        size = 1 if in_flow else len(self.rows) // len(samples)
        initials, inputs, kept = [], [], []
        with attached(self.composite, self.attribution.model) as model, accounting() as account:
            passed = None if in_flow else self._forward(model, samples, self.composite, account)
            for number, part in enumerate(local.chunks(size)):
                if passed is None or in_flow:
                    passed = self._forward(model, [samples[number]], self.composite, account)
                    part = Rows((0,), part.conditions)
                settings, last = self.settings.part(number, size, len(self.rows)), number == len(samples) - 1
                back = self._backward(passed, part, settings, last=last or in_flow)
                layers: dict[str, Tensor] = {}
                for name in passed.sinks:
                    layer = name.removeprefix(SINK).rpartition("#")[0]
                    layers[layer] = layers.get(layer, 0) + back.found[name]
                kept.append(layers)
                initial = passed.encoding.read(back.start, rows_of(back.root, part))
                initials.append(sum_of_rows(initial))
                inputs.append(torch.stack([sum_of_rows(r).to(initial) for r in back.relevances]).sum(0))
        nothing = {name: torch.zeros_like(shares) for layers in kept for name, shares in layers.items()}
        shares = {name: torch.cat([layers.get(name, zero) for layers in kept]) for name, zero in nothing.items()}
        named = {layer: dict(zip(account.kinds, values.unbind(1), strict=True)) for layer, values in shares.items()}
        return AbsorbedRelevance(torch.cat(initials), torch.cat(inputs), named)

    def _members(self) -> list[Composite | None]:
        """Composites whose results are averaged: several, where a method has several references."""
        members_for = getattr(self.composite, "members_for", None)
        if members_for is None or is_on(self.composite, self.attribution.model):
            return [self.composite]
        return list(members_for(self.inputs.explained[0]))

    def _multiplies(self) -> bool:
        """Whether a gradient flows, or multipliers, and not relevance itself."""
        if self.composite is None:
            return not rules_by_hand(self.attribution.model)
        return Encoding.of(self.composite).multiplier

    def _parts(self, composite: Composite | None, batch_size: int) -> Iterator[tuple[AttributionResults, list[Tensor]]]:
        passed, passed_samples = None, None
        # Rules in multiplier encoding live in the graph, so that it outlasts the composite's context.
        keeps = Encoding.of(composite).multiplier or composite is None
        parts = self.rows.chunks(batch_size)
        for number, part in enumerate(parts):
            samples, local = part.distinct(self._masks_in_flow())
            settings = self.settings.part(number, batch_size, len(self.rows))
            last = number == len(parts) - 1
            if keeps and passed is not None and samples == passed_samples:
                found = [self._results(passed, local, settings, last)]
            else:
                with attached(composite, self.attribution.model) as model:
                    passed = self._forward(model, samples, composite)
                    found = [self._results(passed, local, settings, last or not keeps)]
                passed_samples = samples
            if not keeps or last:
                passed = None
            yield found.pop()

    def _masks_in_flow(self) -> bool:
        """Whether masks act while the gradient flows; every row then needs a sample of its own."""
        if self.attribution.overrides("backward"):
            return True
        layers = self.rows.layers(self.attribution.MODEL_OUTPUT_NAME)
        return not self.settings.exclude_parallel and any(name != self.settings.start for name in layers)

    def _forward(
        self, model: nn.Module, samples: list[int], composite: Composite | None, account: Sinks | None = None
    ) -> ForwardPass:
        settings = self.settings
        # (canonizers may have given the model further layers)
        conditioned = self.rows.layers(self.attribution.MODEL_OUTPUT_NAME)
        check_layers(model, conditioned, "conditions")
        check_layers(model, settings.record, "record_layer")
        layers = dict.fromkeys(settings.record, "record") | dict.fromkeys(conditioned, "condition")
        if settings.start is not None:
            layers[settings.start] = "start"
        expect = getattr(composite, "expect", None)
        if expect is not None:
            expect(samples, len(self.inputs))
        inputs = self.inputs.select(samples)
        return ForwardPass.run(model, inputs, layers, self.attribution.select_output, composite, account)

    def _backward(self, passed: ForwardPass, rows: Rows, settings: Settings, last: bool) -> Arrived:
        """Send all rows back through one forward pass."""
        root = passed.output if settings.start is None else passed.uses[settings.start]
        prediction = rows.select(root.output, copy=not last)
        start = self._start(prediction, rows_of(root, rows), rows, passed.encoding, settings)
        backward = self.attribution.backward if self._masks_in_flow() else None
        uses = passed.uses | passed.sinks
        output_name = self.attribution.MODEL_OUTPUT_NAME
        leaves, multiplies = passed.inputs.explained, self._multiplies()
        passes = Backward(leaves, root.output, uses, settings, output_name, backward, multiplies, {*passed.sinks})
        relevances, found = passes.run(rows, start, last)
        return Arrived(root, prediction, start, relevances, found)

    def _start(self, prediction: Tensor, value: Tensor, rows: Rows, encoding: Encoding, settings: Settings) -> Tensor:
        """What starts at the root, (rows, *output shape): initial relevance, or that divided by the output."""
        attribution = self.attribution
        targets = None if settings.start is not None else rows.targets(attribution.MODEL_OUTPUT_NAME)
        targets = check_targets(targets, prediction, attribution.MODEL_OUTPUT_NAME)
        initial = settings.initial(prediction)
        if initial is None and encoding.starts_from_one and not attribution.overrides("relevance_init"):
            return attribution.relevance_init(torch.ones_like(prediction), targets, None)
        if initial is None and encoding.from_one:
            initial = 1.0
        start = attribution.relevance_init(value.clone(), targets, initial)
        check_start(start, prediction)
        return encoding.start(start.detach().to(prediction), value)

    def _results(
        self, passed: ForwardPass, rows: Rows, settings: Settings, last: bool
    ) -> tuple[AttributionResults, list[Tensor]]:
        """Results of some rows, and the relevance of each input that is explained, (rows, *input shape)."""
        back = self._backward(passed, rows, settings, last)
        uses, encoding = passed.uses, passed.encoding
        keeps = encoding.multiplier and settings.multipliers

        def own(tensor: Tensor) -> Tensor:
            # What rows share becomes each row's own, so that the caller may write into it.
            tensor = tensor.contiguous() if tensor.stride()[:1] == (0,) else tensor
            return tensor.to(settings.on_device) if settings.on_device else tensor

        activations = {name: own(rows.select(use.output, copy=not last)) for name, use in uses.items()}
        relevances, multipliers = {}, {}
        for name, use in uses.items():
            arrived = back.found.pop(name)
            relevances[name] = own(encoding.read(arrived, rows_of(use, rows)))
            if keeps:
                multipliers[name] = relevances[name] if encoding.as_multiplier else own(arrived)
        heatmaps = []
        for leaf, relevance in zip(passed.inputs.explained, back.relevances, strict=True):
            explained = rows.select(leaf)
            explained.grad = relevance
            heatmaps.append(self.attribution.heatmap_modifier(explained, settings.on_device))
        result = AttributionResults(
            passed.inputs.shaped(heatmaps),
            activations,
            relevances,
            own(back.prediction),
            encoding=encoding.name,
            multipliers=multipliers if keeps else None,
        )
        return result, back.relevances


@dataclass
class Arrived:
    """What one backward pass of some rows gave.

    Attributes
    ----------
    root : Use
        Where it started.
    prediction : Tensor of shape (rows, *root shape)
    start : Tensor of shape (rows, *root shape)
        What started there.
    relevances : list of Tensor of shape (rows, *input shape)
        Of each input that is explained.
    found : dict of str to Tensor of shape (rows, *layer shape)
        What arrived at each layer and sink.
    """

    root: Use
    prediction: Tensor
    start: Tensor
    relevances: list[Tensor]
    found: dict[str, Tensor]


def rows_of(use: Use, rows: Rows) -> Tensor:
    """What the relevance of each row counts at a layer, to be read only."""
    value = use.value
    return value.expand(len(rows), *value.shape[1:]) if len(value) == 1 else rows.select(value)


def sum_of_rows(values: Tensor) -> Tensor:
    """(rows, ...) to (rows,)."""
    return values.reshape(len(values), -1).sum(1)
