"""A call that does not depend on what its caller changes later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crp.engine.call import Call
from crp.layers.nested import changed


def with_copies(call: Call) -> Call:
    """The same call with copies of what it was given, so that changes between its parts have no effect."""
    given = call.settings
    settings = replace(given, record=(*given.record,), mask_map=copied(given.mask_map), init_rel=copied(given.init_rel))
    rows = replace(call.rows, conditions=tuple(copied({**condition}) for condition in call.rows.conditions))
    return replace(call, inputs=call.inputs.each(torch.clone), rows=rows, settings=settings)


def copied(value: Any) -> Any:
    """Copy of tensors, arrays and sets, alone or nested (see `changed`); anything else as it is."""

    def copy(each: Any) -> Any:
        return each.detach().clone() if isinstance(each, Tensor) else each.copy()

    return changed(value, copy, (Tensor, np.ndarray, set))
