"""What a call is given beside data and conditions: the arguments that hold for all rows, and overridden methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from crp.engine.conditions import MaskMap
from crp.engine.forward import tensor_in
from crp.engine.inputs import Explain
from crp.flags import check_flags
from crp.types import AttributionResults

#: ``results -> one tensor``
Reading: TypeAlias = Callable[[AttributionResults], Tensor]


@dataclass(frozen=True)
class Settings:
    """The arguments of `CondAttribution` that do not depend on the row."""

    record: Sequence[str]
    mask_map: MaskMap
    start: str | None
    init_rel: Any
    on_device: torch.device | str | None
    exclude_parallel: bool
    explain: Explain = None
    #: Key of the targets in a condition.
    output_name: str = "y"
    #: Whether results keep what arrived at layers beside its product with the activation.
    multipliers: bool = True
    #: Whether all slots of a backward pass start alike, where that is known without looking at values.
    shared_start: bool | None = None
    #: Whether the model may be run with the channels last in memory; `Call.laid_out` says where that is faster.
    channels_last: bool = False
    #: Whether results of layers may lie in memory as they were computed, for a caller that only reads them.
    as_computed: bool = False
    #: Whether data that are not finite are an error before the model runs; for a caller that waits for nothing, and
    #: looks at them later, they are not.
    finite: bool = True
    #: What the caller reads of a result, in place of the result: a replay then gives `AttributionResults.reading` and
    #: no layers. A function of nothing but the result's tensors; equal ones read the same.
    reading: Reading | None = None

    def __post_init__(self) -> None:
        check_flags(exclude_parallel=self.exclude_parallel)

    def naming(self, output: str) -> Settings:
        """The same with this key of the targets."""
        return self if self.output_name == output else replace(self, output_name=output)


@dataclass(frozen=True)
class Overrides:
    """Methods that a subclass of `CondAttribution` has in place of the engine's own; None where it has none."""

    select_output: Callable[[Any], Tensor] | None = None
    relevance_init: Callable[..., Tensor] | None = None
    heatmap_modifier: Callable[..., Tensor] | None = None
    broadcast: Callable[..., tuple[Any, Any]] | None = None
    backward: Callable[..., None] | None = None

    @property
    def are_any(self) -> bool:
        """Whether there is one."""
        return any(method is not None for method in vars(self).values())

    @property
    def select(self) -> Callable[[Any], Tensor]:
        """Takes what is explained from what the model returns."""
        return self.select_output or tensor_in
