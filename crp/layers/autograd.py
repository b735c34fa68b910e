"""Autograd's graph: its nodes, and batch norms of one sample, whose gradients torch gets wrong on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor


def graph_nodes(tensors: Iterable[Tensor], known: Iterable[Tensor] = ()) -> list[Any]:
    """All nodes of autograd's graph that tensors were made by, each once; none behind tensors that are known."""
    seen: set[Any] = {None, *map(attrgetter("grad_fn"), known)}
    todo: list[Any] = [*map(attrgetter("grad_fn"), tensors)]
    nodes = []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        nodes.append(node)
        for below, _ in node.next_functions:
            todo.append(below)
    return nodes


def lay_out_alike(outputs: Sequence[Tensor]) -> None:
    """Have each batch norm of one sample, in what outputs are made by, get a gradient laid out as its input is.

    Of one sample, the entries of a contiguous tensor and of one with the channels last may both count as in order for
    torch, which then mixes them up where its kernel reads one of either kind. Instance norm is such a batch norm, too.
    """
    if not any(map(attrgetter("is_cpu"), outputs)):
        return
    for node in graph_nodes(outputs):
        if node.name() == "NativeBatchNormBackward0":
            with contextlib.suppress(RuntimeError):  # (it was overwritten, which torch says if it is needed)
                values = node._saved_input
                if values.is_cpu and values.dim() > 3 and len(values) == 1:
                    node.register_prehook(partial(_alike, values.is_contiguous()))


def _alike(contiguous: bool, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    gradient, *others = gradients
    if gradient is None:
        return gradients
    moved = gradient.contiguous() if contiguous else gradient.movedim(1, -1).contiguous().movedim(-1, 1)
    return moved, *others
