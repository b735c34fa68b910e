"""Maximized pictures of concepts, kept beside a table for the pages of its atlas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from zennit.core import Composite

from crp.concepts.reading import activation_sums
from crp.errors import InputError
from crp.image.colours import as_picture
from crp.visualization.feature import FeatureVisualization
from crp.visualization.objectives import Objective
from crp.visualization.prepared import Normalized
from crp.visualization.synthesis import SynthesisKeywords, maximize
from crp.visualization.table.derived import keep_result
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
    **settings: Unpack[SynthesisKeywords],
) -> Path:
    """Make up a picture for each of some concepts, in which it is as active as can be, and keep them for ``fv.report``.

    Pictures begin with a little noise. Where `fv` normalises by `Normalized`, they stay within 0..1 before it, and are
    shown as they are; others are shown by their range, unless they are within 0..1.

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
    **settings
        As the attributes of `SynthesisSettings`, such as ``steps=100``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ValueError
        If samples are no pictures, or there is no concept.
    """
    table = Table.open(fv.path)
    ids = table.concept_ids(layer, range(table.n_concepts(layer)) if concept_ids is None else list(concept_ids))
    if not len(ids):
        raise InputError("concept_ids is empty; name at least one concept")
    if fv.texts is not None:
        raise InputError("texts have no maximized pictures")
    like = fv.get_data_sample(int(table.rows().sample[0]))[0].detach()
    if like.dim() != 4:
        raise InputError(f"samples have shape {tuple(like.shape[1:])}; pictures have (channels, height, width)")
    normalized = fv.preprocess_fn if isinstance(fv.preprocess_fn, Normalized) else None
    if normalized is not None and settings.get("bounds") is None:
        settings["bounds"] = normalized(torch.zeros_like(like)), normalized(torch.ones_like(like))
    pictures, scores = [], []
    for begin in range(0, len(ids), batch_size):
        columns = torch.from_numpy(ids[begin : begin + batch_size])
        shape = (len(columns), *like.shape[1:])
        # (each picture has noise of its own seed, so that it is the same in any batch)
        noise = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed + int(c))) for c in columns]
        made = maximize(
            fv.attribution.model,
            _objective(fv.layer_map[layer], layer, columns),
            shape,
            start=_NOISE * torch.stack(noise),
            seed=seed,
            composite=composite,
            verbose=verbose,
            **settings,
        )
        pictures += [_shown(one, normalized) for one in made.images.cpu()]
        scores.append(made.scores[:, -1].cpu().double().numpy())
    arrays = {"concept": ids, "picture": np.stack(pictures), "score": np.concatenate(scores)}
    return keep_result(table, "pictures", layer, arrays, {"seed": seed, "steps": settings.get("steps", 500)})


def _objective(kind: Any, layer: str, columns: Tensor) -> Objective:
    """Activation of one concept for each picture, summed over positions."""

    def value(outputs: Any) -> Tensor:
        sums = activation_sums(kind, outputs[layer], layer)
        return sums.gather(1, columns.to(sums.device)[:, None])[:, 0]

    return Objective(frozenset({layer}), value)


def _shown(image: Tensor, normalized: Normalized | None) -> np.ndarray:
    """Picture of shape (height, width, 3) in bytes."""
    if normalized is not None:
        # (the inverse of x -> (x - mean) / std, by its values at 0 and 1)
        zero, one = (normalized(torch.full_like(image, value)[None])[0] for value in (0.0, 1.0))
        image = ((image - zero) / (one - zero)).clamp(0, 1)
    return np.asarray((as_picture(image) * 255).round(), np.uint8)
