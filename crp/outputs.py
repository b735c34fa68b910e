"""What to explain of a dense output: pixels, elements, tokens of a text, and a score for each class of a segmentation.

`Pixels`, `Element` and `Position` are for ``"y"`` in conditions, `segmentation` is for
``CondAttribution(model, output=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Position:
    """Tokens at one position of a text, as a target: ``{"y": Position(-1, token)}``, or a list of these.

    Of an output of shape (batch, positions, vocabulary), the logits of language models; several tokens are summed.

    Attributes
    ----------
    position : int
        Negative ones count from the end of the output, padding included.
    token : int or sequence of int
        Ids of the tokens whose logits are explained.
    against : int or sequence of int
        Ids of tokens whose logits are taken off: why the one and not the other.

    Examples
    --------
    >>> Position(-1, 7, against=3).signed()
    [((-1, 7), 1), ((-1, 3), -1)]
    """

    position: int
    token: int | Sequence[int]
    against: int | Sequence[int] = ()

    def check(self, what: str) -> None:
        """Raise an error that begins with ``what`` unless all are whole numbers, and each token is named once."""
        whole = all(isinstance(ids, int | list | tuple) for ids in (self.token, self.against))
        places = [place for place, _ in self.signed()] if whole else []
        if not places or not all(isinstance(n, int) and not isinstance(n, bool) for place in places for n in place):
            raise TypeError(f"{what} must have Position(position, token) with ints, or lists of them, not {self!r}")
        if len(set(places)) < len(places):
            raise ValueError(f"{what} names a token twice in {self}; explain it once, and against others only")

    def signed(self) -> list[tuple[tuple[int, int], int]]:
        """Places in the output, each with its sign."""
        return [
            ((self.position, one), sign)
            for ids, sign in ((self.token, 1), (self.against, -1))
            for one in ([ids] if isinstance(ids, int) else ids)
        ]


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
