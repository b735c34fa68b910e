"""How many operations positions such as `Last` and `Depth` choose among, before the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from crp.composites.selection import Entry


def totals_of(
    model: nn.Module, positions: Sequence[Entry], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[int, int]:
    """Number of operations of each position's types, by the number of the entry."""
    raise NotImplementedError
