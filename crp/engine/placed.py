"""Which composites are on which module."""

from __future__ import annotations

import threading
import weakref

from torch import nn
from zennit.core import Composite

_modules: weakref.WeakKeyDictionary[Composite, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def note_placed(composite: Composite, module: nn.Module) -> None:
    """Remember that a composite is on a module now; a composite says so when it is registered."""
    with _guard:
        _modules[composite] = weakref.ref(module)


def note_removed(composite: Composite) -> None:
    """Forget where a composite was."""
    with _guard:
        _modules.pop(composite, None)


def placed() -> list[tuple[Composite, nn.Module | None]]:
    """All composites that are on a module, each with it."""
    with _guard:
        return [(composite, module()) for composite, module in _modules.items()]
