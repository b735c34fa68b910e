"""Activations that a user has written out: modules that make one elementwise function of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crp.layers.devices import holds
from crp.layers.nested import tensors_in
from crp.layers.state import undisturbed
from crp.rules.functions import Function, look_up
from crp.rules.mode import Choice, SeeingMode
from crp.rules.notes import Notes
from crp.rules.operation import Operation


def _may_be_activation(module: nn.Module) -> bool:
    """Whether a module is one of the user's, without parameters and parts, which may be an activation written out."""
    kind: type = type(module)
    return _is_of_the_user(kind) and not (module._parameters or module._buffers or module._modules)


@lru_cache(maxsize=4096)
def _is_of_the_user(kind: Any) -> bool:
    is_known = kind.__module__.startswith(("torch.", "crp.")) or issubclass(kind, torch.jit.ScriptModule)
    return not (is_known or kind.forward is nn.Module.forward)


def _one_activation(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> _Found:
    """Functions of which a module makes one activation in this call, and its notes; None if it makes anything else.

    A module is one activation if it is called with one tensor, returns one of the same shape, reads no other tensor
    that depends on the model's input, and calls only elementwise functions that a mode can see, one of them an
    activation. One that calls what no mode sees, such as a custom autograd.Function, is an activation of torch if it
    returns the values of one. To find out, the module runs once more, and is left as it was. The answer is remembered
    for as long as nothing changes that it may depend on.
    """
    if not _may_be_activation(module) or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return None
    answers, key = _answers.setdefault(module, {}), _key(module, args[0])
    if key in answers:
        return answers[key]
    probe = _Probe()
    functions = _probed(module, args[0], probe)
    if key is not None and not probe.reads_others:
        if len(answers) >= _MOST_ANSWERS:
            answers.clear()
        answers[key] = functions
    return functions


#: Answers that are remembered: for each module, by `_key`.
_Found: TypeAlias = tuple[list[Function], int] | None
_answers: WeakKeyDictionary[nn.Module, dict[Any, _Found]] = WeakKeyDictionary()
_MOST_ANSWERS = 64


def _key(module: nn.Module, data: Tensor) -> tuple[Any, ...] | None:
    """What the answer may depend on, beside values of tensors; None where an attribute may hold anything.

    Not in it are variables of Python modules that `forward` reads.
    """
    named = [item for item in vars(module).items() if item[0] not in _OF_ALL_MODULES]
    for kind in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        named += [(key, value) for key, value in vars(kind).items() if not key.startswith("__") or callable(value)]
    if not all(_is_plain(value) for _, value in named):
        return None
    return data.shape, data.dtype, data.device, *((key, type(value), value) for key, value in named)


#: Attributes of every module that do not tell what its `forward` does.
_OF_ALL_MODULES = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, BuiltinFunctionType)


def _is_plain(value: object) -> bool:
    """Whether a value is itself for good: a number, a string, a function without variables of its own, or a tuple."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, FunctionType):
        return all(isinstance(cell.cell_contents, type) for cell in value.__closure__ or ())
    return type(value) in _PLAIN


def _probed(module: nn.Module, data: Tensor, probe: _Probe) -> _Found:
    with undisturbed(module), torch.enable_grad():
        leaf = data.detach().clone().requires_grad_()
        probe.notes.enter(leaf, None)
        data = leaf.clone()  # (a leaf cannot be changed in place)
        probe.notes.add(data, 0)
        with probe:
            output = module.forward(data)
        if not isinstance(output, Tensor) or output.shape != leaf.shape:
            return None
        probe.notes.read([output], [], probe._unseen)
        if not probe.is_seen:
            probe.reads_others = True  # (another time, its values may be others)
            x, y = leaf.detach(), output.detach()
            return next((([look_up(one)], look_up(one).gives) for one in _OF_TORCH if _is_equal(one, x, y)), None)
        functions, flags = probe.functions, probe.notes.flags(output)
    is_smooth = any(function.kind == "activation" and function.has("identity") for function in functions)
    is_one = probe.is_seen and len(functions) > 1 and all(function.has("elementwise") for function in functions)
    return (functions, flags) if is_one and is_smooth else None


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_by_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


#: Activations by which values are known.
_OF_TORCH = (
    F.silu, F.gelu, _gelu_by_tanh, _quick_gelu, F.mish, F.hardswish, F.hardsigmoid, F.relu, F.relu6, F.elu, F.selu,
    F.softplus, F.softsign, torch.sigmoid, torch.tanh,
)  # fmt: skip


def _is_equal(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> bool:
    """Whether an activation gives y, but for rounding."""
    rounding = max(1e-6, 4 * torch.finfo(y.dtype).eps)
    return holds(lambda: ((function(x) - y).abs() <= rounding * (x.abs() + y.abs())).all())


class _OfModule(Notes):
    """Notes of one module: any tensor without a note that requires grad comes from outside, and counts as unseen."""

    def _reaches_input(self, tensor: Tensor) -> bool:
        return True


class _Probe(SeeingMode):
    """Lists the functions that a module calls on what depends on its input."""

    def __init__(self) -> None:
        super().__init__(_OfModule())
        self.functions: list[Function] = []
        self.is_seen = True
        #: Whether the module reads values of tensors, or tensors that are not made from its input.
        self.reads_others = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call a function, and note what it reads."""
        result, tensors = super().__torch_function__(func, types, args, kwargs), list(tensors_in((args, kwargs)))
        known = look_up(func)
        gives_values = next(tensors_in(result), None) is None and not (known.metadata and known.name != "is_nonzero")
        if gives_values or any(self.notes.of(tensor) is None for tensor in tensors):
            self.reads_others = True
        return result

    def choose(self, known: Function, kind: str, *facts: Any) -> Choice:
        """No rule."""
        return Choice(None, True, "")

    def by_chain_rule(self, choice: Choice, op: Operation) -> Any:
        """Output of a call as it is; what can be differentiated is listed."""
        result = op.run()
        if any(tensor.requires_grad for tensor in tensors_in(op.args[0] if result is None else result)):
            self.functions.append(op.known)
        return result

    def _unseen(self, tensor: Tensor, is_changed: bool) -> None:
        """Note that a tensor was made unseen, or comes from outside the module."""
        self.is_seen = False
