"""A model, its weights, how it takes pictures, and the names of its classes, from words."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from crp.engine.forward import tensor_in
from crp.errors import CRPError, InputError, InputTypeError, LoadingError
from crp.layers import nearest
from crp.layers.misfits import takes_decoder_ids, telling_misfits
from crp.notices import kind_of
from crp.visualization.checkpoints import _in_a_line, fill, n_classes_of, read_checkpoint
from crp.visualization.libraries import PREFIXES, Found, find_in_library
from crp.visualization.prepared import Normalized, Prepared
from crp.wording import counted

#: Errors of Pillow about a file that is no picture, or a damaged one.
NOT_READ = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready for pictures.

    Attributes
    ----------
    model : nn.Module
        In evaluation mode.
    prepared : Prepared
        Makes a picture a tensor in 0..1, as it is shown.
    normalized : Normalized, optional
        Makes such tensors what the model takes.
    classes : sequence of str
        May be empty.
    output : callable, optional
        Takes what is explained from what the model returns.
    names_file : path, optional
        Where the names of the classes are from, if they are not the model's own.
    """

    model: nn.Module
    prepared: Prepared
    normalized: Normalized | None
    classes: Sequence[str]
    output: Callable[[Any], Any] | None = None
    names_file: Path | None = None

    @property
    def exclusive(self) -> bool:
        """Whether a softmax of the scores is a probability of classes."""
        return bool(getattr(self.output, "exclusive", True))

    def check_takes(self, data: Tensor) -> None:
        """Raise a `LoadingError` where the model computes in another dtype than that of samples."""
        of_model = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        if of_model and data.is_floating_point() and data.dtype not in of_model:
            raise LoadingError(
                f"{type(self.model).__name__} computes in {next(iter(of_model))}, and samples are {data.dtype}; load "
                "the model in that, such as by model.float()"
            )

    def run(self, data: Tensor) -> Any:
        """What the model returns for samples; a `LoadingError` where it cannot take them."""
        self.check_takes(data)
        try:
            with torch.no_grad(), telling_misfits(self.model, [data], {0: data}):
                return self.model(data)
        except Exception as error:  # (of any kind, as a model may raise any)
            told = f"{type(self.model).__name__} cannot take samples of shape {tuple(data.shape)}: {_in_a_line(error)}"
            hint = "texts are given by --text, or by --data and --tokenizer"
            hint = hint if self.reads_tokens else "--size says how large pictures are"
            raise LoadingError(f"{error if isinstance(error, InputError) else told}; {hint}") from error

    def scores(self, data: Tensor) -> Tensor:
        """Score of every class for each sample, of shape (samples, classes).

        Raises
        ------
        LoadingError
            If what is explained has another shape, or is no real numbers.
        """
        found = select_scores(self.run(data), self.output)
        if found.dim() != 2 or len(found) != len(data):
            raise LoadingError(
                f"what the model returns has shape {tuple(found.shape)}, and is no score of classes, of shape "
                f"({len(data)}, classes); --output says what is explained of it, such as segmentation or detection"
            )
        if not found.is_floating_point() or not found.shape[1]:
            raise LoadingError(
                f"scores of classes must be real numbers, not {found.dtype} of shape {tuple(found.shape)}; --output "
                "says what is explained of what the model returns"
            )
        self.check_names(found.shape[1])
        return found

    def check_names(self, n_outputs: int) -> None:
        """Raise a `LoadingError` where a file names more or fewer classes than the model has outputs."""
        if self.names_file is not None and len(self.classes) != n_outputs:
            raise LoadingError(
                f"--classes {self.names_file} names {counted(len(self.classes), 'class', 'classes')}, and the model "
                f"has {counted(n_outputs, 'output')}"
            )

    def read(self, path: Path) -> tuple[Tensor, Tensor]:
        """Picture as it is shown, (channels, height, width) in 0..1, and as the model takes it, with a batch axis."""
        try:
            with Image.open(path) as file:
                image: Tensor = self.prepared(file)
        except NOT_READ as error:
            raise LoadingError(f"{path} is no picture that can be read: {error}") from error
        try:
            return image, image[None] if self.normalized is None else self.normalized(image[None])
        except ValueError as error:
            raise LoadingError(str(error)) from error

    @property
    def reads_tokens(self) -> bool:
        """Whether the model takes numbers of tokens: it looks numbers up, and has no convolution over pictures."""
        kinds = list(map(type, self.model.modules()))
        return any(issubclass(kind, nn.Embedding) for kind in kinds) and nn.Conv2d not in kinds

    def check_main_input(self) -> None:
        """Raise a `LoadingError` where a model of Hugging Face says that it takes other samples, such as waves."""
        taken = getattr(self.model, "main_input_name", "pixel_values")
        if taken not in ("pixel_values", "input_ids"):
            raise LoadingError(f"{type(self.model).__name__} takes {taken!r}, and neither pictures nor ids of tokens")

    def example(self) -> Tensor | dict[str, Tensor]:
        """A grey picture or a short text as the model takes it, for asking what shapes its layers give."""
        self.check_main_input()
        if self.reads_tokens:
            ids = torch.ones(1, 5, dtype=torch.long)
            return {"input_ids": ids, "decoder_input_ids": ids} if takes_decoder_ids(self.model) else ids
        side = self.prepared.size or self.prepared.resize or 224
        image = torch.full((1, 1 if self.prepared.mode == "L" else 3, side, side), 0.5)
        return image if self.normalized is None else self.normalized(image)

    def class_name(self, index: int) -> str:
        """Name of a class, or its number."""
        return self.classes[index] if 0 <= index < len(self.classes) else f"class {index}"


def load_model(
    model: str,
    weights: str | None = None,
    checkpoint: Path | None = None,
    *,
    size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    classes: Path | None = None,
    output: Callable[[Any], Any] | None = None,
) -> Loaded:
    """Load a model by name.

    Parameters
    ----------
    model : str
        A name of torchvision, such as ``"resnet18"``; ``"timm:..."``, ``"hf:..."`` or ``"torchvision:..."``, whose
        weights are loaded unless a checkpoint is given; or ``"package.module:factory"``, a function without arguments
        (or a model) that is looked for in the working directory too.
    weights : str, optional
        Name in torchvision's enumeration for the model, such as ``"DEFAULT"``; they also say how pictures are prepared
        and what classes are called.
    checkpoint : path, optional
        State dict, by `torch.save` or in safetensors. A model of torchvision or timm is made for the number of classes
        that it was trained on.
    size : int, optional
        Pictures are resized and cut to this many pixels on a side; 224 for torchvision by default.
    mean, std : sequence of float
        For the normalisation, in place of those of the weights.
    classes : path, optional
        Text file with a name per line.
    output : callable, optional
        Takes what is explained from what the model returns. Detectors of torchvision then return the logits of their
        boxes, too.

    Raises
    ------
    LoadingError
        If anything of this is not there, or does not fit.
    """
    loaded = _loaded(model, weights, _Wanted(checkpoint, size, mean, std, classes))
    if output is None:
        return loaded
    with suppress(InputTypeError):  # (where it is no detector of torchvision)
        return replace(loaded, model=imported("crp.outputs:with_logits")(loaded.model), output=output)
    return replace(loaded, output=output)


class _Wanted(NamedTuple):
    """What is asked for in place of what a model, or its weights, say; as for `load_model`."""

    checkpoint: Path | None
    size: int | None
    mean: Sequence[float]
    std: Sequence[float]
    classes: Path | None

    def check(self) -> None:
        """Raise a `LoadingError` where the normalisation is none."""
        if not all(value > 0 and isfinite(value) for value in self.std) or not all(map(isfinite, self.mean)):
            raise LoadingError(
                f"--mean {list(self.mean)} and --std {list(self.std)} must be finite numbers, --std more than 0"
            )
        if len(self.mean) != len(self.std):
            raise LoadingError(f"--mean has {len(self.mean)} values and --std {len(self.std)}; give as many")


def _loaded(model: str, weights: str | None, wanted: _Wanted) -> Loaded:
    if weights and wanted.checkpoint:
        raise LoadingError("--weights and --checkpoint are both given; one fills the model")
    wanted.check()
    found = _find(model, weights, wanted.checkpoint)
    if wanted.checkpoint:
        fill(found.model, wanted.checkpoint)
    names = _read_lines(wanted.classes) if wanted.classes else found.classes
    mean, std = (wanted.mean, wanted.std) if wanted.mean else (found.mean, found.std)
    resize, size = (wanted.size, wanted.size) if wanted.size else (found.resize, found.size)
    prepared = Prepared(_mode(found.model), resize, size, found.interpolation)
    normalized = Normalized(mean, std) if mean else None
    return Loaded(found.model.eval(), prepared, normalized, names, names_file=wanted.classes)


def _find(model: str, weights: str | None, checkpoint: Path | None) -> Found:
    """Model by name, with as many classes as a checkpoint of torchvision or timm was trained on."""
    prefix, colon, rest = model.partition(":")
    if prefix == "torchvision":
        make = partial(_of_torchvision, rest, weights if weights or checkpoint else "DEFAULT")
    elif not colon:
        make = partial(_of_torchvision, model, weights)
    elif weights:
        what = f"the name of {model} says which they are" if prefix in PREFIXES else f"fill {model} by --checkpoint"
        raise LoadingError(f"--weights are those of torchvision's models; {what}")
    elif prefix in PREFIXES:
        make = partial(find_in_library, model, pretrained=checkpoint is None)
    else:
        return Found(_made(model))
    found = make()
    n_classes = n_classes_of(read_checkpoint(checkpoint), found.model) if checkpoint and prefix != "hf" else None
    return found if n_classes is None else make(n_classes=n_classes)


def _mode(net: nn.Module) -> str:
    """What pictures are converted to: what the first convolution takes."""
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    return "L" if first is not None and first.in_channels == 1 else "RGB"


def select_scores(returned: Any, output: Callable[[Any], Any] | None) -> Tensor:
    """Scores in what a model returns: what ``output`` takes from it, or else itself or its ``logits``."""
    try:
        found = tensor_in(returned) if output is None else output(returned)
    except CRPError:
        raise
    except Exception as error:  # (of any kind, as the function is the user's own)
        name = getattr(output, "__qualname__", repr(output))
        raise LoadingError(
            f"--output: {name} raised {type(error).__name__} on what the model returned, {kind_of(returned)}: "
            f"{_in_a_line(error)}"
        ) from error
    if not isinstance(found, Tensor):
        raise InputTypeError(f"--output must take a tensor from what the model returns, not {kind_of(found)}")
    return found


def _of_torchvision(name: str, weights: str | None, n_classes: int | None = None) -> Found:
    from torchvision import models

    dense = [*models.list_models(module=models.segmentation), *models.list_models(module=models.detection)]
    known = [*models.list_models(module=models), *dense]
    if name not in known:
        raise LoadingError(
            f"there is no model {name!r} in torchvision{nearest(name, known)}; a model of your own is named "
            "package.module:factory"
        )
    if not weights:
        # (without this, GoogLeNet and Inception spend a minute on initial weights)
        options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        options |= {"weights_backbone": None} if name in dense else {}
        options |= {} if n_classes is None else {"num_classes": n_classes}
        side = 0 if name in dense else 224  # (of segmentation and detection, pictures are not cut)
        return Found(models.get_model(name, weights=None, **options), side, side)
    kinds = models.get_model_weights(name)
    if weights not in kinds.__members__:
        raise LoadingError(f"{name} has no weights {weights!r}; it has {', '.join(kinds.__members__)}")
    chosen: Any = kinds[weights]
    try:
        net = models.get_model(name, weights=chosen)
    except OSError as error:
        raise LoadingError(f"the weights {weights} of {name} cannot be downloaded: {error}") from error
    recipe, classes = chosen.transforms(), chosen.meta.get("categories", ())
    resize, size = (int((getattr(recipe, side, None) or [0])[0]) for side in ("resize_size", "crop_size"))
    mean, std = (tuple(getattr(recipe, name, ())) for name in ("mean", "std"))
    return Found(net, resize, size, mean, std, classes, getattr(recipe, "interpolation", None))


def imported(place: str) -> Any:
    """What ``"pkg.module:name"`` names; the folder of the command is searched, too.

    Raises
    ------
    LoadingError
        If there is no such module, or no such name in it.
    """
    module_name, _, name = place.partition(":")
    if not module_name or not name or not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise LoadingError(f"{place!r} must be package.module:name, such as my_models:make_net")
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # (of any kind, as the module runs)
        is_missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name))
        why = _in_a_line(error) + "; modules are looked for in the working directory and in PYTHONPATH" * is_missing
        raise LoadingError(f"{place}: the module {module_name} cannot be imported: {why}") from error
    finally:
        sys.path.remove("")
    if (found := getattr(module, name, None)) is None:
        raise LoadingError(f"{place}: {module_name} has no {name!r}{nearest(name, dir(module))}")
    return found


def _made(place: str) -> nn.Module:
    factory: Callable[[], Any] | nn.Module = imported(place)
    made = factory if isinstance(factory, nn.Module) else called(factory, place)
    if not isinstance(made, nn.Module):
        raise LoadingError(f"{place} gives {kind_of(made)}, not a torch.nn.Module")
    return made


def called(factory: Callable[[], Any], place: str) -> Any:
    """What a function of the user's gives; its errors are told of with its name."""
    try:
        return factory()
    except Exception as error:
        what = f"{type(error).__name__}: {_in_a_line(error)}"
        raise LoadingError(f"{place}() raised an error, {what} (--debug shows where)") from error


def _read_lines(path: Path) -> list[str]:
    """Names, one per line, without the blanks and the byte-order mark that editors leave around them."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise LoadingError(f"{path} cannot be read: {error}") from error
    if "" in names:
        raise LoadingError(f"{path}: line {names.index('') + 1} is blank; every class has a name in a line of its own")
    return names


def check_repeatable(place: str, model: nn.Module) -> None:
    """Refuse a function of the user's whose model has other weights at every call.

    Nothing that is mined with such a model can be shown or continued later.

    Raises
    ------
    LoadingError
        If calling it again gives other weights.
    """
    if isinstance(imported(place), nn.Module):
        return
    again = _made(place).state_dict()
    for name, value in model.state_dict().items():
        if not (name in again and value.shape == again[name].shape and torch.equal(value, again[name])):
            raise LoadingError(
                f"{place}() makes a model with other weights at every call ({name}), so that pages cannot be drawn of "
                "what is mined: let it load its weights, or give --checkpoint"
            )


def find_class(name: str, classes: Sequence[str], option: str = "") -> int:
    """Class by its name or its number; a `LoadingError`, which begins with an option, names the nearest."""
    found = _classes_called(name, classes)
    if not found and name.removeprefix("-").isdecimal():
        return int(name)
    if len(found) != 1:
        unnamed = "; classes have no names: give its number, or give --classes with the model"
        why = f"; it is the name of the classes {', '.join(map(str, found))}" if found else nearest(name, classes)
        raise LoadingError(f"{option} {name!r} is no class{why if classes else unnamed}".lstrip())
    return found[0]


def _classes_called(name: str, classes: Sequence[str]) -> list[int]:
    """Classes of a name; in any case, where none is spelt alike."""
    exact = [index for index, one in enumerate(classes) if one == name]
    return exact or [index for index, one in enumerate(classes) if one.casefold() == name.strip().casefold()]
