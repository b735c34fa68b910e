"""State dicts from files, and whether they fit a model."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from crp.errors import LoadingError
from crp.wording import first_few


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__


def read_checkpoint(path: Path) -> Any:
    """State dict in a file by `torch.save` or in safetensors; a `LoadingError` where it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, KeyError) as error:  # (torch tells how to load a model as a whole, which runs its code)
        raise LoadingError(
            f"{path} is no checkpoint that can be read: not by torch.save, or of a whole model; save its state_dict()"
        ) from error
    except Exception as error:  # many kinds, for files that are something else
        raise LoadingError(f"{path} is no checkpoint that can be read: {_in_a_line(error)}") from error
    return _weights_in(state, path) if isinstance(state, dict) else state


def _weights_in(state: dict[str, Any], path: Path) -> Any:
    """State dict in what a training kept: under a name of its own, beside an optimizer's state or the epoch."""
    if isinstance(state.get("state_dict"), dict):
        return state["state_dict"]
    if any(isinstance(value, Tensor) for value in state.values()):
        return state
    dicts = {name: value for name, value in state.items() if isinstance(value, dict) and value}
    inside = [name for name, value in dicts.items() if all(isinstance(entry, Tensor) for entry in value.values())]
    if len(inside) > 1:
        raise LoadingError(f"{path} holds weights under {' and '.join(map(repr, inside))}; save those that are meant")
    return state[inside[0]] if inside else state


def n_classes_of(state: Any, net: nn.Module) -> int | None:
    """Number of classes for which a net was trained on, where a checkpoint fits it but for that number.

    Every entry whose shape differs is then of a layer that gives classes: only its first axis differs, from the same
    number to the same other one.
    """
    if not isinstance(state, dict):
        return None
    given, wanted = _without_wrapper(state, net), net.state_dict()
    shapes = [
        (tuple(given[name].shape), tuple(tensor.shape))
        for name, tensor in wanted.items()
        if isinstance(given.get(name), Tensor) and given[name].shape != tensor.shape
    ]
    if not all(a and b and a[1:] == b[1:] for a, b in shapes):
        return None
    numbers = {(a[0], b[0]) for a, b in shapes}  # of classes, in the checkpoint and in the net
    return numbers.pop()[0] if len(numbers) == 1 else None


def fill(net: nn.Module, path: Path) -> None:
    """Load a state dict into a model, by `torch.save` or in safetensors; a `LoadingError` says what does not fit."""
    state = read_checkpoint(path)
    if isinstance(state, dict):
        state = _without_wrapper(state, net)
        wanted, given = set(net.state_dict()), set(state)
        # Batch norm of torch before 0.4.1 did not count batches, and predictions do not depend on their number.
        uncounted = {name for name in wanted - given if name.endswith("num_batches_tracked")}
        wanted -= uncounted
        state |= {name: net.state_dict()[name] for name in uncounted}
        if missing := sorted(wanted - given) or sorted(given - wanted):
            lacks = "lacks" if wanted - given else "has, and the model lacks,"
            raise LoadingError(f"{path} does not fit the model: it {lacks} {first_few(missing, 3)}")
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise LoadingError(f"{path} does not fit the model: {_in_a_line(error)}") from error


def _without_wrapper(state: dict[str, Any], net: nn.Module) -> dict[str, Any]:
    """Entries without the name that a wrapper, such as `DataParallel` or `torch.compile`, put before all of them."""
    wanted = set(net.state_dict())
    for prefix in ("module.", "_orig_mod.", "model.", "net.", "backbone."):
        if state and not set(state) & wanted and all(str(name).startswith(prefix) for name in state):
            return _without_wrapper({name.removeprefix(prefix): value for name, value in state.items()}, net)
    return state
