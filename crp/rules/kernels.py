"""Attention by kernels that are no functions of torch, such as those of flash-attn and xformers.

A custom kernel is a custom function of autograd, which no rule can see. `register_attention` makes it known as
attention.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch.overrides import handle_torch_function, has_torch_function

from crp.errors import InputError, InputTypeError
from crp.layers.lasting import Shared
from crp.layers.nested import tensors_in
from crp.rules.functions import Function, _enter

_registered: dict[Callable[..., Any], Callable[..., Any]] = {}


def register_attention(
    function: Callable[..., Any], q: int | str = 0, k: int | str = 1, v: int | str = 2, mask: int | str | None = None
) -> Callable[..., Any]:
    """Make a kernel known as attention, for the rules of `crp.rules.DotProductAttention`.

    Parameters
    ----------
    function : callable
        Differentiable; it returns the attended values, or a tuple that begins with them.
    q, k, v, mask : int or str
        Positions or names of its arguments that are queries, keys, values, and what is added to the logits, if any.

    Returns
    -------
    callable
        To be called in place of the kernel: it is the kernel, unless a composite explains the model that calls it.
        Entries of Hugging Face's registry of attention functions that are registered need no such call; they are
        replaced while a composite is on any model.

    Raises
    ------
    TypeError
        If the function's arguments have no names.
    ValueError
        If it has no such argument.

    Examples
    --------
    >>> import torch
    >>> def attend(query, key, value):
    ...     return torch.softmax(query @ key.mT, -1) @ value
    >>> attend = register_attention(attend)
    """
    if function in _registered:
        return _registered[function]
    try:
        names = tuple(inspect.signature(function).parameters)
    except ValueError as error:
        raise InputTypeError(f"the arguments of {function!r} have no names; wrap it in a function of Python") from error

    def named(key: int | str | None) -> str:
        if key is None:
            return ""
        if key not in (*names, *range(len(names))):
            raise InputError(f"{getattr(function, '__name__', function)} has no argument {key!r}; it has {names}")
        return names[key] if isinstance(key, int) else key

    operands = tuple(map(named, (q, k, v, mask)))

    @functools.wraps(function)
    def attend(*args: Any, **kwargs: Any) -> Any:
        tensors = tuple(tensors_in((args, kwargs)))
        if has_torch_function(tensors):
            return handle_torch_function(attend, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    name = getattr(function, "__name__", "attention")
    known = Function(
        name,
        "scaled_dot_product_attention",
        properties=frozenset({"attention"}),
        known=True,
        arguments=names,
        operands=operands,
    )
    _enter(attend, known)
    _registered[function] = attend
    return attend


@Shared
def in_registries() -> Iterator[None]:
    """Registered kernels stand in Hugging Face's registry as what `register_attention` returned."""
    registry = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    for attribute in ("_global_mapping", "_local_mapping"):
        mapping: dict[str, Any] = getattr(registry, attribute, {})
        for name, entry in list(mapping.items()) if _registered else ():
            if entry in _registered:
                replaced.append((mapping, name, entry))
                mapping[name] = _registered[entry]
    try:
        yield
    finally:
        for mapping, name, entry in replaced:
            mapping[name] = entry
