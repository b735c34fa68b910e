"""Activations that a user has written out: modules that make one elementwise function of several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from crp.rules.functions import Function
from crp.rules.mode import Choice, SeeingMode
from crp.rules.notes import Notes
from crp.trace import undisturbed
from crp.trace.recorder import tensors_in


def _may_be_activation(module: nn.Module) -> bool:
    """Whether a module is one of the user's, without parameters and parts, which may be an activation written out."""
    kind: type = type(module)
    return _is_of_the_user(kind) and not (module._parameters or module._buffers or module._modules)


@lru_cache(maxsize=4096)
def _is_of_the_user(kind: Any) -> bool:
    return not (
        kind.__module__.startswith(("torch.", "crp."))
        or issubclass(kind, torch.jit.ScriptModule)
        or kind.forward is nn.Module.forward
    )


def _one_activation(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Function] | None:
    """Functions of which a module makes one activation in this call; None if it makes anything else.

    A module is one activation if it is called with one tensor, returns one of the same shape, reads no other tensor
    that depends on the model's input, and calls only elementwise functions that a mode can see, one of them an
    activation. To find out, the module runs once more, and is left as it was.
    """
    if not _may_be_activation(module) or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return None
    probe = _Probe()
    with undisturbed(module), torch.enable_grad():
        leaf = args[0].detach().clone().requires_grad_()
        probe.notes.enter(leaf, None)
        data = leaf.clone()  # (a leaf cannot be changed in place)
        probe.notes.add(data, 0)
        with probe:
            output = module.forward(data)
        if not isinstance(output, Tensor) or output.shape != leaf.shape:
            return None
        probe.notes.read([output], [], probe.note_unseen)
    functions = probe.functions
    is_smooth = any(function.kind == "activation" and function.has("identity") for function in functions)
    is_one = probe.is_seen and len(functions) > 1 and all(function.has("elementwise") for function in functions)
    return functions if is_one and is_smooth else None


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

    def choose(self, known: Function, kind: str, flags: int, several: bool) -> Choice:
        """No rule."""
        return Choice(None, True, "")

    def by_chain_rule(self, choice: Choice, func: Any, known: Function, *call: Any) -> Any:
        """Output of a call as it is; what can be differentiated is listed."""
        _, args, kwargs, _ = call
        result = func(*args, **kwargs)
        if any(tensor.requires_grad for tensor in tensors_in(args[0] if result is None else result)):
            self.functions.append(known)
        return result

    def note_unseen(self, tensor: Tensor, is_changed: bool) -> None:
        """Note that a tensor was made unseen, or comes from outside the module."""
        self.is_seen = False

    _unseen = note_unseen
