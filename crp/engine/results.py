"""Results of rows: made of what passes have left, averaged over passes, and put one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from crp.engine.backward import _input_name
from crp.engine.conditions import Rows, row_index
from crp.engine.encoding import _read, is_product
from crp.engine.forward import ForwardPass
from crp.engine.settings import Settings
from crp.types import AttributionResults

#: Results of some rows, and the relevance of each input that is explained, (rows, *input shape).
Part: TypeAlias = tuple[AttributionResults, list[Tensor]]


def _results_of(
    passed: ForwardPass,
    rows: Rows,
    prediction: Tensor,
    arrived: dict[str, Tensor],
    settings: Settings,
    heatmap_of: Callable[..., Tensor] | None,
    *,
    main_input: str,
    is_shared: bool,
    last: bool,
) -> Part:
    """Results of some rows, from the prediction of each and what ``arrived`` at each input and layer.

    What is read is taken out of ``arrived``, so that nobody keeps it. Where this is the ``last`` use of the forward
    pass, results may be in its memory. ``is_shared`` leaves the prediction as it lies, as that of a text is large.
    ``main_input`` is what the model calls its first argument, if it says so.
    """
    asked, own = passed.propagation, partial(_own, settings)
    relevances_of_inputs = [arrived.pop(_input_name(number)) for number in range(len(passed.inputs.explained))]
    keeps = settings.multipliers and asked.encoding == "multiplier"
    activations = {name: own(passed.of_rows(output, rows, not last)) for name, output in passed.layers.items()}
    relevances, multipliers, counted = {}, {}, {}
    for name in passed.layers:
        of_layer = arrived.pop(name)
        relevances[name] = own(_read(asked, of_layer, passed.value(name, rows)))
        if keeps:
            multipliers[name] = own(of_layer) if is_product(asked) else relevances[name]
            counted[name] = activations[name] if name not in passed.references else own(passed.value(name, rows))
    heatmaps, inputs = [], passed.inputs
    for place, leaf, relevance in zip(inputs.names, inputs.explained, relevances_of_inputs, strict=True):
        explained = passed.of_rows(leaf, rows)
        explained.grad = relevance
        named = main_input if place == 0 and not inputs.embedded else str(place)
        sum_of = partial(sum_of_channels, axis=_channel_axis(named, explained.shape))
        heatmaps.append((heatmap_of or sum_of)(explained, settings.on_device))
    result = AttributionResults(
        passed.inputs.shaped(heatmaps),
        activations,
        relevances,
        own(prediction, is_shared),
        encoding=asked.encoding,
        multipliers=multipliers if keeps else None,
        counted=counted if keeps and is_product(asked) else None,
    )
    return result, relevances_of_inputs


def _own(settings: Settings, tensor: Tensor, is_shared: bool = False) -> Tensor:
    """Tensor on the device that was asked for, in the usual layout; what rows share becomes each row's own.

    The caller may then write into it. ``is_shared`` leaves it as it is in memory.
    """
    usual = not (settings.as_computed or is_shared) and (settings.channels_last or tensor.stride()[:1] == (0,))
    tensor = tensor.contiguous() if usual else tensor
    return tensor.to(settings.on_device) if settings.on_device else tensor


def _channel_axis(name: str, shape: torch.Size) -> int | None:
    """Axis of channels, by the name that models of Hugging Face give to an input; None where there is none.

    What the model computes does not tell: it reads a spectrogram's frequencies as the channels of a convolution.
    """
    if name in ("input_values", "input_features") and 1 < len(shape) < 4 and shape[1] > 2:  # a wave or spectrogram
        return None
    of_pictures = -3 if len(shape) > 3 else -1  # (also of videos, or of patches)
    return of_pictures if name.startswith("pixel_values") else -1 if name.endswith("inputs_embeds") else 1


def sum_of_channels(data: Tensor, on_device: torch.device | str | None = None, axis: int | None = 1) -> Tensor:
    """Heatmap from the relevance of an input, ``data.grad``; see `CondAttribution.heatmap_modifier`."""
    heatmap = cast(Tensor, data.grad).detach()
    heatmap = heatmap if axis is None or heatmap.dim() < 2 else heatmap.sum(dim=axis)
    return heatmap.to(on_device) if on_device else heatmap


def average(parts: Sequence[Part]) -> Part:
    """Mean of several results of the same rows; without multipliers, which have none."""
    if len(parts) == 1:
        return parts[0]
    first, _ = parts[0]
    each = [(result.heatmap, result.relevances, inputs) for result, inputs in parts]
    heatmap, relevances, inputs = _each(each, lambda tensors: torch.stack(list(tensors)).mean(0))
    result = AttributionResults(heatmap, first.activations, relevances, first.prediction, encoding=first.encoding)
    return result, inputs


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
        is_ordered = order == list(range(len(order)))
        return joined if is_ordered else joined[row_index(order, len(joined) // len(order))]

    results = [result for result, _ in parts]
    result = AttributionResults(
        *(_each(list(values), join) for values in zip(*results, strict=True)),
        encoding=results[0].encoding,
        multipliers=_each([result.multipliers for result in results], join),
        counted=_each([result.counted for result in results], join),
    )
    return result, [join(of_input) for of_input in zip(*(of_inputs for _, of_inputs in parts), strict=True)]


def _each(values: list[Any], combine: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """Tensors combined, or those in tuples, lists or dicts of the same form; None where there are none."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _each([value[name] for value in values], combine) for name in first}
    if isinstance(first, tuple | list):
        return type(first)(_each(list(entries), combine) for entries in zip(*values, strict=True))
    return None if first is None else combine(values)
