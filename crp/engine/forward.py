"""One forward pass of a model, and what it leaves behind for any number of backward passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.engine.encoding import Encoding
from crp.engine.inputs import Inputs
from crp.engine.reference import referencing
from crp.engine.taps import Flow, Tap, Use
from crp.layers import find_layers, modules_of
from crp.notices import warn
from crp.types import Sinks

#: Begin of the names of sinks; no layer has such a name.
SINK = "absorbed by "


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass leaves behind for any number of backward passes.

    Attributes
    ----------
    inputs : Inputs
        What the model was given; those that are explained are leaves that the gradient is asked for.
    output : Use
        The model's, of shape (samples, *output shape).
    uses : dict of str to Use
        Conditioned, recorded and start layers.
    encoding : Encoding
    sinks : dict of str to Use
        What layers keep of the relevance, if that is accounted for; by layer and number of its call.
    """

    inputs: Inputs
    output: Use
    uses: dict[str, Use]
    encoding: Encoding
    sinks: dict[str, Use]

    @classmethod
    def run(
        cls,
        model: nn.Module,
        inputs: Inputs,
        layers: dict[str, str],
        select_output: Callable[[Any], Tensor],
        composite: Composite | None,
        account: Sinks | None = None,
    ) -> ForwardPass:
        """Run the model on its inputs, tapping layers.

        Parameters
        ----------
        model : nn.Module
        inputs : Inputs
        layers : dict of str to str
            Layer name to its role, ``"condition"``, ``"start"`` or ``"record"``; ``"name#1"`` is its second use.
        select_output : callable
            Tensor to explain in what the model returns.
        composite : zennit.core.Composite or None
            The one that is on the model.
        account : Sinks, optional
            Where its rules account for what layers keep.
        """
        references: list[Any] = []

        def keep_reference(module: nn.Module, args: Any, output: Any) -> None:
            if referencing():
                references.append(output)

        handle = model.register_forward_hook(keep_reference)
        try:
            with _tapped(model, layers) as called, torch.enable_grad():
                # Tensors made in inference mode cannot take part in autograd, but copies can.
                inputs = inputs.each(lambda tensor: tensor.clone() if tensor.is_inference() else tensor.detach())
                for leaf in inputs.explained:
                    leaf.requires_grad_()
                returned = inputs.run(model)
                # (What is chosen of the output is no part of the model, and no rule's business.)
                reference = select_output(references[0]).detach() if references else None
                output = select_output(returned)
        finally:
            handle.remove()
        _check_explained("the model's output", output)
        _check_batch("the model's output", output, len(inputs))
        uses = _uses(layers, called, len(inputs))
        for layer, use in uses.items():
            if layers[layer] == "start":
                _check_explained(f"the output of start_layer {layer!r}", use.output)
            elif inputs.passes_on and not use.output.requires_grad:
                warn(
                    f"layer {layer!r} reads inputs that are passed on only ({', '.join(map(repr, inputs.names))} are "
                    "explained); its relevance is not known, and given as 0"
                )
        output_use = Use(output, Flow(), reference)
        return cls(inputs, output_use, uses, Encoding.of(composite), _sinks(account))


def record_outputs(model: nn.Module, data: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Outputs of layers for ``data``, by a forward pass without gradients; without those that it does not use."""
    recorded = dict.fromkeys(layers, "record")
    with _tapped(model, recorded) as called, torch.no_grad():
        model(data.clone())
    return {layer: use.output for layer, use in _uses(recorded, called, len(data)).items()}


@contextmanager
def _tapped(model: nn.Module, layers: Mapping[str, str]) -> Iterator[dict[str, tuple[int | None, Tap]]]:
    """Context in which layers are tapped; by layer, which call is meant, and the tap."""
    known = modules_of(model) if layers else {}
    meant = {layer: _split(layer, known) for layer in layers}
    taps = {name: Tap(name) for name, _ in meant.values()}
    handles = []
    try:
        for name, tap in taps.items():
            handles.append(known[name].register_forward_hook(tap, with_kwargs=True))
        yield {layer: (number, taps[name]) for layer, (name, number) in meant.items()}
    finally:
        for handle in handles:
            handle.remove()


def _uses(layers: Mapping[str, str], called: Mapping[str, tuple[int | None, Tap]], n_samples: int) -> dict[str, Use]:
    """Calls of layers that are meant; without layers to record that are not called."""
    found = {}
    for layer, (number, tap) in called.items():
        use = _use(tap.name, number, tap.uses, layers[layer])
        if use is not None:
            found[layer] = use
            _check_batch(f"the output of layer {layer!r}", use.output, n_samples)
    return found


def _check_explained(what: str, tensor: Tensor) -> None:
    if not tensor.requires_grad:
        raise ValueError(
            f"{what} (dtype {tensor.dtype}) does not depend on the data in a differentiable way; "
            "explain a tensor before rounding, argmax or detach"
        )


def _check_batch(what: str, tensor: Tensor, n_samples: int) -> None:
    if tensor.dim() == 0 or len(tensor) != n_samples:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}; its first axis must be that of {n_samples} samples")


def _use(layer: str, number: int | None, uses: list[Use], role: str) -> Use | None:
    """Call of a layer that is meant; None for a layer to record that is not called."""
    if not uses and role == "record":
        warn(f"layer {layer!r} is not called in the forward pass; nothing is recorded")
        return None
    if not uses:
        raise ValueError(f"layer {layer!r}, named as {role}, is not called in the forward pass")
    if number is not None and number >= len(uses):
        raise ValueError(f"layer {layer!r} is called {len(uses)} times; there is no {layer}#{number}")
    if number is None and len(uses) > 1:
        names = ", ".join(f"{layer}#{i}" for i in range(len(uses)))
        if role != "record":
            raise ValueError(f"layer {layer!r} is called {len(uses)} times in the forward pass; name one: {names}")
        warn(f"layer {layer!r} is called {len(uses)} times; its last call is recorded, of {names}")
    return uses[-1 if number is None else number]


def _sinks(account: Sinks | None) -> dict[str, Use]:
    """What layers keep of the only sample, as if each call of a layer had an output for it."""
    found = {}
    for layer, sinks in (account.sinks if account is not None else {}).items():
        for number, sink in enumerate(sinks):
            use = found[f"{SINK}{layer}#{number}"] = Use(sink, Flow())
            sink.register_hook(use.flow)  # type: ignore[no-untyped-call]
    return found


def tensor_in(output: Any) -> Tensor:
    """Tensor to explain in what a model returns: itself, or its ``logits``."""
    output = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returns a {type(output).__name__}, not a tensor or an object with 'logits'; "
            "override CondAttribution.select_output to choose the tensor to explain"
        )
    return output


def _split(layer: str, known: Collection[str]) -> tuple[str, int | None]:
    """Name of a layer and number of its use, ``"name#1"`` being the second."""
    name, _, number = layer.rpartition("#")
    if layer in known or not name or name not in known or not number.isdigit():
        return layer, None
    return name, int(number)


def check_layers(model: nn.Module, layers: Sequence[str], role: str) -> None:
    """Raise a `KeyError` that names the nearest layers if the model lacks one (``"name#1"`` counts as ``"name"``)."""
    if not layers:
        return
    known = modules_of(model)
    for layer in layers:
        if not isinstance(layer, str):
            raise TypeError(f"<{role}> layers are named by strings, as in model.named_modules(), not {layer!r}")
    find_layers(model, [_split(layer, known)[0] for layer in layers], role)
