"""Token ids as inputs: what is explained are their embeddings, which take the place of what the model looks up.

A model is called with its ids as ever, so that whatever else it reads of them (padding, positions) stays as it is. The
embeddings are a further input: axis 1 holds their features, as that of an image holds its channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crp.engine.attached import put_on
from crp.errors import InputError, OutOfRangeError
from crp.layers import OfThread, hooked, looking, modules_of
from crp.layers.devices import device_of
from crp.layers.interrupts import atomic
from crp.layers.misfits import telling_misfits, unknown_ids
from crp.layers.state import undisturbed

#: Numbers of calls. Each hands embeddings to its own hooks, as other threads may call the same model.
_calls = count()
#: Layer that was found to look ids up, which each call checks, and among which layers, for which input.
_lookups: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


class Embedded(NamedTuple):
    """Embeddings of token ids.

    Attributes
    ----------
    layer : str
        Layer of the model that looks them up.
    values : Tensor of shape (samples, features, *shape of the ids of one sample)
    """

    layer: str
    values: Tensor

    @classmethod
    def of(cls, model: nn.Module, layer: str, ids: Tensor, name: int | str) -> Embedded:
        """Embeddings that a layer has of ids."""
        module = modules_of(model)[layer]
        assert isinstance(module, nn.Embedding)
        _check_range(ids, name, layer, module)
        weight = module.weight
        with torch.no_grad(), looking():
            values = module(ids if weight.is_meta else ids.to(weight.device))  # (a layer that is offloaded moves them)
        return cls(layer, values.movedim(-1, 1).contiguous())


def _can_embed(model: nn.Module, ids: object) -> bool:
    """Whether these may be token ids that the model looks up: integers, and a model with embeddings."""
    return _hold_ids(ids) and any(isinstance(module, nn.Embedding) for module in model.modules())


def _hold_ids(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32) and value.dim() > 0


def _name_of_ids(values: Mapping[Any, Any]) -> int | str | None:
    """Name of the input that holds token ids, among inputs of which none but a mask is floating; None if not clear."""
    others = (value for name, value in values.items() if name != "attention_mask")
    if any(isinstance(value, Tensor) and value.is_floating_point() for value in others):
        return None
    ids = [name for name, value in values.items() if _hold_ids(value)]
    return "input_ids" if "input_ids" in ids else ids[0] if len(ids) == 1 else None


def embed(model: nn.Module, values: Mapping[Any, Any], name: int | str) -> Embedded:
    """Embeddings of one of a model's inputs.

    Parameters
    ----------
    model : nn.Module
    values : mapping of int or str to Any
        All inputs, by position or name.
    name : int or str
        The one that holds token ids.

    Raises
    ------
    ValueError
        If it is not clear which layer looks them up.
    IndexError
        If an id has no embedding.
    """
    layers = {layer: module for layer, module in modules_of(model).items() if isinstance(module, nn.Embedding)}
    # (the probe for the layer would fail at an id that no layer has)
    _check_range(values[name], name, *max(layers.items(), key=lambda item: item[1].num_embeddings))
    layer = _layer_of_ids(model, layers, values, name)
    return Embedded.of(model, layer, values[name], name)


def _check_range(ids: Tensor, name: int | str, layer: str, module: nn.Embedding) -> None:
    wrong = unknown_ids(ids, module)
    if len(wrong):
        raise OutOfRangeError(
            f"input {name!r} holds the id {int(wrong[0])}; layer {layer!r} has embeddings of the ids 0 to "
            f"{module.num_embeddings - 1}"
        )


def _layer_of_ids(
    model: nn.Module, layers: Mapping[str, nn.Embedding], values: Mapping[Any, Any], name: int | str
) -> str:
    """Name of the layer that looks ids up: the input embeddings of Hugging Face, the only one, or what reads them."""
    if len(layers) == 1:
        return next(iter(layers))
    own = input_embeddings(model) if str(name).endswith("input_ids") else None
    for layer, module in layers.items():
        if module is own:
            return layer
    key = name, *values, *map(id, layers.values())
    known = _lookups.get(model)
    if known is not None and known[0] == key:
        return known[1]
    readers: dict[str, None] = {}
    device = device_of(model)
    one = {place: value[:1].to(device) if isinstance(value, Tensor) else value for place, value in values.items()}

    def note(layer: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _is_same(_given(args, kwargs), one[name]):
            readers[layer] = None

    hooks: dict[nn.Module, Any] = {module: partial(note, layer) for layer, module in layers.items()}
    by_position = [value for place, value in one.items() if isinstance(place, int)]
    by_name = {place: value for place, value in one.items() if isinstance(place, str)}
    told, as_it_was = telling_misfits(model, [], values), undisturbed(model, later=model.parameters())
    with hooked(hooks, with_kwargs=True), looking(), put_on(None, model), torch.no_grad(), told, as_it_was:
        model(*by_position, **by_name)
    if len(readers) != 1:
        raise _wrong_readers(name, readers)
    (layer,) = readers
    _lookups[model] = key, layer
    return layer


def _wrong_readers(name: int | str, readers: Collection[str]) -> InputError:
    return InputError(
        f"{f'layers {list(readers)} look' if readers else 'no layer looks'} up the embeddings of input {name!r}; one "
        "must, and read the ids as they are, int64. Explain another input, or call the model with its embeddings"
    )


def input_embeddings(model: nn.Module) -> object:
    """Layer that looks token ids up, where the model tells it, as those of Hugging Face do."""
    own = getattr(model, "get_input_embeddings", None)
    try:
        return own() if callable(own) else None
    except NotImplementedError:
        return None


def output_layer(model: nn.Module) -> str | None:
    """Name of the linear layer that scores tokens, where the model tells it, as those of Hugging Face do."""
    own = getattr(model, "get_output_embeddings", None)
    layer = own() if callable(own) else None
    names = (name for name, module in modules_of(model).items() if module is layer)
    return next(names, None) if type(layer) is nn.Linear else None


@atomic
def scored_at(model: nn.Module, positions: Sequence[int]) -> Iterator[list[int]]:
    """Context in which a language model scores tokens at one position of each text, so that its output has one only.

    The layer that scores must be linear, as it then does so at each position by itself; of 50 257 tokens, it costs more
    than all others of a small model together. Where `output_layer` does not know it, the output is whole.

    Yields
    ------
    list of int
        An entry for each time that it was done.
    """
    done, name = list[int](), output_layer(model)

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if len(args) == 1 else None
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or len(hidden) != len(positions):
            return None
        done.append(len(hidden))
        return (hidden[list(range(len(hidden))), list(positions)][:, None],)

    # (before the hooks of rules, which then see one position)
    handle = None if name is None else modules_of(model)[name].register_forward_pre_hook(OfThread(narrow), prepend=True)
    try:
        yield done
    finally:
        if handle is not None:
            handle.remove()


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input")


def _is_same(given: object, ids: Tensor) -> bool:
    """Whether these are the ids themselves, maybe in another shape."""
    return isinstance(given, Tensor) and given.data_ptr() == ids.data_ptr() and given.numel() == ids.numel()


@contextmanager
def _in_place_of_lookup(model: nn.Module, embedded: Mapping[int | str, Embedded]) -> Iterator[dict[str, Tensor]]:
    """Context in which a model takes embeddings of ids as further keywords, which are yielded.

    An error at its end tells where the layer that was found to has not looked the ids up, or others have, too.
    """
    number = next(_calls)
    keys = {f"embeddings of {name} in call {number}": name for name in embedded}  # (no argument has such a name)
    waiting: dict[int | str, tuple[Tensor, Tensor]] = {}
    modules, used, handles = modules_of(model), dict[int | str, dict[str, None]](), []
    told = input_embeddings(model)

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for key, name in keys.items():
            if key in kwargs:
                waiting[name] = args[name] if isinstance(name, int) else kwargs[name], kwargs[key]
        return args, {key: value for key, value in kwargs.items() if key not in keys}

    def give(name: int | str, reader: str, _: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        ids, values = waiting.get(name, (None, None))
        if ids is None or values is None or not _is_same(_given(args, kwargs), ids):
            return None
        used.setdefault(name, {})[reader] = None
        if reader != embedded[name].layer:
            return None
        # (as it lies in memory otherwise: a model may ask for views of it)
        return values.movedim(1, -1).contiguous().view(output.shape)

    handles.append(model.register_forward_pre_hook(take, with_kwargs=True))
    for name, (layer, _) in embedded.items():
        for other, module in modules.items():
            # (parts of a model, as encoder and decoder, may look ids up by layers that share their weights)
            is_own = getattr(module, "weight", None) is modules[layer].weight and type(module) is type(modules[layer])
            if is_own or (isinstance(module, nn.Embedding) and modules[layer] is not told):
                # (first, so that what is recorded of the layer are these embeddings)
                hook = partial(give, name, layer if is_own else other)
                handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
    try:
        yield {key: embedded[name].values for key, name in keys.items()}
    finally:
        for handle in handles:
            handle.remove()
    for name, (layer, _) in embedded.items():
        if len(used.get(name, ())) > 1:
            raise _wrong_readers(name, used[name])
        if name not in used:
            raise InputError(
                f"layer {layer!r} does not look up the ids of input {name!r} themselves; give them as the model reads "
                "them, int64, or call the model with its embeddings"
            )
