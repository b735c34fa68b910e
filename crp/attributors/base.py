"""What attributors share: zennit's protocol, targets, and gradients and scores of rows of samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import zennit.attribution
from torch import Tensor, nn
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.attributors.scores import explaining
from crp.attributors.target import Classes, Start, Target
from crp.checks import check_number
from crp.composites import Gradient as GradientComposite
from crp.concepts import ChannelConcept
from crp.engine.attached import check_alone, check_composite
from crp.engine.conditions import MaskMap
from crp.engine.encoding import Propagation, propagation_of, write
from crp.engine.forward import check_one_entry, tensor_in
from crp.engine.inputs import Data, Explain, Inputs, Tensors
from crp.engine.taps import changed_at, check_changed_once
from crp.engine.targets import warn_of_positions
from crp.errors import InputError, InputTypeError
from crp.layers import differentiable, unwrap
from crp.layers.interrupts import atomic
from crp.types import AttributionResults

#: Default number of rows in a pass through the model, for methods that see each sample several times.
ROWS_BACKWARD, ROWS_FORWARD = 16, 64


class _Flow(NamedTuple):
    """What came back through the model for some rows.

    Attributes
    ----------
    output : Tensor of shape (rows, *output shape)
    inputs : tuple of Tensor of shape (rows, *input shape)
        What arrived at each input.
    layers : AttributionResults
        Activations and relevances of recorded layers.
    """

    output: Tensor
    inputs: Tensors
    layers: AttributionResults


class Attributor(zennit.attribution.Attributor):  # type: ignore[misc]
    """Base of methods that explain a model's output by its input, in the protocol of `zennit.attribution`.

    Parameters
    ----------
    model : nn.Module
        It is explained in evaluation mode, and left as it was.
    composite : zennit.core.Composite, optional
        What takes the place of the gradient; None for the gradient itself. Inside ``with attributor:`` it is on the
        model.
    attr_output : Target, class, Tensor or callable, optional
        What is explained, where a call does not say.
    condition : mapping of str to concept ids, optional
        Only what flows through these concepts of these layers counts; layers from the output to the input.
    mask_map : callable or mapping
        What the concepts are, as in `crp.attribution.CondAttribution`; channels by default.
    batch_size : int, optional
        Rows in one pass through the model; by default all samples at once, and several steps of few samples together.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type or value; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Any = None,
        *,
        condition: Mapping[str, Any] | None = None,
        mask_map: MaskMap = ChannelConcept.mask,
        batch_size: int | None = None,
    ) -> None:
        unwrap(model)  # (refuses what is no model)
        check_composite(composite)
        if condition is not None and not isinstance(condition, Mapping):
            raise InputTypeError(f"condition must be a dict {{layer name: concept ids}}, not {condition!r}")
        if batch_size is not None:
            batch_size = check_number("batch_size", batch_size, 1, whole=True)
        super().__init__(model, composite, attr_output)
        self.attr_output, self.batch_size = attr_output, batch_size
        self.condition, self.mask_map = dict(condition or {}), mask_map

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {self.composite!r})"

    def __call__(self, input: Data, attr_output: Any = None, *, explain: Explain = None) -> tuple[Tensor, Any]:
        """Explain the model's output.

        Parameters
        ----------
        input : Tensor of shape (samples, *input shape), or tuple or dict of them
            As in `crp.attribution.CondAttribution`.
        attr_output : Target, class, Tensor or callable, optional
            What is explained: anything that `crp.attributors.Target.of` makes a target of, or, as in zennit, a float
            tensor or array, or a function of the output that returns one, in the output's shape: what starts. By
            default what the constructor was given; without that, the output itself.
        explain : int, str, or sequence of these, optional
            Positions or names of the inputs that are explained; all floating-point ones by default.

        Returns
        -------
        output : Tensor of shape (samples, *output shape)
        attribution : Tensor of the input's shape, or tuple or dict of them
            Where several inputs are explained, it has the form of ``input``, with None for those that are passed on.

        Raises
        ------
        RuntimeError
            If another composite is on the model.
        """
        inputs = Inputs.of(input, explain, self.model)
        inputs.check()
        inputs = inputs.each(Tensor.detach)
        target = _target(self.attr_output if attr_output is None else attr_output)
        output, relevance = self._explain(inputs, target)
        return output, inputs.shaped([result.to(inputs.explained[0].device) for result in relevance])

    def forward(self, input: Data, attr_output_fn: Any) -> tuple[Tensor, Any]:
        """Explain the model's output, as `__call__` does."""
        return self(input, attr_output_fn)

    @abstractmethod
    def attribute(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        """Output of the model, and the explanation of each input that is explained; subclasses define it."""

    def flow(self, inputs: Inputs, target: Target, record: str | None = None) -> _Flow:
        """Send the target back through the model, in one pass for all rows.

        Parameters
        ----------
        inputs : Inputs
            For these rows.
        target : Target
        record : str, optional
            Name of a layer to record, which the forward pass must call.
        """
        composite = self._composite()
        explained = _Explained(self.model, target, propagation_of(composite))
        record_layer = [] if record is None else [record]
        result = explained.explain(inputs, self.condition, composite, record_layer, self.mask_map)
        if record is not None and record not in result.relevances:
            raise InputError(f"layer {record!r} is not called in the forward pass; name another")
        check_one_entry(result, record_layer)
        # (of a composite with a reference, and of samples one by one, the output is read several times)
        output = explained.outputs[0] if len(explained.outputs) == 1 else self.output(inputs, target.select)
        return _Flow(output, inputs.parts(result.heatmap), result)

    def multipliers(self, inputs: Inputs, target: Target, layer: str | None = None) -> tuple[Tensor, Tensors]:
        """Output, and what stands for the gradient: multipliers of a composite, or its relevance over the input.

        With a layer, they are those of its output.
        """
        returned, values = self.flow(inputs, target, record=layer), inputs.explained
        found, recorded = returned.inputs, returned.layers
        if layer is not None:
            if recorded.multipliers is not None:
                return returned.output, (recorded.multipliers[layer],)
            found, values = (recorded.relevances[layer],), (recorded.activations[layer],)
        asked = propagation_of(self._composite())
        return returned.output, tuple(write(asked, r, x.to(r)) for r, x in zip(found, values, strict=True))

    def layer_output(self, inputs: Inputs, layer: str) -> Tensor:
        """What a layer gives under the composite, of shape (samples, *layer shape)."""
        with explaining(self.model, self.composite, layer=layer) as outputs, torch.no_grad():
            return outputs(inputs)

    def _multipliers_at(self, layer: str, inputs: Inputs, target: Target, given: Tensor) -> Tensors:
        """Multipliers of a layer's output that is given, in place of what the layer makes of the inputs."""

        def change(output: Tensor) -> Tensor:
            if output.shape != given.shape:
                raise InputError(
                    f"layer {layer!r} gives {tuple(given.shape)} and, where gradients flow, {tuple(output.shape)}: its "
                    "first axis must be that of the samples, of which some are computed at a time"
                )
            return given + (output - output.detach())  # (exactly what is given; rules see that it is of the input)

        with changed_at(unwrap(self.model), layer, change) as calls:
            found = self.multipliers(inputs, target, layer)[1]
        check_changed_once(layer, calls)
        return found

    @atomic
    def differentiating(
        self, target: Target, relevance: bool = False, layer: str | None = None
    ) -> Iterator[Callable[..., Tensors]]:
        """Function, for many passes, from variants of inputs and the target of these rows to what `multipliers` gives.

        With ``relevance``, it is what the composite gives, as it is. With a layer, it is what `multipliers` gives of
        the layer, whose output is a third argument.
        """
        if layer is not None:
            yield partial(self._multipliers_at, layer)
            return
        if self.composite is not None or self.condition:
            yield (
                lambda inputs, rows: self.flow(inputs, rows).inputs if relevance else self.multipliers(inputs, rows)[1]
            )
            return
        differentiable(self.model)

        def gradients(inputs: Inputs, rows: Target) -> Tensors:
            leaves = [data.detach().requires_grad_() for data in inputs.explained]
            with torch.enable_grad():
                output = outputs(inputs.having(leaves))
            if not output.requires_grad:
                raise InputError("the model's output does not depend on the data in a differentiable way")
            start = rows.weights(output.detach())
            return torch.autograd.grad(output, leaves, start, allow_unused=True, materialize_grads=True)

        with explaining(self.model, None, target.select, target.layer) as outputs:
            yield gradients

    @atomic
    def scoring(self, target: Target) -> Iterator[Callable[[Inputs, Target], Tensor]]:
        """Function from variants of inputs and the target of these rows to their scores, without gradients."""
        with explaining(self.model, None, target.select, target.layer) as outputs, torch.no_grad():
            yield lambda inputs, rows: rows.score(outputs(inputs))

    def output(self, inputs: Inputs, select: Callable[[Any], Tensor] = tensor_in) -> Tensor:
        """Output of the model, in parts of ``batch_size`` rows; ``select`` takes it from what the model returns."""
        with explaining(self.model, select=select) as outputs, torch.no_grad():
            parts = torch.split(torch.arange(len(inputs)), self.batch_size or len(inputs))
            return torch.cat([outputs(inputs.select(part.tolist())) for part in parts])

    def parts(self, inputs: Inputs, target: Target) -> Iterator[tuple[Inputs, Target]]:
        """Samples that go through the model together, with their target: all of them, or ``batch_size`` at a time."""
        for sample, _ in self.rows(len(inputs), 1, target, len(inputs)):
            yield inputs.select(sample), target.rows(sample)

    def rows(self, n_samples: int, times: int, target: Target, default: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of rows in which every sample is seen ``times`` times.

        Yields
        ------
        sample, time : Tensor of shape (rows,)
            Which sample each row is of, and which time it is; all samples the first time, then the second time.
        """
        size = self.batch_size or (n_samples if target.joint else max(n_samples, default // n_samples * n_samples))
        for row in torch.split(torch.arange(n_samples * times), size):
            yield row % n_samples, row // n_samples

    def _composite(self) -> Composite:
        return self.composite or GradientComposite()

    def _explain(self, inputs: Inputs, target: Target) -> tuple[Tensor, Tensors]:
        target.check(len(inputs))
        check_alone(self.model, self.composite, type(self).__name__)
        output, relevance = self.attribute(inputs, target)
        if inputs.embedded and isinstance(scored := getattr(target, "target", target), Classes):
            warn_of_positions(scored.ids.tolist(), output, inputs)
        return output, relevance


class _Explained(CondAttribution):
    """The engine with a target of any kind; its heatmap is the relevance of the input in its own shape."""

    def __init__(self, model: nn.Module, target: Target, asked: Propagation) -> None:
        super().__init__(model)
        self.MODEL_OUTPUT_NAME = "<output>"  # (layers may have any name)
        self.target, self.asked = target, asked
        #: Outputs of the model, whatever of them is explained, each time that one is read.
        self.outputs: list[Tensor] = []
        # A score that is a further layer of the model starts from one, exactly, also where an output is 0.
        is_output = target.layer is None and not isinstance(target, Start)
        self.appended = is_output and asked.encoding == "multiplier" and asked.initial != "one"

    def explain(
        self,
        data: Inputs,
        condition: Mapping[str, Any],
        composite: Composite,
        record: Sequence[str],
        mask_map: MaskMap,
    ) -> AttributionResults:
        target = self.target
        if isinstance(target, Start):
            return self(data, [condition], composite, record, mask_map, init_rel=target.attr_output)
        if target.layer is not None:
            start = {target.layer: (), **condition}
            masks = dict.fromkeys(condition, mask_map) if callable(mask_map) else dict(mask_map)
            masks[target.layer] = target.keep
            return self(data, [start], composite, record, masks, start_layer=target.layer)
        if self.appended:
            return self(data, [{self.MODEL_OUTPUT_NAME: 0, **condition}], composite, record, mask_map)
        return self(data, [condition], composite, record, mask_map, init_rel=self._initial)

    def heatmap_modifier(self, data: Tensor, on_device: torch.device | str | None = None) -> Tensor:
        assert data.grad is not None
        return data.grad.detach()

    def select_output(self, output: Any) -> Tensor:
        tensor = self.target.select(output)
        self.outputs.append(tensor.detach())
        return self.target.score(tensor)[:, None] if self.appended else tensor

    def _initial(self, output: Tensor) -> Tensor:
        weights = self.target.weights(output)
        return weights if self.asked.readout == "multiplier" or self.asked.initial == "one" else weights * output


def _target(target: Any) -> Target:
    if target is None:
        return Start(lambda output: output)
    if isinstance(target, np.ndarray) and target.dtype.kind in "biuf":
        target = torch.from_numpy(target.copy())
    if callable(target) or (isinstance(target, Tensor) and target.is_floating_point()):
        return Start(target)
    return Target.of(target)
