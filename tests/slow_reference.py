"""LRP of programs of `model_grammar`, step by step and in matrices; it knows nothing of `crp`.

Forward, every step is evaluated by its plain meaning. Backward, multipliers m with R = a ⊙ m travel: through an affine
step by the rule of its kind, as the papers write it for a weight matrix; through everything else by R = a ⊙ (Jᵀ m),
where J is the Jacobian of what stands in for the step: activations hand relevance on as it is, norms hold their
variance constant, products their gate, quotients their divisor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from grammar_affine import conv_padded, conv_valid, linear, transposed
from model_grammar import Program, merged, squashed
from torch import Tensor

#: Steps of one input that rules at the input reach through for certain; of others that copy, either way is right.
COPYING = frozenset(
    """flatten unflatten unsqueeze swap slice chunk pad same scale layer_scale shift add_bias complement
    negative""".split()  # noqa: SIM905
)


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


@dataclass(frozen=True)
class Method:
    """Rules of a preset.

    Attributes
    ----------
    convolution, dense : Rule
    first : dict of str to Rule
        By kind, for affine operations with no other one between them and the input.
    lower, split : Rule or None, float
        Rule of convolutions whose depth is less than ``split``.
    zero_bias : bool
        Whether biases count as zero in rules and in norms.
    gates : "signal" or "split"
    sums_pools : bool
        Whether max-pooling is taken for sum-pooling.
    """

    convolution: Rule
    dense: Rule
    first: dict[str, Rule] = field(default_factory=dict)
    lower: Rule | None = None
    split: float = 0.0
    zero_bias: bool = False
    gates: str = "signal"
    sums_pools: bool = False


# --- rules of affine operations, on multipliers ----------------------------------------------------------------------


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


def by_sign(a: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``up`` where the input is positive, ``down`` where it is negative."""
    return torch.where(a > 0, up, torch.where(a < 0, down, 0.0))


def hidden(rule: Rule, a: Tensor, w: Tensor, b: Tensor, m: Tensor, zero_bias: bool) -> Tensor:
    """Multiplier of the input (batch, in) of an affine operation; w (out, in), b (out,), m (batch, out)."""
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
        return by_sign(a, s @ up + t @ down, s @ down + t @ up)
    alpha, beta = (1.0, 0.0) if rule.name == "zplus" else (rule.alpha, rule.beta)
    s, t = alpha * shared(relevance, p + pos(b), rule), beta * shared(relevance, n + neg(b), rule)
    if rule.empty == "epsilon":
        is_empty = (p == 0) | ((n == 0) & (beta > 0))
        s, t, itself = s * ~is_empty, t * ~is_empty, itself * is_empty
        rest = itself @ w
    else:
        rest = torch.zeros_like(a)
    return by_sign(a, s @ pos(w) - t @ neg(w), s @ neg(w) - t @ pos(w)) + rest * (a != 0)


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


# --- Jacobians -------------------------------------------------------------------------------------------------------


def columns(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Matrix (out, in) of the linear part of an affine function of one sample."""
    n = math.prod(shape)
    basis = torch.eye(n, dtype=torch.float64).reshape(n, *shape)
    return (function(basis) - function(torch.zeros_like(basis))).flatten(1).T


class SlowReference:
    """Values and multipliers of one program under one method.

    Parameters
    ----------
    program : Program
    method : Method
    data : Tensor of shape (batch, *shape)
    merges : bool
        Whether batch norm is merged into the affine operation that it alone reads.
    reaches : bool
        Whether rules at the input reach it through steps that copy in other ways than `COPYING`.

    Raises
    ------
    Refused
        If the method has no rule for a step.
    """

    def __init__(
        self, program: Program, method: Method, data: Tensor, merges: bool = True, reaches: bool = True
    ) -> None:
        self.program, self.method, self.data = program, method, data
        self.values = [data]
        for k, step in enumerate(program.steps):
            if step.operation.rule == "refused":
                raise Refused(step.name)
            self.values.append(program.plain(k, *(self.values[i] for i in step.reads)))
        self.squashed = squashed(program)
        self._look_at_input(reaches)
        convolutions = [k for k, step in enumerate(program.steps) if step.operation.rule == "convolution"]
        self.depths = {k: n / len(convolutions) for n, k in enumerate(convolutions)}
        self.merged = merged(program) if merges else {}

    def relevance(self, target: int) -> Tensor:
        """Relevance of the data for an output."""
        self.direct = torch.zeros_like(self.data).flatten(1)
        self.m = [torch.zeros_like(value).flatten(1) for value in self.values]
        self.m[-1][:, target] = 1
        for k in reversed(range(len(self.program.steps))):
            step, m = self.program.steps[k], self.m[k + 1]
            send = getattr(self, f"_{step.operation.rule}")
            inputs = [self.values[i] for i in step.reads]
            for i, sent in zip(step.reads, send(k, m, *inputs), strict=True):
                if sent is not None:
                    self.m[i] = self.m[i] + sent.reshape(self.m[i].shape)
        return self.data * self.m[0].reshape(self.data.shape) + self.direct.reshape(self.data.shape)

    def _look_at_input(self, reaches: bool) -> None:
        """Which values no affine operation has made, and what they copy from the input (in matrices)."""
        n = self.data[0].numel()
        self.is_masked = any(step.name == "mask" or step.spelling == "mask" for step in self.program.steps)
        self.is_certain, self.raw, self.copies = True, [True], [torch.eye(n, dtype=torch.float64)]
        for k, step in enumerate(self.program.steps):
            rule = step.operation.rule
            self.raw.append(rule not in ("dense", "convolution") and all(self.raw[i] for i in step.reads))
            copied = None
            if self.raw[-1] and rule == "linear" and len(step.reads) == 1 and self.copies[step.reads[0]] is not None:
                matrix = columns(lambda x, k=k: self.program.plain(k, x), self._shape(step.reads[0]))
                rows = (matrix != 0).sum(1)
                is_certain = step.name in COPYING
                self.is_certain &= is_certain
                if (rows <= 1).all() and (is_certain or reaches):
                    copied = (matrix != 0).double() @ self.copies[step.reads[0]]
            self.copies.append(copied)

    def _shape(self, i: int) -> tuple[int, ...]:
        return tuple(self.values[i].shape[1:])

    # --- affine steps ---

    def _matrices(self, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Padding (padded, in), weight and reach (out, padded), bias (out,); with the batch norm that is merged."""
        step, weights = self.program.steps[k], self.program.weights(k)
        s, shape = step.settings, self._shape(step.reads[0])
        apply = {"linear": linear, "conv": conv_valid, "transposed": transposed}[step.name]
        padding = torch.eye(math.prod(shape), dtype=torch.float64)
        if step.name == "conv":
            padding = columns(lambda x: conv_padded(s, x), shape)
            shape = tuple(conv_padded(s, torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
        ones = {**weights, "weight": torch.ones_like(weights["weight"])}
        w, reach = columns(lambda x: apply(s, weights, x), shape), columns(lambda x: apply(s, ones, x), shape)
        b = apply(s, weights, torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        norm = self.merged.get(k)
        if norm is not None:
            scale, shift = (t.flatten() for t in self._batch_norm_map(norm))
            w, b = scale[:, None] * w, scale * b + shift
        return padding, w, reach, b

    #: Spellings with another first axis than the samples, so that what is relative to a sample means something else.
    _MIXING = frozenset({"each", "rows", "rmatmul", "unbatched"})

    def _affine(self, k: int, m: Tensor, rule: Rule, first: Rule | None, x: Tensor) -> list[Tensor | None]:
        i, zero_bias = self.program.steps[k].reads[0], self.method.zero_bias
        if rule.is_relative and self.program.steps[k].spelling in self._MIXING:
            raise Doubtful("relative to what")
        padding, w, reach, b = self._matrices(k)
        a = x.flatten(1) @ padding.T
        if first is not None and self.raw[i] and self.is_masked:
            raise Doubtful("whether a product with a mask is preprocessing")
        if first is None or not self.raw[i]:
            return [hidden(rule, a, w, b, m, zero_bias) @ padding]
        r = m * (a @ w.T + b)
        if first.name not in ("flat", "wsquare", "zbox"):
            return [hidden(first, a, w, b, m, zero_bias) @ padding]
        copied = self.copies[i]
        if copied is None and self.program.steps[k].spelling == "padded":
            raise Doubtful("whether zeros around what is no copy of the input are in reach")
        if copied is not None:
            self.direct = self.direct + at_input(first, a, w, reach, b, r, padding @ copied, zero_bias)
            return [None]
        given, values = at_input(first, a, w, reach, b, r, padding, zero_bias), x.flatten(1)
        return [divided(given, values)]

    def _convolution(self, k: int, m: Tensor, x: Tensor) -> list[Tensor | None]:
        method = self.method
        if method.lower is not None and any(step.shares is not None for step in self.program.steps):
            raise Doubtful("the depth of a module that is called twice")
        rule = method.lower if method.lower is not None and self.depths[k] < method.split else method.convolution
        return self._affine(k, m, rule, method.first.get("convolution"), x)

    def _dense(self, k: int, m: Tensor, x: Tensor) -> list[Tensor | None]:
        return self._affine(k, m, self.method.dense, self.method.first.get("dense"), x)

    # --- everything else ---

    def _linear(self, k: int, m: Tensor, *inputs: Tensor) -> list[Tensor]:
        """Jᵀ m; constants keep their share."""
        sent = []
        for place in range(len(inputs)):

            def alone(x: Tensor, place: int = place) -> Tensor:
                others = [torch.zeros(len(x), *t.shape[1:], dtype=torch.float64) for t in inputs]
                return self.program.plain(k, *others[:place], x, *others[place + 1 :])

            sent.append(m @ columns(alone, tuple(inputs[place].shape[1:])))
        return sent

    def _pass(self, k: int, m: Tensor, a: Tensor) -> list[Tensor]:
        """R as it is: J = diag(y / a), which for ReLU and the like is the derivative."""
        y, a = self.values[k + 1].flatten(1), a.flatten(1)
        return [divided(m * y, a)]

    _squash = _pass

    def _batch_norm_map(self, k: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of one sample."""
        zero = torch.zeros(1, *self._shape(k + 1), dtype=torch.float64)
        shift = self.program.plain(k, zero)
        return self.program.plain(k, zero + 1) - shift, shift

    def _batch_norm(self, k: int, m: Tensor, a: Tensor) -> list[Tensor]:
        if k in self.merged.values():
            return [m]  # its affine operation has done it
        return self._pass(k, m, a)

    def _winner(self, k: int, m: Tensor, a: Tensor) -> list[Tensor]:
        """All to the largest of each window; or in proportion to all of them."""
        step, flat = self.program.steps[k], a.flatten(1)
        n = flat.shape[1]
        windows = self.program.plain(k, torch.eye(n, dtype=torch.float64).reshape(n, *a.shape[1:])).flatten(1).T > 0
        if self.method.sums_pools and step.name in ("max_pool", "adaptive_max"):
            sums, y = flat @ windows.double().T, self.values[k + 1].flatten(1)
            return [shared(m * y, sums, Rule("sum", 0.0)) @ windows.double()]
        inside = torch.where(windows, flat[:, None], -torch.inf)
        best = inside.max(2).values
        ties = (inside == best[..., None]).sum(2) > 1
        if (ties & (best != 0) & (m != 0)).any():
            raise Doubtful(step.name)
        is_winner = torch.zeros_like(inside).scatter_(2, inside.argmax(2, keepdim=True), 1.0)
        return [(m[..., None] * is_winner).sum(1)]

    def _maximum(self, k: int, m: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        a, b = a.flatten(1), b.flatten(1)
        if ((a == b) & (a != 0)).any():
            raise Doubtful("maximum")
        return [m * (a > b), m * (b > a)]

    def _norm(self, k: int, m: Tensor, a: Tensor) -> list[Tensor]:
        """y = w / σ ⊙ (a − mean a) + b with σ held constant."""
        step, weights = self.program.steps[k], self.program.weights(k)
        s, name = step.settings, step.name
        grouped = a.reshape(len(a), s["groups"], -1) if name == "group_norm" else a
        mean = 0.0 if name == "rms_norm" else grouped.mean(-1, keepdim=True)
        sigma = ((grouped - mean).square().mean(-1, keepdim=True) + s["eps"]).sqrt().expand(grouped.shape)
        shape = (1, -1, *[1] * (a.dim() - 2)) if name == "group_norm" else (-1,)
        weight = weights.get("weight", torch.ones(s["size"], dtype=torch.float64)).reshape(shape)
        scale = weight / sigma.reshape(a.shape)
        scaled = m.reshape(a.shape) * scale
        sent = scaled
        if name != "rms_norm":
            parts = scaled.reshape(grouped.shape)
            sent = (parts - parts.mean(-1, keepdim=True)).reshape(a.shape)
        if self.method.zero_bias and step.spelling != "written":
            # (the share of the bias goes to the input at the same place)
            bias = weights.get("bias", torch.zeros(1, dtype=torch.float64)).reshape(shape)
            sent = sent + torch.where(a == 0, 0.0, m.reshape(a.shape) * bias / torch.where(a == 0, 1.0, a))
        return [sent]

    def _gate(self, k: int, m: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        """The signal takes all and the gate nothing, or each half; a square is an activation."""
        i, j = self.program.steps[k].reads
        y = self.values[k + 1]
        if i == j:
            return [*self._pass(k, m, a), None]
        first, second = self._is_gate(i, j), self._is_gate(j, i)
        half = 1.0 if self.method.gates == "signal" and (first or second) else 0.5
        m = m.reshape(y.shape)
        to_a = _summed(half * m * b, a.shape) if half < 1 or second else None
        to_b = _summed(half * m * a, b.shape) if half < 1 or first else None
        return [to_a, to_b]

    def _is_gate(self, i: int, j: int) -> bool:
        """Whether value i is the gate in a product with value j: the one that is broadcast, or else squashed."""
        broadcast, other = self._shape(i) != self._widest(i, j), self._shape(j) != self._widest(i, j)
        if broadcast != other:
            return broadcast
        return bool(self.squashed[i]) and not self.squashed[j]

    def _widest(self, i: int, j: int) -> tuple[int, ...]:
        return tuple(torch.broadcast_shapes(self._shape(i), self._shape(j)))

    def _glu(self, k: int, m: Tensor, a: Tensor) -> list[Tensor]:
        signal, below = a.chunk(2, 1)
        gate, m = below.sigmoid(), m.reshape(signal.shape)
        if self.method.gates == "signal":
            return [torch.cat([m * gate, torch.zeros_like(m)], 1)]
        return [torch.cat([m * gate / 2, m * signal * gate / 2 / below], 1)]

    def _quotient(self, k: int, m: Tensor, a: Tensor, b: Tensor) -> list[Tensor | None]:
        return [_summed(m.reshape(self.values[k + 1].shape) / b, a.shape), None]


def _summed(m: Tensor, shape: torch.Size) -> Tensor:
    """Multiplier of what was broadcast."""
    dims = [d for d, (n, k) in enumerate(zip(m.shape, shape, strict=True)) if n != k]
    return m.sum(dims, keepdim=True) if dims else m
