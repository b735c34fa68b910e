"""What to explain of a dense output: pixels, elements, tokens of a text; scores of segmentations and of boxes.

`Pixels`, `Element` and `Position` are for ``"y"`` in conditions, `entry`, `segmentation` and `detection` are for
``CondAttribution(model, output=...)``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crp.checks import check_choice
from crp.errors import InputError, InputTypeError, NameNotFoundError, OutOfRangeError, StateError
from crp.kinds import check_kind
from crp.notices import kind_of


class Element(tuple[int, ...]):
    """One element of an output of shape (batch, *output shape), as a target: ``{"y": [Element((3, 10, 12))]}``.

    A plain tuple in a list of targets means the same.
    """


@dataclass(frozen=True, eq=False)
class Pixels:
    """Pixels of one class of an output of shape (batch, classes, *space), as a target: ``{"y": [Pixels(3, mask)]}``.

    Attributes
    ----------
    of_class : int
    mask : array or Tensor of shape (*space), bool
        Pixels that relevance starts from.
    """

    of_class: int
    mask: Any


@dataclass(frozen=True)
class Position:
    """Tokens at one position of a text, as a target: ``{"y": Position(-1, token)}``, or a list of these.

    Of an output of shape (batch, positions, vocabulary), the logits of language models; several tokens are summed.

    Attributes
    ----------
    position : int
        Negative ones count from the end of the output, padding included.
    token : int or sequence of int
        Ids of the tokens whose logits are explained.
    against : int or sequence of int
        Ids of tokens whose logits are taken off: why the one and not the other.

    Examples
    --------
    >>> Position(-1, 7, against=3).signed()
    [((-1, 7), 1), ((-1, 3), -1)]
    """

    position: int
    token: int | Sequence[int]
    against: int | Sequence[int] = ()

    def check(self, what: str) -> None:
        """Raise an error that begins with ``what`` unless all are whole numbers, and each token is named once."""
        whole = all(isinstance(ids, int | list | tuple) for ids in (self.token, self.against))
        places = [place for place, _ in self.signed()] if whole else []
        if not places or not all(isinstance(n, int) and not isinstance(n, bool) for place in places for n in place):
            raise InputTypeError(
                f"{what} must have Position(position, token) with ints, or lists of them, not {self!r}"
            )
        if len(set(places)) < len(places):
            raise InputError(f"{what} names a token twice in {self}; explain it once, and against others only")

    def signed(self) -> list[tuple[tuple[int, int], int]]:
        """Places in the output, each with its sign."""
        tokens, others = ([ids] if isinstance(ids, int) else ids for ids in (self.token, self.against))
        return [((self.position, one), 1) for one in tokens] + [((self.position, one), -1) for one in others]


def entry(key: str | int) -> Callable[[Any], Tensor]:
    """One of several tensors that a model returns: under a name, as an attribute, or at a place.

    Parameters
    ----------
    key : str or int
        Key of a dict, or name of an attribute; of a tuple or list, the place.

    Returns
    -------
    callable
        For ``CondAttribution(model, output=entry("scores"))``.

    Examples
    --------
    >>> entry("scores")({"scores": torch.tensor([[1.0, 2.0]]), "boxes": torch.zeros(1, 4)})
    tensor([[1., 2.]])
    """
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise InputTypeError(f"key must be a name, or a place in a tuple, not {key!r}")

    def scores(returned: Any) -> Tensor:
        if not isinstance(returned, list | tuple) or isinstance(key, str):
            found: Tensor = _entry(returned, key)
        elif -len(returned) <= key < len(returned):
            found = returned[key]
        else:
            raise OutOfRangeError(f"the model returns {len(returned)} values, and there is none at {key}")
        return found

    return scores


def segmentation(
    key: str | None = "out", where: Literal["own", "all"] = "own", positive: bool = True
) -> Callable[[Any], Tensor]:
    """Score of every class of a segmentation, (batch, classes), so that ``{"y": class}`` means it.

    The score of a class is the sum of its logits over pixels, by default over those that are predicted to be of this
    class, and of positive logits: relevance starts at each of these pixels with its logit. Dreyer et al., "Revealing
    Hidden Context Bias in Segmentation and Object Detection through Concept-specific Explanations", CVPR Workshops
    (2023), section 3.

    Parameters
    ----------
    key : str, optional
        Name of the logits, of shape (batch, classes, *space), in what the model returns; None if it returns them.
    where : {"own", "all"}
        Pixels where no other class has a larger logit, or all.
    positive : bool
        Whether negative logits are left out.

    Returns
    -------
    callable
        For ``CondAttribution(model, output=segmentation())``.

    Examples
    --------
    >>> logits = torch.tensor([[[[1.0, -1.0, 2.0]], [[0.0, 3.0, 4.0]]]])
    >>> segmentation(key=None)(logits)
    tensor([[1., 7.]])
    >>> segmentation(key=None, where="all")(logits)
    tensor([[3., 7.]])
    """
    check_choice("where", where, Literal["own", "all"])
    if not isinstance(positive, bool) or not isinstance(key, str | None):
        raise InputTypeError(f"positive must be True or False, not {positive!r}; and key a name or None, not {key!r}")

    def scores(returned: Any) -> Tensor:
        logits = returned if key is None else _entry(returned, key)
        if not isinstance(logits, Tensor) or logits.dim() < 3:
            raise InputTypeError(f"a segmentation has logits of shape (batch, classes, *space), not {kind_of(logits)}")
        kept = torch.ones_like(logits, dtype=torch.bool)
        if where == "own":
            kept = logits.detach() == logits.detach().amax(1, keepdim=True)
        if positive:
            kept = kept & (logits.detach() > 0)
        return torch.where(kept, logits, 0).flatten(2).sum(2)

    scores.exclusive = False  # type: ignore[attr-defined]  # (classes do not exclude each other: no softmax)
    return scores


def detection(
    score: Literal["logit", "log-odds"] = "logit", box: int | Literal["best", "all"] = "best"
) -> Callable[[Any], Tensor | list[Tensor]]:
    """Scores of what a detector has found in each sample, before softmax or sigmoid.

    A probability saturates: at a score of 1 its gradient is 0, and so are heatmaps. Its logit has no such end. Dreyer
    et al., "Revealing Hidden Context Bias in Segmentation and Object Detection through Concept-specific Explanations",
    CVPR Workshops (2023), section 3.

    Parameters
    ----------
    score : {"logit", "log-odds"}
        Logits, or the logarithm of the odds of a class against all others, for classes that exclude each other. Where
        they do not, as behind a sigmoid, the logit is that already.
    box : int or {"best", "all"}
        Box whose scores are explained, as the detector numbers them; ``"best"``: for each class the box where it has
        the largest score, so that ``{"y": class}`` means the class; ``"all"``: every box, and targets are
        ``Element((box, class))``.

    Returns
    -------
    callable
        For ``CondAttribution(model, output=detection())``. Its result is of shape (samples, classes), or of ``"all"``
        boxes a list with a tensor of shape (boxes, classes) for each sample.

        It reads ``"logits"`` of each sample's detections, of shape (boxes, classes), and ``"exclusive"``, whether
        classes exclude each other: `with_logits` adds both to detectors of torchvision. With ``"n_classes"``, logits
        beyond are of no object, and no classes. Of models that return an object with ``logits`` of shape (samples,
        boxes, classes), it reads these.

    Examples
    --------
    >>> found = [{"logits": torch.tensor([[0.0, 3.0, 1.0], [0.0, 2.0, 5.0]])}]
    >>> detection()(found)
    tensor([[0., 3., 5.]])
    >>> detection(box=1)(found)
    tensor([[0., 2., 5.]])
    """
    check_choice("score", score, Literal["logit", "log-odds"])
    if isinstance(box, bool) or not (isinstance(box, int) or (isinstance(box, str) and box in ("best", "all"))):
        raise InputError(f"box must be 'best', 'all' or the number of a box, not {box!r}")

    def of_sample(sample: int, logits: Tensor, exclusive: bool, n_classes: int | None) -> Tensor:
        values = (_log_odds(logits) if score == "log-odds" and exclusive else logits)[:, :n_classes]
        if box == "all":
            return values
        if not len(values) or (isinstance(box, int) and not -len(values) <= box < len(values)):
            named = "a box" if box == "best" else f"box {box}"
            raise OutOfRangeError(f"{named} is to be explained, but {len(values)} boxes are found in sample {sample}")
        return values.max(0).values if box == "best" else values[box]

    def scores(returned: Any) -> Tensor | list[Tensor]:
        found = [of_sample(i, *pair) for i, pair in enumerate(_logits_in(returned))]
        return found if box == "all" else torch.stack(found)

    scores.exclusive = False  # type: ignore[attr-defined]  # (classes do not exclude each other: no softmax)
    return scores


def with_logits(detector: nn.Module) -> nn.Module:
    """Detector whose detections have ``"logits"`` beside boxes, labels and scores, for `detection`.

    Parameters
    ----------
    detector : nn.Module
        Faster, Mask or Keypoint R-CNN, RetinaNet, FCOS or SSD of torchvision.

    Returns
    -------
    nn.Module
        It shares all layers, under their names, with the detector, which stays as it is. In evaluation mode, each of
        its dicts has ``"logits"``, of shape (boxes, classes), of the anchors or proposals that became boxes, and
        ``"exclusive"``.

    Raises
    ------
    TypeError
        If it is another model.
    """
    from torchvision.models import detection as detectors
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.models.detection.roi_heads import RoIHeads

    check_kind("detector", detector, nn.Module, "a detector of torchvision")
    found: Any = _shallow(detector)
    if isinstance(detector, GeneralizedRCNN) and isinstance(detector.roi_heads, RoIHeads):
        found.roi_heads = _shallow(detector.roi_heads)
        found.roi_heads.forward = _Regions(found.roi_heads)
    elif isinstance(detector, detectors.RetinaNet | detectors.FCOS | detectors.ssd.SSD):
        found.postprocess_detections = _Anchors(found, isinstance(detector, detectors.ssd.SSD))
    else:
        raise InputTypeError(
            f"a detector of torchvision is needed: R-CNN, RetinaNet, FCOS or SSD, not {type(detector).__name__}; let "
            "yours return a dict with 'logits' for each sample, of shape (boxes, classes)"
        )
    checked: nn.Module = found
    return checked


class _Regions:
    """Forward pass of heads of regions, whose detections get their logits."""

    def __init__(self, heads: Any) -> None:
        self.heads = heads

    def __call__(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        heads: Any = _shallow(self.heads)
        kept: list[Tensor] = []

        def postprocess(logits: Tensor, regression: Tensor, regions: list[Tensor], shapes: Any) -> Any:
            found = type(heads).postprocess_detections(heads, logits, regression, regions, shapes)
            with torch.no_grad():
                sizes = [len(of_image) for of_image in regions]
                boxes = torch.split(heads.box_coder.decode(regression.detach(), regions), sizes)
                scores = torch.split(logits.detach().softmax(-1), sizes)
            parts = zip(zip(*found, strict=True), torch.split(logits, sizes), boxes, scores, shapes, strict=True)
            kept.extend(of_image[_places(*one, *candidates)] for one, of_image, *candidates in parts)
            return found

        heads.postprocess_detections = postprocess
        result, losses = type(heads).forward(heads, features, proposals, image_shapes, targets)
        for one, logits in zip(result, kept, strict=False):
            one |= {"logits": logits, "exclusive": True}
        return result, losses


class _Anchors:
    """What a detector with anchors makes of its heads' outputs: detections, which get their logits."""

    def __init__(self, detector: Any, exclusive: bool) -> None:
        self.detector, self.exclusive = detector, exclusive

    def __call__(self, outputs: dict[str, Any], anchors: Any, image_shapes: Any) -> list[dict[str, Any]]:
        detector = self.detector
        found = type(detector).postprocess_detections(detector, outputs, anchors, image_shapes)
        decode = getattr(detector.box_coder, "decode_single", detector.box_coder.decode)

        def of_image(image: int, name: str) -> Tensor:
            values = outputs[name]
            return values[image] if isinstance(values, Tensor) else torch.cat([level[image] for level in values])

        for image, (one, shape) in enumerate(zip(found, image_shapes, strict=True)):
            logits = of_image(image, "cls_logits")
            with torch.no_grad():
                known = anchors[image]
                known = known if isinstance(known, Tensor) else torch.cat(list(known))
                boxes = decode(of_image(image, "bbox_regression").detach(), known)[:, None]
                scores = logits.detach().softmax(-1) if self.exclusive else logits.detach().sigmoid()
                if "bbox_ctrness" in outputs:
                    scores = (scores * of_image(image, "bbox_ctrness").detach().sigmoid()).sqrt()
            places = _places(one["boxes"], one["scores"], one["labels"], boxes, scores, shape)
            one |= {"logits": logits[places], "exclusive": self.exclusive}
        return list(found)


def _places(
    boxes: Tensor, scores: Tensor, labels: Tensor, all_boxes: Tensor, all_scores: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Which anchor or proposal became each detection: the one with its box, of (anchors, 1 or classes, 4), and score.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    height, width = shape
    with torch.no_grad():
        limits = torch.tensor([width, height, width, height]).to(all_boxes)
        clipped = torch.minimum(all_boxes.clamp_min(0), limits)
        places = []
        for box, score, label in zip(boxes.detach(), scores.detach(), labels.tolist(), strict=True):
            of_label = clipped[:, label if clipped.shape[1] > 1 else 0]
            off = (of_label - box).abs().amax(1) / limits.max() + (all_scores[:, label] - score).abs()
            least = off.min(0)
            if not least.values <= 1e-3:
                raise StateError(f"the box {box.tolist()} of class {label} is that of no anchor or proposal")
            places.append(least.indices)
        return torch.stack(places) if places else torch.zeros(0, dtype=torch.long, device=boxes.device)


def _shallow(module: nn.Module) -> nn.Module:
    """Copy of a module that shares its layers, but not which layers and hooks it has."""
    made = copy.copy(module)
    vars(made).update({name: copy.copy(value) for name, value in vars(made).items() if isinstance(value, dict)})
    return made


def _log_odds(logits: Tensor) -> Tensor:
    """Logarithm of the odds of each class against all others, of shape (..., classes)."""
    own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    others = logits[..., None, :].expand(*logits.shape, logits.shape[-1]).masked_fill(own, -torch.inf)
    return logits - others.logsumexp(-1)


def _logits_in(returned: Any) -> list[tuple[Tensor, bool, int | None]]:
    """Logits of each sample's boxes, whether its classes exclude each other, and how many there are (None for all)."""
    if isinstance(returned, list | tuple) and all(isinstance(one, Mapping) for one in returned):
        for one in returned:
            if "logits" not in one:
                raise NameNotFoundError(
                    f"the detections have {sorted(map(str, one))}, and no 'logits'; explain "
                    "crp.outputs.with_logits(model), for detectors of torchvision"
                )
        return [(one["logits"], bool(one.get("exclusive", True)), one.get("n_classes")) for one in returned]
    logits = returned if isinstance(returned, Tensor) else _entry(returned, "logits")
    if logits.dim() != 3:
        raise InputTypeError(f"a detection has logits of shape (samples, boxes, classes), not {tuple(logits.shape)}")
    return [(of_sample, True, None) for of_sample in logits]


def _entry(returned: Any, key: str | int) -> Any:
    if isinstance(returned, Mapping):
        if key not in returned:
            raise NameNotFoundError(
                f"the model returns {sorted(map(str, returned))}, and not {key!r}; name the logits: key="
            )
        return returned[key]
    if isinstance(key, int) or not hasattr(returned, key):
        raise InputTypeError(
            f"the model returns {kind_of(returned)}, which has no {key!r}; name the logits, or give key=None "
            "if it returns them themselves"
        )
    return getattr(returned, key)
