"""Activation checkpoints under rules: a part of the model keeps its inputs only, and runs again in the backward pass.

`torch.utils.checkpoint.checkpoint` runs a part again where no rule acts. While a composite is on a model, its forward
pass takes such a part in another way, for both kinds (``use_reentrant``): the part runs under its rules, what it has
saved is dropped, and in the backward pass it runs under the same rules again. The result is the same.

A part keeps all it saves where something looks inside: a layer that is conditioned or recorded, an account of what
layers keep, a report, rules by position or for the first layer, a reference, or a tensor that the part reads without
being called with it. There is no second derivative through a part that runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import _get_current_function_mode
from torch.utils import checkpoint as torch_checkpoint

from crp.engine.backward_hooks import hooks_as_now
from crp.errors import StateError
from crp.layers.interrupts import atomic
from crp.layers.lasting import Shared
from crp.layers.nested import changed, tensors_in
from crp.layers.repeated import repeated
from crp.layers.state import random_states
from crp.rules.mode import SeeingMode
from crp.rules.notes import FIRST

#: The composite whose model runs in this thread.
running: ContextVar[Any] = ContextVar("running", default=None)
_replaced: list[Any] = []
#: Attribute of the undecorated `checkpoint`, with what its decorator calls in its place.
_CALLED = "__dynamo_disable"
#: Keywords of `checkpoint` itself; others are those of the part.
_OPTIONS = (
    "use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop",
    "respect_saved_tensors_hooks",
)  # fmt: skip


@Shared
def checkpoints_under_rules() -> Iterator[None]:
    """`torch.utils.checkpoint.checkpoint` takes rules along, in threads in which a composite sees a model run."""
    plain = getattr(torch_checkpoint.checkpoint, "__wrapped__", None)
    if plain is None:  # (another version of torch; then parts keep what they save)
        yield
        return
    _replaced.append(getattr(plain, _CALLED, None))
    setattr(plain, _CALLED, _checkpoint)
    try:
        yield
    finally:
        setattr(plain, _CALLED, _replaced.pop())


def _checkpoint(*args: Any, **kwargs: Any) -> Any:
    composite = running.get()
    is_seen = composite is not None and _sees(composite._operations)
    mode = _get_current_function_mode()  # type: ignore[no-untyped-call]
    is_recorded = isinstance(mode, SeeingMode)  # (on a reference, or to count positions)
    if not torch.is_grad_enabled() or not (is_seen or is_recorded):
        plain: Any = (_replaced and _replaced[-1]) or torch_checkpoint.checkpoint.__wrapped__  # type: ignore[attr-defined]
        if composite is not None:  # (the other kind does not allow `torch.autograd.grad`)
            kwargs["use_reentrant"] = False
        return plain(*args, **kwargs)
    function, given = (args[0], args[1:]) if args else (kwargs["function"], ())
    named = {name: value for name, value in kwargs.items() if name not in ("function", *_OPTIONS)}
    while isinstance(function, partial):
        given, named = (*function.args, *given), {**function.keywords, **named}
        function = function.func
    return _Part(composite, function, given, named).run() if is_seen else function(*given, **named)


class _Part:
    """A part of a model, and what it is called with.

    Parameters
    ----------
    composite : Composite
    function : callable
    args, kwargs
        What it is called with.
    """

    def __init__(self, composite: Any, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> None:
        mode = composite._operations
        self.composite, self.mode = composite, mode
        self.function, self.args, self.kwargs, self._hooks = function, args, kwargs, hooks_as_now()
        found: list[Tensor] = []
        mode.notes.read((args, kwargs), found, mode._unseen)
        inputs = {id(tensor): tensor for tensor in found}
        #: Place of each input that depends on the model's, by its `id`.
        self._places = {key: number for number, key in enumerate(inputs)}
        self.inputs = list(inputs.values())
        self.made: list[Tensor] = []

    def run(self) -> Any:
        """What the function returns; the gradient of tensors in it runs the part again."""
        mode, notes = self.mode, self.mode.notes
        if not self.inputs or _looks_inside(mode, self.inputs):
            return self.function(*self.args, **self.kwargs)
        self._state = mode.matching.state(), len(mode._wholes)
        self._flags = [notes.flags(tensor) for tensor in self.inputs]
        self._surroundings = _Surroundings(self.inputs[0].device)
        leaves = [tensor.detach().requires_grad_() for tensor in self.inputs]
        with repeated() as repetition, notes.entered(leaves, self._flags):
            result = self._call(leaves)
        made = {id(tensor): tensor for tensor in tensors_in(result) if tensor.requires_grad}
        if repetition.is_watched or any(map(notes.leads_outside, made.values())):
            with self._surroundings.again():
                return self.function(*self.args, **self.kwargs)
        if not made:
            return result
        flags = [notes.flags(tensor) for tensor in made.values()]
        self.made = [tensor.detach() for tensor in made.values()]
        new = dict(zip(made, _Again.apply(self, *self.inputs), strict=True))
        for tensor, known in zip(new.values(), flags, strict=True):
            notes.add(tensor, known)
        return changed(result, lambda tensor: new.get(id(tensor), tensor))

    def run_again(self, leaves: list[Tensor]) -> list[Tensor]:
        """Tensors that the function makes of leaves in place of its inputs."""
        with ExitStack() as stack:
            stack.enter_context(self._surroundings.again())
            stack.enter_context(temporarily_clear_interpreter_stack())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(repeated())
            stack.enter_context(self._hooks())
            stack.enter_context(_resumed(self.composite, self.mode, *self._state))
            stack.enter_context(self.mode.notes.entered(leaves, self._flags))
            result = self._call(leaves)
        return list({id(tensor): tensor for tensor in tensors_in(result) if tensor.requires_grad}.values())

    def _call(self, leaves: list[Tensor]) -> Any:
        def replaced(tensor: Tensor) -> Tensor:
            place = self._places.get(id(tensor))
            return tensor if place is None else leaves[place]

        args, kwargs = changed((self.args, self.kwargs), replaced)
        return self.function(*args, **kwargs)


def _sees(mode: Any) -> bool:
    """Whether the model runs for the user, and not inside a module that is one operation."""
    return mode._is_running and not (mode._aside or mode.references.is_recording or mode.matching.is_counting)


def _looks_inside(mode: Any, inputs: Sequence[Tensor]) -> bool:
    """Whether what runs on these inputs must run once, and keep what it saves."""
    mode._note_reading(inputs)
    matching, flags = mode.matching, [mode.notes.flags(tensor) for tensor in inputs]
    is_first = any(entry.first for entry in matching.entries) and any(known & FIRST for known in flags)
    watched = mode.attachment.account is not None or mode.seen is not None or mode.references.is_on
    return is_first or watched or bool(matching.positions) or bool(mode.notes.tolerant)


@atomic
def _resumed(composite: Any, mode: Any, state: Any, n_wholes: int) -> Iterator[None]:
    """Context in which a part of the model runs again, after the forward pass, inside of the same modules."""
    if composite._operations is not mode:
        raise StateError(
            f"{mode.method} is no longer on the model, a checkpointed part of which has to run again: run the backward "
            "pass inside the composite's context"
        )
    before = mode.matching.state(), mode._wholes, mode._is_running, mode._aside
    mode.matching.set_state(state)
    mode._wholes, mode._is_running, mode._aside = [None] * n_wholes, True, 0
    token = running.set(composite)
    mode.__enter__()
    try:
        yield
    finally:
        while _get_current_function_mode() is mode:  # type: ignore[no-untyped-call]
            mode.__exit__(None, None, None)
        running.reset(token)
        of_matching, mode._wholes, mode._is_running, mode._aside = before
        mode.matching.set_state(of_matching)
        mode._untreated.clear()


class _Again(torch.autograd.Function):
    """Result of a part that runs again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, part: _Part, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the part has made."""
        ctx.part = part
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        made, part.made = tuple(part.made), []
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradient of the inputs, by the rules that are on the model."""
        if torch.is_grad_enabled():  # with create_graph=True
            raise StateError(
                "relevance has no second derivatives through activation checkpoints; switch them off, as by "
                "model.gradient_checkpointing_disable()"
            )
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        made = ctx.part.run_again(leaves)
        sent = [(tensor, grad) for tensor, grad in zip(made, grads, strict=True) if grad is not None]
        if not sent:
            return (None, *(None for _ in leaves))
        tensors, of_tensors = zip(*sent, strict=True)
        return (None, *torch.autograd.grad(tensors, leaves, of_tensors, allow_unused=True))


class _Surroundings:
    """What a part may depend on beside its inputs: random numbers and autocast.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._random = device, list(random_states([device]))
        kinds = dict.fromkeys(["cpu", device.type])
        self._casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    @atomic
    def again(self) -> Iterator[None]:
        """Context in which they are as they were."""
        with ExitStack() as stack:
            for state, put_back in random_states([self._device]):
                stack.callback(put_back, state)
            for state, put_back in self._random:
                put_back(state)
            for cast in self._casts:
                stack.enter_context(torch.autocast(*cast))
            yield
