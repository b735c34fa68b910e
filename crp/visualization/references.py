"""What references are asked for: concept ids and classes as users write them, ranks, and where heatmaps start."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from zennit.core import Composite

from crp.attribution import CondAttribution
from crp.checks import check_number
from crp.concepts import Concept, as_ids, mask_of
from crp.concepts.reading import initial_relevance_of, starts_by_code
from crp.engine.attached import check_composite
from crp.errors import InputError, InputTypeError, OutOfRangeError
from crp.flags import check_flags, check_function
from crp.notices import warn
from crp.visualization.table.fingerprint import fingerprint
from crp.visualization.table.ranking import ReferenceSamples
from crp.wording import counted, first_few

#: Concept id: a channel, or what a custom concept calls its parts.
ConceptId = int | tuple[int, ...]
PlotFn = Callable[[Tensor, Tensor, bool], Any]


class PictureRequest(NamedTuple):
    """What a method such as `get_max_reference` is asked for, besides concepts, classes and ranks.

    Attributes
    ----------
    options : mapping
        Whatever else the pictures depend on, such as where heatmaps start.
    """

    method: str
    layer: str
    mode: str
    composite: Composite | None
    rf: bool
    plot_fn: PlotFn | None
    options: Mapping[str, Any]


def concept_list(concept_ids: Any) -> list[ConceptId]:
    """Concept ids as a list of int (or of tuples of int), from an int, a sequence, or an array or tensor of any shape.

    Raises
    ------
    TypeError
        If an id is not an integer.
    """
    if isinstance(concept_ids, Tensor | np.ndarray):
        return list(as_ids(concept_ids))
    if isinstance(concept_ids, str | bytes):
        raise InputTypeError(f"concept ids must be integers, not {concept_ids!r}")
    if not isinstance(concept_ids, Iterable):
        return list(as_ids(concept_ids))
    ids: list[ConceptId] = []
    for concept_id in concept_ids:
        if isinstance(concept_id, tuple):
            ids.append(tuple(as_ids(concept_id)))
        else:
            ids.extend(concept_list(concept_id))
    return ids


def target_list(targets: Any) -> list[int]:
    """Targets as a list of int, from an int, a sequence (also of numerals), or an array or tensor of any shape.

    Raises
    ------
    TypeError
        If a target is not an integer.
    """
    ids: list[Any] = []
    is_one = isinstance(targets, str | Tensor | np.ndarray) or not isinstance(targets, Iterable)
    for target in [targets] if is_one else targets:
        ids += target.reshape(-1).tolist() if isinstance(target, Tensor | np.ndarray) else [target]
    return as_ids([int(t) if isinstance(t, str) and t.isdecimal() else t for t in ids], what="targets")


def column(concept: Concept, concept_id: ConceptId, layer: str, n_concepts: int | None = None) -> int:
    """Column of a concept in a layer's scores: the id itself, or what ``concept.column(concept_id, layer)`` says.

    Raises
    ------
    IndexError
        If the layer has no such concept.
    TypeError
        If the id is a tuple and the concept does not say what its column is.
    """
    method = getattr(concept, "column", None)
    if method is not None:
        index = int(method(concept_id, layer))
    elif isinstance(concept_id, tuple):
        raise InputTypeError(
            f"concept id {concept_id!r} is a tuple; {type(concept).__name__} needs a method "
            "column(concept_id, layer_name) that returns its column in the concept's scores"
        )
    else:
        index = concept_id
    if n_concepts is not None and not -n_concepts <= index < n_concepts:
        raise OutOfRangeError(
            f"layer {layer!r} has {n_concepts} concepts, 0 to {n_concepts - 1}; there is no concept {concept_id}"
        )
    return index


def one_concept(concept_id: Any) -> ConceptId:
    """The only concept that is given; a `ValueError` for several."""
    concepts = concept_list([concept_id])
    if len(concepts) != 1:
        raise InputError(f"one concept is asked at a time, not {concept_id!r}")
    return concepts[0]


def _check_counts(**counts: object) -> None:
    """Raise a `ValueError` for a number of things, by the name of its parameter, that is no whole number above 0."""
    for name, count in counts.items():
        check_number(name, count, 1, whole=True)


def checked(request: tuple[Any, ...], r_range: Any) -> tuple[PictureRequest, tuple[int, int]]:
    """A request and its ranks, if they can be drawn."""
    picture = PictureRequest(*request)
    check_flags(rf=picture.rf)
    check_composite(picture.composite)
    check_function("plot_fn", picture.plot_fn, "samples, heatmaps and rf")
    return picture, _check_ranks(r_range)


def _check_ranks(r_range: Any) -> tuple[int, int]:
    """First rank, and the one after the last; a `ValueError` for anything else than two numbers in this order."""
    ranks = as_ids(r_range, what="r_range")
    if len(ranks) != 2 or not 0 <= ranks[0] < ranks[1]:
        raise InputError(f"r_range must be (first rank, rank after the last) with 0 <= first < last, not {r_range!r}")
    return ranks[0], ranks[1]


def clip(r_range: tuple[int, int], available: int, what: str) -> tuple[int, int]:
    """Ranks that exist.

    Raises
    ------
    ValueError
        If the range is none, or begins after the last reference.
    """
    start, stop = _check_ranks(r_range)
    if start >= available:
        raise InputError(f"r_range {(start, stop)} begins after the last reference: there are {available} for {what}")
    return start, min(stop, available)


def row_targets(init: str, targets: Any, mined: np.ndarray, layer: str) -> dict[str, list[list[int]]]:
    """Say where the heatmaps of some references start.

    Parameters
    ----------
    init : {"activation", "relevance"}
    targets : int, sequence of int, or None
        Classes whose relevance is shown; None is the class for which a reference was mined.
    mined : array of int of shape (references,)
        These classes; -1 where there is none.
    layer : str

    Returns
    -------
    dict
        ``{"targets": classes of each reference}``, or nothing where heatmaps start from the concept's activation. (An
        overridden method need not know of targets until they are asked for.)
    """
    if init == "activation":
        if targets is not None:
            raise InputError(
                f"heatmaps that start from the activation have no targets={targets!r}; add init='relevance'"
            )
        return {}
    if init != "relevance":
        raise InputError(f"init must be 'activation' or 'relevance', not {init!r}")
    if targets is not None:
        return {"targets": [target_list(targets)] * len(mined)}
    if (mined < 0).any():
        raise InputError(
            f"the references of layer {layer!r} were mined without classes; say from which to start: targets="
        )
    return {"targets": [[int(target)] for target in mined]}


def once_each(ask: Callable[[int], ReferenceSamples], size: int) -> ReferenceSamples:
    """Best samples of every concept, each once: one that was mined for several targets counts with its best.

    Parameters
    ----------
    ask : callable
        Gives the best rows of every concept, at most as many as it is asked for.
    size : int
        How many samples, at most.
    """
    n = size
    while True:
        top = ask(n)
        places = [np.sort(np.unique(column, return_index=True)[1]) for column in top.sample.T]
        found = min((len(one) for one in places), default=0)
        if found >= size or len(top.sample) < n:
            break
        n *= 2
    rows = np.array([one[: min(found, size)] for one in places], np.int64).reshape(len(places), -1).T
    return ReferenceSamples(*(np.take_along_axis(column, rows, 0) for column in top))


def _tell_signs(values: Mapping[Any, np.ndarray], best: Mapping[Any, float], layer: str, mode: str) -> None:
    """Warn of concepts, all of a call together, whose values on their references are 0, or are negative everywhere."""
    zero = [key for key, on_references in values.items() if not np.any(on_references)]
    negative = [key for key, value in best.items() if mode == "relevance" and value < 0]
    for keys, what in (
        (zero, "0 on their references, whose order means nothing"),
        (negative, "negative everywhere: their references are those in which they speak least against; "
         "mode='activation' shows where they are most active"),
    ):  # fmt: skip
        if keys:
            which = f"{len(keys)} of {counted(len(values), 'concept')} ({first_few(list(map(str, keys)), 5)})"
            warn(f"the {mode} of {which} of layer {layer!r} is {what}")


def plot_name(plot_fn: Callable[..., Any], content: Sequence[Any]) -> str:
    """Name of a plot function, followed by a digest of the function and of all that its pictures depend on."""
    named: Any = plot_fn
    while isinstance(named, functools.partial):
        named = named.func
    name = getattr(named, "__name__", type(named).__name__)
    return f"{name}-{fingerprint([plot_fn, *content])[:16]}"


class OfConcept(NamedTuple):
    """One concept of a layer."""

    concept: Concept
    concept_id: ConceptId
    layer: str


def heatmaps_of(
    attribution: CondAttribution,
    data: Tensor,
    chosen: OfConcept,
    composite: Composite,
    positions: Sequence[int] | None,
    targets: Sequence[Any] | None,
    batch_size: int,
    device: torch.device | str | None,
) -> Tensor:
    """Heatmaps of a concept on some samples, of shape (samples, *space).

    Of each sample, one position counts, or all of them; and the relevance of its ``targets`` is shown. Without these,
    heatmaps show how active the concept is.
    """
    check_number("batch_size", batch_size, 1, whole=True)
    concept, concept_id, layer = chosen
    by_code = targets is None and starts_by_code(concept)
    keywords: dict[str, Any] = {"on_device": device, "start_layer": layer if targets is None else None}
    conditions: list[dict[str, Any]] = [{}] * len(data)
    if not by_code:
        keywords["mask_map"] = mask_of(concept, "mask" if positions is None else "mask_rf")
        ids = [[concept_id]] * len(data) if positions is None else [{concept_id: at} for at in positions]
        conditions = [{layer: kept} for kept in ids]
    if targets is not None:
        output_name = attribution.MODEL_OUTPUT_NAME
        conditions = [{output_name: classes, **kept} for classes, kept in zip(targets, conditions, strict=True)]
    heatmaps = []
    for i in range(0, len(data), batch_size):
        part = slice(i, i + batch_size)
        if by_code:
            at = None if positions is None else positions[part]
            keywords["init_rel"] = functools.partial(
                initial_relevance_of, concept, concept_id=column(*chosen), positions=at
            )  # fmt: skip
        # From the output, relevance could pass by the concept in a parallel branch.
        found = attribution(
            data[part].detach(), conditions[part], composite, exclude_parallel=targets is not None, **keywords
        )  # fmt: skip
        heatmaps.append(found.heatmap)
    return torch.cat(heatmaps)
