"""What a composite does to a model: which rule and which canonizer reached which layer and operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from zennit.canonizers import Canonizer

from crp.canonizers.base import Reporting
from crp.graph import tracing
from crp.reference import referencing
from crp.rules.operation import changed

if TYPE_CHECKING:
    from crp.composites.base import Composite

CHAIN_RULE = "ordinary chain rule"
MERGED = "merged into"


@dataclass(frozen=True)
class Treated:
    """What happens in one layer.

    Attributes
    ----------
    layer : str
        Name in ``model.named_modules()``; ``""`` is the model itself.
    kind : str
        Type of the module.
    rule : str or None
        Its rule; None where no rule is mapped to it, as for containers.
    calls : int
        How often the forward pass called it.
    operations : dict of (str, str) to int
        Functions of torch that ran in it outside of any rule of a module: (name, rule) and how often.
    canonizer : str or None
        What a canonizer did to it.
    """

    layer: str
    kind: str
    rule: str | None
    calls: int
    operations: dict[tuple[str, str], int] = field(default_factory=dict)
    canonizer: str | None = None


@dataclass(frozen=True)
class Report:
    """What a composite does to a model.

    Attributes
    ----------
    composite : str
        Its `repr`.
    model : str
        Type of the model.
    layers : list of Treated
        Layers that something was done to or in, in the order of ``model.named_modules()``.
    canonizers : list of str
        Each with how many layers it changed; those that matched nothing are named as such.
    left : list of str
        Operations without a rule for which the ordinary chain rule is not known to be the method.
    """

    composite: str
    model: str
    layers: Sequence[Treated]
    canonizers: Sequence[str]
    left: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        layers = [
            {
                "layer": layer.layer,
                "kind": layer.kind,
                "rule": layer.rule,
                "calls": layer.calls,
                "operations": [
                    {"operation": name, "rule": rule, "times": times}
                    for (name, rule), times in layer.operations.items()
                ],
                "canonizer": layer.canonizer,
            }
            for layer in self.layers
        ]
        return {
            "composite": self.composite,
            "model": self.model,
            "layers": layers,
            "canonizers": list(self.canonizers),
            "left": list(self.left),
        }

    def __str__(self) -> str:
        rows = [("layer", "kind", "rule", "canonizer")]
        for treated in self.layers:
            name = treated.layer or "(model)"
            times = f" ×{treated.calls}" if treated.calls > 1 else " (not called)" if not treated.calls else ""
            rules: dict[str, list[str]] = {}
            for (operation, rule), count in treated.operations.items():
                rules.setdefault(rule, []).append(f"{operation} ×{count}" if count > 1 else operation)
            texts = [treated.rule] if treated.rule is not None else []
            texts += [f"{rule}: {', '.join(names)}" for rule, names in rules.items()]
            rows.append((name + times, treated.kind, texts[0] if texts else "", treated.canonizer or ""))
            rows += [("", "", text, "") for text in texts[1:]]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        end = [f"canonizer {canonizer}" for canonizer in self.canonizers]
        end += [f"without a rule, by the ordinary chain rule: {', '.join(self.left)}"] if self.left else []
        return "\n".join([f"{self.composite} on {self.model}", *table, *end])


def report_on(composite: Composite, model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """What a composite does to a model, from one forward pass; see `Composite.report`."""
    modules = dict(model.named_modules())
    calls: Counter[str] = Counter()
    training = [module for module in modules.values() if module.training]
    handles = []
    try:
        for module in training:
            module.training = False
        for name, module in modules.items():
            handles.append(
                module.register_forward_hook(lambda *_, name=name: calls.update([] if _is_aside() else [name]))
            )
        with composite.context(model), composite.watching() as seen, torch.enable_grad():
            given, named = changed((args, kwargs), _explained)
            model(*given, **named)
            rules, applied = composite.plan(model), list(composite.applied)
            done = [_done(canonizer, instances) for canonizer, instances in applied]
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    merged = {name for layers, _ in done for name, what in layers.items() if what.startswith(MERGED)}
    treated = {name: what for layers, _ in done for name, what in layers.items()}
    operations: dict[str, Counter[tuple[str, str]]] = {}
    for layer, operation, rule, _ in seen:
        operations.setdefault(layer, Counter())[operation, CHAIN_RULE if rule is None else repr(rule)] += 1
    layers = [
        Treated(
            name,
            type(module).__name__,
            (CHAIN_RULE if rules[name] is None else repr(rules[name]))
            if name in rules and name not in merged
            else None,
            calls[name],
            dict(operations.get(name, {})),
            treated.get(name),
        )
        for name, module in modules.items()
        if name in rules or name in operations or name in treated
    ]
    left = dict.fromkeys(
        f"{s.operation}() in {s.layer!r}" if s.layer else f"{s.operation}()" for s in seen if not s.treated
    )
    return Report(repr(composite), type(model).__name__, layers, [text for _, text in done], list(left))


def _is_aside() -> bool:
    """Whether the model runs for the record only."""
    return tracing() or referencing()


def _explained(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor


def _done(canonizer: Canonizer, instances: Sequence[Canonizer]) -> tuple[dict[str, str], str]:
    """What a canonizer did to which layer, and a line about it."""
    layers: dict[str, str] = {}
    reporting = [instance for instance in instances if isinstance(instance, Reporting)]
    for instance in reporting:
        layers |= {name: f"{MERGED} {into}" for name, into in instance.merged.items()}
        layers |= {name: f"left: {why}" for name, why in instance.left.items()}
    number = sum(len(instance.merged) for instance in reporting) + len(instances) - len(reporting)
    left = sum(len(instance.left) for instance in reporting)
    text = f"{canonizer!r} changed {number} layers" if number else f"{canonizer!r} matched nothing"
    return layers, f"{text}, left {left}" if left else text
