"""Gradient flow through one forward pass: what `CondAttribution` is built from.

`Backward` sends relevance back through a `crp.engine.forward.ForwardPass`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crp.engine.conditions import Grid, Rows, Settings, row_masks
from crp.engine.inputs import Tensors
from crp.engine.taps import Use, apply_masks
from crp.notices import warn
from crp.types import Condition, MaskFn

#: Begin of the names of inputs among those of layers; no layer has such a name.
INPUT = "."

#: Bytes of data whose gradients, throughout a usual convolutional net, stay in a CPU's cache.
IN_CACHE = 2**19

ORDER_MESSAGE = (
    "The layer names must be ordered according to their succession in the model if 'exclude_parallel'=True: "
    "start with the last and end with the first layer in each condition; parallel layers cannot be in one condition. "
    "The flow from {} does not reach {!r}."
)


def flow(
    root: Tensor, cotangent: Tensor, goals: Mapping[str, Tensor], records: Mapping[str, Tensor], keep_graph: bool = True
) -> dict[str, Tensor]:
    """Gradient that flows from ``root`` to some tensors, for each slot, and what arrives at others on the way.

    Parameters
    ----------
    root : Tensor of shape (samples, ...)
    cotangent : Tensor of shape (slots, samples, ...)
    goals : dict of str to Tensor
        The inputs, or a layer's output.
    records : dict of str to Tensor
        Those that are not between root and goals are passed over.
    keep_graph : bool
        Whether the graph is needed again.

    Returns
    -------
    dict of str to Tensor of shape (slots, *shape)
        Without goals and records that the flow does not reach.
    """
    inputs = {**goals, **_between(root, list(goals.values()), records)}
    if len(cotangent) == 1:
        found = torch.autograd.grad(
            root, list(inputs.values()), cotangent[0], retain_graph=keep_graph, allow_unused=True
        )
        gradients: list[Tensor | None] = [None if g is None else g[None] for g in found]
    else:
        gradients = _batched(root, list(inputs.values()), cotangent, sum(goal.nbytes for goal in goals.values()))
    return {name: g for name, g in zip(inputs, gradients, strict=True) if g is not None}


def send_back(root: Tensor, cotangent: Tensor, steps: Mapping[str, Tensor], keep_graph: bool) -> None:
    """Send a cotangent from ``root`` from step to step, and into the leaves."""
    origin = "the start"
    for name, target in steps.items():
        (reached,) = torch.autograd.grad(root, target, cotangent, retain_graph=True, allow_unused=True)
        if reached is None:
            raise RuntimeError(ORDER_MESSAGE.format(origin, name))
        root, cotangent, origin = target, reached, repr(name)
    torch.autograd.backward(root, cotangent, retain_graph=keep_graph)


Gradients = list[Tensor | None]


def _batched(root: Tensor, inputs: list[Tensor], cotangent: Tensor, n_bytes: int) -> Gradients:
    """Gradients of all slots, for each input that the flow reaches; a slot's result has so many bytes."""
    grad = partial(torch.autograd.grad, root, inputs, retain_graph=True, allow_unused=True)
    parts = torch.split(cotangent, _slots_at_once(cotangent, n_bytes))
    # Not every rule can be batched: those of zennit only in torch's older way, one that looks at values in none.
    for way in (_by_vmap, _by_older_vmap):
        try:
            return _joined([way(grad, part) for part in parts], torch.cat)
        except RuntimeError as error:
            if lacks_memory(error):
                raise
    return _joined([list(grad(slot)) for slot in cotangent], torch.stack)  # (other errors come again here)


def lacks_memory(error: Exception) -> bool:
    """Whether memory did not suffice; on the CPU, torch says so in words only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _by_vmap(grad: Callable[..., Any], cotangent: Tensor) -> Gradients:
    reached: list[bool] = []

    def of_slot(start: Tensor) -> tuple[Tensor, ...]:
        found = grad(start)
        reached[:] = [gradient is not None for gradient in found]
        return tuple(gradient for gradient in found if gradient is not None)

    found = iter(torch.func.vmap(of_slot)(cotangent))
    return [next(found) if is_reached else None for is_reached in reached]


def _by_older_vmap(grad: Callable[..., Any], cotangent: Tensor) -> Gradients:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return list(grad(cotangent, is_grads_batched=True))


def _joined(parts: list[Gradients], join: Callable[[list[Tensor]], Tensor]) -> Gradients:
    found = zip(*parts, strict=True)
    return [None if of_input[0] is None else join(list(of_input)) for of_input in found]


def _slots_at_once(cotangent: Tensor, n_bytes: int) -> int:
    """How many slots are sent back together: on a CPU, only as many as its cache may hold the gradients of."""
    if cotangent.device.type != "cpu":
        return len(cotangent)
    return min(len(cotangent), max(4, IN_CACHE // n_bytes))


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


@dataclass
class Backward:
    """Backward passes of all rows through one forward pass.

    Attributes
    ----------
    inputs : tuple of Tensor of shape (samples, *input shape)
        Leaves that are explained.
    root : Tensor of shape (samples, ...)
        Where the flow starts: the model's output or a layer's.
    uses : dict of str to Use
        Conditioned, recorded and start layers.
    call : Settings
    output_name : str
    backward : callable or None
        `CondAttribution.backward`, or what overrides it, where masks act while the gradient flows.
    multiplies : bool
        Whether a gradient flows, or multipliers, and not relevance itself, for which not every mask is right.
    sinks : collection of str
        Of ``uses``, what layers keep.
    """

    inputs: Tensors
    root: Tensor
    uses: dict[str, Use]
    call: Settings
    output_name: str
    backward: Callable[..., None] | None
    multiplies: bool
    sinks: Collection[str] = ()

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The inputs that are explained, by names that no layer has."""
        return {f"{INPUT}{number}": tensor for number, tensor in enumerate(self.inputs)}

    def run(self, rows: Rows, start: Tensor, last: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Send ``start``, of shape (rows, *root shape), back.

        Returns
        -------
        relevances : list of Tensor of shape (rows, *input shape)
        recorded : dict of str to Tensor of shape (rows, *output shape of the layer)
        """
        leaves = self.leaves
        outputs = leaves | {name: use.output for name, use in self.uses.items()}
        found: dict[str, Tensor] = {}

        def zeros(name: str) -> Tensor:
            return outputs[name].detach().new_zeros(len(rows), *outputs[name].shape[1:])

        groups = rows.groups(self.output_name) if self.call.exclude_parallel else [list(range(len(rows)))]
        for number, group in enumerate(groups):
            part = rows if len(groups) == 1 else rows.part(group)
            layers = [name for name in part.layers(self.output_name) if name != self.call.start]
            keep_graph = not last or number < len(groups) - 1
            if self.backward is None:
                arrived = self.by_layer(part, start if part is rows else start[group], layers, keep_graph)
            else:
                arrived = self.in_flow(dict(zip(group, part.conditions, strict=True)), start, layers, self.backward)
            for name, values in arrived.items():
                values = values.to(outputs[name])
                if part is not rows:
                    index = torch.tensor(group, device=values.device)
                    values = (found[name] if name in found else zeros(name)).index_copy_(0, index, values)
                found[name] = values
        found = {name: found[name] if name in found else zeros(name) for name in outputs}  # (0 where none arrived)
        return [found.pop(name) for name in leaves], found

    def by_layer(self, rows: Rows, start: Tensor, layers: Sequence[str], keep_graph: bool) -> dict[str, Tensor]:
        """From conditioned layer to conditioned layer to the inputs; rows of one sample share the forward pass.

        Parameters
        ----------
        rows : Rows
        start : Tensor of shape (rows, *root shape)
        layers : sequence of str
            From the output to the input.
        keep_graph : bool
            Whether the graph is needed again.

        Returns
        -------
        dict of str to Tensor of shape (rows, ...)
            What arrives at each layer and input; rows that share it are views of the same memory.
        """
        grid = Grid(rows.samples, len(self.inputs[0]), start.device)
        conditions = dict(enumerate(rows.conditions))
        outputs = {name: use.output for name, use in self.uses.items()}
        recorded, start = self._begin(conditions, start)
        recorded = {name: grid.scatter(values) for name, values in recorded.items()}
        root, origin, cotangent = self.root, "the start", grid.scatter(start)
        if layers and (cotangent == cotangent[:1]).all():
            cotangent = cotangent[:1]  # down to the first conditioned layer, all slots are one
        for name in layers:
            target = outputs[name]
            seen = flow(root, cotangent, {name: target}, outputs) if target.requires_grad else {}
            if name not in seen:
                raise RuntimeError(ORDER_MESSAGE.format(origin, name))
            gradient = seen[name]
            recorded = {**seen, **recorded}
            masks = self._masks(conditions, name)
            masked = apply_masks(masks, grid.gather(gradient.expand(grid.n_slots, *gradient.shape[1:])))
            root, origin, cotangent = target, repr(name), grid.scatter(masked)
        recorded = {**flow(root, cotangent, self.leaves, outputs, keep_graph), **recorded}
        of_rows = {}
        for name, values in recorded.items():
            if name in self.sinks:  # (which row of one is whose cannot be told: only one sample starts at a time)
                values = values.sum(1, keepdim=True).expand(-1, grid.n_samples, *values.shape[2:])
            of_rows[name] = grid.gather(values.expand(grid.n_slots, *values.shape[1:]))
        return of_rows

    def in_flow(
        self, conditions: dict[int, Condition], start: Tensor, layers: Sequence[str], backward: Callable[..., None]
    ) -> dict[str, Tensor]:
        """Through ``backward``, masking where the flow passes; every row has a sample of its own.

        Parameters
        ----------
        conditions : dict of int to Condition
            Condition of each row that takes part.
        start : Tensor of shape (rows of all groups, *root shape)
        layers : sequence of str
        backward : callable
            As `CondAttribution.backward`.

        Returns
        -------
        dict of str to Tensor of shape (rows that take part, ...)
        """
        index = torch.tensor(list(conditions), device=start.device)
        begun, start = self._begin(conditions, torch.zeros_like(start).index_copy_(0, index, start[index]))
        outputs = {name: use.output for name, use in self.uses.items()}
        for use in self.uses.values():
            known_as = [name for name in layers if self.uses[name] is use]  # "conv", "conv#0", or both
            masks = [mask for name in known_as for mask in self._masks(conditions, name)]
            use.flow.reset(partial(apply_masks, masks) if masks else None)
        leaves = self.leaves
        for leaf in leaves.values():
            leaf.grad = None
        try:
            backward(self.root, start, self.call.exclude_parallel, layers, outputs, True)
            if missed := [name for name in layers if not self.uses[name].flow.arrived]:
                warn(f"conditions on {missed} have no effect: relevance does not reach them")
            gradients = {name: leaf.grad for name, leaf in leaves.items()}
            arrived = gradients | {name: use.flow.gradient for name, use in self.uses.items()} | begun
        finally:
            for leaf in leaves.values():
                leaf.grad = None
            for use in self.uses.values():
                use.flow.reset()
        of_rows = {}
        for name, values in arrived.items():
            if values is not None and name in self.sinks:  # (as in `by_layer`)
                values = values.sum(0, keepdim=True).expand(len(start), *values.shape[1:])
            if values is not None:
                of_rows[name] = values[index]
        return of_rows

    def _begin(self, conditions: dict[int, Condition], start: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Record and mask what starts at the start layer."""
        name = self.call.start
        if name is None:
            return {}, start
        return {name: start}, apply_masks(self._masks(conditions, name), start)

    def _masks(self, conditions: dict[int, Condition], layer: str) -> list[MaskFn]:
        return row_masks(conditions, layer, self.call.mask_map, self.multiplies)


def fill_grad(data: Tensor, samples: Sequence[int], relevance: Tensor, overwrite: bool) -> None:
    """Put the relevance of each sample, summed over its rows, into ``data.grad``, where data require a gradient."""
    if not (data.requires_grad and data.is_leaf):
        return
    grad = torch.zeros_like(data).index_add_(0, torch.tensor(samples, device=data.device), relevance.to(data))
    if data.grad is not None and not overwrite:
        warn("data.grad is filled; relevance is added to it, as overwrite_data_grad is False")
        grad = grad + data.grad
    data.grad = grad
