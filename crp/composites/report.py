"""What a composite does to a model: which rule and which canonizer reached what, operation by operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zennit.canonizers import Canonizer

from crp.canonizers.base import Reporting
from crp.errors import InputTypeError
from crp.layers import evaluating, hooked, referencing, tracing
from crp.layers.misfits import telling_misfits
from crp.layers.nested import changed
from crp.rules.layer import call_in_words
from crp.wording import counted

CHAIN_RULE = "ordinary chain rule"
MERGED = "merged into"


@dataclass(frozen=True)
class _Treated:
    """One operation that depends on the model's input.

    Attributes
    ----------
    layer : str
        Name of the innermost module in which it ran, as in ``model.named_modules()``; ``""`` is the model itself.
    module : str
        Type of that module.
    call : int
        Which call of that module, counted from 0.
    function : str
        Plain name of the function of torch; or type of the module, if that is one operation.
    rule : str
        Its rule.
    why : str
        The entry of the composite that it matched, or why there is none.
    canonizer : str or None
        What a canonizer did to the module.
    """

    layer: str
    module: str
    call: int
    function: str
    rule: str
    why: str
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
    operations : list of _Treated
        In the order of execution.
    modules : dict of str to str
        Type of each module that operations ran in, or that a canonizer changed, or that was not called.
    calls : dict of str to int
        How often the forward pass called each of these.
    changed : dict of str to str
        What a canonizer did to which module.
    canonizers : list of str
        Each with how many layers it changed; those that matched nothing are named as such.
    left : list of str
        Operations without a rule, if the ordinary chain rule is not known to be the method for them.
    """

    composite: str
    model: str
    operations: Sequence[_Treated]
    modules: Mapping[str, str]
    calls: Mapping[str, int]
    changed: Mapping[str, str]
    canonizers: Sequence[str]
    left: Sequence[str]

    def by_layer(self) -> dict[str, list[_Treated]]:
        """Operations of each module, in the order of ``model.named_modules()``."""
        treated: dict[str, list[_Treated]] = {name: [] for name in self.modules}
        for operation in self.operations:
            treated[operation.layer].append(operation)
        return treated

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("layer", "module", "operation: rule", "canonizer")]
        for name, operations in self.by_layer().items():
            calls = self.calls[name]
            times = f" ×{calls}" if calls > 1 else " (not called)" if not calls else ""
            numbers = Counter((operation.rule, operation.function) for operation in operations)
            rules: dict[str, list[str]] = {}
            for (rule, function), count in numbers.items():
                rules.setdefault(rule, []).append(f"{function} ×{count}" if count > 1 else function)
            texts = [f"{', '.join(functions)}: {rule}" for rule, functions in rules.items()]
            first = texts[0] if texts else ""
            rows.append(((name or "(model)") + times, self.modules[name], first, self.changed.get(name, "")))
            rows += [("", "", text, "") for text in texts[1:]]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        end = [f"canonizer {canonizer}" for canonizer in self.canonizers]
        end += [f"without a rule, by the ordinary chain rule: {', '.join(self.left)}"] if self.left else []
        return "\n".join([f"{self.composite} on {self.model}", *table, *end])


def _report_on(composite: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """What a composite does to a model, from one forward pass; see `Composite.report`."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}; a sample comes after it")
    modules = dict(model.named_modules())
    calls: Counter[str] = Counter()

    def count(name: str, *_: Any) -> None:
        # (not where the model runs for a record only, or on a reference)
        if not (tracing() or referencing()):
            calls.update([name])

    counting = {module: partial(count, name) for name, module in modules.items()}
    with evaluating(model), hooked(counting), composite.context(model), composite.watching() as seen:
        given, named = changed((args, kwargs), _explained)
        arguments: dict[int | str, Any] = {**dict(enumerate(given)), **named}
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        with torch.enable_grad(), telling_misfits(model, tensors, arguments):
            model(*given, **named)
        done = [_done(canonizer, instances) for canonizer, instances in composite.applied]
    told = {name: what for layers, _ in done for name, what in layers.items()}
    kinds = {name: type(module).__name__ for name, module in modules.items()}
    operations = [
        _Treated(layer, kinds[layer], call, function, CHAIN_RULE if rule is None else repr(rule), why, told.get(layer))
        for layer, call, function, rule, _, why in seen
    ]
    shown = {operation.layer for operation in operations} | told.keys()
    shown |= {name for name, module in modules.items() if module._parameters and not calls[name]}
    kinds = {name: kind for name, kind in kinds.items() if name in shown}
    left = dict.fromkeys(call_in_words(one.operation, one.layer) for one in seen if not one.is_method)
    return Report(
        repr(composite),
        type(model).__name__,
        operations,
        kinds,
        {name: calls[name] for name in kinds},
        told,
        [text for _, text in done],
        list(left),
    )


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
    text = f"{canonizer!r} changed {counted(number, 'layer')}" if number else f"{canonizer!r} matched nothing"
    return layers, f"{text}, left {left}" if left else text
