"""Classes for which a sample's relevance is computed: those of its label, those the model predicts, or a fixed list."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from operator import index, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept, as_ids
from crp.engine.attached import put_on
from crp.engine.conditions import Rows
from crp.engine.encoding import propagation_of
from crp.engine.forward import check_one_entry, record_outputs
from crp.engine.results import Part
from crp.engine.settings import Reading, Settings
from crp.errors import InputError, OutOfRangeError
from crp.flags import is_flag
from crp.layers import hooked
from crp.types import AttributionResults
from crp.visualization.mining.text_batches import Asked
from crp.wording import shortened

#: ``"label"``, ``"prediction"``, ``"all"``, ``"top-5"`` (any number), or classes.
Targets = str | Sequence[int]

_TOP = re.compile(r"top-([1-9]\d{0,8})")


def parse_targets(targets: Targets) -> str | tuple[int, ...]:
    """Value of `mine`'s ``targets``, checked: a word, or classes in ascending order.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if isinstance(targets, str):
        if targets in ("label", "prediction", "all") or _TOP.fullmatch(targets):
            return targets
    elif isinstance(targets, Sequence | Tensor | np.ndarray):
        with suppress(TypeError):
            if min(ids := as_ids(targets), default=-1) >= 0:
                return tuple(sorted({*ids}))
    raise InputError(f"targets must be 'label', 'prediction', 'top-5', 'all', or a list of classes; not {targets!r}")


def to_targets(label: Any, single_targets: Callable[[Any], Iterable[Any]] | None, needed: bool) -> list[int]:
    """Targets that a label names, ascending and each once; [-1] stands for no label, where none is ``needed``.

    Raises
    ------
    ValueError
        If they are no classes.
    """
    if single_targets is None and label is None and not needed:
        return [-1]
    targets = [label] if single_targets is None else list(single_targets(label))
    found = []
    for target in targets:
        try:
            found.append(int(target) if is_flag(target) else index(target))
        except TypeError:
            what = "label" if single_targets is None else "target"
            raise InputError(
                f"{what} {shortened(target)} is no integer class; single_targets (of FeatureVisualization: "
                "multitarget_to_single; of crp mine: --multi-label) turns a label into classes, and "
                "targets='prediction' (--targets prediction) needs no labels"
            ) from None
    for target in found:
        if not 0 <= target < 1 << 63:
            raise InputError(f"target {target} is no class; classes count from 0")
    return sorted(set(found))


def choose_targets(targets: str | tuple[int, ...], attribution: CondAttribution, asked: Asked) -> list[list[int]]:
    """Classes of every sample, ascending, where they are not those of its label.

    Parameters
    ----------
    targets : str or tuple of int
        From `parse_targets`.
    attribution : CondAttribution
    asked : Asked
        Of a language model, tokens at the positions that are explained are chosen.

    Returns
    -------
    list of list of int
        Of equal outputs, the smaller class is the predicted one.

    Raises
    ------
    ValueError
        If the model's output is not of shape (samples, classes).
    """
    if not isinstance(targets, str):
        return [list(targets)] * asked.n_samples
    n_samples = asked.n_samples
    # For "all", only the number of outputs is needed, which one sample tells.
    asked = asked.first() if targets == "all" else asked
    with torch.no_grad(), put_on(None, attribution.model) as model:
        chosen = attribution.select_output(asked.run(model))
    output = asked.chosen(chosen) if isinstance(chosen, Tensor) else chosen
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != asked.n_samples:
        shape = tuple(output.shape) if isinstance(output, Tensor) else "a list of tensors"
        instead = (
            "give a list of targets" if asked.lengths is None else "a language model needs Texts(..., position=-1)"
        )
        raise InputError(
            f"targets={targets!r} needs an output of shape ({asked.n_samples}, classes), not {shape}; " + instead
        )
    if output.is_complex() or not output.shape[1]:
        raise InputError(
            f"targets={targets!r} needs scores of classes that are real numbers, not {output.dtype} of shape "
            f"{tuple(output.shape)}"
        )
    if targets == "all":
        return [list(range(output.shape[1]))] * n_samples
    found = _TOP.fullmatch(targets)
    n = int(found[1]) if found else 1
    # (of a large vocabulary, sorting takes longer than a small model's relevance)
    best = (
        output.argmax(1)[:, None] if n == 1 else torch.sort(output, dim=1, descending=True, stable=True).indices[:, :n]
    )
    of_samples: list[list[int]] = torch.sort(best, dim=1).values.tolist()
    return of_samples


def count_outputs(attribution: CondAttribution, asked: Asked) -> int | None:
    """Number of outputs that can be targets, by what a model returns for a sample; None where it tells none."""
    try:
        with torch.no_grad(), put_on(None, attribution.model) as model:
            output = asked.chosen(attribution.select_output(asked.run(model)))
    except Exception:  # (whatever is wrong with a sample is told where it is explained)
        return None
    return output.shape[1] if output.dim() > 1 else None


def check_has(targets: Sequence[int], n_outputs: int | None) -> None:
    """Raise an `IndexError` where a model does not have one of these classes."""
    if n_outputs is not None and max(targets) >= n_outputs:
        raise OutOfRangeError(f"targets={list(targets)}: the model has outputs 0 to {n_outputs - 1}")


def keeps_graph(composite: Composite | None) -> bool:
    """Whether rules are part of autograd's graph, so that several backward passes can use one forward pass."""
    return composite is None or propagation_of(composite).encoding == "multiplier"


def calls_itself(attribution: CondAttribution) -> bool:
    """Whether a subclass has a ``__call__`` of its own."""
    return type(attribution).__call__ is not CondAttribution.__call__


def record_activations(
    attribution: CondAttribution,
    asked: Asked,
    composite: Composite | None,
    layers: Sequence[str],
    on_device: torch.device | str | None = None,
) -> tuple[dict[str, Tensor], Any]:
    """Outputs of layers for every sample, by the forward pass alone, and what would be explained.

    There are none of layers that the forward pass does not use, and None where the model returns no such tensor. The
    composite's canonizers may change what layers give.
    """
    returned: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        returned.append(output)

    with put_on(composite, attribution.model) as model, hooked({model: keep}):
        found = record_outputs(model, asked.run, asked.n_texts, layers)
    found = {layer: asked.of_samples(outputs) for layer, outputs in found.items()}
    output = None
    with suppress(TypeError, ValueError, KeyError, IndexError, AttributeError):  # nothing is explained here
        output = attribution.select_output(returned[-1])
    return {layer: output.to(on_device) if on_device else output for layer, output in found.items()}, output


@torch.no_grad()
def top_class(output: Any, n_samples: int) -> tuple[Tensor, Tensor]:
    """Predicted class of every sample, and its probability.

    Parameters
    ----------
    output : Tensor of shape (rows, classes)
        Scores, of which a softmax is taken, or probabilities; the samples come first.
    n_samples : int

    Returns
    -------
    prediction : Tensor of shape (samples,)
        Of equal outputs, the smaller class (int64); -1 where the output is no such tensor.
    probability : Tensor of shape (samples,)
        As float32.
    """
    is_scores = isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point()
    if not is_scores or len(output) < n_samples or output.shape[1] < 2:
        device = output.device if isinstance(output, Tensor) else None
        return torch.full((n_samples,), -1, device=device), torch.zeros(n_samples, device=device)
    tolerance = max(1e-3, 8 * torch.finfo(output.dtype).eps)  # (half precision rounds each of them)
    output = output[:n_samples].detach().to(torch.float64 if output.dtype == torch.float64 else torch.float32)
    shares = (output.min(1).values >= 0) & ((output.sum(1) - 1).abs() < tolerance)
    scores = torch.where(shares[:, None], output, output.softmax(1))
    best = scores.argmax(1)  # (the first of equal ones)
    return best, scores.gather(1, best[:, None])[:, 0].nan_to_num(0).clamp(0, 1).float()


def attribute_targets(
    attribution: CondAttribution,
    asked: Asked,
    targets: Sequence[Sequence[int]],
    composite: Composite | None,
    layers: Sequence[str],
    on_device: torch.device | str | None = None,
    multipliers: bool = False,
    reading: Reading | None = None,
    at_once: int | None = None,
) -> Iterator[AttributionResults]:
    """Attribute several targets of every sample; each text or other sample takes part in one forward pass.

    Whether the data are finite is for the caller to find out.

    Parameters
    ----------
    attribution : CondAttribution
    asked : Asked
    targets : sequence of sequences of int
        Of each sample equally many; of a language model, tokens at the positions that are explained.
    composite : zennit.core.Composite or None
    layers : sequence of str
        Recorded ones.
    on_device : torch.device or str, optional
    multipliers : bool
        Whether results keep multipliers, which not all concepts read.
    reading : callable, optional
        What is read of each result, if a replay gives it.
    at_once : int, optional
        Rows that are sent back together, at most, where the graph is kept; all samples by default.

    Yields
    ------
    AttributionResults
        First target of every sample, second target of every sample, ...; some of these rows at a time. Only an
        attribution with a ``__call__`` or a ``broadcast`` of its own needs a forward pass for each.

    Raises
    ------
    ValueError
        If a layer has several entries for each sample, as one that runs on (batch * time).
    """
    name, data = attribution.MODEL_OUTPUT_NAME, asked.data
    slots = [
        [asked.condition(name, place, [target]) for place, target in enumerate(slot)]
        for slot in zip(*targets, strict=True)
    ]
    if calls_itself(attribution) or type(attribution).broadcast is not CondAttribution.broadcast:
        for slot in slots:
            yield check_one_entry(
                attribution(asked.paired(), slot, composite, layers, on_device=on_device, exclude_parallel=False)
            )
        return
    # (a long text with many positions is sent back in parts of about the same size)
    n_parts, keeps = -(-asked.n_samples // (at_once or asked.n_samples)), keeps_graph(composite)
    at_once = -(-asked.n_samples // n_parts) if keeps else asked.n_samples * len(slots)
    together = keeps and asked.shares_starts
    if together:
        slots = asked.starting_together(name, slots, at_once)
    # Multipliers would be a second copy from the device, which scores of channels do not need.
    settings = Settings(
        layers, ChannelConcept.mask, None, None, on_device, exclude_parallel=together,
        multipliers=multipliers, as_computed=attribution.device.type == "cuda", finite=False, reading=reading,
    )  # fmt: skip
    call = attribution.plan(data, slots[0], composite, settings)
    rows = Rows.of(asked.columns * len(slots), [condition for slot in slots for condition in slot])
    parts = replace(call, rows=rows, batch_size=at_once).parts()
    # (`map` keeps no result while the next one is computed)
    yield from map(check_one_entry, map(itemgetter(0), _scored(parts, attribution.model, asked)))


def _scored(parts: Iterator[Part], model: nn.Module, asked: Asked) -> Iterator[Part]:
    """Parts, for which a model scores tokens where that is asked; while they are read, it is untouched."""
    while True:
        with asked.scoring(model):
            part = list(islice(parts, 1))
        if not part:
            return
        yield part.pop()
