"""One forward pass, and gradient flow through it: what `CondAttribution` is built from.

Everything that is put on the user's model is put there by `attached` and `ForwardPass.run`, and is gone when they are left.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Composite

from crp.conditions import Grid, Rows, Settings
from crp.hooks import Tap, Use, apply_masks
from crp.layers import LayerNotFoundError, find_layers
from crp.types import MaskFn

ORDER_MESSAGE = (
    "The layer names must be ordered according to their succession in the model if 'exclude_parallel'=True: "
    "start with the last and end with the first layer in each condition; parallel layers cannot be in one condition. "
    "The flow from {} does not reach {!r}."
)

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def is_multiplier(composite: Composite | None) -> bool:
    """Whether a composite propagates relevance divided by activation, as ours do, and not relevance itself."""
    return getattr(composite, "encoding", None) == "multiplier"


@contextmanager
def attached(composite: Composite, model: nn.Module) -> Iterator[nn.Module]:
    """Model with the composite's rules and canonizers on it, in evaluation mode, its parameters outside autograd.

    Threads that share a model take turns. Leaving, also by an exception, leaves the model as it was found.
    """
    with _locks_guard:
        lock = _locks.setdefault(model, threading.RLock())
    guard = nullcontext() if is_multiplier(composite) else _restored_on_error(model)
    with lock, _evaluating(model), _without_parameter_gradients(model), guard:
        try:
            with composite.context(model) as modified:
                yield modified
        finally:
            composite.remove()  # the context does not, where registering itself failed


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    if training:
        warnings.warn(
            f"the model is in training mode ({len(training)} modules); it is explained in evaluation mode. "
            "Settings model.eval() first to say so.",
            stacklevel=6,
        )
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    # A canonizer that raises half-way never hands out what would undo its first half.
    states = [
        (vars(module), dict(vars(module)), {k: v.copy() for k, v in vars(module).items() if isinstance(v, dict | set)})
        for module in model.modules()
    ]
    values = [(tensor, tensor.data) for tensor in [*model.parameters(), *model.buffers()]]
    try:
        yield
    except BaseException:
        for attributes, before, collections in states:
            attributes.clear()
            attributes.update(before)
            for name, entries in collections.items():
                attributes[name].clear()
                attributes[name].update(entries)
        for tensor, data in values:
            tensor.data = data
        raise


@dataclass
class ForwardPass:
    """What one forward pass leaves behind for any number of backward passes.

    Attributes
    ----------
    data : Tensor of shape (samples, *input shape)
        Leaf that the gradient is asked for.
    output : Tensor of shape (samples, *output shape)
    taps : dict of str to Tap
        Outputs of the layers that are conditioned or recorded.
    multiplier : bool
        Whether the flow is relevance divided by activation.
    """

    data: Tensor
    output: Tensor
    taps: dict[str, Tap]
    multiplier: bool

    @classmethod
    def run(
        cls, model: nn.Module, data: Tensor, layers: Iterable[str], output: Callable[[Any], Tensor], multiplier: bool
    ) -> ForwardPass:
        """Run the model on ``data``, tapping the named layers (``"name#1"`` is the second use of a layer)."""
        known = dict(model.named_modules())
        taps = {}
        handles = []
        try:
            for name in dict.fromkeys(_base(layer, known) for layer in layers):
                taps[name] = Tap(name)
                handles.append(known[name].register_forward_hook(taps[name]))
            leaf = data.detach().requires_grad_()
            with torch.enable_grad():
                result = output(model(leaf))
        finally:
            for handle in handles:
                handle.remove()
        if not result.requires_grad:
            raise ValueError(
                f"the model's output (dtype {result.dtype}) does not depend on the data in a differentiable way; "
                "explain a tensor before rounding, argmax or detach"
            )
        return cls(leaf, result, taps, multiplier)

    def use(self, layer: str, role: str) -> Use:
        """Tapped call of a layer; the only one, or the one its name says."""
        name, _, number = layer.rpartition("#") if layer not in self.taps else (layer, "", "")
        uses = self.taps[name].uses
        if number:
            if int(number) >= len(uses):
                raise ValueError(f"layer {name!r} is called {len(uses)} times in the forward pass; there is no {layer!r}")
            return uses[int(number)]
        if not uses:
            raise ValueError(f"layer {layer!r} is not called in the forward pass: it has no {role}")
        if len(uses) > 1:
            names = ", ".join(f"{layer}#{i}" for i in range(len(uses)))
            if role != "record":
                raise ValueError(f"layer {layer!r} is called {len(uses)} times in the forward pass; name one: {names}")
            warnings.warn(f"layer {layer!r} is called {len(uses)} times; its last call is recorded, of {names}", stacklevel=7)
        return uses[-1]

    def called(self, layer: str) -> bool:
        """Whether the forward pass reached the layer."""
        return layer not in self.taps or bool(self.taps[layer].uses)


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
    inputs = {None: target} | _between(root, target, records)
    if len(cotangent) == 1:
        found = torch.autograd.grad(
            root, list(inputs.values()), cotangent[0], retain_graph=keep_graph, allow_unused=True
        )
        gradients = [None if g is None else g[None] for g in found]
    else:
        gradients = _batched(root, list(inputs.values()), cotangent)
    reached = dict(zip(inputs, gradients, strict=True))
    gradient = reached.pop(None)
    return gradient, {name: g for name, g in reached.items() if name is not None and g is not None}


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


def _between(root: Tensor, target: Tensor, records: dict[str, Tensor]) -> dict[str | None, Tensor]:
    """Records that depend on ``target``; all of them, where it is a leaf such as the data."""
    records = {name: t for name, t in records.items() if t.requires_grad and t is not root and t is not target}
    goal = target.grad_fn
    if not records or goal is None:
        return dict(records)
    leads: dict[Any, bool] = {goal: True}
    stack = [root.grad_fn]
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
    """Backward passes of one group of rows through one forward pass.

    Attributes
    ----------
    passed : ForwardPass
    root : Tensor of shape (samples, ...)
        Where the flow starts: the model's output or a layer's.
    uses : dict of str to Use
        Conditioned, recorded and start layers.
    grid : Grid
    rows : Rows
    call : Settings
    """

    passed: ForwardPass
    root: Tensor
    uses: dict[str, Use]
    grid: Grid
    rows: Rows
    call: Settings

    def by_layer(
        self, cotangent: Tensor, layers: Sequence[str], keep_graph: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """From conditioned layer to conditioned layer to the data, all slots at once.

        Parameters
        ----------
        cotangent : Tensor of shape (slots, samples, *root shape)
        layers : sequence of str
            From the output to the input.
        keep_graph : bool

        Returns
        -------
        gradient : Tensor of shape (slots, *data shape), or None if nothing reaches the data
        recorded : dict of str to Tensor of shape (slots, *output shape of the layer)
        """
        root, origin = self.root, "the start"
        outputs = {name: use.output for name, use in self.uses.items()}
        recorded, cotangent = self._begin(cotangent)
        layers = [name for name in layers if name != self.call.start]
        if layers and (cotangent == cotangent[:1]).all():
            cotangent = cotangent[:1]  # down to the first conditioned layer, all slots are one
        for name in layers:
            target = self.uses[name].output
            gradient, seen = flow(root, cotangent, target, outputs) if target.requires_grad else (None, {})
            if gradient is None:
                raise RuntimeError(ORDER_MESSAGE.format(origin, name))
            recorded = seen | {name: gradient} | recorded
            root, origin, cotangent = target, repr(name), self._masked(name, gradient)
        gradient, seen = flow(root, cotangent, self.passed.data, outputs, keep_graph)
        recorded = seen | recorded
        return gradient, {name: found.expand(self.grid.n_slots, *found.shape[1:]) for name, found in recorded.items()}

    def by_slot(
        self, cotangent: Tensor, layers: Sequence[str], backward: Callable[..., None]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Slot after slot through ``backward``, masking where the flow passes; parameters and results as `by_layer`."""
        begun, cotangent = self._begin(cotangent)
        layers = [name for name in layers if name != self.call.start]
        masks = {name: self._masks(name) for name in layers}
        layer_out = {name: use.output for name, use in self.uses.items()}
        gradients, recorded = [], {n: cotangent.new_zeros(len(cotangent), *t.shape) for n, t in layer_out.items()}
        data = self.passed.data
        for slot, start in enumerate(cotangent):
            for name, use in self.uses.items():
                use.flow.reset(partial(apply_masks, masks[name][slot]) if name in masks else None)
            data.grad = None
            backward(self.root, start, self.call.exclude_parallel, layers, layer_out, True)
            gradients.append(torch.zeros_like(data) if data.grad is None else data.grad)
            for name, use in self.uses.items():
                if use.flow.gradient is not None:
                    recorded[name][slot] = use.flow.gradient
                use.flow.reset()
        return torch.stack(gradients), recorded | begun

    def _begin(self, cotangent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Record and mask what starts at the start layer."""
        name = self.call.start
        if name is None:
            return {}, cotangent
        conditioned = any(name in condition for condition in self.rows.conditions)
        return {name: cotangent}, self._masked(name, cotangent) if conditioned else cotangent

    def _masked(self, layer: str, gradient: Tensor) -> Tensor:
        gradient = gradient.expand(self.grid.n_slots, *gradient.shape[1:])
        return torch.stack([apply_masks(fns, g) for fns, g in zip(self._masks(layer), gradient, strict=True)])

    def _masks(self, layer: str) -> list[list[MaskFn]]:
        return self.grid.masks(self.rows.conditions, layer, self.call.mask_map)


def _base(layer: str, known: dict[str, nn.Module]) -> str:
    name, _, number = layer.rpartition("#")
    if layer not in known and number.isdigit():
        layer = name
    if layer not in known or layer == "":
        raise LayerNotFoundError(layer, known)
    return layer


def check_layers(model: nn.Module, layers: Sequence[str], role: str) -> None:
    """Raise a `KeyError` that names the nearest layers if the model lacks one (``"name#1"`` counts as ``"name"``)."""
    known = dict(model.named_modules())
    for layer in layers:
        try:
            _base(layer, known)
        except LayerNotFoundError:
            find_layers(model, [layer], role)
