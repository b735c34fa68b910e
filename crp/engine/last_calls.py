"""What zennit's rules do not support: layers that are called several times, and branches that meet in a plain sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from crp.layers.autograd import graph_nodes
from crp.layers.nested import tensors_in
from crp.wording import counted


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

    def problem(self, layers: Iterable[str]) -> str | None:
        """What is wrong, naming these of the layers, in their order."""
        missed = [layer for layer in layers if layer in self.missed]
        if not missed:
            return None
        return (
            f"layers {missed} are called more than once, which zennit's rules do not support: relevance is wrong. "
            "Those of crp.composites do."
        )


class PlainSums:
    """Notes which sums of branches relevance passes that no layer makes: there, zennit's rules are wrong.

    Those rules hand relevance on as a gradient, of which a sum gives all to each branch. (Zennit's layer `Sum`, which
    its canonizers put into residual blocks, shares it.)

    Attributes
    ----------
    passed : set of int
        Numbers of these sums, in the order of a walk through the graph.
    """

    def __init__(self) -> None:
        self.passed: set[int] = set()

    def watch_call(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        """Forward hook for the model."""
        made = tensors_in(getattr(output, "logits", output))
        for number, node in enumerate(filter(_adds_branches, graph_nodes(made))):
            node.register_prehook(lambda _gradients, number=number: self.passed.add(number))

    def problem(self) -> str | None:
        """What is wrong."""
        if not self.passed:
            return None
        return (
            f"the model adds branches up in {counted(len(self.passed), 'place')} without a layer for it, and zennit's "
            "rules give all relevance to each branch there: there is too much. Give the composite a canonizer for "
            "that, such as zennit.torchvision.ResNetCanonizer(), or use one of crp.composites"
        )


def _adds_branches(node: Any) -> bool:
    """Whether a node of the graph adds or subtracts two tensors that both depend on what is explained."""
    return node.name() in ("AddBackward0", "SubBackward0") and all(below for below, _ in node.next_functions)
