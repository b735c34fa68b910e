"""How a function of torch is called: its plain name, and whether it works in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any


def name_of(function: Callable[..., Any]) -> str:
    """Plain name of a function of torch: `F.relu`, `torch.relu_` and `Tensor.relu` are all ``"relu"``."""
    return _plain(getattr(function, "__name__", None) or str(function))


@lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    return name.split(".")[0].strip("_")


#: Methods behind ``+=`` and the like.
_AUGMENTED = frozenset(
    f"__i{name}__"
    for name in "add and div floordiv lshift matmul mod mul or pow rshift sub truediv xor".split()  # noqa: SIM905
)


def in_place(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the result takes the place of the first operand, and is returned."""
    # (torch hands it on by name; by position, True may be `training`)
    return _in_place_by_name(getattr(function, "__name__", "")) or (bool(kwargs) and bool(kwargs.get("inplace")))


@lru_cache(maxsize=4096)
def _in_place_by_name(name: str) -> bool:
    return (name.partition(".")[0].endswith("_") and not name.endswith("__")) or name in _AUGMENTED
