"""What the weights of a model that runs are made of: the parameters and buffers that it stores."""

from __future__ import annotations

from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from crp.layers.nested import tensors_in


class Origins:
    """Stored tensors that each constant of a forward pass was computed from.

    Parameters
    ----------
    model : nn.Module
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = {id(buffer) for buffer in model.buffers()}
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._numbers = count(1)

    def add(self, result: object, args: Any, kwargs: Any) -> None:
        """Note the tensors that a call has made."""
        origins = frozenset().union(*map(self.of, tensors_in((args, kwargs))))
        for tensor in tensors_in(result):
            if not self._is_stored(tensor):
                self._made[tensor] = origins

    def of(self, tensor: Tensor) -> frozenset[int]:
        """Ids of the stored tensors; of a tensor that nothing seen has made, a number of its own."""
        base = tensor if tensor._base is None else tensor._base
        for candidate in (tensor, base):
            if not self._is_stored(candidate) and candidate in self._made:
                origins: frozenset[int] = self._made[candidate]
                return origins
        if self._is_stored(base):
            return frozenset({id(base)})
        # (a number of its own, as another tensor may get the id of one that is gone)
        self._made[base] = frozenset({-next(self._numbers)})
        return self.of(base)

    def _is_stored(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or id(tensor) in self._buffers
