"""Putting a model back as it was before a forward pass that only looks at it.

A forward pass may leave traces in the model: batch norm and quantisation observers write to buffers, spiking and
recurrent layers keep their state in attributes, others count calls, fill caches, or draw random numbers.
"""

from __future__ import annotations

import operator
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from gc import get_referents
from itertools import chain
from sys import stdlib_module_names
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from crp.errors import InputError
from crp.layers.interrupts import atomic

#: Types without state that a forward pass could change.
_CONSTANT = (int, float, str, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, partial)
#: Random generators that a model can have of its own.
GENERATORS = (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)
#: Integer types by size, to compare bits: NaN then equals NaN, and 0 differs from -0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@atomic
def undisturbed(model: nn.Module, *inputs: Any, later: Iterable[Tensor] = ()) -> Iterator[Snapshot]:
    """Context that leaves a model, what it is called with, and random generators as they were, bit for bit.

    Put back are the attributes of all modules, new and deleted ones included; parameters and buffers, whether replaced,
    resized or written to; what is in lists, dictionaries, sets, deques, arrays and tensors that attributes hold, also
    through an object of the user's own; generators in attributes, those of Python, NumPy and torch, and those of the
    devices that hold tensors of the model.

    Parameters
    ----------
    model : nn.Module
    *inputs
        What the model is called with.
    later : iterable of Tensor
        Tensors whose content is kept only when `Snapshot.keep_now` is called for them, before they are written to.

    Yields
    ------
    Snapshot

    Raises
    ------
    ValueError
        If parameters or buffers of the model have no shape yet, which the first call would give them for good.

    Notes
    -----
    Memory for one copy of what is kept is needed meanwhile. What cannot be put back: objects behind objects, variables
    of functions and modules, files.
    """
    if lazy := [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]:
        raise InputError(f"{', '.join(lazy)}: no call has given these a shape; call the model once before")
    snapshot = Snapshot(later)
    snapshot.keep(model)
    snapshot.keep(inputs)
    snapshot.keep_random_states()
    try:
        yield snapshot
    finally:
        snapshot.restore()


def random_states(devices: Iterable[torch.device]) -> Iterator[tuple[Any, Callable[[Any], object]]]:
    """States of global random generators, torch's on the CPU and some devices, and functions that put them back."""
    yield random.getstate(), random.setstate
    yield np.random.get_state(), np.random.set_state  # noqa: NPY002 (what others draw from)
    yield torch.get_rng_state(), torch.set_rng_state
    for device in devices:
        module: Any = getattr(torch, device.type, None)
        if hasattr(module, "get_rng_state"):  # (not of the CPU)
            place = {} if device.type == "mps" else {"device": device}
            yield module.get_rng_state(**place), partial(module.set_rng_state, **place)


def random_numbers(devices: Iterable[torch.device] = ()) -> list[Any]:
    """The same states in parts that `numpy.array_equal` compares."""
    states = [state for state, _ in random_states(devices)]
    return [part for state in states for part in (state if isinstance(state, tuple) else (state,))]


def version_of(tensor: Tensor) -> int | None:
    """Count of in-place changes, shared by all views; None where torch keeps no count."""
    return None if tensor.is_inference() else tensor._version


class Snapshot:
    """State of everything that can be reached from what was kept.

    Parameters
    ----------
    later : iterable of Tensor
        Tensors that count only when they are kept themselves.
    """

    def __init__(self, later: Iterable[Tensor]) -> None:
        self._later = {id(tensor): tensor for tensor in later}
        self._seen: dict[int, Any] = {}  # (holding the objects, so that their ids stay theirs)
        self._undo: list[Callable[[], object]] = []
        self._devices: set[torch.device] = set()

    def restore(self) -> None:
        """Put everything back."""
        for undo in self._undo:
            undo()

    @property
    def generators(self) -> list[Any]:
        """Random generators in what was kept."""
        return [value for value in self._seen.values() if isinstance(value, GENERATORS)]

    def keep(self, value: Any, objects: bool = True) -> None:
        """Keep the content of a value; that of objects only where `objects` says so."""
        if value is None or isinstance(value, _CONSTANT) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, nn.Module):
            self._keep_module(value)
        elif isinstance(value, tuple | list | deque | set | dict):
            self._keep_container(value, objects)
        elif isinstance(value, np.ndarray):
            self._undo.append(partial(_put_array_back, value, value.copy()))
        elif (state := _state_of_generator(value)) is not None:
            self._undo.append(state)
        elif objects and _is_of_user(value):
            self._keep_container(vars(value), objects=False)

    def keep_now(self, tensor: Tensor) -> None:
        """Keep one of the tensors of ``later``; does nothing for others."""
        if self._later.pop(id(tensor), None) is not None:
            self._keep_content(tensor)

    def keep_random_states(self) -> None:
        """Keep the state of global random generators."""
        self._undo += [partial(put_back, state) for state, put_back in random_states(self._devices)]

    def _keep_module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            self._keep_scripted(module)
        self._keep_container(vars(module), objects=True)

    def _keep_scripted(self, module: Any) -> None:
        """Keep attributes that live outside Python."""
        kind: Any = torch._C.ConcreteModuleType.from_jit_type(module._c._type())
        for name in kind.get_attributes():
            value = module._c.getattr(name)
            self.keep(value)
            self._undo.append(partial(_put_attribute_back, module._c, name, value))
        for child in module.children():
            self.keep(child)

    def _keep_container(self, value: Any, objects: bool) -> None:
        if not isinstance(value, tuple):
            self._undo.append(partial(_put_content_back, value, dict(value) if isinstance(value, dict) else [*value]))
        for item in (*value.values(),) if isinstance(value, dict) else get_referents(value):
            self.keep(item, objects)

    def _keep_tensor(self, tensor: Tensor) -> None:
        self._devices |= {tensor.device} - {torch.device("cpu"), torch.device("meta")}
        if tensor.is_leaf:
            self.keep(tensor.grad)
            self._undo.append(partial(_put_gradient_back, tensor, tensor.grad, tensor.requires_grad))
        if attributes := vars(tensor):  # (in which bitsandbytes says how a weight is packed)
            self._keep_container(attributes, objects=True)
        self._keep_content(tensor, with_content=id(tensor) not in self._later)

    def _keep_content(self, tensor: Tensor, with_content: bool = True) -> None:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            same = tensor.detach()  # the same memory, and the shape and type of now
            content = _once(same).clone() if with_content else None
            self._undo.append(partial(_put_tensor_back, tensor, same, version_of(tensor), content))


def _put_tensor_back(tensor: Tensor, same: Tensor, version: int | None, content: Tensor | None) -> None:
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad(), torch.inference_mode(tensor.is_inference()):
        if _form(tensor) != _form(same):  # resized, or given other memory
            tensor.data = same
        if content is None:
            return
        if not _is_plain(same):
            if version_of(tensor) != version or tensor.layout is torch.sparse_coo:  # (which misses some changes)
                tensor.copy_(content)
        elif not _equals(_once(same), content):
            # (through `.data`, which does not count as a new version; batch norm's own changes do not count either)
            _once(same).data.copy_(content)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in memory, and nothing else."""
    special = tensor.is_nested or tensor.is_quantized or tensor.is_meta or tensor.layout is not torch.strided
    return not special and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def _once(tensor: Tensor) -> Tensor:
    """View of a tensor in which no entry is repeated, so that it can be written to."""
    if not _is_plain(tensor):
        return tensor
    return tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _form(tensor: Tensor) -> tuple[object, ...]:
    if not _is_plain(tensor):
        return ()
    memory = tensor.untyped_storage()._cdata
    return memory, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _equals(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    one, other = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t.resolve_neg() for t in (one, other))
    bits = _BITS[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))


def _put_gradient_back(tensor: Tensor, gradient: Tensor | None, requires_grad: bool) -> None:
    if tensor.grad is not gradient:
        tensor.grad = gradient
    if tensor.requires_grad != requires_grad:
        tensor.detach_().requires_grad_(requires_grad)


def _put_content_back(value: Any, content: Any) -> None:
    """Restore a list, deque, set or dictionary; one that holds the same objects is not touched."""
    if len(value) == len(content) and all(map(operator.is_, _flat(value), _flat(content))):
        return
    if isinstance(value, dict):
        for name in [name for name in value if name not in content]:
            del value[name]
        value.update(content)
        if list(value) == list(content):  # (not cleared, as other threads may read a module's attributes meanwhile)
            return
    value.clear()
    (value.update if isinstance(value, dict | set) else value.extend)(content)


def _flat(value: Any) -> Iterator[Any]:
    return chain.from_iterable(value.items()) if isinstance(value, dict) else iter(value)


def _put_attribute_back(scripted: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor | nn.Module) and scripted.getattr(name) is value:
        return
    scripted.setattr(name, value)


def _put_array_back(array: Any, content: Any) -> None:
    if array.tobytes() != content.tobytes():
        array[...] = content


def _state_of_generator(value: Any) -> Callable[[], object] | None:
    """How to put a random generator back; None for anything else."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):  # (whose numbers nobody knows)
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _is_of_user(value: Any) -> bool:
    """Whether an object is neither of Python's library nor of torch, and has attributes."""
    root = type(value).__module__.partition(".")[0]
    return root != "torch" and root not in stdlib_module_names and isinstance(getattr(value, "__dict__", None), dict)
