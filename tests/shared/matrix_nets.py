"""Small nets of named layers, and their relevance in matrices, row by row; it knows nothing of `crp`.

What flows back is a gradient, a multiplier m (R = a ⊙ m), or relevance itself, as zennit's composites have it. Rules
are those of `slow_rules`. A condition masks what arrives at a layer; where relevance flows through conditioned layers
only, it is taken from layer to layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from slow_rules import Rule, at_input, hidden
from torch import Tensor, nn


class OutOfOrder(Exception):
    """The flow does not reach a conditioned layer."""


@dataclass(frozen=True)
class Step:
    """One operation: a layer's name, or none; which values it reads (the inputs come first)."""

    kind: Literal["conv", "linear", "norm", "relu", "pool", "flatten", "add"]
    reads: tuple[int, ...]
    name: str = ""


@dataclass(frozen=True)
class Plan:
    """Steps of a net, the shapes of its inputs, and its layers."""

    inputs: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    make: Callable[[], dict[str, nn.Module]]

    def names(self) -> dict[str, int]:
        """Value of each layer's name, and of ``name#i``; a layer that is called several times has the latter only."""
        calls: dict[str, list[int]] = {}
        for k, step in enumerate(self.steps):
            if step.name:
                calls.setdefault(step.name, []).append(k + len(self.inputs))
        names = {f"{name}#{i}": value for name, values in calls.items() for i, value in enumerate(values)}
        return names | {name: values[0] for name, values in calls.items() if len(values) == 1}


class Planned(nn.Module):
    """Net that does what a plan says."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        for name, layer in plan.make().items():
            self.add_module(name, layer)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        values = [x] if z is None else [x, z]
        for step in self.plan.steps:
            inputs = [values[i] for i in step.reads]
            made = inputs[0].flatten(1) if step.kind == "flatten" else None
            made = inputs[0] + inputs[1] if step.kind == "add" else made
            values.append(getattr(self, step.name)(*inputs) if made is None else made)
        return values[-1]


def _chain() -> dict[str, nn.Module]:
    return {"conv1": nn.Conv2d(2, 4, 2), "act": nn.ReLU(), "conv2": nn.Conv2d(4, 3, 2), "fc": nn.Linear(12, 3)}


def _branch() -> dict[str, nn.Module]:
    return {
        "stem": nn.Conv2d(2, 3, 2), "act1": nn.ReLU(), "left": nn.Conv2d(3, 4, 1), "right": nn.Conv2d(3, 4, 1),
        "act2": nn.ReLU(), "act3": nn.ReLU(), "top": nn.Conv2d(4, 3, 2), "fc": nn.Linear(12, 4),
    }  # fmt: skip


def _again() -> dict[str, nn.Module]:
    return {"stem": nn.Linear(5, 4), "act": nn.ReLU(), "mix": nn.Linear(4, 4), "head": nn.Linear(4, 3)}


def _normed() -> dict[str, nn.Module]:
    return {
        "conv1": nn.Conv2d(2, 4, 2, bias=False), "norm1": nn.BatchNorm2d(4, eps=0), "act1": nn.ReLU(),
        "pool": nn.AvgPool2d(2, 1), "conv2": nn.Conv2d(4, 4, 1), "norm2": nn.BatchNorm2d(4, eps=0), "act2": nn.ReLU(),
        "fc": nn.Linear(16, 3),
    }  # fmt: skip


def _maps() -> dict[str, nn.Module]:
    return {"conv1": nn.Conv2d(2, 4, 2), "act": nn.ReLU(), "out": nn.Conv2d(4, 3, 2)}


def _two() -> dict[str, nn.Module]:
    return {"left": nn.Linear(5, 4), "right": nn.Linear(3, 4), "act": nn.ReLU(), "head": nn.Linear(4, 3)}


def _named(*steps: tuple[Any, ...]) -> tuple[Step, ...]:
    return tuple(Step(kind, reads if isinstance(reads, tuple) else (reads,), *name) for kind, reads, *name in steps)


PLANS: dict[str, Plan] = {
    "chain": Plan(((2, 4, 4),), _named(
        ("conv", 0, "conv1"), ("relu", 1, "act"), ("conv", 2, "conv2"), ("relu", 3, "act"), ("flatten", 4),
        ("linear", 5, "fc"),
    ), _chain),
    "branch": Plan(((2, 4, 4),), _named(
        ("conv", 0, "stem"), ("relu", 1, "act1"), ("conv", 2, "left"), ("conv", 2, "right"), ("relu", 3, "act2"),
        ("relu", 4, "act3"), ("add", (5, 6)), ("conv", 7, "top"), ("flatten", 8), ("linear", 9, "fc"),
    ), _branch),
    "again": Plan(((5,),), _named(
        ("linear", 0, "stem"), ("relu", 1, "act"), ("linear", 2, "mix"), ("relu", 3, "act"), ("linear", 4, "mix"),
        ("add", (5, 2)), ("relu", 6, "act"), ("linear", 7, "head"),
    ), _again),
    "normed": Plan(((2, 4, 4),), _named(
        ("conv", 0, "conv1"), ("norm", 1, "norm1"), ("relu", 2, "act1"), ("pool", 3, "pool"), ("conv", 4, "conv2"),
        ("norm", 5, "norm2"), ("relu", 6, "act2"), ("flatten", 7), ("linear", 8, "fc"),
    ), _normed),
    "maps": Plan(((2, 4, 4),), _named(("conv", 0, "conv1"), ("relu", 1, "act"), ("conv", 2, "out")), _maps),
    "two": Plan(((5,), (3,)), _named(
        ("linear", 0, "left"), ("linear", 1, "right"), ("add", (2, 3)), ("relu", 4, "act"), ("linear", 5, "head"),
    ), _two),
}  # fmt: skip


def planned(name: str, seed: int, dtype: torch.dtype = torch.float64) -> Planned:
    """Net of a plan with seeded weights, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    model = Planned(PLANS[name]).to(torch.float64).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0, 0.6, generator=generator)
            if key.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return model.to(dtype)


# --- methods --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What flows, and the rules that share it.

    Attributes
    ----------
    flow : "gradient", "multiplier" or "relevance"
    convolution, dense : Rule or None
        None is the plain gradient.
    first : Rule or None
        Of operations that read an input.
    merges : bool
        Whether batch norm is merged into the convolution before it.
    """

    flow: Literal["gradient", "multiplier", "relevance"]
    convolution: Rule | None = None
    dense: Rule | None = None
    first: Rule | None = None
    merges: bool = False


@dataclass
class Masked:
    """What a row's condition does at a value: ``function(flow) -> flow``, on what has the layer's shape."""

    value: int
    function: Callable[[Tensor], Tensor]


@dataclass
class RowFlow:
    """What was found for one row."""

    prediction: Tensor
    heatmaps: list[Tensor]
    activations: dict[int, Tensor]
    relevances: dict[int, Tensor]
    #: Conditioned values that relevance does not reach.
    missed: list[int] = field(default_factory=list)
    initial: float = 0.0
    #: What each step keeps, by value.
    kept: dict[int, float] = field(default_factory=dict)


# --- matrices --------------------------------------------------------------------------------------------------------


def _columns(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Matrix (out, in) of an affine function of one sample, without its constant."""
    n = math.prod(shape)
    basis = torch.eye(n, dtype=torch.float64).reshape(n, *shape)
    return (function(basis) - function(torch.zeros_like(basis))).flatten(1).T


class MatrixNet:
    """A planned net as matrices: values of a sample, and flows back from a value to others.

    ``explained`` are numbers of inputs, all by default.
    """

    def __init__(self, model: Planned, method: Method, explained: Sequence[int] | None = None) -> None:
        self.plan, self.method, self.n_inputs = model.plan, method, len(model.plan.inputs)
        self.depending = set(range(self.n_inputs) if explained is None else explained)
        for k, step in enumerate(self.plan.steps, self.n_inputs):
            if self.depending & {*step.reads}:
                self.depending.add(k)
        layers = {name: _double(layer) for name, layer in model.named_children()}
        self.shapes: list[tuple[int, ...]] = [*self.plan.inputs]
        self.weights: dict[int, tuple[Tensor, Tensor]] = {}
        self.reach: dict[int, Tensor] = {}
        with torch.no_grad():
            for k, step in enumerate(self.plan.steps, self.n_inputs):
                self._add(k, step, layers.get(step.name))
        if method.merges:
            for k, step in enumerate(self.plan.steps, self.n_inputs):
                if step.kind == "norm":
                    self._merge(k, step.reads[0])

    def _add(self, k: int, step: Step, layer: nn.Module | None) -> None:
        shape = self.shapes[step.reads[0]]
        zero = torch.zeros(1, *shape, dtype=torch.float64)
        if step.kind in ("flatten", "add"):
            self.shapes.append((math.prod(shape),) if step.kind == "flatten" else shape)
            return
        assert layer is not None
        offset = layer(zero)
        self.shapes.append(tuple(offset.shape[1:]))
        if step.kind == "relu":
            return
        self.weights[k] = _columns(layer, shape), offset.flatten()
        if step.kind in ("conv", "linear"):
            before = layer.weight.clone()
            layer.weight.fill_(1.0)
            self.reach[k] = _columns(layer, shape)
            layer.weight.copy_(before)

    def _merge(self, k: int, below: int) -> None:
        scale, shift = self.weights[k]
        weight, bias = self.weights[below]
        self.weights[below] = scale @ weight, scale @ bias + shift
        self.weights[k] = torch.eye(len(shift), dtype=torch.float64), torch.zeros_like(shift)

    def values(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """All values of one sample, each (1, n)."""
        values = [x.detach().to(torch.float64).reshape(1, -1) for x in inputs]
        for k, step in enumerate(self.plan.steps, self.n_inputs):
            a = values[step.reads[0]]
            if step.kind == "relu":
                values.append(a.clamp(min=0))
            elif step.kind == "flatten":
                values.append(a)
            elif step.kind == "add":
                values.append(a + values[step.reads[1]])
            else:
                weight, bias = self.weights[k]
                values.append(a @ weight.T + bias)
        return values

    # --- backward ---

    def send(self, k: int, flow: Tensor, values: Sequence[Tensor], direct: dict[int, Tensor]) -> list[Tensor]:
        """What a step hands on to what it reads; ``direct`` is added relevance of inputs."""
        step = self.plan.steps[k - self.n_inputs]
        a, y = values[step.reads[0]], values[k]
        if step.kind in ("flatten", "add"):
            return [flow] * len(step.reads)
        if step.kind == "relu":
            return [flow if self.method.flow == "relevance" else flow * (a > 0)]
        weight, bias = self.weights[k]
        rule = {"conv": self.method.convolution, "linear": self.method.dense}.get(step.kind)
        if self.method.flow == "relevance" and step.kind == "norm":
            return [flow]
        if self.method.flow == "relevance" and step.kind == "pool":
            return [a * (_over(flow, y, 1e-6) @ weight)]
        if rule is None:
            return [flow @ weight]
        # (zennit's composites take the module that was registered first, and no other)
        is_first = step.reads[0] < self.n_inputs and (self.method.flow == "multiplier" or k == self.n_inputs)
        first = self.method.first if is_first else None
        if self.method.flow == "relevance":
            return [_relevance(first or rule, a, weight, self.reach[k], bias, flow)]
        if first is None:
            return [hidden(rule, a, weight, bias, flow, zero_bias=False)]
        copied = torch.eye(a.shape[1], dtype=torch.float64)
        given = at_input(first, a, weight, self.reach[k], bias, flow * y, copied, zero_bias=False)
        direct[step.reads[0]] = direct.get(step.reads[0], 0) + given
        return [torch.zeros_like(a)]

    def below(self, root: int) -> set[int]:
        """Values that a value depends on, and itself."""
        found = {root}
        for k in reversed(range(self.n_inputs, root + 1)):
            if k in found:
                found.update(self.plan.steps[k - self.n_inputs].reads)
        return found

    def flow(
        self, root: int, start: Tensor, values: Sequence[Tensor], masks: Mapping[int, Callable[[Tensor], Tensor]]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, float]]:
        """What arrives at each value (before masks) from a root; relevance of inputs beside; what steps keep."""
        arrived: dict[int, Tensor] = {root: start}
        direct: dict[int, Tensor] = {}
        kept: dict[int, float] = {}
        for k in reversed(range(self.n_inputs, root + 1)):
            if k not in arrived or k not in self.depending:
                continue
            flow = self._masked(masks.get(k), arrived[k], k)
            step = self.plan.steps[k - self.n_inputs]
            before = sum(t.sum().item() for t in direct.values())
            sent = self.send(k, flow, values, direct)
            gone = sum(t.sum().item() for t in direct.values()) - before
            # (what does not depend on what is explained keeps its part, like a bias)
            sent = [part if i in self.depending else 0 * part for i, part in zip(step.reads, sent, strict=True)]
            gone += sum((s * values[i]).sum().item() for i, s in zip(step.reads, sent, strict=True))
            kept[k] = (flow * values[k]).sum().item() - gone
            for i, part in zip(step.reads, sent, strict=True):
                arrived[i] = arrived[i] + part if i in arrived else part
        return arrived, direct, kept

    def _masked(self, mask: Callable[[Tensor], Tensor] | None, flow: Tensor, k: int) -> Tensor:
        return flow if mask is None else mask(flow.reshape(self.shapes[k]).clone()).reshape(1, -1)

    def row(
        self,
        inputs: Sequence[Tensor],
        masked: Sequence[Masked],
        records: Sequence[int],
        start_value: int | None,
        initial: Callable[[Tensor], Tensor],
        through: bool,
    ) -> RowFlow:
        """All results of one row.

        ``initial`` takes the prediction, of the root's shape, to what starts; ``through`` says whether relevance flows
        through conditioned layers only.
        """
        values = self.values(inputs)
        root = len(values) - 1 if start_value is None else start_value
        relevance = initial(values[root].reshape(self.shapes[root])).reshape(1, -1)
        y = values[root]
        start = torch.where(y == 0, 0.0, relevance / y) if self.method.flow == "multiplier" else relevance
        seen, direct, missed, kept = (self._through if through else self._past)(root, start, values, masked)
        times = [v if self.method.flow == "multiplier" else torch.ones_like(v) for v in values]
        zeros = {i: torch.zeros_like(v) for i, v in enumerate(values)}
        of_inputs = [seen.get(i, zeros[i]) * times[i] + direct.get(i, 0) for i in range(self.n_inputs)]
        return RowFlow(
            values[root].reshape(self.shapes[root]),
            [r.reshape(shape).sum(0) for r, shape in zip(of_inputs, self.plan.inputs, strict=True)],
            {i: values[i].reshape(self.shapes[i]) for i in records},
            {i: (seen.get(i, zeros[i]) * times[i]).reshape(self.shapes[i]) for i in records},
            missed,
            (start * values[root]).sum().item(),
            kept,
        )

    def _past(self, root: int, start: Tensor, values: Any, masked: Sequence[Masked]) -> Any:
        """Masks act while everything flows."""
        masks: dict[int, Callable[[Tensor], Tensor]] = {}
        for one in masked:
            masks[one.value] = _after(masks.get(one.value), one.function)
        seen, direct, kept = self.flow(root, start, values, masks)
        missed = [one.value for one in masked if one.value not in seen or one.value not in self.depending]
        return seen, direct, missed, kept

    def _through(self, root: int, start: Tensor, values: Any, masked: Sequence[Masked]) -> Any:
        """From conditioned layer to conditioned layer; what is recorded is what flowed there first."""
        recorded: dict[int, Tensor] = {root: start}
        above: dict[int, float] = {}
        for one in masked:
            goal = one.value
            if goal not in self.below(root) or goal not in self.depending:
                raise OutOfOrder(goal)
            seen, _, kept = self.flow(root, start, values, {})
            between = [i for i in seen if goal in self.below(i)]
            recorded = {**{i: seen[i] for i in between}, **recorded}
            above |= {i: kept[i] for i in between if i != goal}
            root, start = goal, self._masked(one.function, seen[goal], goal)
        seen, direct, kept = self.flow(root, start, values, {})
        return {**seen, **recorded}, direct, [], above | kept


def _after(first: Callable[[Tensor], Tensor] | None, then: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return then if first is None else lambda flow: then(first(flow))


def _double(layer: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(layer).to(torch.float64)


def _over(flow: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """``flow / z``, stabilized as zennit does: with +ε where z is 0."""
    return flow / (z + epsilon * torch.where(z == 0, 1.0, z.sign()))


def _relevance(rule: Rule, a: Tensor, w: Tensor, reach: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """Relevance that a rule hands on, as zennit has it."""
    if rule.name == "flat":
        return _over(r, reach.sum(1)[None], rule.epsilon) @ reach
    if rule.name == "epsilon":
        return a * (_over(r, a @ w.T + b, rule.epsilon) @ w)
    up, down = a.clamp(min=0), a.clamp(max=0)
    s = _over(r, up @ w.clamp(min=0).T + b.clamp(min=0) + down @ w.clamp(max=0).T, rule.epsilon)
    return up * (s @ w.clamp(min=0)) + down * (s @ w.clamp(max=0))
