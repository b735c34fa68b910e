"""What a careful user would check of an explanation: that it is of the model, adds up, and depends on the weights."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zennit.core import Composite

from crp.engine.attached import put_on
from crp.engine.door import _not_finite, is_finite
from crp.engine.encoding import propagation_of
from crp.engine.inputs import Data, Inputs
from crp.engine.targets import initial_relevance
from crp.layers import evaluating, hooked, modules_of
from crp.types import AbsorbedRelevance, AttributionResults, Condition
from crp.wording import percent

#: What rules are called in a report whose multiplier is the gradient: LRP-0, and what has no rule.
_GRADIENT = ("ordinary chain rule", "LRP0(zero_params=())", "Epsilon(epsilon=0.0, zero_params=(), ")
#: How far the difference quotient may be from the relevance, relative to the larger.
_ACCURACY = 0.01
#: Change of a heatmap, relative to its largest value, below which weights count as without effect.
_EFFECT = 1e-3


class _Attributing(Protocol):
    """What is needed of a `CondAttribution`."""

    model: nn.Module
    device: torch.device
    MODEL_OUTPUT_NAME: str

    def __call__(self, data: Any, conditions: Any, composite: Any = ..., record_layer: Any = ...) -> AttributionResults:
        """Attribute."""

    def absorbed(self, data: Any, conditions: Any, composite: Any) -> AbsorbedRelevance:
        """What layers keep."""

    def select_output(self, output: Any) -> Tensor:
        """Tensor that is explained."""


@dataclass(frozen=True)
class _Point:
    """One thing that was checked; None where it does not apply."""

    name: str
    holds: bool | None
    #: What was measured, to be compared with the limit.
    value: float | None
    limit: float | None
    #: In words.
    what: str

    def __str__(self) -> str:
        mark = {True: "ok    ", False: "FAILED", None: "-     "}[self.holds]
        measured = "" if self.value is None else f" ({self.value:.2g}, at most {self.limit:.2g})"
        return f"{mark} {self.name}: {self.what}{measured if self.name != 'weights matter' else ''}"


@dataclass(frozen=True)
class Checked:
    """What was checked of an explanation; `str` is a page of it.

    Attributes
    ----------
    findings : list of _Point
    kept : dict of str to dict of str to float
        Share of the initial relevance that each layer keeps: with its bias, where nothing contributed, with the
        stabilizer.
    rules : dict of str to int
        Operations by rule; of a composite of `crp.composites`.
    left : list of str
        Operations without a rule that were left to the ordinary chain rule.
    """

    findings: Sequence[_Point]
    kept: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rules: Mapping[str, int] = field(default_factory=dict)
    left: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing failed."""
        return all(finding.holds is not False for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        if self.kept:
            lines += ["kept by layers, as shares of the initial relevance:"]
            for layer, shares in self.kept.items():
                words = ", ".join(f"{kind} {percent(share)}" for kind, share in shares.items() if share)
                lines.append(f"       {layer or '(model)'}: {words or 'nothing'}")
        if self.rules:
            lines += ["operations by rule:", *(f"       {rule}: {count}" for rule, count in self.rules.items())]
        if self.left:
            lines.append(f"left to the ordinary chain rule: {', '.join(self.left)}")
        return "\n".join(lines)


def check_explanation(
    attribution: _Attributing, data: Data, conditions: Sequence[Condition], composite: Composite | None
) -> Checked:
    """Check an explanation; see `crp.attribution.CondAttribution.check`."""
    inputs = Inputs.of(data, None, attribution.model).to(attribution.device)
    result = attribution(data, conditions, composite)
    again = attribution(data, conditions, composite)
    heatmap = _heatmap_of(result, inputs)
    plain, rounding = _run_plainly(attribution, inputs)
    findings = [
        _prediction_unchanged(plain, result, rounding),
        _finite(attribution, result, heatmap),
        _repeats(heatmap, _heatmap_of(again, inputs)),
        _weights_matter(attribution, inputs, conditions, composite, heatmap),
    ]
    account, kept = _account(attribution, data, conditions, composite, rounding)
    operations, left = _operations(attribution, inputs.select([0]), composite)
    findings += [_as_by_differences(attribution, inputs.select([0]), conditions, composite, operations, rounding)]
    rules = dict(Counter(operation.rule for operation in operations).most_common())
    return Checked([findings[0], account, *findings[1:]], kept, rules, left)


def _heatmap_of(result: AttributionResults, inputs: Inputs) -> Tensor:
    """Relevance of all inputs as a vector; samples of several shapes, which have none, are refused."""
    heatmaps = zip(inputs.parts(result.heatmap), inputs.explained, strict=True)
    return torch.cat([heatmap.flatten() for heatmap, _ in heatmaps])


class _Dtypes(TorchFunctionMode):
    """Collects the floating-point dtypes in which a model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[torch.dtype]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        self.seen |= {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        return result


def _run_plainly(attribution: _Attributing, inputs: Inputs) -> tuple[Tensor, float]:
    """Prediction without a composite, and the relative rounding of the least precise dtype that takes part in it."""
    with torch.no_grad(), evaluating(attribution.model), _Dtypes() as dtypes:
        plain = attribution.select_output(inputs.run(attribution.model))
    return plain, max(torch.finfo(dtype).eps for dtype in (plain.dtype, *dtypes.seen))


def _prediction_unchanged(plain: Tensor, result: AttributionResults, rounding: float) -> _Point:
    repeats = len(result.prediction) // len(plain)
    plain = plain.repeat_interleave(repeats, 0).to(result.prediction)
    scale = float(plain.abs().max()) or 1.0
    value, limit = float((result.prediction - plain).abs().max()) / scale, min(1e4 * rounding, 0.1)
    return _Point("prediction", value <= limit, value, limit, "the model predicts the same under the composite")


def _account(
    attribution: _Attributing,
    data: Data,
    conditions: Sequence[Condition],
    composite: Composite | None,
    rounding: float,
) -> tuple[_Point, dict[str, dict[str, float]]]:
    """Σ input + Σ kept = initial, for targets alone, as conditions on layers mask some of it."""
    name, asked = attribution.MODEL_OUTPUT_NAME, propagation_of(composite)
    targets = [{name: condition[name]} for condition in conditions if name in condition]
    what = "relevance of the data, and what layers keep, is what started"
    if not targets or asked.accounting() is None or asked.readout == "multiplier":
        by = "the plain gradient" if composite is None else type(composite).__name__
        return _Point("account", None, None, None, f"{what}: not known of {by}"), {}
    account = attribution.absorbed(data, targets, composite)
    scale = account.initial.abs().clamp(min=torch.finfo(account.initial.dtype).tiny)
    value, limit = float((account.rest.abs() / scale).max()), rounding**0.5
    kept = {
        layer: {kind: float((share / account.initial).mean()) for kind, share in shares.items()}
        for layer, shares in account.layers.items()
    }
    return _Point("account", value <= limit, value, limit, what), kept


def _finite(attribution: _Attributing, result: AttributionResults, heatmap: Tensor) -> _Point:
    tensors = {"heatmap": heatmap, "prediction": result.prediction, **result.relevances}
    wrong = _not_finite({name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)})
    wrong += _not_finite({**dict(attribution.model.named_parameters()), **dict(attribution.model.named_buffers())})
    what = f"not finite: {', '.join(wrong)}" if wrong else "all values are finite"
    return _Point("finite", not wrong, None, None, what)


def _repeats(heatmap: Tensor, again: Tensor) -> _Point:
    difference, scale = float((heatmap - again).abs().max()), float(heatmap.abs().max()) or 1.0
    what = "the same call gives the same heatmap, bit for bit, on this device"
    return _Point("repeats", torch.equal(heatmap, again), difference / scale, 0.0, what)


def _weights_matter(
    attribution: _Attributing,
    inputs: Inputs,
    conditions: Sequence[Condition],
    composite: Composite | None,
    heatmap: Tensor,
) -> _Point:
    """Shuffled weights change the heatmap (Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018)."""
    what = "the heatmap is another one if weights are shuffled"
    changed = copy.copy(attribution)
    changed.model = copy.deepcopy(attribution.model)
    generator = torch.Generator().manual_seed(0)
    for module in modules_of(changed.model).values():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.numel() > 1 and parameter.is_floating_point():
                shuffle(parameter, generator)
    other = _heatmap_of(changed(inputs.data, conditions, composite), inputs)
    scale = float(heatmap.abs().max()) or 1.0
    value = float((other - heatmap).abs().max()) / scale if is_finite(other) else float("inf")
    return _Point("weights matter", value > _EFFECT, value, _EFFECT, f"{what} (change {value:.2g})")


@torch.no_grad()
def shuffle(parameter: Tensor, generator: torch.Generator) -> None:
    """Shuffle the entries of a parameter in place."""
    order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
    parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _as_by_differences(
    attribution: _Attributing,
    sample: Inputs,
    conditions: Sequence[Condition],
    composite: Composite | None,
    operations: Sequence[Any],
    rounding: float,
) -> _Point:
    """Relevance of the strongest concept of a layer halfway, against the change of the output where it is scaled.

    Where every rule is LRP-0, the relevance of a concept is the derivative of the output by that scale: activation
    times gradient.
    """
    name, what = attribution.MODEL_OUTPUT_NAME, "relevance of a concept is what scaling it changes"
    targets = next((condition[name] for condition in conditions if name in condition), None)
    calls = Counter(operation.layer for operation in operations)
    layers = [o.layer for o in operations[:-1] if o.layer and calls[o.layer] == 1]
    has_gradient = operations and all(operation.rule.startswith(_GRADIENT) for operation in operations)
    if targets is None or not layers or not has_gradient or propagation_of(composite).readout == "multiplier":
        return _Point("by differences", None, None, None, f"{what}: known where every rule is LRP-0")
    layer = layers[len(layers) // 2]
    result = attribution(sample.data, [{name: targets}], composite, [layer])
    relevance = result.relevances[layer][0].reshape(len(result.relevances[layer][0]), -1).sum(1)
    concept = int(relevance.abs().argmax())
    step = 1e-5 if rounding < 1e-12 else 1e-2

    def output(scale: float) -> float:
        def scaled(module: nn.Module, args: Any, value: Tensor) -> Tensor:
            factors = torch.ones(value.shape[1], dtype=value.dtype, device=value.device)
            factors[concept] = scale
            return value * factors.reshape(1, -1, *[1] * (value.dim() - 2))

        with put_on(composite, attribution.model) as model, hooked({model.get_submodule(layer): scaled}):
            prediction = attribution.select_output(sample.run(model))
        return float(initial_relevance(prediction.detach(), [targets], None).sum())

    quotient, found = (output(1 + step) - output(1 - step)) / (2 * step), float(relevance[concept])
    scale = max(abs(quotient), abs(found), 1e-3 * float(result.prediction.abs().max()))
    value = abs(quotient - found) / (scale or 1.0)
    what += f" (layer {layer!r}, channel {concept}: {found:.4g} and {quotient:.4g})"
    return _Point("by differences", value <= _ACCURACY, value, _ACCURACY, what)


def _operations(
    attribution: _Attributing, sample: Inputs, composite: Composite | None
) -> tuple[list[Any], Sequence[str]]:
    """Operations in the order of execution, and those that were left to the ordinary chain rule."""
    report: Any = getattr(composite, "report", None)
    if report is None:
        return [], ()
    data = sample.data
    positional, named = ([], data) if isinstance(data, Mapping) else (data if isinstance(data, tuple) else [data], {})
    found = report(attribution.model, *positional, **named)
    return [*found.operations], found.left
