"""Where relevance lies, against what is known of the place, and on how much of the sample.

All of them take heatmaps, one for each sample, whatever method they are by. Ground truth is a mask of the pixels (or
tokens, or steps) that should be relevant; `crp.audit.context.inside_boxes` makes masks of boxes. Where several places
are equally relevant, a metric is the mean over their orders, and a heatmap that has no relevance to place has NaN.

Pointing game: Zhang et al., "Top-Down Neural Attention by Excitation Backprop", IJCV 126 (2018). Mass and rank: Arras
et al., "CLEVR-XAI", Information Fusion 81 (2022). Gini index: Chalasani et al., "Concise Explanations of Neural
Networks using Adversarial Training", ICML (2020). Entropy: Bhatt et al., "Evaluating and Aggregating Feature-based
Model Explanations", IJCAI (2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crp.errors import InputError, InputTypeError
from crp.values import check_form


def pointing_game(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Whether the most relevant place lies inside of the mask.

    Parameters
    ----------
    heatmaps : Tensor of shape (samples, *space)
    masks : bool Tensor of shape (samples, *space) or (*space)

    Returns
    -------
    Tensor of shape (samples,)
        1 or 0, and a share where several places are the most relevant ones; NaN where no relevance is positive.

    Examples
    --------
    >>> heatmaps = torch.tensor([[0.0, 3, 1], [2, 0, 2]])
    >>> pointing_game(heatmaps, torch.tensor([False, True, True]))
    tensor([1.0000, 0.5000])
    """
    heat, inside = _checked(heatmaps, masks)
    strongest = heat == heat.amax(1, keepdim=True)
    return _ratio((strongest & inside).to(heat).sum(1), strongest.sum(1), (heat > 0).any(1))


def relevance_mass(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive relevance that lies inside of the mask.

    Parameters
    ----------
    heatmaps : Tensor of shape (samples, *space)
    masks : bool Tensor of shape (samples, *space) or (*space)

    Returns
    -------
    Tensor of shape (samples,)
        NaN where no relevance is positive.

    Examples
    --------
    >>> relevance_mass(torch.tensor([[-5.0, 3, 1]]), torch.tensor([True, True, False]))
    tensor([0.7500])
    """
    heat, inside = _checked(heatmaps, masks)
    positive = heat.clamp(min=0)
    return _ratio((positive * inside).sum(1), positive.sum(1), (heat > 0).any(1))


def relevance_rank(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Share of the K most relevant places that lie inside of the mask, which has K places.

    Parameters
    ----------
    heatmaps : Tensor of shape (samples, *space)
    masks : bool Tensor of shape (samples, *space) or (*space)

    Returns
    -------
    Tensor of shape (samples,)
        NaN where all relevance is the same.

    Examples
    --------
    >>> relevance_rank(torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([True, False, True, False]))
    tensor([0.5000])
    """
    heat, inside = _checked(heatmaps, masks)
    size = inside.sum(1, keepdim=True)
    last = heat.sort(1, descending=True).values.gather(1, size - 1)
    above, equal = heat > last, heat == last
    # (of the places that are as relevant as the last one, as many as there is room for)
    room = (size - above.sum(1, keepdim=True)).to(heat) / equal.sum(1, keepdim=True)
    hits = ((above + equal * room) * inside).sum(1)
    return _ratio(hits, size[:, 0], heat.amax(1) > heat.amin(1))


def sparseness(heatmaps: Tensor) -> Tensor:
    """Gini index of absolute relevance: 0 where it is the same everywhere, 1 - 1 / places where it is in one place.

    Parameters
    ----------
    heatmaps : Tensor of shape (samples, *space)

    Returns
    -------
    Tensor of shape (samples,)
        NaN where all relevance is 0.

    Examples
    --------
    >>> sparseness(torch.tensor([[1.0, -1, 1, 1], [0, 4, 0, 0]]))
    tensor([0.0000, 0.7500])
    """
    sizes = _flat(heatmaps).abs().sort(1).values
    n = sizes.shape[1]
    weight = 2 * torch.arange(1, n + 1, device=sizes.device, dtype=sizes.dtype) - n - 1
    return _ratio((weight * sizes).sum(1), n * sizes.sum(1), sizes[:, -1] > 0)


def complexity(heatmaps: Tensor) -> Tensor:
    """Entropy of absolute relevance, in nats: 0 where it is in one place, log(places) where it is the same everywhere.

    Parameters
    ----------
    heatmaps : Tensor of shape (samples, *space)

    Returns
    -------
    Tensor of shape (samples,)
        NaN where all relevance is 0.

    Examples
    --------
    >>> complexity(torch.tensor([[1.0, -1], [0, 4]]))
    tensor([0.6931, 0.0000])
    """
    sizes = _flat(heatmaps).abs()
    shares = _ratio(sizes, sizes.sum(1, keepdim=True), sizes.sum(1, keepdim=True) > 0)
    entropy: Tensor = torch.special.entr(shares).sum(1)
    return entropy


def _ratio(part: Tensor, whole: Tensor, known: Tensor) -> Tensor:
    """Quotient, and NaN where it is not known."""
    return torch.where(known, part / torch.where(known, whole, 1), torch.nan)


def _flat(heatmaps: Tensor) -> Tensor:
    """Heatmaps that are checked, of shape (samples, places), each divided by its largest value."""
    if not isinstance(heatmaps, Tensor) or heatmaps.is_complex():
        raise InputTypeError(f"heatmaps must be a tensor of real numbers, not {heatmaps!r:.60}")
    if heatmaps.dim() < 2 or not heatmaps.numel():
        raise InputError(f"heatmaps must be of shape (samples, *space), not {tuple(heatmaps.shape)}")
    check_form(heatmaps, "heatmaps")
    flat = heatmaps.detach().flatten(1).to(torch.promote_types(heatmaps.dtype, torch.float32))
    if not flat.isfinite().all():
        wrong = (~flat.isfinite().all(1)).nonzero().flatten().tolist()
        raise InputError(f"heatmaps are NaN or infinite for samples {wrong}")
    largest = flat.abs().amax(1, keepdim=True)
    return flat / torch.where(largest > 0, largest, 1)


def _checked(heatmaps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Heatmaps and masks that are checked, each of shape (samples, places)."""
    flat = _flat(heatmaps)
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        raise InputTypeError(f"masks must be a tensor of bool, such as values > 0, not {masks!r:.60}")
    if masks.shape not in (heatmaps.shape, heatmaps.shape[1:]):
        raise InputError(
            f"masks are of shape {tuple(masks.shape)}, and heatmaps of {tuple(heatmaps.shape)}; both must have the "
            "same places, so that relevance is summed over channels first, as in heatmaps.sum(1)"
        )
    inside = masks.to(flat.device).expand(heatmaps.shape).flatten(1)
    if empty := (~inside.any(1)).nonzero().flatten().tolist():
        raise InputError(f"the masks of samples {empty} are empty, so that no relevance can lie in them")
    return flat, inside
