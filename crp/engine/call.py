"""One call of `CondAttribution`: its forward passes, and all rows sent back through them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.engine.attached import _rules_by_hand, composite_on, is_on, put_on
from crp.engine.backward import MakeMasks, _input_name, _send_rows_back, send_back
from crp.engine.basic_hooks import _batched_hooks
from crp.engine.conditions import Rows, check_conditions
from crp.engine.door import check_device, check_result
from crp.engine.encoding import _read, propagation_of, starts_at_one, write
from crp.engine.forward import SINK, ForwardPass
from crp.engine.independence import FirstLook
from crp.engine.inputs import Data, Inputs, Samples
from crp.engine.masks import Given, _check_channels, mask_factory, row_masks
from crp.engine.memory_layout import _is_same_channels_last, _run_channels_last, is_faster_channels_last
from crp.engine.model_state import _Parts, is_watched
from crp.engine.results import Part, _results_of, average, in_order
from crp.engine.settings import Overrides, Settings
from crp.engine.starts import Starts, distinct
from crp.engine.taps import check_layers
from crp.engine.targets import (
    _check_initial,
    all_positions,
    check_start,
    check_targets_exist,
    init_of_rows,
    initial_relevance,
    warn_of_positions,
)
from crp.engine.turns import TURNS, parts_of
from crp.errors import InputError, InputTypeError
from crp.layers import modules_of
from crp.notices import warn
from crp.types import AbsorbedRelevance, AttributionResults, Condition, MaskFactory, MaskFn, Sinks
from crp.wording import first_few

#: ``(call, composite, rows) -> results, or None``
Shortcut: TypeAlias = Callable[["Call", Composite | None, Rows], Part | None]


@dataclass(frozen=True)
class Call:
    """What a call is about, checked before the model runs.

    Attributes
    ----------
    model : nn.Module
    composite : zennit.core.Composite or None
        The one that was given, or that is on the model.
    inputs : Inputs
    rows : Rows
    settings : Settings
    overrides : Overrides
    batch_size : int or None
        Rows that are computed together; all, if None.
    shortcut : callable or None
        Gives the results of rows under a composite if it can, in place of their computation.
    given : Given or None
        Start and masks, in place of those that follow from the conditions.
    """

    model: nn.Module
    composite: Composite | None
    inputs: Inputs
    rows: Rows
    settings: Settings
    overrides: Overrides
    batch_size: int | None = None
    shortcut: Shortcut | None = None
    given: Given | None = None

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        device: torch.device,
        data: Data,
        conditions: Sequence[Condition],
        composite: Composite | None,
        settings: Settings,
        overrides: Overrides,
        channels_last: bool = False,
        shortcut: Shortcut | None = None,
    ) -> Call:
        """Check everything that can be checked before the model runs; ``channels_last`` allows that layout."""
        inputs = Inputs.of(data, settings.explain, model)
        inputs.check(settings.finite)
        if settings.on_device is not None:
            check_device(settings.on_device, "on_device")
        if overrides.relevance_init is None:
            _check_initial(settings.init_rel)
        modules = modules_of(model)
        composite = composite_on(model, composite, modules)
        if isinstance(settings.record, str) or not isinstance(settings.record, Collection):
            raise InputTypeError(f"record_layer must be a list of layer names, not {settings.record!r}")
        if settings.output_name in modules:
            raise InputError(
                f"the model has a layer called {settings.output_name!r}, which names the output in conditions; "
                "set attribution.MODEL_OUTPUT_NAME to another name"
            )
        conditions = check_conditions(conditions, settings.output_name, settings.start, settings.init_rel is not None)
        if settings.start is not None:
            check_layers(model, [settings.start], "start_layer")
        if overrides.broadcast is None:
            rows = Rows.broadcast(len(inputs), conditions)
        else:
            data, conditions = overrides.broadcast(inputs.data, conditions)
            inputs = Inputs.of(data, settings.explain, model)
            inputs.check(settings.finite)
            if len(inputs) != len(conditions):
                raise InputError(f"broadcast gave {len(inputs)} samples and {len(conditions)} conditions; pair them")
            rows = Rows.of(range(len(inputs)), conditions)
        inputs = inputs.to(device)
        is_plain = not (rows.layers(settings.output_name) or overrides.are_any)
        if channels_last and is_plain and propagation_of(composite).encoding == "multiplier":
            settings = replace(settings, channels_last=True) if is_faster_channels_last(model, inputs) else settings
        call = cls(model, composite, inputs, rows, settings, overrides, shortcut=shortcut)
        for layer in call.conditioned:
            call._masks({}, layer)
        return call

    def parts(self) -> Iterator[Part]:
        """Results of ``batch_size`` rows at a time; means, for composites whose results are averaged."""
        return self._joined([self._parts(composite) for composite in self._members()])

    @cached_property
    def conditioned(self) -> list[str]:
        """Layers that the conditions name."""
        return self.rows.layers(self.settings.output_name)

    def checked(self, part: Part, of_channels: Collection[MaskFactory]) -> AttributionResults:
        """Results of a part, or an error where they are not what they are called; some masks are of channels."""
        result, own = part[0], self.overrides
        is_other = own.heatmap_modifier or own.relevance_init or self.given or self.settings.init_rel is not None
        shares = () if is_other or not propagation_of(self.composite).shares_output() else part[1]
        check_result(self.model, result.heatmap, result.prediction, shares)
        for layer in self.conditioned:
            activation = result.activations[layer]  # (a list, where rows differ in shape)
            if isinstance(activation, Tensor) and mask_factory(self.settings.mask_map, layer) in of_channels:
                _check_channels(self.model, layer, activation)
        return result

    def _joined(self, runs: Sequence[Iterator[Part]]) -> Iterator[Part]:
        """Means of several runs; an error where the model is another one for the next part than for those before."""
        known, by_hand = _Parts(), False
        chunks = self._chunks()
        for number in range(len(chunks)):
            # (a composite that was put on by hand, and is taken off now, may have merged weights)
            is_same = number > 0 and by_hand == is_on(self.composite, self.model)
            if is_same and known.changed(self.model):
                # (another thread may have swapped weights for a while, and gives them back with its turn)
                with put_on(None, self.model):
                    changed = known.changed(self.model)
                if changed:
                    raise InputError(
                        f"{first_few([repr(name) for name in changed], 5)} of the model changed between parts, which "
                        "were of two models; let all parts come first, such as by list(attribution.generate(...))"
                    )
            # (the caller alone keeps a part while the next one is computed)
            look = FirstLook(self.model) if number == 0 else None
            part = [average([next(run) for run in runs])]
            if look is not None and (look.is_first or len(self.rows) > 1):
                look.check(self.inputs, map(self._samples, chunks), self.overrides.select)
            if number < len(chunks) - 1:
                with TURNS.taken(parts_of(self.model)):  # (in its turn, another thread may have swapped weights)
                    known.note(self.model)
                    by_hand = is_on(self.composite, self.model)
            yield part.pop()

    def absorbed(self) -> AbsorbedRelevance:
        """What each layer keeps of the relevance of each row.

        Raises
        ------
        TypeError
            If the composite keeps no account.
        """
        asked = propagation_of(self.composite)
        accounting = asked.accounting()
        if accounting is None or self._members() != [self.composite]:
            what = "only a composite of crp.composites accounts for what layers keep"
            raise InputTypeError(f"{what}, not {self.composite!r}")
        if asked.readout == "multiplier":
            what = "gives multipliers, of which layers keep nothing; it has no relevance"
            raise InputTypeError(f"{self.composite!r} {what}")
        initials, inputs, kept, look = [], [], [], FirstLook(self.model)
        with put_on(self.composite, self.model) as model, accounting as account:
            # One sample starts at a time: whose an entry is cannot be told where the first axis is not the samples'.
            in_flow = self._masks_in_flow()
            ragged = isinstance(self.inputs, Samples)
            of_all = None if in_flow or ragged else self._forward(model, self.rows, self.composite, account)
            if of_all is not None and of_all.is_folded:
                of_all = None
            for rows in self.rows.one_by_one(in_flow):
                passed = of_all or self._forward(model, rows, self.composite, account)
                _, start, arrived = self._send_back(passed, rows, last=of_all is None)
                initial = _sum_of_rows(_read(asked, start.rows(), passed.value(self.settings.start, rows)))
                initials.append(initial)
                relevances = [arrived[_input_name(number)] for number in range(len(passed.inputs.explained))]
                inputs.append(torch.stack([_sum_of_rows(r).to(initial) for r in relevances]).sum(0))
                layers: dict[str, Tensor] = {}
                for name in passed.layers:
                    if name.startswith(SINK):
                        layer = name.removeprefix(SINK).rpartition("#")[0]
                        share = arrived[name].reshape(len(rows), -1, len(account.kinds)).sum(1)
                        layers[layer] = layers.get(layer, 0) + share
                kept.append(layers)
        look.check(self.inputs, iter([self._samples(self.rows)]), self.overrides.select)
        nothing = {name: torch.zeros_like(shares) for layers in kept for name, shares in layers.items()}
        shares = {name: torch.cat([layers.get(name, zero) for layers in kept]) for name, zero in nothing.items()}
        named = {layer: dict(zip(account.kinds, values.unbind(1), strict=True)) for layer, values in shares.items()}
        return AbsorbedRelevance(torch.cat(initials), torch.cat(inputs), named)

    def _members(self) -> list[Composite | None]:
        """Composites whose results are averaged: several, where a method has several references."""
        members = propagation_of(self.composite).members_for(self.inputs.select([0]).explained[0])
        alone = self.composite is None or not members or is_on(self.composite, self.model)
        return [self.composite] if alone else [*members]

    def _chunks(self) -> list[Rows]:
        return self.rows.chunks(self.batch_size or len(self.rows))

    def _parts(self, composite: Composite | None) -> Iterator[Part]:
        passed: ForwardPass | None = None
        call: Call | None = None
        # Rules in multiplier encoding live in the graph, so that it outlasts the composite's context.
        keeps = composite is None or propagation_of(composite).encoding == "multiplier"
        chunks, tell = self._chunks(), cache(warn)  # (of all parts, each warning is told once)
        for number, rows in enumerate(chunks):
            last = number == len(chunks) - 1 or not keeps
            known = None if self.shortcut is None else self.shortcut(self, composite, rows)
            if known is not None:
                passed, part = None, [known]
                del known
                yield part.pop()
                continue
            call = call or self.laid_out()
            ragged = isinstance(self.inputs, Samples)
            if ragged and isinstance(self.inputs.select(list(self._samples(rows))), Samples):
                passed, part = None, [call._one_by_one(rows, composite, {}, tell)]
            elif passed is not None and passed.samples == self._samples(rows):
                part = [call._results(passed, rows, last)]
            else:
                shared = len(rows) > len(self._samples(rows))
                with put_on(composite, self.model, tell) as model, _batched_hooks(model) if shared else nullcontext():
                    passed = call._forward(model, rows, composite)
                    part = [] if passed.is_folded else [call._results(passed, rows, last)]
            if passed is not None and not part:
                shapes = {name: output.shape for name, output in passed.layers.items()}
                passed = None
                part = [call._one_by_one(rows, composite, shapes, tell)]
            if last:
                passed = None
            yield part.pop()

    def laid_out(self) -> Call:
        """The same in the usual layout of memory, where the model needs that, or others watch it run, who know that."""
        model, settings = self.model, self.settings
        if not settings.channels_last or (not is_watched(model) and _is_same_channels_last(model, self.inputs)):
            return self
        return replace(self, settings=replace(settings, channels_last=False))

    def at_once(self, composite: Composite | None) -> Part | None:
        """Results of all rows by one forward pass; None where entries of samples cannot be told apart."""
        with put_on(composite, self.model) as model:
            passed = self._forward(model, self.rows, composite)
            return None if passed.is_folded else self._results(passed, self.rows, last=True)

    def _one_by_one(
        self, rows: Rows, composite: Composite | None, shapes: Mapping[str, torch.Size], tell: Callable[[str], None]
    ) -> Part:
        """Results of rows by a forward pass for each sample, whose entries are then known in every layer.

        Takes the shapes that layers have in one forward pass for all of these rows, and what warns.
        """
        results, places = list[Part](), list[int]()
        alone: dict[str, dict[int, torch.Size]] = {name: {} for name in shapes}
        for part in rows.one_by_one(self._masks_in_flow()):
            with put_on(composite, self.model, tell) as model:
                passed = self._forward(model, part, composite)
                results.append(self._results(passed, part, last=True))
            for name in {*shapes} & {*passed.layers}:
                alone[name][part.samples[0]] = passed.layers[name].shape
            places += part.places
        columns = self._samples(rows)
        for name, of_samples in alone.items():
            if of_samples and shapes[name][0] != sum(of_samples[sample][0] for sample in columns):
                raise InputError(
                    f"the output of layer {name!r} has shape {tuple(shapes[name])} for {len(columns)} samples, and "
                    f"{tuple(next(iter(of_samples.values())))} for one of them; its first axis must be that of the "
                    "samples, or have as many entries for each of them"
                )
        return in_order(results, [places.index(place) for place in rows.places])

    def _masks_in_flow(self) -> bool:
        """Whether masks act while the gradient flows; every row then needs a column of its own."""
        if self.overrides.backward is not None:
            return True
        layers = self.rows.layers(self.settings.output_name)
        return not self.settings.exclude_parallel and any(name != self.settings.start for name in layers)

    def _masks(self, rows: Mapping[int, Condition], layer: str, n_entries: int = 1) -> list[MaskFn]:
        """Mask functions of a layer, as the conditions of rows say."""
        is_gradient = self.composite is None and not _rules_by_hand(self.model)
        multiplies = is_gradient or propagation_of(self.composite).encoding == "multiplier"
        return row_masks(rows, layer, self.settings.mask_map, multiplies, n_entries)

    def _samples(self, rows: Rows) -> tuple[int, ...]:
        """Sample of each column of a forward pass for these rows, which share columns if they may."""
        return rows.samples if self._masks_in_flow() else tuple(sorted({*rows.samples}))

    def _forward(
        self, model: nn.Module, rows: Rows, composite: Composite | None, account: Sinks | None = None
    ) -> ForwardPass:
        settings = self.settings
        # (canonizers may have given the model further layers)
        check_layers(model, self.conditioned, "conditions")
        check_layers(model, settings.record, "record_layer")
        roles = dict.fromkeys(settings.record, "record") | dict.fromkeys(self.conditioned, "condition")
        if settings.start is not None:
            roles[settings.start] = "start"
        samples = self._samples(rows)
        propagation_of(composite).expect(list(samples), len(self.inputs))
        inputs = self.inputs.select(list(samples))

        def run(data: Inputs) -> ForwardPass:
            return ForwardPass.run(model, data, roles, self.overrides.select, composite, account, samples)

        passed = _run_channels_last(run, model, inputs) if settings.channels_last and account is None else None
        return passed or run(inputs)

    def _send_back(self, passed: ForwardPass, rows: Rows, last: bool) -> tuple[Tensor, Starts, dict[str, Tensor]]:
        """Prediction of each row, what started there, and what arrived at each input and layer."""
        root = passed.output if self.settings.start is None else passed.layers[self.settings.start]
        if self._explains_positions(rows) and len(passed.inputs) == 1:
            prediction = (root.detach() if last else root.detach().clone()).expand(len(rows), *root.shape[1:])
        else:
            prediction = passed.of_rows(root, rows, copy=not last)
        start = Starts.of_each(self.given.start.to(prediction)) if self.given else self._start(prediction, passed, rows)
        backward = (self.overrides.backward or send_back) if self._masks_in_flow() else None
        make_masks: MakeMasks = self.given.make_masks if self.given else self._masks
        return prediction, start, _send_rows_back(passed, rows, start, self.settings, make_masks, backward, last)

    def _explains_positions(self, rows: Rows) -> bool:
        """Whether each row explains tokens at a position, so that most of the output is of others."""
        return self.settings.start is None and all_positions(rows.targets(self.settings.output_name))

    def _start(self, prediction: Tensor, passed: ForwardPass, rows: Rows) -> Starts:
        """What starts at the root: initial relevance, or that divided by the output."""
        settings, own = self.settings, self.overrides.relevance_init is not None
        if own or settings.start is not None or not isinstance(settings.init_rel, int | float | None):
            return Starts.of_each(self._start_of_rows(prediction, passed, rows))
        first, starts = distinct(rows, passed.columns(rows), rows.targets(settings.output_name))
        if len(first) < len(rows):
            rows, prediction = rows.part(first), prediction[: len(first)]
        return replace(starts, values=self._start_of_rows(prediction, passed, rows))

    def _start_of_rows(self, prediction: Tensor, passed: ForwardPass, rows: Rows) -> Tensor:
        """The same of each row, (rows, *root shape); of the prediction, only its form counts."""
        settings, asked, overridden = self.settings, passed.propagation, self.overrides.relevance_init
        targets = rows.targets(settings.output_name) if settings.start is None else None
        check_targets_exist(targets, prediction, settings.output_name, rows.places)
        if passed.inputs.embedded:
            warn_of_positions(targets, prediction, passed.inputs)
        lengths = (len(self.rows), self.batch_size or len(self.rows))
        initial = init_of_rows(settings.init_rel, rows.places, prediction, lengths)
        if initial is None and starts_at_one(asked) and overridden is None:
            one = torch.ones_like(prediction) if targets is None else prediction.new_ones(()).expand(prediction.shape)
            return initial_relevance(one, targets, None)
        if initial is None and asked.initial == "one":
            initial = 1.0
        value = passed.value(settings.start, rows)
        start = (overridden or initial_relevance)(value.clone(), targets, initial)
        check_start(start, prediction)
        return write(asked, start.detach().to(prediction), value)

    def _results(self, passed: ForwardPass, rows: Rows, last: bool) -> Part:
        """Results of some rows, and the relevance of each input that is explained, (rows, *input shape)."""
        prediction, _, arrived = self._send_back(passed, rows, last)
        heatmap_of, is_shared = self.overrides.heatmap_modifier, self._explains_positions(rows)
        main = str(getattr(self.model, "main_input_name", 0))  # (models of Hugging Face have it)
        given = passed, rows, prediction, arrived, self.settings, heatmap_of
        return _results_of(*given, main_input=main, is_shared=is_shared, last=last)


def _sum_of_rows(values: Tensor) -> Tensor:
    """(rows, ...) to (rows,)."""
    return values.reshape(len(values), -1).sum(1)
