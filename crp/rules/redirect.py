"""The output of a call with another gradient, and what second derivatives need of the call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from crp.errors import StateError


def _acting(is_active: Callable[[], bool], call: object) -> Callable[[], bool]:
    """Gives whether a rule acts on a call, and not the ordinary chain rule, as that may inside of a softmax."""
    made = getattr(call, "parts", None)
    return is_active if made is None else lambda: is_active() and not getattr(made, "is_chained", False)


class SecondOrder:
    """What second derivatives need of a call: its scales, computed again with their graph.

    Parameters
    ----------
    name : object
        The call, for messages.
    inputs : sequence of Tensor
        What the call read.
    is_active : callable
        Whether the rule acts, and not the ordinary chain rule.
    scales : callable
        Gives the scales of the surrogates, with their graph.
    """

    def __init__(
        self,
        name: object,
        inputs: Sequence[Tensor],
        is_active: Callable[[], bool],
        scales: Callable[[], Sequence[Tensor]],
    ) -> None:
        is_alone = getattr(name, "parts", None) is None
        self.name, self.is_active, self.scales = name, is_active if is_alone else _acting(is_active, name), scales
        self.versions = [(tensor, tensor._version) for tensor in inputs]

    def __call__(self) -> Sequence[Tensor]:
        """Scales, after a check that the inputs are what they were."""
        self.check_inputs()
        return self.scales()

    def check_inputs(self) -> None:
        """Raise a RuntimeError if an input was overwritten."""
        if any(tensor._version != version for tensor, version in self.versions):
            raise StateError(f"second derivatives need the input of {self.name}, which was changed in place since")


class _Borrowed:
    """The values of a call's output, for as long as somebody else has them: they are not kept alive.

    Parameters
    ----------
    output : Tensor
    """

    def __init__(self, output: Tensor) -> None:
        self.follow(output)

    def follow(self, output: Tensor) -> None:
        """Look at another tensor from now on, into which the values were copied."""
        self._tensor, self._version = weakref.ref(output), output._version

    def values(self) -> Tensor | None:
        """The values, as a constant; None where they are gone."""
        output = self._tensor()
        return None if output is None or output._version != self._version else output.detach()


class Redirect(torch.autograd.Function):
    """Value of ``y``; its gradient goes into the surrogates ``z``, scaled, or into the layer's own output."""

    only_scales = True  #: what arrives goes on value by value, as `crp.engine.few_channels` needs to know

    @staticmethod
    def forward(ctx: Any, y: Tensor, again: SecondOrder | None, n: int, *tensors: Tensor | None) -> Tensor:
        """Return ``y`` itself; ``tensors`` are the n surrogates, their n scales, and perhaps the layer's own output."""
        ctx.save_for_backward(*tensors[n : 2 * n])
        ctx.mark_dirty(y)
        ctx.set_materialize_grads(False)
        ctx.again, ctx.y_is_own = again, ctx.needs_input_grad[0]
        ctx.is_own = [tensor is not None for tensor in tensors[2 * n :]]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Scale the gradient for each surrogate."""
        scales, again, m = ctx.saved_tensors, ctx.again, grads[0]
        to_y: Tensor | None = None
        to_surrogates: list[Tensor | None] = [None] * len(scales)
        to_own: list[Tensor | None] = [None] * len(ctx.is_own)
        if m is not None and again is not None and not again.is_active():  # the ordinary chain rule
            to_y = m if ctx.y_is_own else None
            to_own = [m if is_given else None for is_given in ctx.is_own]
            if not ctx.y_is_own and not any(ctx.is_own):
                raise StateError(f"{again.name} counts as one function by its rule, which has no ordinary derivative")
        elif m is not None:
            if again is not None and torch.is_grad_enabled():  # with create_graph=True
                scales = again()
            to_surrogates = [m * scale.conj() for scale in scales]  # (as autograd does; of real numbers, the same)
        return (to_y, None, None, *to_surrogates, *[None] * len(scales), *to_own)


class _RedirectLater(torch.autograd.Function):
    """As `Redirect`, into one surrogate; its scale is not kept, but computed once more when the gradient arrives."""

    only_scales = True

    @staticmethod
    def forward(ctx: Any, y: Tensor, again: SecondOrder, z: Tensor) -> Tensor:
        """Return ``y`` itself, which is the call's own output."""
        ctx.mark_dirty(y)
        ctx.set_materialize_grads(False)
        ctx.again = again
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, Tensor | None]:
        """Scale the gradient for the surrogate."""
        m = grads[0]
        if m is None or not ctx.again.is_active():
            return m, None, None
        (scale,) = ctx.again()
        return None, None, m * scale


class _Overwrite(torch.autograd.Function):
    """Tensor with the values of another one, to which all of its gradient goes."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, result: Tensor) -> Tensor:
        """Copy into ``target``."""
        ctx.mark_dirty(target)
        return target.copy_(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """Pass on; what was there before has no part in it."""
        return None, grads[0]


def overwritten(target: Tensor, result: Tensor) -> Tensor:
    """``target.copy_(result)``, whose gradient goes to ``result`` only; `copy_` would send zeros to the old target."""
    same = target.shape == result.shape and target.dtype == result.dtype
    if not same or target._is_view() or not result.requires_grad or (target.is_leaf and target.requires_grad):
        return target.copy_(result)
    return cast(Tensor, _Overwrite.apply(target, result))


def _released(output: Tensor) -> Tensor:
    """Values of an output, as a tensor that may be overwritten although the output's own gradient is still needed."""
    return output.detach().clone() if output._is_view() or _saves_output(output) else output.data


_saving: dict[type, bool] = {}


def _saves_output(own: Tensor | None) -> bool:
    """Whether the gradient of a call needs the call's output, as that of a sigmoid does."""
    if own is None:
        return False
    kind = type(own.grad_fn)
    if kind not in _saving:
        _saving[kind] = any(hasattr(own.grad_fn, name) for name in ("_saved_result", "_saved_self_or_result"))
    return _saving[kind]
