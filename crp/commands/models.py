"""A model, its weights, how it takes pictures, and the names of its classes, from words of the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from crp.commands.errors import CommandError, nearest


@dataclass(frozen=True)
class Loaded:
    """A model that is ready for pictures.

    Attributes
    ----------
    model : nn.Module
        In evaluation mode.
    resize : int
        Length of a picture's shorter side; 0 to leave it.
    size : int
        Side of the square that is cut out of the middle; 0 for the whole picture.
    mean, std : tuple of float
        That pictures in 0..1 are normalised with.
    classes : sequence of str
        May be empty.
    """

    model: nn.Module
    resize: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Sequence[str]

    def read(self, path: Path) -> tuple[Tensor, Tensor]:
        """Picture as it is shown, (channels, height, width) in 0..1, and as the model takes it, with a batch axis."""
        from torchvision.transforms import functional as F

        first = next((m for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
        grey = first is not None and first.in_channels == 1
        try:
            with Image.open(path) as file:
                picture = file.convert("L" if grey else "RGB")
        except OSError as error:
            raise CommandError(f"{path} is no picture that can be read: {error}") from error
        if self.resize:
            picture = F.resize(picture, [self.resize], antialias=True)
        if self.size:
            picture = F.center_crop(picture, [self.size])
        image: Tensor = F.to_tensor(picture)
        if not self.mean:
            return image, image[None]
        if len(self.mean) not in (1, len(image)):
            raise CommandError(f"--mean has {len(self.mean)} values for {len(image)} channels")
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return image, ((image - mean) / std)[None]

    def class_name(self, index: int) -> str:
        """Name of a class, or its number."""
        return self.classes[index] if 0 <= index < len(self.classes) else f"class {index}"


def load(
    model: str,
    weights: str | None = None,
    checkpoint: Path | None = None,
    *,
    size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    classes: Path | None = None,
) -> Loaded:
    """Load a model by name.

    Parameters
    ----------
    model : str
        A name of torchvision, such as ``"resnet18"``, or ``"package.module:factory"``, a function without arguments (or
        a model) that is looked for in the working directory too.
    weights : str, optional
        Name in torchvision's enumeration for the model, such as ``"DEFAULT"``; they also say how pictures are prepared
        and what classes are called.
    checkpoint : path, optional
        State dict, by `torch.save` or in safetensors.
    size : int, optional
        Pictures are resized and cut to this many pixels on a side; 224 for torchvision by default.
    mean, std : sequence of float
        For the normalisation, in place of those of the weights.
    classes : path, optional
        Text file with a name per line.

    Raises
    ------
    CommandError
        If anything of this is not there, or does not fit.
    """
    if weights and checkpoint:
        raise CommandError("--weights and --checkpoint are both given; one fills the model")
    if len(mean) != len(std):
        raise CommandError(f"--mean has {len(mean)} values and --std {len(std)}; give as many")
    recipe: Any = None
    names: Sequence[str] = ()
    if ":" in model:
        if weights:
            raise CommandError(f"--weights are those of torchvision's models; fill {model} by --checkpoint")
        net = _made(model)
    else:
        net, chosen = _of_torchvision(model, weights)
        if chosen is not None:
            recipe, names = chosen.transforms(), chosen.meta.get("categories", ())
    if checkpoint:
        _fill(net, checkpoint)
    if classes:
        names = _read_lines(classes)
    default = 0 if ":" in model else 224
    cut = size or (recipe.crop_size[0] if recipe else default)
    resize = recipe.resize_size[0] if recipe and not size else cut
    given = bool(mean)
    return Loaded(
        net.eval(),
        resize,
        cut,
        tuple(mean) if given else tuple(recipe.mean) if recipe else (),
        tuple(std) if given else tuple(recipe.std) if recipe else (),
        names,
    )


def _of_torchvision(name: str, weights: str | None) -> tuple[nn.Module, Any]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise CommandError(
            f"there is no model {name!r} in torchvision{nearest(name, known)}; a model of your own is named "
            "package.module:factory"
        )
    chosen = None
    if weights:
        kinds = models.get_model_weights(name)
        if weights not in kinds.__members__:
            raise CommandError(f"{name} has no weights {weights!r}; it has {', '.join(kinds.__members__)}")
        chosen = kinds[weights]
    try:
        # (without this, GoogLeNet and Inception spend a minute on initial weights)
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") and not weights else {}
        return models.get_model(name, weights=chosen, **options), chosen
    except OSError as error:
        raise CommandError(f"the weights {weights} of {name} cannot be downloaded: {error}") from error


def imported(place: str) -> Any:
    """What ``"pkg.module:name"`` names; the folder of the command is searched, too.

    Raises
    ------
    CommandError
        If there is no such module, or no such name in it.
    """
    module_name, _, name = place.partition(":")
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise CommandError(f"{place}: the module {module_name} cannot be imported: {error}") from error
    finally:
        sys.path.remove("")
    found = getattr(module, name, None)
    if found is None:
        raise CommandError(f"{place}: {module_name} has no {name!r}{nearest(name, dir(module))}")
    return found


def _made(place: str) -> nn.Module:
    factory: Callable[[], Any] | nn.Module = imported(place)
    made = factory if isinstance(factory, nn.Module) else factory()
    if not isinstance(made, nn.Module):
        raise CommandError(f"{place} gives a {type(made).__name__}, not a torch.nn.Module")
    return made


def _fill(net: nn.Module, path: Path) -> None:
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds, for files that are something else
        raise CommandError(f"{path} is no checkpoint that can be read: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise CommandError(f"{path} does not fit the model: {error}") from error


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} cannot be read: {error}") from error
