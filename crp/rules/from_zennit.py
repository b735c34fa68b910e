"""zennit's rules inside our composites: relevance in, relevance out, at a layer where multipliers travel."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from zennit import rules as zennit_rules
from zennit.core import BasicHook, Hook, ParamMod

from crp.errors import InputTypeError
from crp.layers.packed import unpacked
from crp.rules.activations import Pass
from crp.rules.base import Rule, _unit_of
from crp.rules.layer import Layer
from crp.wording import shortened


def lift(hook: Hook) -> Rule:
    """Rule that does in multiplier encoding what a zennit hook does in relevance encoding.

    Parameters
    ----------
    hook : Rule, zennit.core.BasicHook or zennit.rules.Pass
        One of our rules is returned as it is.

    Raises
    ------
    TypeError
        If the hook has a backward pass of its own, which cannot be known to treat relevance.
    """
    if isinstance(hook, Rule):
        if not hasattr(hook, "stabilizer"):
            raise InputTypeError(f"{type(hook).__name__}.__init__ does not call super().__init__(), as a rule must")
        return hook
    if isinstance(hook, zennit_rules.Pass):
        return Pass()
    own = [name for name in ("forward", "backward") if getattr(type(hook), name, None) is not getattr(BasicHook, name)]
    if isinstance(hook, BasicHook) and not own:
        return _Lifted(hook)
    if not isinstance(hook, Hook):
        raise InputTypeError(f"a rule must be an instance of one, such as Epsilon(), or None; not {shortened(hook)}")
    raise InputTypeError(
        f"{type(hook).__name__} cannot be used in this composite: neither a crp rule nor a zennit BasicHook with the "
        "passes of that class. Use it in a zennit composite, which propagates relevance."
    )


class _Lifted(Rule):
    """A zennit `BasicHook` with ``R = m * y`` in and ``R / a`` out (0 where ``a`` is 0).

    At the model's input relevance is handed out as it is.

    Parameters
    ----------
    hook : zennit.core.BasicHook
    """

    def __init__(self, hook: BasicHook) -> None:
        super().__init__()
        self.hook = hook

    def __repr__(self) -> str:
        return f"zennit's {type(self.hook).__name__}"

    def propagate(self, layer: Layer, a: Tensor, y: Tensor) -> Tensor:
        """Return the layer's output, with the hook's rule as its gradient."""
        # The modified forward passes run now, so that the backward pass does not need the model.
        inputs, outputs, original = [], [], a.detach().clone()
        for in_mod, param_mod, out_mod in zip(
            self.hook.input_modifiers, self.hook.param_modifiers, self.hook.output_modifiers, strict=True
        ):
            with torch.no_grad():  # (as in zennit, a tensor that is handed back is one input, also of several passes)
                inputs.append(in_mod(original).requires_grad_())
            outputs.append(out_mod(_modified(layer, ParamMod.ensure(param_mod), inputs[-1])))
        note = self._note_of(a)
        unit = None if note is None or note.copied is None else _unit_of(note.copied)
        target, divisor = (a, a.detach()) if unit is None else (unit, None)
        return cast(Tensor, _Propagate.apply(target, y, divisor, self.hook, inputs, outputs))


def _modified(layer: Layer, modifier: ParamMod, a: Tensor) -> Tensor:
    """Output of an operation for another input, with its weight and bias modified as zennit does with parameters."""
    if layer.module is not None:
        with modifier(layer.module) as module:
            return cast(Tensor, module.forward(a))
    arguments = layer.arguments
    parameters = {name: getattr(layer, name) if layer.operands else arguments.get(name) for name in ("weight", "bias")}
    changed: dict[str, Tensor | None] = {}
    for name, value in parameters.items():
        if not isinstance(value, Tensor):
            changed[name] = None
        elif modifier.param_keys is not None and name not in modifier.param_keys:
            changed[name] = value.detach()
        elif name in (modifier.zero_params or ()):
            changed[name] = torch.zeros_like(unpacked(value))
        else:
            changed[name] = modifier.modifier(unpacked(value.detach()), name)
    if layer.operands is not None:
        weight = changed["weight"]
        assert weight is not None
        return layer.operands.run(a, weight, changed["bias"])
    if all(value is None for value in changed.values()):
        return cast(Tensor, layer.value(a))
    return cast(Tensor, layer.function(**arguments | changed | {"input": a}))


class _Propagate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        y: Tensor,
        divisor: Tensor | None,
        hook: BasicHook,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> Tensor:
        ctx.y, ctx.divisor, ctx.hook, ctx.tensors = y.clone(), divisor, hook, (inputs, outputs)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs, outputs = ctx.tensors
        relevance = grads[0] * ctx.y
        gradients = torch.autograd.grad(
            outputs, inputs, ctx.hook.gradient_mapper(relevance, outputs), retain_graph=True
        )
        relevance = ctx.hook.reducer(inputs, gradients)
        if ctx.divisor is not None:
            relevance = torch.where(ctx.divisor == 0, 0.0, relevance / ctx.divisor)
        return relevance.detach(), None, None, None, None, None
