"""A call that does not depend on what its caller changes later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.engine.call import Call


def with_copies(call: Call) -> Call:
    """The same call with copies of what it was given, so that changes between its parts have no effect."""
    given = call.settings
    settings = replace(given, record=(*given.record,), mask_map=copied(given.mask_map), init_rel=copied(given.init_rel))
    rows = replace(call.rows, conditions=tuple(copied({**condition}) for condition in call.rows.conditions))
    return replace(call, inputs=call.inputs.each(torch.clone), rows=rows, settings=settings)


def copied(value: Any) -> Any:
    """Copy of tensors and arrays, and of lists, tuples, sets and dicts of them; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return type(value)(map(copied, value)) if type(value) in (list, tuple, set) else value
