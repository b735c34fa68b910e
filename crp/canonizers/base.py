"""What the canonizers of this package have in common."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Reporting(Protocol):
    """A canonizer that can say what it did: every instance that `apply` of one of ours returns.

    Both attributes are known after the model's first call; names are those of ``model.named_modules()``. An instance
    whose `merged` is empty changed nothing.

    Attributes
    ----------
    merged : dict of str to str
        Layers that were taken up by another one, and by which.
    left : dict of str to str
        Layers of the kind it looks for that it left as they are, and why.
    """

    merged: dict[str, str]
    left: dict[str, str]
