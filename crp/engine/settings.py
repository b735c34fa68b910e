"""What a call is given beside data and conditions: the arguments that hold for all rows, and overridden methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crp.engine.inputs import Explain
from crp.engine.masks import MaskMap


@dataclass(frozen=True)
class Settings:
    """The arguments of a call that do not depend on the row; see `CondAttribution`.

    Attributes
    ----------
    record : sequence of str
        Layers whose activations and relevances are returned.
    mask_map : callable or mapping of str to callable
    start : str or None
        Layer where relevance starts, in place of the output.
    init_rel : Tensor, number, callable or None
    on_device : torch.device, str or None
    exclude_parallel : bool
    explain : int, str, sequence of these, or None
    output_name : str
        Key of the targets in a condition.
    multipliers : bool
        Whether results keep what arrived at layers beside its product with the activation.
    """

    record: Sequence[str]
    mask_map: MaskMap
    start: str | None
    init_rel: Any
    on_device: torch.device | str | None
    exclude_parallel: bool
    explain: Explain = None
    output_name: str = "y"
    multipliers: bool = True


@dataclass(frozen=True)
class Overrides:
    """Methods that a subclass of `CondAttribution` has in place of the engine's own; None where it has none.

    Attributes
    ----------
    select_output : callable or None
        ``what the model returns -> tensor to explain``
    relevance_init : callable or None
        ``(prediction, targets, init_rel) -> initial relevance``
    heatmap_modifier : callable or None
        ``(data with its relevance as grad, device) -> heatmap``
    broadcast : callable or None
        ``(data, conditions) -> data and conditions, one for each row``
    backward : callable or None
        As `crp.engine.backward.send_back`.
    """

    select_output: Callable[[Any], Tensor] | None = None
    relevance_init: Callable[..., Tensor] | None = None
    heatmap_modifier: Callable[..., Tensor] | None = None
    broadcast: Callable[..., tuple[Any, Any]] | None = None
    backward: Callable[..., None] | None = None
