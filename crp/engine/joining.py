"""Results of several passes in one: means of the same rows, and rows one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from crp.engine.conditions import row_index
from crp.types import AttributionResults

#: Results of some rows, and the relevance of each input that is explained, (rows, *input shape).
Part: TypeAlias = tuple[AttributionResults, list[Tensor]]


def average(parts: Sequence[Part]) -> Part:
    """Mean of several results of the same rows; without multipliers, which have none."""
    if len(parts) == 1:
        return parts[0]
    first, _ = parts[0]
    heatmap, relevances = (_each([getattr(result, field) for result, _ in parts], _mean) for field in _AVERAGED)
    result = AttributionResults(heatmap, first.activations, relevances, first.prediction, encoding=first.encoding)
    return result, _each([of_inputs for _, of_inputs in parts], _mean)


def one_ahead(parts: Iterator[Part]) -> Iterator[Part]:
    """Parts, each given when the next one is begun: a GPU computes it while the host waits for what is given.

    An error comes in its turn, after the parts before it.
    """
    ahead, error = [next(parts)], None
    while ahead:
        current = [ahead.pop()]
        try:
            ahead += [part for part in [next(parts, None)] if part is not None]
        except Exception as raised:
            error = raised
        yield current.pop()  # (the caller alone keeps it)
    if error is not None:
        raise error


_AVERAGED = ("heatmap", "relevances")


def in_order(parts: Sequence[Part], order: Sequence[int]) -> Part:
    """Results of all rows of several parts: as row i the ``order[i]``-th of the parts one after the other.

    Where rows differ in shape, there is a list with a tensor for each.
    """
    lengths = [len(result.prediction) for result, _ in parts]

    def join(tensors: Sequence[Tensor]) -> Any:
        n_entries = [len(tensor) // n_rows for tensor, n_rows in zip(tensors, lengths, strict=True)]
        if len({*n_entries}) > 1 or len({tensor.shape[1:] for tensor in tensors}) > 1:
            several = max(n_entries) > 1
            rows = [row if several else row[0] for tensor, n in zip(tensors, n_entries, strict=True)
                    for row in torch.split(tensor, n)]  # fmt: skip
            return [rows[place] for place in order]
        joined = torch.cat(list(tensors))
        if order == list(range(len(order))):
            return joined
        return joined[row_index(order, len(joined) // len(order))]

    results = [result for result, _ in parts]
    result = AttributionResults(
        *(_each(list(values), join) for values in zip(*results, strict=True)),
        encoding=results[0].encoding,
        multipliers=_each([result.multipliers for result in results], join),
        counted=_each([result.counted for result in results], join),
    )
    return result, [join(of_input) for of_input in zip(*(of_inputs for _, of_inputs in parts), strict=True)]


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


def _each(values: list[Any], combine: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """Tensors combined, or those in tuples, lists or dicts of the same form; None where there are none."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _each([value[name] for value in values], combine) for name in first}
    if isinstance(first, tuple | list):
        return type(first)(_each(list(entries), combine) for entries in zip(*values, strict=True))
    return None if first is None else combine(values)
