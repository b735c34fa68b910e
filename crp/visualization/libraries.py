"""Models of timm and Hugging Face by name, with the preparation and the class names of their training."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from crp.errors import LoadingError
from crp.layers import nearest

#: Words before the colon of a model's name.
PREFIXES = ("timm", "hf")


class Found(NamedTuple):
    """A model, and how it takes pictures; models that read texts, and those of users, have none of these.

    Attributes
    ----------
    model : nn.Module
    resize, size : int
        Length of the shorter side, and side of the square in the middle.
    mean, std : tuple of float
    classes : sequence of str
        May be empty.
    interpolation : torchvision.transforms.InterpolationMode, optional
        Of the resizing.
    """

    model: nn.Module
    resize: int = 0
    size: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: Sequence[str] = ()
    interpolation: Any = None


class Logits(nn.Module):
    """Model of Hugging Face as a function of pictures that gives a tensor of scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores of classes."""
        scores: Tensor = self.model(pixel_values=pixels, return_dict=True).logits
        return scores


class _Segmented(Logits):
    """Segmentation of Hugging Face that gives ``{"out": logits}``, as those of torchvision do."""

    def forward(self, pixels: Tensor) -> Any:
        """Logits of shape (samples, classes, height, width), mostly coarser than the pictures."""
        return {"out": super().forward(pixels)}


class _Detected(Logits):
    """Detector of Hugging Face that gives a dict for each sample, as those of torchvision with their logits do."""

    def forward(self, pixels: Tensor) -> Any:
        """``"boxes"`` (middle and size, as shares of the picture), and ``"logits"`` of all that are looked for.

        A model with one logit more than it has classes weighs them against no object by a softmax; others have a
        sigmoid for each class.
        """
        model: Any = self.model
        found = model(pixel_values=pixels, return_dict=True)
        n = int(model.config.num_labels)
        about = {"exclusive": found.logits.shape[-1] > n, "n_classes": n}
        pairs = zip(found.pred_boxes, found.logits, strict=True)
        return [about | {"boxes": boxes, "logits": logits} for boxes, logits in pairs]


#: Ends of the names of a model of pictures, the class of transformers that loads it, and how its scores are given.
_OF_PICTURES: dict[str, tuple[str, type[Logits]]] = {
    "ForImageClassification": ("AutoModelForImageClassification", Logits),
    "ForSemanticSegmentation": ("AutoModelForSemanticSegmentation", _Segmented),
    "ForObjectDetection": ("AutoModelForObjectDetection", _Detected),
}


def find_in_library(name: str, *, pretrained: bool, n_classes: int | None = None) -> Found:
    """Model by ``"timm:name"`` or ``"hf:name"``.

    Parameters
    ----------
    name : str
    pretrained : bool
        Whether its weights are loaded; they may be downloaded.
    n_classes : int, optional
        Number of outputs of a model of timm, in place of its own.

    Raises
    ------
    LoadingError
        If the library is not installed, has no such model, or the weights cannot be had.
    """
    prefix, _, rest = name.partition(":")
    try:
        return _of_timm(rest, pretrained, n_classes) if prefix == "timm" else _of_hugging_face(rest, pretrained)
    except ImportError as error:
        package = {"timm": "timm", "hf": "transformers"}[prefix]
        raise LoadingError(f"{name} needs {package} ({error}): python -m pip install {package}") from error
    except LoadingError:
        raise
    except Exception as error:  # each library has its own, for unknown names and failed downloads
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadingError(f"{name} cannot be loaded: {lines[0]}") from error


def _of_timm(name: str, pretrained: bool, n_classes: int | None = None) -> Found:
    timm: Any = importlib.import_module("timm")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise LoadingError(f"there is no model {name!r} in timm{nearest(architecture, timm.list_models())}")
    model = timm.create_model(name, pretrained=pretrained, **({} if n_classes is None else {"num_classes": n_classes}))
    data: Any = importlib.import_module("timm.data")
    config = data.resolve_model_data_config(model)
    size = int(config["input_size"][-1])
    resize = round(size / float(config.get("crop_pct") or 1))
    names: Sequence[str] = model.pretrained_cfg.get("label_names") or ()
    subset = data.infer_imagenet_subset(model)
    if not names and subset and int(model.pretrained_cfg.get("num_classes") or 0) == model.num_classes:
        info = data.ImageNetInfo(subset)
        names = [info.index_to_description(index) for index in range(info.num_classes())]
    return Found(model, resize, size, tuple(config["mean"]), tuple(config["std"]), names)


def _of_hugging_face(name: str, pretrained: bool) -> Found:
    library: Any = importlib.import_module("transformers")
    config = library.AutoConfig.from_pretrained(name)
    if (auto := _reads_texts(config)) is not None:
        of_texts = getattr(library, auto)
        model = of_texts.from_pretrained(name) if pretrained else of_texts.from_config(config)
        is_classifier = auto.endswith("SequenceClassification")
        return Found(model, classes=_names_of(config) if is_classifier else ())
    task, scored = _task_of(name, config)
    kind = getattr(library, task)
    model = kind.from_pretrained(name) if pretrained else kind.from_config(config)
    processor = library.AutoImageProcessor.from_pretrained(name)
    crop, size = _side(getattr(processor, "crop_size", None)), _side(processor.size)
    normal = getattr(processor, "do_normalize", True)
    mean, std = (tuple(processor.image_mean), tuple(processor.image_std)) if normal else ((), ())
    # (of segmentation and detection, pictures are not cut)
    return Found(scored(model), size, (crop or size) if scored is Logits else 0, mean, std, _names_of(config))


def _task_of(name: str, config: Any) -> tuple[str, type[Logits]]:
    """Class of transformers that makes a model of pictures, by what its configuration says it was, and its scores."""
    known = [str(one) for one in getattr(config, "architectures", None) or ()]
    for word, task in _OF_PICTURES.items():
        if not known or any(word in one for one in known):
            return task
    raise LoadingError(
        f"{name} was made as {known[0]}, and would have a part with random weights; models of Hugging Face end in "
        f"{', '.join(_OF_PICTURES)}, ForSequenceClassification, ForCausalLM or LMHeadModel. Others are loaded by a "
        "function of yours, package.module:factory"
    )


def _reads_texts(config: Any) -> str | None:
    """Class of transformers that makes a model of texts, by what its configuration says it was; None for pictures."""
    known = getattr(config, "architectures", None) or ()
    if any(name.endswith("ForSequenceClassification") for name in known):
        return "AutoModelForSequenceClassification"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in known):
        return "AutoModelForCausalLM"
    return None


def _names_of(config: Any) -> Sequence[str]:
    labels = config.id2label
    return [str(labels[index]) for index in sorted(labels)] if labels else ()


def _side(size: Any) -> int:
    """Pixels on a side, from a number or from words such as ``{"shortest_edge": 224}``."""
    if size is None or isinstance(size, int):
        return size or 0
    return int(next(size[key] for key in ("shortest_edge", "height", "longest_edge") if key in size))
