"""Rules of LRP for affine operations, as the papers write them for a weight matrix, on multipliers m with R = a ⊙ m."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Refused(Exception):
    """No rule of LRP is for this program."""


class Doubtful(Exception):
    """What is right hangs on ties or on rounding."""


@dataclass(frozen=True)
class Rule:
    """Rule of affine operations: its name, what is added to denominators, and what else it takes."""

    name: str
    epsilon: float = 1e-6
    alpha: float = 2.0
    beta: float = 1.0
    gamma: float = 0.25
    low: float = 0.0
    high: float = 0.0
    empty: str = "drop"
    is_relative: bool = False


def pos(t: Tensor) -> Tensor:
    return t.clamp(min=0)


def neg(t: Tensor) -> Tensor:
    return t.clamp(max=0)


def shared(above: Tensor, below: Tensor, rule: Rule) -> Tensor:
    """``above / (below + ε sign(below))``, and 0 where ``below`` is 0."""
    epsilon: float | Tensor = rule.epsilon
    if rule.is_relative:
        epsilon = epsilon * below.square().mean(1, keepdim=True).sqrt()
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below + epsilon * below.sign()))


def divided(r: Tensor, a: Tensor) -> Tensor:
    """Multiplier of relevance; what an input of 0 is given is lost.

    Raises
    ------
    Doubtful
        If an input is 0 but for rounding.
    """
    if ((a != 0) & (a.abs() < 1e-10) & (r != 0)).any():
        raise Doubtful("an input that is 0 but for rounding")
    return torch.where(a == 0, 0.0, r / torch.where(a == 0, 1.0, a))


def by_sign(a: Tensor, up: Tensor, down: Tensor, zeros: str) -> Tensor:
    """``up`` where the input is positive, ``down`` where it is negative; where it is 0, as ``zeros`` says."""
    at_zero = {"none": 0 * up, "up": up, "down": down, "both": up + down}[zeros]
    return torch.where(a > 0, up, torch.where(a < 0, down, at_zero))


def hidden(rule: Rule, a: Tensor, w: Tensor, b: Tensor, m: Tensor, zero_bias: bool, zeros: str = "none") -> Tensor:
    """Multiplier of the input (batch, in) of an affine operation; w (out, in), b (out,), m (batch, out)."""
    z = a @ w.T
    if ((z != 0) & (z.abs() < 1e-12 * (a.abs() @ w.abs().T))).any():
        raise Doubtful("a sum that is 0 but for rounding")
    relevance = m * (a @ w.T + b)
    y, b = a @ w.T + b, torch.zeros_like(b) if zero_bias else b
    p, n = pos(a) @ pos(w).T + neg(a) @ neg(w).T, pos(a) @ neg(w).T + neg(a) @ pos(w).T
    itself = shared(relevance, a @ w.T + b, rule)
    if rule.name == "epsilon":
        return itself @ w
    if rule.name == "gamma":
        up, down = w + rule.gamma * pos(w), w + rule.gamma * neg(w)
        s = shared(relevance * (y > 0), a @ w.T + b + rule.gamma * (p + pos(b)), rule)
        t = shared(relevance * (y < 0), a @ w.T + b + rule.gamma * (n + neg(b)), rule)
        return by_sign(a, s @ up + t @ down, s @ down + t @ up, zeros)
    alpha, beta = (1.0, 0.0) if rule.name == "zplus" else (rule.alpha, rule.beta)
    s, t = alpha * shared(relevance, p + pos(b), rule), beta * shared(relevance, n + neg(b), rule)
    if rule.empty == "epsilon":
        is_empty = (p == 0) | ((n == 0) & (beta > 0))
        s, t, itself = s * ~is_empty, t * ~is_empty, itself * is_empty
        rest = itself @ w
    else:
        rest = torch.zeros_like(a)
    return by_sign(a, s @ pos(w) - t @ neg(w), s @ neg(w) - t @ pos(w), zeros) + rest * ((a != 0) | (zeros != "none"))


def at_input(
    rule: Rule, a: Tensor, w: Tensor, reach: Tensor, b: Tensor, r: Tensor, copied: Tensor, zero_bias: bool
) -> Tensor:
    """Relevance of what an affine operation at the input copies from; ``copied`` (in, copied from) says how."""
    there = copied.sum(1)
    if rule.name == "flat":
        return shared(r, reach @ there + 0 * r, rule) @ reach @ copied
    if rule.name == "wsquare":
        z = w.square() @ there + (0.0 if zero_bias else b.square())
        return shared(r, z + 0 * r, rule) @ w.square() @ copied
    parts = a[:, None] * w - rule.low * pos(w) - rule.high * neg(w)
    s = shared(r, parts @ there, rule)
    return (s[:, :, None] * parts).sum(1) @ copied
