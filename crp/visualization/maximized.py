"""Maximized pictures of concepts, kept beside a table for the pages of its atlas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from zennit.core import Composite

from crp.checks import check_number
from crp.concepts import as_ids
from crp.concepts.reading import activation_sums
from crp.engine.door import check_seed
from crp.errors import InputError
from crp.flags import check_flags
from crp.image.colours import as_picture
from crp.notices import warn
from crp.visualization.feature import FeatureVisualization, table_of
from crp.visualization.mining.recipe import in_words
from crp.visualization.objectives import Objective
from crp.visualization.samples import SampleAccess, function_of
from crp.visualization.synthesis import SynthesisKeywords, SynthesisSettings, maximize
from crp.visualization.table.derived import keep_result, read_kept
from crp.visualization.table.fingerprint import fingerprint
from crp.visualization.table.manifest import TableMismatchError, TableNotFoundError
from crp.visualization.table.store import Table

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Standard deviation of the noise that is begun with.
_NOISE = 0.1


def keep_maximized(
    fv: FeatureVisualization,
    layer: str,
    concept_ids: Sequence[int] | None = None,
    *,
    seed: int = 0,
    composite: Composite | None = None,
    batch_size: int = 16,
    verbose: bool = False,
    add: bool = False,
    **settings: Unpack[SynthesisKeywords],
) -> Path:
    """Make up a picture for each of some concepts, in which it is as active as can be, and keep them for ``fv.report``.

    Pictures begin with a little noise. Where `fv` prepares samples by a mean and a standard deviation of each channel,
    pictures stay within 0..1 before it, and are shown as they are; others are shown by their range, unless they are
    within 0..1.

    Parameters
    ----------
    fv : FeatureVisualization
        Of pictures, after a run.
    layer : str
    concept_ids : sequence of int, optional
        All of the layer by default.
    seed : int
        Of the noise and of the jitter.
    composite : zennit Composite, optional
        Changes the gradients that are followed, as in `maximize`.
    batch_size : int
        Pictures at once.
    verbose : bool
        Whether to show progress bars.
    add : bool
        Whether pictures of the layer that are kept already stay, if they were made in the same way, and only those that
        are missing are made. They are kept batch after batch, so that an interrupted call can go on.
    **settings
        As the attributes of `SynthesisSettings`, such as ``steps=100``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    TableMismatchError
        If another model or dataset was mined.
    ValueError
        If samples are no pictures, or there is no concept.
    """
    check_flags(verbose=verbose, add=add)
    table = table_of(fv, layer)
    every = range(table.n_concepts(layer))
    ids = table.concept_ids(layer, every if concept_ids is None else as_ids(concept_ids, layer)).tolist()
    if not ids:
        raise InputError("concept_ids is empty; name at least one concept")
    if fv.texts is not None:
        raise InputError("texts have no maximized pictures")
    check_seed(seed)
    check_number("batch_size", batch_size, 1, whole=True)
    fv._lookup(layer, table.modes[0], (0, 1))  # refuses another model, dataset or preparation
    like = fv.get_data_sample(int(table.rows().sample[0]))[0].detach()
    if like.dim() != 4:
        raise InputError(f"samples have shape {tuple(like.shape[1:])}; pictures have (channels, height, width)")
    about = {
        "seed": seed,
        "steps": settings.get("steps", SynthesisSettings.steps),
        "settings": fingerprint([dict(settings), composite]),
    }
    ends = _ends_of_range(fv)
    if ends is not None and settings.get("bounds") is None:
        settings["bounds"] = ends
    kept = _kept_before(table, layer, about) if add else {}
    wanted = list(dict.fromkeys(c for c in ids if c not in kept))
    for begin in range(0, len(wanted), batch_size):
        columns = wanted[begin : begin + batch_size]
        # (each picture has noise of its own seed, so that it is the same in any batch)
        noise = [
            torch.randn(like.shape[1:], generator=torch.Generator().manual_seed((seed + c) % 2**63)) for c in columns
        ]
        made = maximize(
            fv.attribution.model,
            _objective(fv.layer_map[layer], layer, torch.tensor(columns)),
            (len(columns), *like.shape[1:]),
            start=_NOISE * torch.stack(noise),
            seed=seed,
            composite=composite,
            verbose=verbose,
            desc=f"Pictures {begin + 1} to {begin + len(columns)} of {len(wanted)}, {layer}",
            **settings,
        )
        pictures = [_shown(one, ends) for one in made.images.cpu()]
        scores = made.scores[:, -1].cpu().double().tolist()
        kept |= {c: pair for c, *pair in zip(columns, pictures, scores, strict=True)}
        if add:
            _keep(table, layer, list(kept), kept, about)
    return _keep(table, layer, list(kept) if add else ids, kept, about)


def _ends_of_range(fv: FeatureVisualization) -> tuple[Tensor, Tensor] | None:
    """What black and white pictures are prepared to, where each value is only scaled and shifted; None otherwise.

    Returns
    -------
    (Tensor, Tensor) or None
        Of shape (1, channels, height, width).
    """
    shown = fv.get_data_sample(int(table_of(fv).rows().sample[0]), preprocessing=False)[0].detach()
    if not _prepares(fv) or not shown.is_floating_point():
        return None
    grey = torch.linspace(0, 1, shown.numel(), dtype=shown.dtype, device=shown.device).view_as(shown)
    black, white, between = (fv.preprocess_data(one) for one in (torch.zeros_like(shown), torch.ones_like(shown), grey))
    alike = black.shape == white.shape == between.shape == shown.shape and bool((white > black).all())
    if not alike or not torch.allclose(between, black + grey * (white - black), rtol=1e-4, atol=1e-5):
        return None
    return black.detach(), white.detach()


def check_can_be_shown(fv: FeatureVisualization, n: int) -> None:
    """Refuse to make up ``n`` pictures where the preparation of samples cannot be undone: they could not be shown.

    Raises
    ------
    ValueError
        If samples are texts, or are prepared by more than a scale and a shift of each value.
    """
    if n == 0:
        return
    if fv.texts is not None:
        raise InputError("n_maximized (--maximize): texts have no maximized pictures; leave it out")
    if _prepares(fv) and _ends_of_range(fv) is None:
        raise InputError(
            f"n_maximized (--maximize): what {in_words(fv.preprocess_fn)} does to samples is no scale and shift of "
            "each value, and cannot be undone, so that a picture made up for the model cannot be shown as samples are; "
            "crp.visualization.keep_maximized keeps such pictures by their range"
        )


def _prepares(fv: FeatureVisualization) -> bool:
    return callable(fv.preprocess_fn) or function_of(fv.preprocess_data) is not SampleAccess.preprocess_data


def _kept_before(table: Table, layer: str, about: Mapping[str, Any]) -> dict[int, Any]:
    """Pictures and scores of a layer that were made in the same way, of the table as it is."""
    try:
        found = read_kept(table, "pictures", layer)
    except (TableNotFoundError, TableMismatchError):
        return {}
    if found.settings != about:
        was = ", ".join(f"{name}={found.settings.get(name)}" for name in ("seed", "steps"))
        warn(f"the pictures that are kept of layer {layer!r} were made in another way ({was}), and are replaced")
        return {}
    columns = (found.arrays[name] for name in ("concept", "picture", "score"))
    return {int(concept): [picture, float(score)] for concept, picture, score in zip(*columns, strict=True)}


def _keep(table: Table, layer: str, ids: Sequence[int], kept: Mapping[int, Any], about: Mapping[str, Any]) -> Path:
    arrays = {
        "concept": np.asarray(ids, np.int64),
        "picture": np.stack([kept[c][0] for c in ids]),
        "score": np.asarray([kept[c][1] for c in ids]),
    }
    return keep_result(table, "pictures", layer, arrays, about)


def _objective(kind: Any, layer: str, columns: Tensor) -> Objective:
    """Activation of one concept for each picture, summed over positions."""

    def value(outputs: Any) -> Tensor:
        sums = activation_sums(kind, outputs[layer], layer)
        return sums.gather(1, columns.to(sums.device)[:, None])[:, 0]

    return Objective(frozenset({layer}), value)


def _shown(image: Tensor, ends: tuple[Tensor, Tensor] | None) -> np.ndarray:
    """Picture of shape (height, width, 3) in bytes."""
    if ends is not None:
        black, white = (end[0].cpu() for end in ends)
        image = ((image - black) / (white - black)).clamp(0, 1)
    return np.asarray((as_picture(image) * 255).round(), np.uint8)
