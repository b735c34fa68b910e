"""What to explain of a dense output: single pixels, single elements, and a score for each class of a segmentation.

`Pixels` and `Element` are for ``"y"`` in conditions, `segmentation` for ``CondAttribution(model, output=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


class Element(tuple[int, ...]):
    """One element of an output of shape (batch, *output shape), as a target: ``{"y": [Element((3, 10, 12))]}``.

    A plain tuple in a list of targets means the same.
    """


@dataclass(frozen=True, eq=False)
class Pixels:
    """Pixels of one class of an output of shape (batch, classes, *space), as a target: ``{"y": [Pixels(3, mask)]}``.

    Attributes
    ----------
    of_class : int
    mask : array or Tensor of shape (*space), bool
        Pixels that relevance starts from.
    """

    of_class: int
    mask: Any


def segmentation(
    key: str | None = "out", where: Literal["own", "all"] = "own", positive: bool = True
) -> Callable[[Any], Tensor]:
    """Score of every class of a segmentation, (batch, classes), so that ``{"y": class}`` means it.

    The score of a class is the sum of its logits over pixels, by default over those that are predicted to be of this
    class, and of positive logits: relevance starts at each of these pixels with its logit. Dreyer et al., "Revealing
    Hidden Context Bias in Segmentation and Object Detection through Concept-specific Explanations", CVPR Workshops
    (2023), section 3.

    Parameters
    ----------
    key : str, optional
        Name of the logits, of shape (batch, classes, *space), in what the model returns; None if it returns them.
    where : {"own", "all"}
        Pixels where no other class has a larger logit, or all.
    positive : bool
        Whether negative logits are left out.

    Returns
    -------
    callable
        For ``CondAttribution(model, output=segmentation())``.

    Examples
    --------
    >>> logits = torch.tensor([[[[1.0, -1.0, 2.0]], [[0.0, 3.0, 4.0]]]])
    >>> segmentation(key=None)(logits)
    tensor([[1., 7.]])
    >>> segmentation(key=None, where="all")(logits)
    tensor([[3., 7.]])
    """
    if where not in ("own", "all"):
        raise ValueError(f"where must be 'own' or 'all', not {where!r}")

    def scores(returned: Any) -> Tensor:
        logits = returned if key is None else _entry(returned, key)
        if not isinstance(logits, Tensor) or logits.dim() < 3:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"a segmentation has logits of shape (batch, classes, *space), not {shape}")
        kept = torch.ones_like(logits, dtype=torch.bool)
        if where == "own":
            kept = logits.detach() == logits.detach().amax(1, keepdim=True)
        if positive:
            kept = kept & (logits.detach() > 0)
        return torch.where(kept, logits, 0).flatten(2).sum(2)

    return scores


def _entry(returned: Any, key: str) -> Any:
    if isinstance(returned, Mapping):
        if key not in returned:
            raise KeyError(f"the model returns {sorted(map(str, returned))}, and not {key!r}; name the logits: key=")
        return returned[key]
    if not hasattr(returned, key):
        raise TypeError(
            f"the model returns a {type(returned).__name__}, which has no {key!r}; name the logits, or give key=None "
            "if it returns them themselves"
        )
    return getattr(returned, key)
