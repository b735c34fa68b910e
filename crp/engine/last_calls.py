"""What zennit's rules do not support: layers that are called several times, and branches that meet in a plain sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from crp.layers.autograd import graph_nodes
from crp.layers.nested import tensors_in
from crp.wording import counted


class _Unsupported:
    """Notes what relevance passes while zennit's rules are on a model, and where they are wrong.

    They keep what a layer was called with last, so that other calls of it get that call's relevance. (Several passes
    through a model are fine, as long as relevance goes back before the next one.) And they hand relevance on as a
    gradient, of which a sum gives all to each branch; zennit's layer `Sum`, which its canonizers put into residual
    blocks, shares it.
    """

    def __init__(self) -> None:
        self._n_calls: Counter[str] = Counter()
        self._missed = set[str]()
        self._sums = set[int]()

    def watch_layer(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Forward hook for the layer of this name."""

        def watch_call(_module: nn.Module, _arguments: Any, output: Any) -> None:
            self._n_calls[name] += 1
            number = self._n_calls[name]

            def note_arrival(_gradient: Tensor) -> None:
                if self._n_calls[name] != number:
                    self._missed.add(name)

            for tensor in output if isinstance(output, tuple) else [output]:
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(note_arrival)  # type: ignore[no-untyped-call]

        return watch_call

    def watch_model(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        """Forward hook for the model."""
        made = tensors_in(getattr(output, "logits", output))
        for number, node in enumerate(filter(_adds_branches, graph_nodes(made))):
            node.register_prehook(lambda _gradients, number=number: self._sums.add(number))

    def problems(self, layers: Iterable[str]) -> list[str]:
        """What is wrong, naming some of these layers, in their order."""
        found = []
        if self._sums:
            found.append(
                f"the model adds branches up in {counted(len(self._sums), 'place')} without a layer for it, and "
                "zennit's rules give all relevance to each branch there: there is too much. Give the composite a "
                "canonizer for that, such as zennit.torchvision.ResNetCanonizer(), or use one of crp.composites"
            )
        if missed := [layer for layer in layers if layer in self._missed]:
            found.append(
                f"layers {missed} are called more than once, which zennit's rules do not support: relevance is wrong. "
                "Those of crp.composites do."
            )
        return found


def _adds_branches(node: Any) -> bool:
    """Whether a node of the graph adds or subtracts two tensors that both depend on what is explained."""
    return node.name() in ("AddBackward0", "SubBackward0") and all(below for below, _ in node.next_functions)
