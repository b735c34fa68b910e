"""What can be told from how a function of torch is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor


def name_of(function: Callable[..., Any]) -> str:
    """Plain name of a function of torch: `F.relu`, `torch.relu_` and `Tensor.relu` are all ``"relu"``."""
    return _plain(getattr(function, "__name__", None) or str(function))


@lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    return name.split(".")[0].strip("_")


#: Functions with a positional argument ``inplace``.
_FLAGGED = frozenset(
    "celu elu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 rrelu selu silu threshold _threshold".split()  # noqa: SIM905
)

#: Functions that look at a tensor without reading its values.
METADATA = frozenset(
    """get len data_ptr dim element_size get_device is_contiguous is_floating_point ndimension nelement numel size
    storage_offset stride detach requires_grad register_hook retain_grad""".split()  # noqa: SIM905
)

#: Methods behind ``+=`` and the like.
_AUGMENTED = frozenset(
    f"__i{name}__"
    for name in "add and div floordiv lshift matmul mod mul or pow rshift sub truediv xor".split()  # noqa: SIM905
)


def in_place(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the result takes the place of the first operand, and is returned."""
    name = getattr(function, "__name__", "")
    by_name = (name.endswith("_") and not name.endswith("__")) or name in _AUGMENTED
    by_flag = bool(kwargs.get("inplace")) or (name in _FLAGGED and any(arg is True for arg in args[1:]))
    return by_name or by_flag


def overwrites(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the first operand is changed."""
    return name_of(function) == "setitem" or in_place(function, args, kwargs)


def out_of_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like a function that works in place, but on a copy."""

    def copying(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(first.clone(), *args, **kwargs)

    copying.__name__ = getattr(function, "__name__", str(function))
    return copying


def has_negative(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a number below zero is among the arguments."""
    return any(isinstance(value, int | float) and value < 0 for value in (*args, *kwargs.values()))


def is_rectifier(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of one operand gives 0 for all that is below 0."""
    name, others = name_of(function), args[1:]
    return name in ("relu", "relu6") or (name == "hardtanh" and kwargs.get("min_val", others[0] if others else -1) == 0)


def custom_function() -> str | None:
    """Name of the `torch.autograd.Function` of a model whose forward pass runs now; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        first = frame.f_locals.get(names[0]) if names else None
        if isinstance(first, torch.autograd.function.FunctionCtx):
            kind: type = first._forward_cls  # type: ignore[attr-defined]
            return None if kind.__module__.partition(".")[0] in ("crp", "zennit") else kind.__name__
        frame = frame.f_back
    return None
