"""Where a batch norm can be merged: the linear layers next to it in the order of execution."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from crp.canonizers import norms
from crp.canonizers.folding import LINEAR, has_shift, is_shift_invariant
from crp.graph import adjacent_pairs, trace
from crp.layers import modules_of

Side: TypeAlias = Literal["before", "after"]


class Place(NamedTuple):
    """A linear layer, held weakly, and on which side of it the batch norm is."""

    name: str
    linear: Callable[[], Any]
    side: Side


class Candidate(NamedTuple):
    """A batch norm, held weakly, its places, and why it has no others."""

    name: str
    norm: Callable[[], Any]
    places: tuple[Place, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All batch norms of a model, as long as its structure is the same."""

    structure: tuple[object, ...]
    candidates: tuple[Candidate, ...]


def structure(root: nn.Module) -> tuple[object, ...]:
    """Changes whenever a module is replaced, gets a hook, or is switched between training and evaluation."""
    return tuple(
        (weakref.ref(m), m.training, "forward" in vars(m), (*m._forward_hooks,), (*m._forward_pre_hooks,))
        for m in modules_of(root).values()
    )


def find_places(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: tuple[object, ...]) -> Plan:
    """Find all batch norms and their places by one traced forward pass."""
    with _watching(root) as seen:
        record = trace(root, *args, **kwargs)
    found = {name: module for name, module in record.modules.items() if norms.is_batch_norm(module)}
    kinds = tuple({type(norm) for norm in found.values()})
    behind, ahead = adjacent_pairs(record, LINEAR, kinds), adjacent_pairs(record, kinds, LINEAR)
    pairs: dict[str, list[tuple[Side, str, nn.Module]]] = {name: [] for name in found}
    for pair in behind.pairs:
        pairs[pair.second_name].append(("after", pair.first_name, pair.first))
    for pair in ahead.pairs:
        pairs[pair.first_name].append(("before", pair.second_name, pair.second))
    candidates = []
    for name, norm in found.items():
        reasons = [other.unpaired[name] for other in (behind, ahead) if name in other.unpaired]
        places = []
        for side, linear_name, linear in pairs[name]:
            reason = _trace_obstacle(seen, side, norm, linear_name, linear)
            if reason is None:
                places.append(Place(linear_name, weakref.ref(linear), side))
            else:
                reasons.append(reason)
        candidates.append(Candidate(name, weakref.ref(norm), tuple(places), tuple(dict.fromkeys(reasons))))
    return Plan(key, tuple(candidates))


def obstacle(norm: Any, name: str, linear: Any, side: Side) -> str | None:
    """Reason why a batch norm cannot go into the linear layer, as both are now; None if it can."""
    if linear._parameters.get("weight") is None or "bias" not in linear._parameters:
        return f"a parameter of {name!r} is computed, not stored"
    if side == "before" and not norms.is_affine_only(norm):
        return f"its activation comes before {name!r}"
    if side == "before" and not is_shift_invariant(linear) and has_shift(norm):
        return f"its shift would not reach the borders of {name!r} as it does now"
    return None


def _trace_obstacle(seen: dict[nn.Module, _Seen], side: Side, norm: nn.Module, name: str, linear: Any) -> str | None:
    first, second = (linear, norm) if side == "after" else (norm, linear)
    there, here = seen[linear], seen[norm]
    if there.output_dim != (2 if isinstance(linear, nn.Linear) else linear.weight.dim()):
        return f"it normalizes another axis than the features of {name!r}"
    if here.input_dtype != here.output_dtype:
        return f"it makes {here.output_dtype} of {here.input_dtype}"
    if seen[first].output_changed or seen[second].input_changed:
        return f"a hook changes what goes between it and {name!r}"
    if linear._parameters.get("weight") is not None and not _has_plain_forward(linear):
        if side == "before":
            return f"the forward of {type(linear).__name__} {name!r} is not that of torch"
        if not _follows_its_parameters(linear, there):
            return f"the output of {type(linear).__name__} {name!r} does not follow its weight and bias"
    return None


# --- linear layers with a forward of their own ----------------------------------------------------------------------

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = {kind.forward for kind in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)}
_CONV_FORWARDS = {kind._conv_forward for kind in _CONVOLUTIONS}


def _has_plain_forward(linear: Any) -> bool:
    plain = "forward" not in vars(linear) and type(linear).forward in _FORWARDS
    if isinstance(linear, nn.Linear | _ConvTransposeNd):
        return plain
    return plain and type(linear)._conv_forward in _CONV_FORWARDS


@torch.no_grad()
def _follows_its_parameters(linear: Any, seen: _Seen) -> bool:
    """Whether the output is the bias without the weight, and -2 times itself with -2 times both.

    So it is where a layer only pads as it likes, but not where it standardizes its weight. Both are exact in floating
    point, so that no tolerance is needed.
    """
    weight, own = linear.weight, dict(linear._parameters)
    size = weight.shape[1] * linear.groups if isinstance(linear, _ConvTransposeNd) else weight.shape[0]
    bias = torch.linspace(-1, 1, size, dtype=weight.dtype, device=weight.device)
    numbers = torch.linspace(-1, 1, seen.input_shape.numel(), device=weight.device)
    data = numbers.to(seen.input_dtype).reshape(seen.input_shape)

    def output(weight: Tensor, bias: Tensor) -> Tensor:
        linear._parameters.update(weight=weight, bias=bias)
        return linear.forward(data)  # type: ignore[no-any-return]

    try:
        constant = output(torch.zeros_like(weight), bias).movedim(1, -1)
        once, twice = output(weight.detach(), bias), output(-2 * weight, -2 * bias)
    finally:
        linear._parameters.update(own)
    return torch.equal(constant, bias.expand_as(constant)) and torch.equal(twice, -2 * once)


# --- what hooks see during the traced pass --------------------------------------------------------------------------


@dataclass
class _Seen:
    """What went into a module and came out, and whether hooks replaced or wrote to it."""

    input_shape: torch.Size = field(default_factory=torch.Size)
    input_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    output_dim: int = 0
    input_changed: bool = False
    output_changed: bool = False
    given: list[tuple[Tensor, int]] = field(default_factory=list)


@contextlib.contextmanager
def _watching(root: nn.Module) -> Iterator[dict[nn.Module, _Seen]]:
    seen: dict[nn.Module, _Seen] = {}

    def versions(*values: Any) -> list[tuple[Tensor, int]]:
        return [(value, value._version) for value in values if isinstance(value, Tensor)]

    def differ(now: list[tuple[Tensor, int]], then: list[tuple[Tensor, int]]) -> bool:
        return [(id(t), v) for t, v in now] != [(id(t), v) for t, v in then]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        record = seen[module] = _Seen(given=versions(*args, *kwargs.values()))
        for tensor, _ in record.given[:1]:
            record.input_shape, record.input_dtype = tensor.shape, tensor.dtype

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        record = seen[module]
        record.input_changed = differ(versions(*args, *kwargs.values()), record.given)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        record = seen[module]
        record.given = versions(output)
        for tensor, _ in record.given[:1]:
            record.output_dtype, record.output_dim = tensor.dtype, tensor.dim()

    def left(module: nn.Module, args: Any, output: Any) -> None:
        record = seen[module]
        record.output_changed = differ(versions(output), record.given)
        record.given = []

    with contextlib.ExitStack() as stack:
        for module in root.modules():
            if isinstance(module, LINEAR) or norms.is_batch_norm(module):
                for register, hook, options in (
                    (module.register_forward_pre_hook, enter, {"prepend": True, "with_kwargs": True}),
                    (module.register_forward_pre_hook, entered, {"with_kwargs": True}),
                    (module.register_forward_hook, leave, {"prepend": True}),
                    (module.register_forward_hook, left, {}),
                ):
                    stack.callback(register(hook, **options).remove)
        yield seen
