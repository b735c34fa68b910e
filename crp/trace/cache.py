"""One traced forward pass for each model, as long as its structure is the same."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from crp.layers import modules_of
from crp.trace.record import Trace
from crp.trace.recorder import trace

Structure: TypeAlias = tuple[object, ...]

#: Number of structures remembered for each model: with and without a composite, in training and in evaluation.
_REMEMBERED = 4
_records: weakref.WeakKeyDictionary[nn.Module, deque[tuple[Structure, Trace]]] = weakref.WeakKeyDictionary()


class Passive:
    """A hook, or a replaced ``forward``, that does not count as a change of the model's structure."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._function(*args, **kwargs)


def structure(model: nn.Module) -> Structure:
    """Changes whenever a module is replaced, gets a hook, or is switched between training and evaluation.

    A hook on all modules of the process counts, too; not torch's own, such as those of a `FlopCounterMode`, which look.
    """
    entries: list[Any] = [
        (
            weakref.ref(module),
            module.training,
            "forward" in vars(module) and not isinstance(vars(module)["forward"], Passive),
            (*module._forward_hooks,),
            (*module._forward_pre_hooks,),
        )
        for module in modules_of(model).values()
    ]
    *root, hooks = entries[0]
    if hooks:
        passive = {key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, Passive)}
        entries[0] = (*root, tuple(key for key in hooks if key not in passive))
    if on_all := {**torch_module._global_forward_hooks, **torch_module._global_forward_pre_hooks}:
        homes = {key: getattr(hook, "__module__", None) or "" for key, hook in on_all.items()}
        entries += [key for key, home in homes.items() if not home.startswith("torch.")]
    return tuple(entries)


def known(model: nn.Module, key: Structure) -> Trace | None:
    """Record of a forward pass that a model made when it had this structure; None if there is none."""
    for other, record in _records.get(model, ()):
        if other == key:
            return record
    return None


def recorded(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: Structure, alike: bool = False
) -> Trace:
    """Record of a forward pass of a model, made unless one is known for this structure.

    Parameters
    ----------
    model : nn.Module
        Only weak references to it are kept.
    args, kwargs
        What the model is called with. A later call that takes another way through the model is not noticed.
    key : tuple
        What `structure` said before the caller put anything on the model.
    alike : bool
        Whether a record counts only where the first argument, a tensor, had the type and shape of this one, but for the
        number of samples: the model can take such data, then.

    Returns
    -------
    Trace
        The same object as long as it is kept, so that it can be the key of what is derived from it.
    """
    record = known(model, key)
    if record is None or (alike and not _is_of_such(record, args[0])):
        record = trace(model, *args, **kwargs)
        _records.setdefault(model, deque(maxlen=_REMEMBERED)).appendleft((key, record))
    return record


def _is_of_such(record: Trace, data: Tensor) -> bool:
    """Whether a model was called with samples of such a type and shape."""
    given = record.calls[0].given
    return given is not None and (given.dtype, given.shape[1:]) == (data.dtype, data.shape[1:])
