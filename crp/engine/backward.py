"""Gradient flow through one forward pass: what `CondAttribution` is built from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from crp.engine.conditions import Grid, Rows, row_index
from crp.engine.few_channels import below_convolution
from crp.engine.forward import SINK, ForwardPass
from crp.engine.masks import apply_masks
from crp.engine.settings import Settings
from crp.engine.starts import Starts
from crp.errors import StateError
from crp.layers.devices import send_to
from crp.notices import warn
from crp.types import Condition, MaskFn

#: ``(condition of each row, layer, n_entries=entries of a row) -> mask functions``
MakeMasks: TypeAlias = Callable[..., list[MaskFn]]

#: Bytes of data whose gradients, throughout a usual convolutional net, stay in a CPU's cache.
IN_CACHE = 2**19

_ORDER_MESSAGE = (
    "The layer names must be ordered according to their succession in the model if 'exclude_parallel'=True: "
    "start with the last and end with the first layer in each condition; parallel layers cannot be in one condition. "
    "The flow from {} does not reach {!r}."
)
_CONSTANT_MESSAGE = (
    "The flow from the start does not reach {!r}, so that a condition on it would leave nothing: what is explained "
    "does not depend on it, or the composite holds it constant, as most presets do with gates, queries and keys."
)


def flow(
    root: Tensor, cotangent: Tensor, goals: Mapping[str, Tensor], records: Mapping[str, Tensor], keep_graph: bool = True
) -> dict[str, Tensor]:
    """Gradient that flows from ``root`` to goals, the inputs or a layer's output, and what arrives at records between.

    From a cotangent of shape (slots, *root shape) to gradients of shape (slots, *shape); without goals and records that
    the flow does not reach.
    """
    inputs = {**goals, **_between(root, list(goals.values()), records)}
    if len(cotangent) == 1:
        roots, arrived = below_convolution(root, cotangent, list(inputs.values()))
        slot = torch.autograd.grad(
            roots, list(inputs.values()), [of[0] for of in arrived], retain_graph=keep_graph, allow_unused=True
        )
        gradients: list[Tensor | None] = [None if g is None else g[None] for g in slot]
    else:
        gradients = _batched(root, list(inputs.values()), cotangent, sum(goal.nbytes for goal in goals.values()))
    return {name: g for name, g in zip(inputs, gradients, strict=True) if g is not None}


def send_back(
    pred: Tensor,
    grad_mask: Tensor,
    partial_backward: bool,
    layer_names: Sequence[str],
    layer_out: Mapping[str, Tensor],
    generate: bool = False,
) -> None:
    """Send a cotangent into the leaves, if need be from layer to layer; see `CondAttribution.backward`."""
    root, cotangent, origin = pred, grad_mask.to(pred), "the start"
    for name in layer_names if partial_backward else ():
        (reached,) = torch.autograd.grad(root, layer_out[name], cotangent, retain_graph=True, allow_unused=True)
        if reached is None:
            raise StateError(_not_reached(origin, name))
        root, cotangent, origin = layer_out[name], reached, repr(name)
    torch.autograd.backward(root, cotangent, retain_graph=generate)


def _not_reached(origin: str, layer: str) -> str:
    """Message that what starts at a conditioned layer, or at ``"the start"``, does not reach the next one."""
    return _CONSTANT_MESSAGE.format(layer) if origin == "the start" else _ORDER_MESSAGE.format(origin, layer)


Gradients = list[Tensor | None]


def _batched(root: Tensor, inputs: list[Tensor], cotangent: Tensor, n_bytes: int) -> Gradients:
    """Gradients of all slots, for each input that the flow reaches; a slot's result has so many bytes."""

    def sent(way: Callable[..., Gradients], part: Tensor) -> Gradients:
        roots, arrived = below_convolution(root, part, inputs)
        return way(partial(torch.autograd.grad, roots, inputs, retain_graph=True, allow_unused=True), arrived)

    parts = torch.split(cotangent, _slots_at_once(cotangent, n_bytes))
    # What checkpoints compute again is batched not by `torch.func.vmap`, but by torch's older batching; rules that look
    # at values in the backward pass cannot be batched at all.
    for way in (_by_vmap, _by_older_vmap):
        try:
            with warnings.catch_warnings():  # (fused attention runs once for each slot)
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return _joined([sent(way, part) for part in parts], torch.cat)
        except RuntimeError as error:
            if lacks_memory(error):
                raise
    one_by_one = [torch.autograd.grad(root, inputs, slot, retain_graph=True, allow_unused=True) for slot in cotangent]
    return _joined([list(slot) for slot in one_by_one], torch.stack)  # (other errors come again here)


def lacks_memory(error: Exception) -> bool:
    """Whether memory did not suffice; on the CPU, torch says so in words only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _by_vmap(grad: Callable[..., Any], cotangents: list[Tensor]) -> Gradients:
    reached: list[bool] = []

    def of_slot(start: list[Tensor]) -> tuple[Tensor, ...]:
        of_inputs = grad(start)
        reached[:] = [gradient is not None for gradient in of_inputs]
        return tuple(gradient for gradient in of_inputs if gradient is not None)

    gradients = iter(torch.func.vmap(of_slot)(cotangents))
    return [next(gradients) if is_reached else None for is_reached in reached]


def _by_older_vmap(grad: Callable[..., Any], cotangents: list[Tensor]) -> Gradients:
    return list(grad(cotangents, is_grads_batched=True))


def _joined(parts: list[Gradients], join: Callable[[list[Tensor]], Tensor]) -> Gradients:
    return [None if of_input[0] is None else join(list(of_input)) for of_input in zip(*parts, strict=True)]


def _slots_at_once(cotangent: Tensor, n_bytes: int) -> int:
    """How many slots are sent back together: on a CPU, only as many as its cache may hold the gradients of.

    Four share what a call costs, where that counts; of a picture of 288 pixels, or a text of 1000 tokens, they take
    longer than one after the other.
    """
    if cotangent.device.type != "cpu":
        return len(cotangent)
    return min(len(cotangent), max(1 if n_bytes > 1.5 * IN_CACHE else 4, IN_CACHE // n_bytes))


def _between(root: Tensor, goals: Sequence[Tensor], records: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Records that depend on a layer's output, the only goal; all of them, where goals are leaves such as inputs."""
    others = [root, *goals]
    records = {name: t for name, t in records.items() if t.requires_grad and not any(t is other for other in others)}
    goal = goals[0].grad_fn
    if not records or goal is None:
        return records
    leads: dict[Any, bool] = {goal: True}
    stack: list[Any] = [root.grad_fn]
    while stack:
        node = stack[-1]
        below = [] if node in leads else [n for n, _ in node.next_functions if n is not None]
        unknown = [n for n in below if n not in leads]
        stack += unknown
        if not unknown:
            leads.setdefault(node, any(leads[n] for n in below))
            stack.pop()
    return {name: tensor for name, tensor in records.items() if leads.get(tensor.grad_fn, False)}


def _send_rows_back(
    passed: ForwardPass,
    rows: Rows,
    start: Starts,
    settings: Settings,
    make_masks: MakeMasks,
    backward: Callable[..., None] | None,
    last: bool,
) -> dict[str, Tensor]:
    """Send rows back through one forward pass, those with the same conditioned layers together.

    ``start`` begins at the model's output or at the start layer. ``backward`` is `send_back`, or what overrides it, if
    masks act while the gradient flows and every row has a column of its own. With ``last``, the graph is not needed
    again. Gives what arrives at each input that is explained, by `_input_name`, and at each layer, (rows * entries,
    ...); 0 where nothing does.
    """
    groups = rows.groups(settings.output_name) if settings.exclude_parallel else [list(range(len(rows)))]
    arrived = []
    for number, group in enumerate(groups):
        part = rows if len(groups) == 1 else rows.part(group)
        layers = [name for name in part.layers(settings.output_name) if name != settings.start]
        if backward is None:
            keep_graph = not last or number < len(groups) - 1
            begin = start if part is rows else start.part(group)
            arrived.append(_by_layer(passed, part, begin, layers, settings, make_masks, keep_graph))
        else:
            conditions = dict(zip(group, part.conditions, strict=True))
            arrived.append(_in_flow(passed, conditions, start.rows(), layers, settings, make_masks, backward))
    of_rows = {}
    for name, output in (_leaves(passed) | passed.layers).items():
        if len(groups) == 1 and name in arrived[0]:
            of_rows[name] = arrived[0][name].to(output)
            continue
        n_entries = 1 if name.startswith(SINK) else len(output) // len(passed.inputs)
        of_rows[name] = output.detach().new_zeros(len(rows) * n_entries, *output.shape[1:])
        for group, of_group in zip(groups, arrived, strict=True):
            if name in of_group:
                index = send_to(output.device, torch.tensor(row_index(group, n_entries)))
                of_rows[name].index_copy_(0, index, of_group.pop(name).to(output))
    return of_rows


def _by_layer(
    passed: ForwardPass,
    rows: Rows,
    starts: Starts,
    layers: Sequence[str],
    settings: Settings,
    make_masks: MakeMasks,
    keep_graph: bool,
) -> dict[str, Tensor]:
    """From conditioned layer to conditioned layer to the inputs; rows of one sample share its column.

    Takes ``layers`` from the output to the input. Returns what arrives at each layer and input, (rows * entries, ...);
    rows that share it are views of the same memory.
    """
    grid = Grid(passed.columns(rows), len(passed.inputs), starts.values.device)
    conditions = dict(enumerate(rows.conditions))
    names_of = _names_by_output(passed)
    recorded: dict[str, Tensor] = {}
    root = passed.output
    if settings.start is not None:
        start_layer, start = passed.layers[settings.start], starts.rows()
        recorded.update(dict.fromkeys(names_of[id(start_layer)], grid.scatter(start)))
        root, starts = start_layer, Starts.of_each(apply_masks(make_masks(conditions, settings.start), start))
    origin, (cotangent, key) = "the start", _begin(starts, grid, bool(layers), settings.shared_start)
    for name in layers:
        target = passed.layers[name]
        below = partial(flow, root, cotangent, {name: target}, passed.layers)
        seen = passed.arrivals.get(name, key, below, keep_graph) if target.requires_grad else {}
        key = None  # (what comes next has met a mask)
        if name not in seen:
            raise StateError(_not_reached(origin, name))
        recorded = {**seen, **dict.fromkeys(names_of[id(target)], seen[name]), **recorded}
        masks = make_masks(conditions, name, n_entries=len(target) // len(passed.inputs))
        root, origin, cotangent = target, repr(name), grid.scatter(apply_masks(masks, grid.gather(seen[name])))
    recorded = {**flow(root, cotangent, _leaves(passed), passed.layers, keep_graph), **recorded}
    # (All of a sink is of the only sample that started, whatever its first axis is.)
    return {
        name: values.sum(1).expand(grid.n_slots, -1) if name.startswith(SINK) else grid.gather(values)
        for name, values in recorded.items()
    }


def _begin(starts: Starts, grid: Grid, masked: bool, shared: bool | None) -> tuple[Tensor, tuple[Hashable, ...] | None]:
    """Cotangent of (slots, columns, *root shape), and what makes it, where that is known.

    Down to the first layer that is ``masked``, slots that start alike are one.
    """
    known = starts.shared(grid) if masked else None
    if known is not None:
        return known
    cotangent = grid.scatter(starts.rows())
    if shared is None:  # (equal targets may be of any form)
        shared = masked and bool((cotangent == cotangent[:1]).all())
    return cotangent[:1] if masked and shared else cotangent, None


def _in_flow(
    passed: ForwardPass,
    conditions: Mapping[int, Condition],
    start: Tensor,
    layers: Sequence[str],
    settings: Settings,
    make_masks: MakeMasks,
    backward: Callable[..., None],
) -> dict[str, Tensor]:
    """Through ``backward``, masking where the flow passes; every row has a column of its own.

    Takes the condition of each row that takes part, and a start of shape (rows of all groups, *root shape). Returns
    what arrives at each layer and input, (rows that take part * entries, ...).
    """
    index = send_to(start.device, torch.tensor(list(conditions)))
    start = torch.zeros_like(start).index_copy_(0, index, start[index])
    begun: dict[str, Tensor] = {}
    root = passed.output
    if settings.start is not None:
        begun.update(dict.fromkeys(_names_by_output(passed)[id(passed.layers[settings.start])], start))
        root = passed.layers[settings.start]
        start = apply_masks(make_masks(conditions, settings.start), start)
    leaves = _leaves(passed)
    handles: list[Any] = []
    seen: dict[str, Tensor | None] = {}
    for leaf in leaves.values():
        leaf.grad = None
    try:
        for names in _names_by_output(passed).values():
            output = passed.layers[names[0]]
            if not output.requires_grad:
                continue
            n = len(output) // len(passed.inputs)
            masks = [mask for name in names if name in layers for mask in make_masks(conditions, name, n_entries=n)]
            handles.append(output.register_hook(_keeping_first(names, masks, seen)))  # type: ignore[no-untyped-call]
        backward(root, start, settings.exclude_parallel, layers, dict(passed.layers), True)
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
    finally:
        for leaf in leaves.values():
            leaf.grad = None
        for handle in handles:
            handle.remove()
    if missed := [name for name in layers if name not in seen]:
        warn(f"conditions on {missed} have no effect: relevance does not reach them")
    arrived = gradients | seen | begun
    n_columns, rows = len(passed.inputs), list(conditions)
    reached = {name: values for name, values in arrived.items() if values is not None}
    return {name: values[row_index(rows, len(values) // n_columns)] for name, values in reached.items()}


def _names_by_output(passed: ForwardPass) -> dict[int, list[str]]:
    """Names of each output, by its `id`: "conv" and "conv#0" may name one call, whose output arrives once."""
    names: dict[int, list[str]] = {}
    for name, output in passed.layers.items():
        names.setdefault(id(output), []).append(name)
    return names


def _keeping_first(
    names: Sequence[str], masks: list[MaskFn], arrived: dict[str, Tensor | None]
) -> Callable[[Tensor | None], Tensor | None]:
    """Tensor hook that keeps the gradient and masks it, once.

    A tensor that is first an input and then a root of a backward pass sees its gradient twice.
    """

    def hook(gradient: Tensor | None) -> Tensor | None:
        if gradient is None or names[0] in arrived:  # (none comes to what is held constant)
            return None
        arrived.update(dict.fromkeys(names, gradient))
        return apply_masks(masks, gradient) if masks else None

    return hook


def _leaves(passed: ForwardPass) -> dict[str, Tensor]:
    """Inputs that are explained, by names that no layer has."""
    return {_input_name(number): leaf for number, leaf in enumerate(passed.inputs.explained)}


def _input_name(number: int) -> str:
    """Name of an input among those of layers; no layer has such a name."""
    return f".{number}"


def fill_grad(data: Tensor, samples: Sequence[int], relevance: Tensor, overwrite: bool) -> None:
    """Put the relevance of each sample, summed over its rows, into ``data.grad``, where data require a gradient."""
    if not (data.requires_grad and data.is_leaf):
        return
    grad = torch.zeros_like(data).index_add_(0, send_to(data.device, torch.tensor(samples)), relevance.to(data))
    if data.grad is not None and not overwrite:
        warn("data.grad is filled; relevance is added to it, as overwrite_data_grad is False")
        grad = grad + data.grad
    data.grad = grad
