"""``crp methods``, the table of all methods, and ``crp attribute``, one picture explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from crp.commands.errors import CommandError


@click.command("methods")
@click.option("--family", help="Only those of one family, such as cam.")
def methods_command(family: str | None) -> None:
    """List all methods with their options and papers."""
    from crp.explain import methods as known

    families = sorted({method.family for method in known()})
    if family is not None and family not in families:
        raise CommandError(f"there is no family {family!r}; there are {', '.join(families)}")
    chosen = [method for method in known() if family in (None, method.family)]
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
@click.option("--size", type=click.IntRange(min=1), help="Pixels on a side, where the weights do not say.")
@click.option("--mean", type=float, multiple=True, help="For the normalisation; once for each channel.")
@click.option("--std", type=float, multiple=True, help="As --mean.")
@click.option("--classes", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Names, one per line.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Picture to write.")
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
) -> None:
    """Explain one picture: input, heatmap, overlay, colours and prediction in one file."""
    import torch

    from crp.commands.panel import draw
    from crp.explain import explain
    from crp.explain import methods as known
    from crp.visualization.models import load_model

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise CommandError(f"--out {out} must end in .png, .jpg, .pdf or .svg")
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
        raise CommandError(str(error)) from error
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
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(shown, flat, "; ".join(filter(None, (f"predicted: {prediction}", of))), f"{method}{through}", out)
    click.echo(f"{image}: predicted {prediction}{'; ' * bool(of)}{of}\nwrote {out}")


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
