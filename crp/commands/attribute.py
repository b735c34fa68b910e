"""``crp methods``, the table of all methods, and ``crp attribute``, one picture explained."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import click

from crp.commands.errors import LARGEST, CommandError
from crp.commands.group import in_a_line


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


@click.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", required=True, help="Name in torchvision, or package.module:factory.")
@click.option("--weights", help="Of torchvision, such as DEFAULT; they may be downloaded.")
@click.option("--checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="State dict.")
@click.option("--method", default="epsilon_plus_flat", show_default=True, help="See crp methods.")
@click.option("--target", type=int, help="Class to explain; by default, the predicted one.")
@click.option("--layer", help="Layer of the concepts; of a class activation map; or to be explained itself.")
@click.option("--concept", type=int, multiple=True, help="Channel of the layer to explain; may be given again.")
@click.option("--option", "settings", multiple=True, metavar="NAME=VALUE", help="Of the method; may be given again.")
@click.option("--size", type=click.IntRange(1, LARGEST), help="Pixels on a side, where the weights do not say.")
@click.option("--mean", type=float, multiple=True, help="For the normalisation; once for each channel.")
@click.option("--std", type=float, multiple=True, help="As --mean.")
@click.option("--classes", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Names, one per line.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Picture to write.")
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")
def attribute(
    image: Path,
    model: str,
    weights: str | None,
    checkpoint: Path | None,
    method: str,
    target: int | None,
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
    """Explain one picture: input, heatmap, overlay, colours and prediction in one file."""
    import torch

    from crp.commands.panel import draw
    from crp.explain import explain
    from crp.explain import methods as known
    from crp.visualization.models import load_model

    _check_writable(out)
    given = _parsed(settings)
    families = {one.name: one.family for one in known()}
    if concept:
        if layer is None:
            raise CommandError("--concept needs the --layer that it is in")
        given["condition"] = {layer: list(concept)}
    if layer is not None and (not concept or families.get(method) == "cam"):
        given["layer"] = layer
    try:
        loaded = load_model(model, weights, checkpoint, size=size, mean=mean, std=std, classes=classes)
        shown, data = loaded.read(image)
        with torch.no_grad():
            output = loaded.model(data)
        if not isinstance(output, torch.Tensor) or output.dim() != 2:
            raise CommandError(f"the output of {model} is no score of classes")
        heatmap = explain(method, loaded.model, data, int(output[0].argmax()) if target is None else target, **given)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise CommandError(in_a_line(error)) from error
    if heatmap.dim() != 4:
        raise CommandError(f"layer {layer!r} has no positions to draw; its relevance is {tuple(heatmap.shape)}")
    probability = output.softmax(1)[0]
    first = int(probability.argmax())
    index = (first if target is None else target) % len(probability)
    prediction = f"{loaded.class_name(first)} ({probability[first]:.1%})"
    of = "" if index == first else f"explained: {loaded.class_name(index)} ({probability[index]:.1%})"
    # A map of positions is the same for every channel; relevance of channels adds up.
    is_map = method in ("cam", "grad_cam", "grad_cam_pp", "meaningful_perturbation")
    flat = heatmap[0, 0] if is_map else heatmap[0].sum(0)
    through = f" through channels {list(concept)} of {layer}" if concept else f" of {layer}" if layer else ""
    draw(shown, flat, "; ".join(filter(None, (f"predicted: {prediction}", of))), f"{method}{through}", out)
    if as_json:
        shown_classes = {
            name: {"class": i, "name": loaded.class_name(i), "probability": float(probability[i])}
            for name, i in (("predicted", first), ("explained", index))
        }
        click.echo(json.dumps({"image": str(image), "method": method, **shown_classes, "out": str(out)}))
        return
    click.echo(f"{image}: predicted {prediction}{'; ' * bool(of)}{of}\nwrote {out}")


def _check_writable(out: Path) -> None:
    """Make the folder of a picture, and see whether files can be written there."""
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise CommandError(f"--out {out} must end in .png, .jpg, .pdf or .svg")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
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
