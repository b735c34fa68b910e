"""One forward pass of a model, and what it leaves behind for any number of backward passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.engine.conditions import Rows, row_index
from crp.engine.encoding import Propagation, propagation_of
from crp.engine.inputs import Data, Inputs
from crp.engine.starts import Arrivals
from crp.engine.taps import check_layers, outputs_meant, tapped
from crp.errors import InputError, InputTypeError
from crp.layers import evaluating, hooked, referencing, unwrap
from crp.layers.autograd import lay_out_alike
from crp.layers.devices import send_to
from crp.notices import kind_of, warn
from crp.types import AttributionResults, Sinks

#: Begin of the names of sinks; no layer has such a name.
SINK = "absorbed by "


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass leaves behind for any number of backward passes.

    Its tensors have a *column* for each sample along the first axis. A layer may have several entries for each: one
    that runs on (batch * time), say. Which entry is of which sample is known where there is one column only.

    Attributes
    ----------
    inputs : Inputs
        What the model was given; those that are explained are leaves that the gradient is asked for.
    output : Tensor of shape (columns, *output shape)
        The model's.
    layers : dict of str to Tensor of shape (columns * entries, *layer shape)
        Outputs of conditioned, recorded and start layers; and sinks, whose gradient is what a layer keeps.
    references : dict of str or None to Tensor
        Outputs for the reference input of a composite that has one, by layer; the model's own by None.
    propagation : Propagation
    samples : tuple of int
        Sample of each column, as rows name it.
    is_ragged : bool
        Whether outputs of samples differ in shape, as numbers of boxes do; ``output`` is then empty.
    arrivals : Arrivals
        What arrived at layers in an earlier backward pass.
    """

    inputs: Inputs
    output: Tensor
    layers: dict[str, Tensor]
    references: dict[str | None, Tensor]
    propagation: Propagation
    samples: tuple[int, ...] = ()
    is_ragged: bool = False
    arrivals: Arrivals = field(default_factory=Arrivals)

    @classmethod
    def run(
        cls,
        model: nn.Module,
        inputs: Inputs,
        roles: Mapping[str, str],
        select_output: Callable[[Any], Tensor],
        composite: Composite | None,
        account: Sinks | None = None,
        samples: tuple[int, ...] = (),
    ) -> ForwardPass:
        """Run the model on its inputs, tapping layers in their roles (see `tapped`).

        ``select_output`` chooses the tensor to explain in what the model returns. The composite is the one that is on
        the model, and accounts for what layers keep of the only sample in ``account``.
        """
        returned_for_reference: list[Any] = []

        def keep_reference(module: nn.Module, args: Any, output: Any) -> None:
            if referencing():
                returned_for_reference.append(output)

        with hooked({model: keep_reference}), tapped(model, roles) as taps, torch.enable_grad():
            # Tensors made in inference mode cannot take part in autograd, but copies can.
            inputs = inputs.each(lambda tensor: tensor.clone() if tensor.is_inference() else tensor.detach())
            for leaf in inputs.explained:
                leaf.requires_grad_()
            returned = inputs.run(model)
            # (What is chosen of the output is no part of the model, and no rule's business.)
            output = _stacked(select_output(returned), len(inputs))
            reference = None
            if returned_for_reference and output is not None:
                of_reference = _stacked(select_output(returned_for_reference[0]), len(inputs))
                reference = None if of_reference is None else of_reference.detach()
                if reference is None or reference.shape != output.shape:
                    raise InputError("the model's output for the reference is of another shape than that for the data")
        if output is not None:
            _check_explained("the model's output", output)
            check_columns("the model's output", output, len(inputs))
        layers, references = outputs_meant(taps, roles)
        lay_out_alike([*layers.values()] if output is None else [output, *layers.values()])
        for layer in layers:
            _check_layer(layer, roles[layer], layers[layer], inputs)
        if reference is not None:
            references[None] = reference
        is_ragged, output = output is None, torch.empty(0) if output is None else output
        return cls(inputs, output, layers | _sinks(account), references, propagation_of(composite), samples, is_ragged)

    @property
    def is_folded(self) -> bool:
        """Whether samples must be computed one at a time: their outputs differ in shape, or entries have no owner.

        A layer may have several entries for each column, of which it is not known whose they are.
        """
        n_columns = len(self.inputs)
        layers = (output for name, output in self.layers.items() if not name.startswith(SINK))
        return self.is_ragged or (n_columns > 1 and any(len(output) != n_columns for output in layers))

    def columns(self, rows: Rows) -> list[int]:
        """Column of each row."""
        if rows.samples == self.samples:
            return list(range(len(rows)))
        place = {sample: column for column, sample in enumerate(self.samples)}
        return [place[sample] for sample in rows.samples]

    def of_rows(self, tensor: Tensor, rows: Rows, copy: bool = False) -> Tensor:
        """(columns * entries, ...) to (rows * entries, ...), detached.

        A view where nothing is moved, unless ``copy``.
        """
        tensor, columns, n_columns = tensor.detach(), self.columns(rows), len(self.inputs)
        if columns == list(range(n_columns)):
            return tensor.clone() if copy else tensor
        index = row_index(columns, len(tensor) // n_columns)
        return tensor.index_select(0, send_to(tensor.device, torch.tensor(index)))

    def value(self, layer: str | None, rows: Rows) -> Tensor:
        """What relevance of rows counts at a layer, or at the model's output: (rows * entries, ...), to be read only.

        The output, or what it differs by from its reference.
        """
        value = (self.output if layer is None else self.layers[layer]).detach()
        if layer in self.references:
            value = value - self.references[layer]
        return value.expand(len(rows), *value.shape[1:]) if len(value) == 1 else self.of_rows(value, rows)


def get_output_shapes(model: nn.Module, single_sample: Data, record_layers: Iterable[str]) -> dict[str, torch.Size]:
    """Output shape of each layer, without the batch axis, from one forward pass in evaluation mode.

    Parameters
    ----------
    model : nn.Module
    single_sample : Tensor of shape (1, *input shape), or tuple or dict of them
    record_layers : iterable of str
        Names as in `crp.layers.addresses`.

    Returns
    -------
    dict of str to torch.Size
        Layers that the forward pass does not reach are absent, and a warning names them.

    Raises
    ------
    KeyError
        If a layer is not in the model.
    ValueError, TypeError
        If the model cannot take the sample, a layer is not called so often, or returns no tensor.
    """
    model = unwrap(model)
    if isinstance(record_layers, str) or not isinstance(record_layers, Iterable):
        raise InputTypeError(f"record_layers must be a list of layer names, not {record_layers!r}")
    inputs, layers = Inputs.of(single_sample, None, model), list(record_layers)
    check_layers(model, layers, "record_layer")
    with evaluating(model):
        outputs = _recorded(model, inputs.run, layers)
    for layer, output in outputs.items():
        _check_divisible(layer, output, len(inputs))
    return {layer: output.shape[1:] for layer, output in outputs.items()}


def record_outputs(
    model: nn.Module, run: Callable[[nn.Module], Any], n_samples: int, layers: Sequence[str]
) -> dict[str, Tensor]:
    """Outputs of layers when ``run`` calls the model, without gradients; without those that are not used.

    Raises
    ------
    ValueError
        If an output has not one entry for each sample.
    """
    outputs = _recorded(model, run, layers)
    for layer, output in outputs.items():
        check_columns(f"the output of layer {layer!r}", output, n_samples)
    return outputs


def _recorded(model: nn.Module, run: Callable[[nn.Module], Any], layers: Sequence[str]) -> dict[str, Tensor]:
    roles = dict.fromkeys(layers, "record")
    with tapped(model, roles) as taps, torch.no_grad():
        run(model)
    return outputs_meant(taps, roles)[0]


def check_one_entry(results: AttributionResults, layers: Collection[str] | None = None) -> AttributionResults:
    """Raise a `ValueError` if layers (all, by default) have several entries for each row; otherwise the results."""
    for layer, relevance in results.relevances.items():
        if layers is None or layer in layers:
            what, n_rows = f"the output of layer {layer!r}", len(results.prediction)
            n_entries, rest = divmod(len(relevance), n_rows) if relevance.dim() and n_rows else (1, 0)
            if n_entries > 1 and not rest:
                raise InputError(
                    f"{what} has shape {tuple(relevance.shape)}: {n_entries} entries along its first axis for each of "
                    f"{n_rows} rows, such as windows of attention, which would have to be added up; name a layer that "
                    "has one for each, such as the whole attention"
                )
            check_columns(what, relevance, n_rows, "rows")
    return results


def _check_layer(layer: str, role: str, output: Tensor, inputs: Inputs) -> None:
    n_samples, what = len(inputs), f"the output of layer {layer!r}"
    if output.is_complex():
        raise InputTypeError(f"{what} has complex numbers, of which relevance has no parts; name a layer of real ones")
    if role == "start":
        check_columns(what, output, n_samples)
        _check_explained(f"the output of start_layer {layer!r}", output)
        return
    _check_divisible(layer, output, n_samples)
    if inputs.passes_on and not output.requires_grad:
        warn(
            f"layer {layer!r} reads inputs that are passed on only ({', '.join(map(repr, inputs.names))} are "
            "explained); its relevance is not known, and given as 0"
        )


def _check_divisible(layer: str, output: Tensor, n_samples: int) -> None:
    if output.dim() == 0 or len(output) == 0 or len(output) % n_samples:
        raise InputError(
            f"the output of layer {layer!r} has shape {tuple(output.shape)}; its first axis must be that of "
            f"{n_samples} samples, or have as many entries for each of them"
        )


def _check_explained(what: str, tensor: Tensor) -> None:
    if not tensor.requires_grad:
        raise InputError(
            f"{what} (dtype {tensor.dtype}) does not depend on the data in a differentiable way; "
            "explain a tensor before rounding, argmax or detach"
        )


def check_columns(what: str, tensor: Tensor, n: int, of: str = "samples") -> None:
    """Raise an error that begins with ``what`` unless a tensor has a row for each of ``n`` samples."""
    if tensor.dim() == 0 or len(tensor) != n:
        raise InputError(f"{what} has shape {tuple(tensor.shape)}; its first axis must be that of {n} {of}")


def _sinks(account: Sinks | None) -> dict[str, Tensor]:
    """What layers keep of the only sample, as if each call of a layer had an output for it."""
    sinks = account.sinks if account is not None else {}
    return {f"{SINK}{layer}#{number}": sink for layer, calls in sinks.items() for number, sink in enumerate(calls)}


def _stacked(output: Any, n_samples: int) -> Tensor | None:
    """Output of all samples, of which a list has one tensor for each; None where these differ in shape."""
    if not isinstance(output, list):
        return cast(Tensor, output)
    if len(output) != n_samples:
        raise InputError(f"output returned a list of {len(output)} tensors for {n_samples} samples; give one for each")
    return torch.stack(output) if len({tensor.shape for tensor in output}) == 1 else None


def tensor_in(output: Any) -> Tensor:
    """Tensor to explain in what a model returns: itself, or its ``logits``."""
    output = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    if not isinstance(output, Tensor):
        parts = list(output) if isinstance(output, Mapping) else [*range(len(output))] if type(output) is tuple else []
        of_parts = f", and entry({parts[0]!r}) for one of its parts {parts}" if parts else ""
        raise InputTypeError(
            f"the model returns {kind_of(output)}, not a tensor or an object with 'logits'; choose the tensor "
            "to explain by output=, of CondAttribution or crp.explain: crp.outputs has segmentation() and detection()"
            + of_parts
        )
    return output
