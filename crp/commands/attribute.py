"""``crp methods``, the table of all methods, and ``crp attribute``, pictures explained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import click

from crp.commands.errors import LARGEST, CommandError
from crp.commands.group import in_a_line

if TYPE_CHECKING:
    from crp.visualization.models import Loaded


@click.command("methods")
@click.option("--family", help="Only those of one family, such as cam.")
@click.option("--json", "as_json", is_flag=True, help="For machines: a list of JSON objects.")
def methods_command(family: str | None, as_json: bool) -> None:
    """List all methods with their options and papers."""
    from crp.explain import methods as known

    families = sorted({method.family for method in known()})
    if family is not None and family not in families:
        raise CommandError(f"there is no family {family!r}; there are {', '.join(families)}")
    chosen = [method for method in known() if family in (None, method.family)]
    if as_json:
        rows = [{"name": m.name, "family": m.family, "paper": m.paper, "options": _options(m.options)} for m in chosen]
        click.echo(json.dumps(rows))
        return
    for name in families:
        of_family = [method for method in chosen if method.family == name]
        if of_family:
            click.echo(f"\n{name}" if name != families[0] and family is None else name)
        for method in of_family:
            click.echo(f"  {method.name:32} {method.paper}")
            click.echo(click.wrap_text(_options(method.options), 100, "      ", "      "))


_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


@click.command()
@click.argument("images", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", required=True, help="Name in torchvision, timm:NAME, hf:NAME, or package.module:factory.")
@click.option("--weights", help="Of torchvision, such as DEFAULT; they may be downloaded.")
@click.option("--checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="State dict.")
@click.option("--method", default="epsilon_plus_flat", show_default=True, help="See crp methods.")
@click.option("--target", help="Class, by number or name, or token, by its text or #NUMBER; else the predicted one.")
@click.option("--text", "texts", multiple=True, help="Explain a text, and no picture; may be given again.")
@click.option("--tokenizer", help="Of texts: a folder or name for Hugging Face, or package.module:factory.")
@click.option(
    "--position", help="Of a language model: the token whose next one is explained; -1, the last, by default."
)
@click.option("--against", help="Of a language model: a token in whose place the target is explained.")
@click.option("--layer", help="Layer of the concepts; of a class activation map; or to be explained itself.")
@click.option("--concept", type=int, multiple=True, help="Channel of the layer to explain; may be given again.")
@click.option("--option", "settings", multiple=True, metavar="NAME=VALUE", help="Of the method; may be given again.")
@click.option("--size", type=click.IntRange(1, LARGEST), help="Pixels on a side, where the weights do not say.")
@click.option("--mean", type=float, multiple=True, help="For the normalisation; once for each channel.")
@click.option("--std", type=float, multiple=True, help="As --mean.")
@click.option("--classes", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Names, one per line.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Picture to write; of several, a folder.")
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object for each picture, on a line.")
def attribute(
    images: tuple[Path, ...],
    model: str,
    weights: str | None,
    checkpoint: Path | None,
    method: str,
    target: str | None,
    texts: tuple[str, ...],
    tokenizer: str | None,
    position: str | None,
    against: str | None,
    layer: str | None,
    concept: tuple[int, ...],
    settings: tuple[str, ...],
    size: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Explain pictures: input, heatmap, overlay, colours and prediction of each in one file. Or texts, in one page.

    crp attribute cat.jpg dog.jpg --model timm:resnet18 --out explained/

    crp attribute --text 'The capital of France is' --target ' Paris' --model hf:gpt2 --method attn_lrp --out why.html
    """
    from crp.commands.texts import Asking, explain_texts
    from crp.explain import find_method
    from crp.visualization.models import load_model

    if bool(images) == bool(texts) or (images and (tokenizer or position or against)):
        raise CommandError("give pictures, or --text, of which --tokenizer, --position and --against are")
    if texts:
        asking = Asking(tokenizer or model.partition("hf:")[2], position or "-1", target, against, layer, concept)
        _check_writable(out.parent, out)
        loaded = _loaded(model, weights, checkpoint, classes)
        for line in explain_texts(texts, loaded, method, asking, _parsed(settings), out, as_json):
            click.echo(line)
        return
    places = _places(images, out)
    for place in places:
        if any(place.resolve() == image.resolve() for image in images):
            raise CommandError(f"{place} is explained, and would be overwritten; give --out another name or folder")
    for folder in {place.parent for place in places}:
        _check_writable(folder, out)
    given = _parsed(settings)
    if concept:
        if layer is None:
            raise CommandError("--concept needs the --layer that it is in")
        given["condition"] = {layer: list(concept)}
    try:
        chosen = find_method(method)
        if layer is not None and (not concept or chosen.family == "cam"):
            given["layer"] = layer
        loaded = load_model(model, weights, checkpoint, size=size, mean=mean, std=std, classes=classes)
        index = None if target is None else loaded.find_class(target)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise CommandError(in_a_line(error)) from error
    through = f" through channels {list(concept)} of {layer}" if concept else f" of {layer}" if layer else ""
    for image, place in zip(images, places, strict=True):
        said, facts = _explain(image, place, loaded, chosen.name, index, given, f"{chosen.name}{through}")
        click.echo(json.dumps(facts) if as_json else f"{image}: {said}\nwrote {place}")


def _loaded(model: str, weights: str | None, checkpoint: Path | None, classes: Path | None) -> Loaded:
    from crp.visualization.models import load_model

    try:
        return load_model(model, weights, checkpoint, classes=classes)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise CommandError(in_a_line(error)) from error


def _places(images: Sequence[Path], out: Path) -> list[Path]:
    """Where the explanation of each picture is written."""
    if len(images) == 1 and out.suffix.lower() in _SUFFIXES:
        return [out]
    if len(images) == 1 and not out.is_dir():
        raise CommandError(f"--out {out} must end in .png, .jpg, .pdf or .svg")
    if out.suffix.lower() in _SUFFIXES:
        raise CommandError(f"--out {out} is one picture, and {len(images)} are explained; name a folder")
    names = [image.stem for image in images]
    return [
        out / (f"{name}.png" if names.count(name) == 1 else f"{name}-{number}.png") for number, name in enumerate(names)
    ]


def _explain(
    image: Path, place: Path, loaded: Loaded, method: str, target: int | None, given: dict[str, Any], caption: str
) -> tuple[str, dict[str, Any]]:
    """Explain one picture, and tell what the model says of it, in words and as data."""
    import torch

    from crp.commands.panel import draw
    from crp.engine.probabilities import probabilities
    from crp.explain import explain

    try:
        shown, data = loaded.read(image)
        with torch.no_grad():
            output = loaded.model(data)
        if not isinstance(output, torch.Tensor) or output.dim() != 2:
            raise CommandError("the output of the model is no score of classes")
        heatmap = explain(method, loaded.model, data, int(output[0].argmax()) if target is None else target, **given)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise CommandError(in_a_line(error)) from error
    if heatmap.dim() != 4:
        raise CommandError(
            f"layer {given.get('layer')!r} has no positions to draw; its relevance is {tuple(heatmap.shape)}"
        )
    probability = probabilities(output)[0]
    first = int(probability.argmax())
    index = (first if target is None else target) % len(probability)
    said = f"predicted {loaded.class_name(first)} ({probability[first]:.1%})"
    of = "" if index == first else f"; explained: {loaded.class_name(index)} ({probability[index]:.1%})"
    # A map of positions is the same for every channel; relevance of channels adds up.
    is_map = method in ("cam", "grad_cam", "grad_cam_pp", "meaningful_perturbation")
    flat = heatmap[0, 0] if is_map else heatmap[0].sum(0)
    draw(shown, flat, f"{said}{of}".replace("predicted ", "predicted: ", 1), caption, place)
    classes = {
        name: {"class": i, "name": loaded.class_name(i), "probability": float(probability[i])}
        for name, i in (("predicted", first), ("explained", index))
    }
    return f"{said}{of}", {"image": str(image), "method": method, **classes, "out": str(place)}


def _check_writable(folder: Path, out: Path) -> None:
    """Make the folder of a picture, and see whether files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"--out {out} cannot be written: {error.strerror or error}") from error


def _parsed(settings: tuple[str, ...]) -> dict[str, Any]:
    """Options of the method; a value is JSON, or else a word, and a list is a tuple."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise CommandError(f"--option {setting!r} must be NAME=VALUE, such as steps=50")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        found[name] = tuple(parsed) if isinstance(parsed, list) else parsed
    return found


def _options(options: dict[str, Any]) -> str:
    """Options as one line, those that must be given first."""
    words = [f"{name} (required)" for name, default in options.items() if default is ...]
    for name, default in options.items():
        if default is not ...:
            word = getattr(default, "__qualname__", None)
            words.append(f"{name}={word or (default if isinstance(default, str) else repr(default))}")
    return ", ".join(words)
