"""Denominators that may be divided by: ε with the denominator's sign, absolute or relative to its scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from crp.errors import InputError, InputTypeError, StateError
from crp.flags import check_flags
from crp.rules.fused import fused_quotient

Stabilize = float | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Absolute:
    r"""Stabilizer :math:`z + \varepsilon \operatorname{sign} z` (+ for 0), the same as zennit's ``Stabilizer``."""

    epsilon: float

    def __call__(self, z: Tensor) -> Tensor:
        """Stabilize a denominator."""
        return z + torch.where(z < 0, -self.epsilon, self.epsilon)


@dataclass(frozen=True)
class Relative:
    r"""Stabilizer whose ε is relative, :math:`z + \varepsilon\,\mathrm{rms}(z) \operatorname{sign} z` (+ for 0).

    The root mean square :math:`\mathrm{rms}(z)` is taken over all axes but the first, so that a sample does not
    depend on the others of its batch. The same as zennit's ``Stabilizer(epsilon, norm_scale=True)``.
    """

    epsilon: float

    def __call__(self, z: Tensor) -> Tensor:
        """Stabilize a denominator of shape (batch, *output shape)."""
        # Squares overflow in half precision.
        flat = z.reshape(len(z), -1).to(torch.promote_types(z.dtype, torch.float32))
        rms = torch.linalg.vector_norm(flat, dim=1) / math.sqrt(flat.shape[1])
        scaled: Tensor = self.epsilon * rms.reshape(-1, *[1] * (z.ndim - 1))
        return z + torch.where(z < 0, -scaled, scaled)


def stabilizing(value: object, norm_scale: bool = False, name: str = "stabilizer") -> Callable[[Tensor], Tensor]:
    """Return the function that stabilizes denominators.

    Parameters
    ----------
    value : float or callable
        ε, or the function itself.
    norm_scale : bool
        Whether ε is relative to the root mean square of each sample's denominators.
    name : str
        What errors call the value.

    Raises
    ------
    ValueError
        If ε is negative or not finite.
    TypeError
        If the value is neither a number nor a function, or is a function that ``norm_scale`` cannot scale.
    """
    check_flags(norm_scale=norm_scale)
    if isinstance(value, bool) or not (isinstance(value, Real) or callable(value)):
        raise InputTypeError(f"{name} must be a number or a function of the denominator, not {value!r}")
    if isinstance(value, Real):
        epsilon = float(value)
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise InputError(f"{name} must be finite and not negative, got {value}")
        return Relative(epsilon) if norm_scale else Absolute(epsilon)
    if norm_scale:
        raise InputTypeError(f"norm_scale scales a number; {name} is the function {value!r}, which may do so itself")
    return value


class _Stabilized:
    """Base of rules: what stabilizes is made of the settings that a rule is shown with, which a composite fixes."""

    settings: ClassVar[tuple[str, ...]] = ("stabilizer",)  #: attributes that `__repr__` shows
    stabilizer: Stabilize
    _is_fixed = False

    @cached_property
    def _stabilize(self) -> Callable[[Tensor], Tensor]:
        return stabilizing(self.stabilizer)

    def fix(self) -> None:
        """Refuse other settings from now on: a composite works with those, and is told by those, that it got."""
        self.__dict__["_is_fixed"] = True
        for name in self.settings:
            if isinstance(inner := getattr(self, name, None), _Stabilized):
                inner.fix()

    def __setattr__(self, name: str, value: object) -> None:
        if self._is_fixed and name in self.settings:
            kind = type(self).__name__
            raise StateError(f"{name} of this {kind} cannot change, as a composite was built with it; make another one")
        super().__setattr__(name, value)
        self.__dict__.pop("_stabilize", None)


def quotient(
    above: Tensor,
    below: Tensor,
    stabilize: Callable[[Tensor], Tensor],
    sign: int = 0,
    added: Tensor | None = None,
    weight: float = 1.0,
) -> Tensor:
    """``weight * above`` over the stabilized ``below + added``, and 0 where that is 0.

    Parameters
    ----------
    above, below : Tensor
    stabilize : callable
    sign : 1, -1 or 0
        1 if the denominator is not negative, -1 if it is not positive, 0 if that is not known. (It saves memory
        traffic.)
    added : Tensor, optional
        A bias, along one axis of ``below``.
    weight : float
    """
    epsilon = stabilize.epsilon if isinstance(stabilize, Absolute) else None
    differentiable = torch.is_grad_enabled() and (above.requires_grad or below.requires_grad)
    if epsilon is not None and not differentiable and below.is_cuda:
        fused = fused_quotient(above, below, added, epsilon, sign, weight)
        if fused is not None:
            return fused
    below = below if added is None else below + added
    if epsilon is None:
        result = above / stabilize(below).masked_fill(below == 0, math.inf)
    elif differentiable:
        result = above / torch.add(below, below.sign(), alpha=epsilon).masked_fill(below == 0, math.inf)
    else:
        return _quotient_in_one_memory(above, below, epsilon, sign, weight)
    return result if weight == 1 else result.mul_(weight)


def _quotient_in_one_memory(above: Tensor, below: Tensor, epsilon: float, sign: int, weight: float) -> Tensor:
    """The same without gradients: every step writes over the one before."""
    if above is below and epsilon > 0:  # an operation whose output is its own surrogate
        above = below.abs()
        bottom = above + epsilon
    elif sign > 0:
        bottom = torch.threshold(below, 0.0, math.inf).add_(epsilon)
    elif sign < 0:
        bottom, weight = torch.threshold_(-below, 0.0, math.inf).add_(epsilon), -weight
    else:
        bottom = torch.add(below, below.sign(), alpha=epsilon).masked_fill_(below == 0, math.inf)
    fits = above.dtype == bottom.dtype and above.shape == bottom.shape
    result = torch.div(above, bottom, out=bottom) if fits else above / bottom
    return result if weight == 1 else result.mul_(weight)
