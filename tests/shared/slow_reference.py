"""LRP of programs of `model_grammar`, step by step and in matrices; it knows nothing of `crp`.

Forward, every step is evaluated by its plain meaning. Backward, multipliers m with R = a ⊙ m travel: through an affine
step by the rule of its kind, as the papers write it for a weight matrix; through everything else by R = a ⊙ (Jᵀ m),
where J is the Jacobian of what stands in for the step: activations hand relevance on as it is, norms hold their
variance constant, products their gate, quotients their divisor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from grammar_affine import conv_padded, conv_valid, linear, transposed
from grammar_attention import in_heads, joined, logits
from model_grammar import Program, activated, dividing, gating, merged, origins, squashed
from slow_rules import Doubtful, Refused, Rule, at_input, divided, hidden, shared
from torch import Tensor

#: Steps of one input that rules at the input reach through for certain; of others that copy, either way is right.
COPYING = frozenset(
    """flatten unflatten unsqueeze swap slice chunk pad same scale layer_scale shift add_bias complement
    negative""".split()  # noqa: SIM905
)


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
    attention : "constant" or "split", or None
        Whether what a sigmoid has made is held constant in products of matrices; None refuses products without such.
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
    attention: str | None = "constant"
    sums_pools: bool = False


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
    unreached : collection of int
        Steps (of `uncertain`) that rules at the input do not reach it through.
    zeros : "none", "up", "down" or "both"
        Multiplier of an input of 0 under rules that take weights apart by its sign: none, or that of a neighbour. It
        has no relevance, but tells how much a constant that is added before it and cancels there has.

    Attributes
    ----------
    uncertain : list of int
        Steps that copy the input in other ways than `COPYING`: rules at the input may reach it through them or not.

    Raises
    ------
    Refused
        If the method has no rule for a step.
    """

    def __init__(
        self,
        program: Program,
        method: Method,
        data: Tensor,
        merges: bool = True,
        unreached: Collection[int] = (),
        zeros: str = "none",
    ) -> None:
        self.program, self.method, self.data, self.zeros = program, method, data, zeros
        self.values, self.squashed, self.activated = [data], squashed(program), activated(program)
        self.gating, self.dividing, self.origins = gating(program), dividing(program), origins(program)
        read = {len(program.steps), *(i for step in program.steps for i in step.reads)}
        for k, step in enumerate(program.steps):
            if step.operation.rule == "refused" and k + 1 in read:  # (what nothing reads explains nothing)
                raise Refused(step.name)
            known = [self.dividing] if method.attention else [self.dividing, self.squashed]  # (what is held constant)
            if step.name == "attention" and any(one[i] is not False for one in known for i in step.reads):
                raise Doubtful("weights, or values that are one over something")
            if step.operation.rule in ("weighted", "attention") and not self._has_rule(k):
                raise Refused(step.name)
            self.values.append(program.plain(k, *(self.values[i] for i in step.reads)))
        self._look_at_input(unreached)
        self.depths = self._depths()
        self.merged = merged(program) if merges else {}

    def relevance(self, target: int) -> Tensor:
        """Relevance of the data for an output."""
        self.direct = torch.zeros_like(self.data).flatten(1)
        self.m = [torch.zeros_like(value).flatten(1) for value in self.values]
        self.m[-1][:, target] = 1
        for k in reversed(range(len(self.program.steps))):
            step, m = self.program.steps[k], self.m[k + 1]
            if step.operation.rule == "refused":
                continue
            send = getattr(self, f"_{step.operation.rule}")
            inputs = [self.values[i] for i in step.reads]
            for i, sent in zip(step.reads, send(k, m, *inputs), strict=True):
                if sent is not None:
                    self.m[i] = self.m[i] + sent.reshape(self.m[i].shape)
        return self.data * self.m[0].reshape(self.data.shape) + self.direct.reshape(self.data.shape)

    def _look_at_input(self, unreached: Collection[int]) -> None:
        """Which values no affine operation has made, and what they copy from the input (in matrices)."""
        n = self.data[0].numel()
        self.uncertain: list[int] = []
        self.raw, self.copies = [True], [torch.eye(n, dtype=torch.float64)]
        for k, step in enumerate(self.program.steps):
            is_affine = step.operation.rule in ("dense", "convolution")
            self.raw.append(not is_affine and all(self.raw[i] for i in step.reads))
            copied = self._copied(k) if self.raw[-1] and all(self.copies[i] is not None for i in step.reads) else None
            if copied is not None and step.name not in COPYING:
                self.uncertain.append(k)
                copied = None if k in unreached else copied
            self.copies.append(copied)

    def _copied(self, k: int) -> Tensor | None:
        """How a step copies the input, if what it reads does."""
        step = self.program.steps[k]
        below = [self.copies[i] for i in step.reads]
        if step.spelling in ("mask", "product") and step.name in ("mask", "relu"):
            return below[0]  # a product with a constant: every entry in its place
        if step.operation.rule != "linear":
            return None
        parts = [(matrix != 0).double() for matrix in self._parts(k, *(self.values[i] for i in step.reads))]
        if (sum(part.sum(1) for part in parts) > 1).any():
            return None
        return sum(part @ matrix for part, matrix in zip(parts, below, strict=True))

    def _depths(self) -> dict[int, float]:
        """Depth of each convolution: layers in order; calls with the same stored weight are one."""
        known: dict[object, int] = {}
        convolutions = [k for k, step in enumerate(self.program.steps) if step.operation.rule == "convolution"]
        places = {k: known.setdefault(self.program.layer(k), len(known)) for k in convolutions}
        return {k: place / len(known) for k, place in places.items()}

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
        if ((a != 0) & (a.abs() < 1e-12)).any():
            raise Doubtful("an input that is 0 but for rounding")
        if first is None or not self.raw[i]:
            return [hidden(rule, a, w, b, m, zero_bias, self.zeros) @ padding]
        r = m * (a @ w.T + b)
        if first.name not in ("flat", "wsquare", "zbox"):
            return [hidden(first, a, w, b, m, zero_bias, self.zeros) @ padding]
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
        is_low = method.lower is not None and self.depths[k] < method.split
        rule = method.lower if is_low else method.convolution
        return self._affine(k, m, rule, method.first.get("convolution"), x)

    def _dense(self, k: int, m: Tensor, x: Tensor) -> list[Tensor | None]:
        return self._affine(k, m, self.method.dense, self.method.first.get("dense"), x)

    # --- everything else ---

    def _linear(self, k: int, m: Tensor, *inputs: Tensor) -> list[Tensor]:
        """Jᵀ m; constants keep their share, but for numbers that are added to what a gate is made of."""
        is_number = self.program.steps[k].name == "add_bias" and inputs[0].shape[1] == 1
        if self.program.steps[k].name in ("shift", "complement") or is_number:
            if any(map(self._is_inverse, self.origins[self.program.steps[k].reads[0]])):
                raise Doubtful("1 - 1 / (1 + a) is a / (1 + a), where 1 has no share")
            is_part = self.gating[self.program.steps[k].reads[0]]
            if is_part is None:
                raise Doubtful("a constant, or part of a gate")
            if is_part and ((inputs[0] == 0) & (m.reshape(inputs[0].shape) != 0)).any():
                raise Doubtful("whether a number is added to 0, or to what has made it")
            if is_part:
                return self._pass(k, m, *inputs)
        if self._is_written_out(k):
            raise Doubtful("a sum, or an activation that is written out with numbers in it")
        return [m @ matrix for matrix in self._parts(k, *inputs)]

    def _is_written_out(self, k: int) -> bool:
        """Whether what is summed up is made of the same tensor, entry by entry and by numbers that are added."""
        reads = self.program.steps[k].reads
        if len(reads) < 2 or not self.origins[reads[0]] & self.origins[reads[1]]:
            return False
        return any(i and self.program.steps[i - 1].name in ("shift", "complement") for i in self._origins_of(reads))

    def _origins_of(self, values: tuple[int, ...]) -> set[int]:
        return set().union(*(self.origins[i] for i in values))

    def _parts(self, k: int, *inputs: Tensor) -> list[Tensor]:
        """Matrix of a linear step for each operand, where the others are zero."""
        found = []
        for place in range(len(inputs)):

            def alone(x: Tensor, place: int = place) -> Tensor:
                others = [torch.zeros(len(x), *t.shape[1:], dtype=torch.float64) for t in inputs]
                return self.program.plain(k, *others[:place], x, *others[place + 1 :])

            found.append(columns(alone, tuple(inputs[place].shape[1:])))
        return found

    def _pass(self, k: int, m: Tensor, a: Tensor) -> list[Tensor]:
        """R as it is: J = diag(y / a), which for ReLU and the like is the derivative."""
        below = self.origins[self.program.steps[k].reads[0]]
        if self.program.steps[k].name == "reciprocal" and any(self._is_inverse(i) for i in below):
            raise Doubtful("1 / (1 / a + c) is a / (1 + c a), where c has no share")
        y, a = self.values[k + 1].flatten(1), a.flatten(1)
        return [divided(m * y, a)]

    _squash = _pass

    def _is_inverse(self, i: int) -> bool:
        return i > 0 and self.program.steps[i - 1].name in ("reciprocal", "quotient")

    def _batch_norm_map(self, k: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of one sample."""
        zero = torch.zeros(1, *self._shape(k + 1), dtype=torch.float64)
        shift = self.program.plain(k, zero)
        return self.program.plain(k, zero + 1) - shift, shift

    def _batch_norm(self, k: int, m: Tensor, a: Tensor) -> list[Tensor]:
        if k in self.merged.values():
            return [m]  # its affine operation has done it
        if self.method.convolution.name != "epsilon":
            return self._pass(k, m, a)
        scale, shift = (t.flatten(1) for t in self._batch_norm_map(k))
        return [m * scale + (divided(m * shift, a.flatten(1)) if self.method.zero_bias else 0.0)]

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
        if self.method.zero_bias and step.spelling in ("plain", "module"):
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
        self._check_order(i, j)
        first, second = self._is_held(i, j), self._is_held(j, i)
        half = 1.0 if first or second else 0.5
        if half < 1 and self.origins[i] & self.origins[j]:
            raise Doubtful("a product, or an activation")
        m = m.reshape(y.shape)
        to_a = _summed(half * m * b, a.shape) if half < 1 or second else None
        to_b = _summed(half * m * a, b.shape) if half < 1 or first else None
        return [to_a, to_b]

    def _check_order(self, *reads: int) -> None:
        """Refuse a product of several factors of which two are made of one value, and others come in between."""
        left, right = ([self.origins[factor] for factor in self._factors(i)] for i in reads)
        is_of_one = self.origins[reads[0]] & self.origins[reads[1]]
        if not is_of_one and any(one & other for one in left for other in right):
            raise Doubtful("factors that are made of one value come first")

    def _factors(self, i: int) -> list[int]:
        """Values that a value is a product or a quotient of."""
        step = self.program.steps[i - 1]
        if i == 0 or step.name not in ("product", "quotient", "scale", "layer_scale"):
            return [i]
        return [factor for read in step.reads for factor in self._factors(read)]

    def _has_weights(self, k: int) -> bool:
        """Whether one operand of a product of matrices is held constant."""
        return self._weights(k) is not None

    def _weights(self, k: int) -> int | None:
        """Which operand of a product of matrices is one over something, or comes from a sigmoid, if one does."""
        for known in (self.dividing, self.squashed):
            made = [known[i] for i in self.program.steps[k].reads]
            if None in made:
                raise Doubtful("weights or values")
            if made[0] != made[1]:
                return made.index(True)
        return None

    def _has_rule(self, k: int) -> bool:
        is_attention = self.program.steps[k].name == "attention"
        return self.method.attention is not None or (not is_attention and self._has_weights(k))

    def _weighted(self, k: int, m: Tensor, a: Tensor, b: Tensor) -> list[Tensor | None]:
        """The values take all and the weights nothing, or each half."""
        m = m.reshape(self.values[k + 1].shape)
        held, reads = self._weights(k), self.program.steps[k].reads
        if held is not None and self.method.attention == "split" and not self.dividing[reads[held]]:
            held = None
        half = 0.5 if held is None else 1.0
        to_a = half * m @ b.flatten(2) if held != 0 else None
        to_b = half * m.mT @ a.flatten(2) if held != 1 else None
        return [to_a, to_b]

    def _attention(self, number: int, m: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor | None]:
        """The values take all; or each product hands half to both, and the softmax passes on by its Jacobian."""
        s = self.program.steps[number].settings
        m, q, k, v = (in_heads(s, tokens.reshape(v.shape)) for tokens in (m, q, k, v))
        weights = logits(s, q, k).softmax(-1)
        if self.method.attention == "constant":
            return [None, None, joined(weights.mT @ m)]
        of_weights = m @ v.mT / 2
        of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * s["scale"] / 2
        return [joined(of_logits @ k), joined(of_logits.mT @ q), joined(weights.mT @ m / 2)]

    def _is_held(self, i: int, j: int) -> bool:
        """Whether value i is held constant in a product with value j.

        The one over something, or else the gate, where gates are held constant: the one that is broadcast, or else
        squashed, or else made by an activation.
        """
        divides = self.dividing[i], self.dividing[j]
        if None in divides:
            raise Doubtful("what divides depends on how it is written")
        if divides[0] != divides[1]:
            return bool(divides[0])
        if self.method.gates == "split":
            return False
        broadcast, other = self._shape(i) != self._widest(i, j), self._shape(j) != self._widest(i, j)
        if broadcast != other:
            return broadcast
        if None in (self.squashed[i], self.squashed[j]):
            raise Doubtful("what is a gate depends on how it is written")
        if self.squashed[i] != self.squashed[j]:
            return bool(self.squashed[i])
        if None in (self.activated[i], self.activated[j]):
            raise Doubtful("what is an activation depends on how it is written")
        return bool(self.activated[i]) and not self.activated[j]

    def _widest(self, i: int, j: int) -> tuple[int, ...]:
        return tuple(torch.broadcast_shapes(self._shape(i), self._shape(j)))

    def _glu(self, k: int, m: Tensor, a: Tensor) -> list[Tensor]:
        if self.program.steps[k].spelling == "written" and self.squashed[self.program.steps[k].reads[0]] is not False:
            raise Doubtful("which of two gates is the signal")
        signal, below = a.chunk(2, 1)
        gate, m = below.sigmoid(), m.reshape(signal.shape)
        divides = self.dividing[self.program.steps[k].reads[0]]
        if divides is None:
            raise Doubtful("what divides depends on how it is written")
        if divides:
            return [torch.cat([torch.zeros_like(m), torch.where(below == 0, 0.0, m * signal * gate / below)], 1)]
        if self.method.gates == "signal":
            return [torch.cat([m * gate, torch.zeros_like(m)], 1)]
        return [torch.cat([m * gate / 2, torch.where(below == 0, 0.0, m * signal * gate / 2 / below)], 1)]

    def _quotient(self, k: int, m: Tensor, a: Tensor, b: Tensor) -> list[Tensor | None]:
        self._check_order(*self.program.steps[k].reads)
        return [_summed(m.reshape(self.values[k + 1].shape) / b, a.shape), None]


def _summed(m: Tensor, shape: torch.Size) -> Tensor:
    """Multiplier of what was broadcast."""
    dims = [d for d, (n, k) in enumerate(zip(m.shape, shape, strict=True)) if n != k]
    return m.sum(dims, keepdim=True) if dims else m
