"""Layers that are called several times, under rules that know their last call only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class LastCalls:
    """Notes which layers relevance reaches by another call than their last: there, zennit's rules are wrong.

    Those rules keep what a layer was called with last. Several passes through a model are fine, as long as relevance
    goes back before the next one.

    Attributes
    ----------
    missed : dict of str to None
        Names of these layers, in the order in which relevance has reached them.
    """

    def __init__(self) -> None:
        self.missed: dict[str, None] = {}
        self._n_calls: Counter[str] = Counter()

    def watch(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Forward hook for the layer of this name."""

        def watch_call(_module: nn.Module, _arguments: Any, output: Any) -> None:
            self._n_calls[name] += 1
            number = self._n_calls[name]

            def note_arrival(_gradient: Tensor) -> None:
                if self._n_calls[name] != number:
                    self.missed[name] = None

            for tensor in output if isinstance(output, tuple) else [output]:
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(note_arrival)  # type: ignore[no-untyped-call]

        return watch_call
