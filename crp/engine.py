"""One forward pass, and gradient flow through it: what `CondAttribution` is built from.

Everything that is put on the user's model is put there by `attached` and `ForwardPass.run`, and is gone when they are
left.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crp.conditions import Grid, Rows, Settings
from crp.hooks import Tap, Use, apply_masks
from crp.layers import find_layers
from crp.types import MaskFn

#: Key of the data among the layers; no layer has this name.
DATA = ""

ORDER_MESSAGE = (
    "The layer names must be ordered according to their succession in the model if 'exclude_parallel'=True: "
    "start with the last and end with the first layer in each condition; parallel layers cannot be in one condition. "
    "The flow from {} does not reach {!r}."
)


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass leaves behind for any number of backward passes.

    Attributes
    ----------
    data : Tensor of shape (samples, *input shape)
        Leaf that the gradient is asked for.
    output : Tensor of shape (samples, *output shape)
    uses : dict of str to Use
        Conditioned, recorded and start layers.
    multiplier : bool
        Whether what flows is relevance divided by activation.
    """

    data: Tensor
    output: Tensor
    uses: dict[str, Use]
    multiplier: bool

    @classmethod
    def run(
        cls,
        model: nn.Module,
        data: Tensor,
        layers: dict[str, str],
        select_output: Callable[[Any], Tensor],
        multiplier: bool,
    ) -> ForwardPass:
        """Run the model on ``data``, tapping layers.

        Parameters
        ----------
        model : nn.Module
        data : Tensor of shape (samples, *input shape)
        layers : dict of str to str
            Layer name to its role, ``"condition"``, ``"start"`` or ``"record"``; ``"name#1"`` is its second use.
        select_output : callable
            Tensor to explain in what the model returns.
        multiplier : bool
        """
        known = dict(model.named_modules())
        taps = {name: Tap(name) for name, _ in (_split(layer, known) for layer in layers)}
        handles = []
        try:
            for name, tap in taps.items():
                handles.append(known[name].register_forward_hook(tap))
            leaf = data.detach().requires_grad_()
            with torch.enable_grad():
                output = select_output(model(leaf))
        finally:
            for handle in handles:
                handle.remove()
        if not output.requires_grad:
            raise ValueError(
                f"the model's output (dtype {output.dtype}) does not depend on the data in a differentiable way; "
                "explain a tensor before rounding, argmax or detach"
            )
        uses = {}
        for layer, role in layers.items():
            name, number = _split(layer, known)
            uses[layer] = _use(name, number, taps[name].uses, role)
        return cls(leaf, output, {layer: use for layer, use in uses.items() if use is not None}, multiplier)


def _use(layer: str, number: int | None, uses: list[Use], role: str) -> Use | None:
    """Call of a layer that is meant; None for a layer to record that is not called."""
    if not uses and role == "record":
        warnings.warn(f"layer {layer!r} is not called in the forward pass; nothing is recorded", stacklevel=6)
        return None
    if not uses:
        raise ValueError(f"layer {layer!r}, named as {role}, is not called in the forward pass")
    if number is not None and number >= len(uses):
        raise ValueError(f"layer {layer!r} is called {len(uses)} times; there is no {layer}#{number}")
    if number is None and len(uses) > 1:
        names = ", ".join(f"{layer}#{i}" for i in range(len(uses)))
        if role != "record":
            raise ValueError(f"layer {layer!r} is called {len(uses)} times in the forward pass; name one: {names}")
        warnings.warn(
            f"layer {layer!r} is called {len(uses)} times; its last call is recorded, of {names}", stacklevel=6
        )
    return uses[-1 if number is None else number]


def flow(
    root: Tensor, cotangent: Tensor, target: Tensor, records: dict[str, Tensor], keep_graph: bool = True
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Gradient that flows from ``root`` to ``target``, for each slot, and what arrives at other tensors on the way.

    Parameters
    ----------
    root : Tensor of shape (samples, ...)
    cotangent : Tensor of shape (slots, samples, ...)
    target : Tensor
    records : dict of str to Tensor
        Those that are not between root and target are passed over.
    keep_graph : bool
        Whether the graph is needed again.

    Returns
    -------
    gradient : Tensor of shape (slots, *target shape), or None if the flow does not reach ``target``
    recorded : dict of str to Tensor of shape (slots, *record shape)
    """
    inputs = {DATA: target, **_between(root, target, records)}
    if len(cotangent) == 1:
        found = torch.autograd.grad(
            root, list(inputs.values()), cotangent[0], retain_graph=keep_graph, allow_unused=True
        )
        gradients: list[Tensor | None] = [None if g is None else g[None] for g in found]
    else:
        gradients = _batched(root, list(inputs.values()), cotangent)
    reached = dict(zip(inputs, gradients, strict=True))
    gradient = reached.pop(DATA)
    return gradient, {name: g for name, g in reached.items() if g is not None}


def _batched(root: Tensor, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor | None]:
    grad = partial(torch.autograd.grad, root, inputs, retain_graph=True, allow_unused=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        try:
            return list(grad(cotangent, is_grads_batched=True))
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
    # A custom rule that cannot be batched, for example as it branches on its values.
    found = zip(*(grad(start) for start in cotangent), strict=True)
    return [None if slots[0] is None else torch.stack(slots) for slots in found]


def _between(root: Tensor, target: Tensor, records: dict[str, Tensor]) -> dict[str, Tensor]:
    """Records that depend on ``target``; all of them, where it is a leaf such as the data."""
    records = {name: t for name, t in records.items() if t.requires_grad and t is not root and t is not target}
    goal = target.grad_fn
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
    data : Tensor of shape (samples, *input shape)
    root : Tensor of shape (samples, ...)
        Where the flow starts: the model's output or a layer's.
    uses : dict of str to Use
        Conditioned, recorded and start layers.
    call : Settings
    output_name : str
    backward : callable
        `CondAttribution.backward`, or what overrides it.
    custom : bool
        Whether it is overridden.
    """

    data: Tensor
    root: Tensor
    uses: dict[str, Use]
    call: Settings
    output_name: str
    backward: Callable[..., None]
    custom: bool

    def run(self, rows: Rows, start: Tensor, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Send ``start``, of shape (rows, *root shape), back.

        Returns
        -------
        relevance : Tensor of shape (rows, *data shape)
        recorded : dict of str to Tensor of shape (rows, *output shape of the layer)
        """
        n = len(self.data)
        outputs = {DATA: self.data} | {name: use.output for name, use in self.uses.items()}
        found = {name: t.detach().new_zeros(len(rows), *t.shape[1:]) for name, t in outputs.items()}
        groups = rows.groups(self.output_name) if self.call.exclude_parallel else [list(range(len(rows)))]
        for number, group in enumerate(groups):
            part = rows.part(group)
            layers = [name for name in part.layers(self.output_name) if name != self.call.start]
            grid = Grid(part.samples, n, start.device)
            index = torch.tensor(group, device=start.device)
            cotangent = grid.scatter(start if len(groups) == 1 else start.index_select(0, index))
            if self.custom or (layers and not self.call.exclude_parallel):
                grids = self.by_slot(part, grid, cotangent, layers)
            else:
                grids = self.by_layer(part, grid, cotangent, layers, not last or number < len(groups) - 1)
            for name, values in grids.items():
                values = grid.gather(values).to(found[name])
                found[name] = values if len(groups) == 1 else found[name].index_copy(0, index, values)
        relevance = found.pop(DATA)
        return relevance, found

    def by_layer(
        self, rows: Rows, grid: Grid, cotangent: Tensor, layers: Sequence[str], keep_graph: bool
    ) -> dict[str, Tensor]:
        """From conditioned layer to conditioned layer to the data, all slots at once.

        Parameters
        ----------
        rows : Rows
        grid : Grid
        cotangent : Tensor of shape (slots, samples, *root shape)
        layers : sequence of str
            From the output to the input.
        keep_graph : bool

        Returns
        -------
        dict of str to Tensor of shape (slots, samples, ...)
            What arrives at each layer, and (`DATA`) at the data.
        """
        root, origin = self.root, "the start"
        outputs = {name: use.output for name, use in self.uses.items()}
        recorded, cotangent = self._begin(rows, grid, cotangent)
        if layers and (cotangent == cotangent[:1]).all():
            cotangent = cotangent[:1]  # down to the first conditioned layer, all slots are one
        for name in layers:
            target = outputs[name]
            gradient, seen = flow(root, cotangent, target, outputs) if target.requires_grad else (None, {})
            if gradient is None:
                raise RuntimeError(ORDER_MESSAGE.format(origin, name))
            recorded = {**seen, name: gradient, **recorded}
            masks = grid.masks(rows.conditions, name, self.call.mask_map)
            root, origin, cotangent = target, repr(name), _masked(masks, gradient)
        gradient, seen = flow(root, cotangent, self.data, outputs, keep_graph)
        recorded = {**seen, **recorded}
        if gradient is not None:
            recorded[DATA] = gradient
        return {name: values.expand(grid.n_slots, *values.shape[1:]) for name, values in recorded.items()}

    def by_slot(self, rows: Rows, grid: Grid, cotangent: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Slot after slot, masking where the flow passes; parameters and result as in `by_layer`."""
        begun, cotangent = self._begin(rows, grid, cotangent)
        masks = {name: grid.masks(rows.conditions, name, self.call.mask_map) for name in layers}
        outputs = {name: use.output for name, use in self.uses.items()}
        found = {n: t.detach().new_zeros(len(cotangent), *t.shape) for n, t in ({DATA: self.data} | outputs).items()}
        for slot, start in enumerate(cotangent):
            for name, use in self.uses.items():
                use.flow.reset(partial(apply_masks, masks[name][slot]) if name in masks else None)
            self.data.grad = None
            self.backward(self.root, start, self.call.exclude_parallel, layers, outputs, True)
            arrived = {DATA: self.data.grad} | {name: use.flow.gradient for name, use in self.uses.items()}
            for key, gradient in arrived.items():
                if gradient is not None:
                    found[key][slot] = gradient
            for use in self.uses.values():
                use.flow.reset()
        self.data.grad = None
        return found | begun

    def _begin(self, rows: Rows, grid: Grid, cotangent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Record and mask what starts at the start layer."""
        name = self.call.start
        if name is None:
            return {}, cotangent
        return {name: cotangent}, _masked(grid.masks(rows.conditions, name, self.call.mask_map), cotangent)


def _masked(masks: list[list[MaskFn]], gradient: Tensor) -> Tensor:
    """Mask each slot of a gradient of shape (slots, samples, ...) with its own functions."""
    if not any(masks):
        return gradient
    gradient = gradient.expand(len(masks), *gradient.shape[1:])
    return torch.stack([apply_masks(fns, g) for fns, g in zip(masks, gradient, strict=True)])


def _split(layer: str, known: Collection[str]) -> tuple[str, int | None]:
    """Name of a layer and number of its use, ``"name#1"`` being the second."""
    name, _, number = layer.rpartition("#")
    if layer in known or name not in known or not number.isdigit():
        return layer, None
    return name, int(number)


def check_layers(model: nn.Module, layers: Sequence[str], role: str) -> None:
    """Raise a `KeyError` that names the nearest layers if the model lacks one (``"name#1"`` counts as ``"name"``)."""
    known = dict(model.named_modules())
    find_layers(model, [_split(layer, known)[0] for layer in layers], role)
