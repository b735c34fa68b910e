"""One call for all methods, by name: ``crp.explain("intgrad", model, data, target, steps=50)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from crp.attributors.catalogue import Entry, Method, entries
from crp.attributors.gradient import Gradient
from crp.attributors.scores import known_target
from crp.attributors.selected import Selected
from crp.attributors.target import Classes, Neuron, Target
from crp.checks import check_number
from crp.composites.registry import ALIASES, find_known
from crp.engine.forward import tensor_in
from crp.engine.inputs import Data, Explain, Inputs
from crp.errors import InputError, InputTypeError
from crp.flags import check_function
from crp.layers import nearest
from crp.wording import shortened

#: What methods are called elsewhere.
_ALIASES = {**ALIASES, "ig": "intgrad", "integrated_gradients": "intgrad"}


def explain(
    method: str,
    model: nn.Module,
    data: Data,
    target: Any = None,
    *,
    explain: Explain = None,
    layer: str | None = None,
    neuron: int | tuple[int, ...] | None = None,
    output: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Any:
    """Explain a model's output, or one of its neurons, by any method.

    Parameters
    ----------
    method : str
        One of `methods`, in any case: the names of DeepExplain, those of all composites, and more. Some go by other
        names, too, such as ``"LRP"``, ``"ig"`` and ``"IntegratedGradients"``.
    model : nn.Module
        It is explained in evaluation mode, and left as it was.
    data : Tensor of shape (samples, *input shape), or tuple or dict of them
        For models with several inputs, a tuple holds the positional arguments, and a dict the keyword arguments. Of
        token ids, of shape (samples, tokens), the model's embeddings are explained; the result has a number for each
        token: the sum over the features of its embedding, or what a map of positions has there.
    target : int, sequence of int, Tensor, callable, Target or None
        One class for all samples, or one for each; a float mask of the output's shape, such as a probability
        distribution; a differentiable function of the output that returns one score per row;
        ``crp.attributors.Neuron(layer, index)``; of `crp.outputs`, ``Position(position, token)`` for a language model,
        ``Pixels(class, mask)`` or ``Element(place)`` for dense outputs, or a list of these, one for each sample. None
        is the class that the model predicts, which has the largest score.
    explain : int, str, or sequence of these, optional
        Positions (in a tuple) or names (in a dict) of the inputs that are explained: all floating-point tensors by
        default. Others, such as ids or masks, are passed on.
    layer : str, optional
        With ``neuron``, the layer that it is in. Otherwise an option of the method: the layer of a class activation
        map, or, for composites and gradients, the layer that is explained in place of the input.
    neuron : int or tuple of int, optional
        Unit to explain in place of an output: its place in the output of ``layer``, without the batch axis; a shorter
        one, such as a channel, is all that it holds.
    output : callable, optional
        Takes the tensor to explain from what the model returns, of shape (samples, classes, ...): for models that
        return a dict, boxes or several tensors. ``crp.outputs.segmentation()`` scores the classes of a segmentation,
        ``crp.outputs.detection()`` those of boxes. By default, the model returns the tensor, or has it as ``logits``.
    **options
        Of the method, see `methods`. All take ``batch_size``, the number of rows in one pass through the model; those
        that use gradients take ``condition``, ``{layer: concept ids}``, and attributors a ``composite`` or its name.

    Returns
    -------
    Tensor of the data's shape, or tuple or dict of them
        A tensor where one input is explained. For several it has the form of the data, with None for inputs that are
        passed on. Of the layer's shape where a layer is explained. Maps of positions are the same for all channels.

    Raises
    ------
    ValueError
        If there is no such method or option; the message gives the nearest names.
    TypeError, KeyError, IndexError
        If data, target or layer are none of the model.

    Examples
    --------
    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    >>> explain("intgrad", net, torch.ones(5, 3), target=[0, 1, 1, 0, 1], steps=20).shape
    torch.Size([5, 3])
    >>> explain("epsilon", net, torch.ones(5, 3), layer="0", neuron=2).shape
    torch.Size([5, 3])
    >>> explain("occlusion", net, torch.ones(5, 3), 0, output=lambda returned: returned.softmax(1)).shape
    torch.Size([5, 3])
    """
    entry = _entry(method)
    check_function("output", output, "what the model returns")
    if neuron is not None:
        if target is not None:
            raise InputError(f"target {target!r} and neuron {neuron!r} are both given; one can be explained")
        if layer is None:
            raise InputError(f"neuron {neuron!r} needs the layer that it is in; give layer=")
        target, layer = Neuron(layer, neuron), None
    if layer is not None:
        options["layer"] = layer
    _check_options(entry.method, options)
    inputs = Inputs.of(data, explain, model)
    inputs.check()
    inputs = inputs.each(Tensor.detach)
    aim = _predicted(model, inputs, options, output) if target is None else Target.of(target)
    if output is not None:
        aim = Selected(aim, output)
    aim.check(len(inputs))
    results = entry.run(model, inputs, aim, options)
    if inputs.embedded and (layer is None or entry.method.family == "cam"):
        of_positions = entry.method.family in ("cam", "perturbation")
        pairs = zip(inputs.names, results, strict=True)
        results = tuple(_of_tokens(r, of_positions) if name in inputs.embedded else r for name, r in pairs)
    return inputs.shaped(results)


def _of_tokens(result: Tensor, of_positions: bool) -> Tensor:
    """Relevance of tokens from that of their embeddings: its sum, or what all features have alike in a map."""
    if of_positions and bool((result == result[:, :1]).all()):
        return result[:, 0]
    return result.sum(1)


def methods() -> list[Method]:
    """All methods that `explain` knows: name, family, options with their defaults, and paper.

    Examples
    --------
    >>> {method.name: method.paper for method in methods()}["intgrad"]
    'Sundararajan et al. 2017'
    """
    return [entry.method for entry in entries().values()]


def _entry(name: object) -> Entry:
    if not isinstance(name, str):
        raise InputTypeError(
            f"method must be a name, such as 'epsilon_plus_flat', not {shortened(name)}; the order is explain(method, "
            "model, data, target), and CondAttribution takes a composite itself"
        )
    known = entries()
    found = find_known(name, known, _ALIASES)
    if found is None:
        raise InputError(f"there is no method {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[found]


def find_method(name: str) -> Method:
    """Method by any name that `explain` takes; a `ValueError` gives the nearest."""
    return _entry(name).method


def _check_options(method: Method, options: dict[str, Any]) -> None:
    for name in options:
        if name not in method.options:
            near, has = nearest(name, method.options), ", ".join(sorted(method.options))
            raise InputError(f"method {method.name!r} has no option {name!r}{near}; it has {has}")
    missing = [name for name, default in method.options.items() if default is ... and name not in options]
    if missing:
        hint = ", the name of a layer with positions, such as the last convolution" if "layer" in missing else ""
        raise InputError(f"method {method.name!r} needs {', '.join(f'{name}=' for name in missing)}{hint}")
    if options.get("batch_size") is not None:
        options["batch_size"] = check_number("batch_size", options["batch_size"], 1, whole=True)


def _predicted(
    model: nn.Module, inputs: Inputs, options: Mapping[str, Any], output: Callable[[Any], Any] | None
) -> Target:
    # (which class is scored does not matter to what is selected)
    select = tensor_in if output is None else Selected(Classes(0), output).select
    return known_target(None, Gradient(model, batch_size=options.get("batch_size")).output(inputs, select))
