"""zennit's basic hooks, for many rows of a sample.

`zennit.core.BasicHook` computes the modified outputs of its layer in each backward pass, in a way that
`torch.func.vmap` does not batch. Here they are computed in the forward pass, so that rows go back through them
together. What they are, and what is made of their gradients, is for the hook to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from zennit import rules
from zennit.core import BasicHook, ParamMod

from crp.layers import OfThread, modules_of
from crp.layers.interrupts import atomic


@atomic
def _batched_hooks(model: nn.Module) -> Iterator[None]:
    """Context in which basic hooks on a model send rows back together; hooks with passes of their own do not.

    For more rows than samples: else, there is as much to compute, in more memory.
    """
    own: list[tuple[dict[int, Any], int, Any]] = []
    try:
        for module in modules_of(model).values():
            batched: dict[int, _Batched] = {}
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number, method in [*hooks.items()]:
                    if _is_basic(hook := getattr(method, "__self__", None)):
                        own.append((hooks, number, method))
                        step = next(batched.setdefault(id(hook), _Batched(hook)).steps)
                        hooks[number] = OfThread(step)
        yield
    finally:
        for hooks, number, method in own:
            hooks[number] = method


def _is_basic(hook: object) -> TypeGuard[BasicHook]:
    passes = ("pre_forward", "post_forward", "pre_backward", "forward", "backward", "register")
    return isinstance(hook, BasicHook) and all(getattr(type(hook), n) is getattr(BasicHook, n) for n in passes)


class _Batched:
    """A basic hook whose modified outputs are computed in the forward pass."""

    def __init__(self, hook: BasicHook) -> None:
        self._hook, self._takes = hook, False
        #: What stands in for the methods that the hook has registered, in their order.
        self.steps = iter((self._before, self._after, self._last))

    def _before(self, module: nn.Module, args: Any) -> Any:
        self._takes = self._hook.active and args[0].requires_grad
        return None if self._takes else self._hook.pre_forward(module, args)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._takes:
            return self._hook.post_forward(module, args, output)
        hook, original = self._hook, args[0].detach().clone()
        inputs, outputs = [], []
        ways = zip(hook.input_modifiers, hook.param_modifiers, hook.output_modifiers, strict=True)
        for of_input, of_parameters, of_output in ways:
            with torch.no_grad():
                inputs.append(of_input(original).requires_grad_())
            with ParamMod.ensure(of_parameters)(module) as modified, torch.enable_grad():
                outputs.append(of_output(modified.forward(inputs[-1])))
        return _Propagate.apply(args[0], output.detach(), hook, inputs, outputs)

    def _last(self, module: nn.Module, args: Any, output: Any) -> Any:
        return None if self._takes else self._hook.forward(module, args, output)


class _Propagate(torch.autograd.Function):
    """A layer's output, whose relevance goes back as a hook says; as in zennit, none that does not fit the input."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, output: Tensor, hook: BasicHook, inputs: list[Tensor], outputs: list[Tensor]
    ) -> Tensor:
        # zennit's own rules multiply an input by its gradient, or have ones: an input of zeros adds nothing.
        adds_by_input = type(hook).__module__ == rules.__name__
        ctx.needed = [i for i, given in enumerate(inputs) if not (adds_by_input and not given.any())]
        ctx.shape, ctx.hook, ctx.tensors = a.shape, hook, (inputs, outputs)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> Any:
        inputs, outputs = ctx.tensors
        starts = ctx.hook.gradient_mapper(relevance[0], outputs)
        starts = [starts] if isinstance(starts, Tensor) else starts
        of, to, by = ([tensors[i] for i in ctx.needed] for tensors in (outputs, inputs, starts))
        found = iter(torch.autograd.grad(of, to, by, retain_graph=True) if ctx.needed else ())
        gradients = [next(found) if i in ctx.needed else torch.zeros_like(given) for i, given in enumerate(inputs)]
        arrived = ctx.hook.reducer(inputs, gradients)
        return (arrived if arrived.shape == ctx.shape else None), None, None, None, None
