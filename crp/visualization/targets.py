"""Which classes a sample's relevance is computed for: those of its label, those that the model gives, or given ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.guard import attached

#: ``"label"``, ``"prediction"``, ``"all"``, ``"top-5"`` (any number), or classes.
Targets = str | Sequence[int]

_TOP = re.compile(r"top-([1-9]\d{0,8})")


def check_targets(targets: Targets) -> str | tuple[int, ...]:
    """What `mine` takes as ``targets``, in one form.

    Raises
    ------
    ValueError
        If it is nothing of that.
    """
    if isinstance(targets, str):
        if targets in ("label", "prediction", "all") or _TOP.fullmatch(targets):
            return targets
    elif isinstance(targets, Sequence) and targets and all(type(t) is int and t >= 0 for t in targets):
        return tuple(sorted({*targets}))
    raise ValueError(f"targets must be 'label', 'prediction', 'top-5', 'all', or a list of classes; not {targets!r}")


def choose_targets(targets: str | tuple[int, ...], attribution: CondAttribution, data: Tensor) -> list[list[int]]:
    """Classes of every sample, ascending, where they are not those of its label.

    Parameters
    ----------
    targets : str or tuple of int
        From `check_targets`.
    attribution : CondAttribution
    data : Tensor of shape (samples, ...)

    Returns
    -------
    list of list of int
        Of equal outputs, the smaller class is the predicted one.

    Raises
    ------
    ValueError
        If the model's output is not of shape (samples, classes).
    """
    if not isinstance(targets, str):
        return [list(targets)] * len(data)
    with torch.no_grad(), attached(Composite(), attribution.model) as model:
        output = attribution.select_output(model(data))
    if output.dim() != 2 or len(output) != len(data):
        raise ValueError(
            f"targets={targets!r} needs an output of shape ({len(data)}, classes), not {tuple(output.shape)}; give "
            "a list of targets"
        )
    if targets == "all":
        return [list(range(output.shape[1]))] * len(data)
    found = _TOP.fullmatch(targets)
    n = int(found[1]) if found else 1
    best = torch.sort(output, dim=1, descending=True, stable=True).indices[:, :n]
    chosen: list[list[int]] = torch.sort(best, dim=1).values.tolist()
    return chosen
