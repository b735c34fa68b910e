"""``crp methods``, the table of all methods, and ``crp attribute``, pictures explained."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from crp.commands.errors import FIGURES, CommandError
from crp.commands.loading import _has_random_weights, _load, _picture_options, _weight_options
from crp.commands.page import FoundConcepts, PageConcepts, concepts_of_picture
from crp.commands.values import _plain, _read_settings, _values_of
from crp.errors import LoadingError
from crp.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from crp.visualization.models import Loaded


@click.command("methods")
@click.option("--family", help="Only those of one family, such as cam.")
@click.option("--json", "as_json", is_flag=True, help="For machines: a list of JSON objects.")
def methods_command(family: str | None, as_json: bool) -> None:
    """List all methods with their options and papers."""
    from crp.attributors.explaining import methods as known

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


#: Names that are no options of a method in a command, and what says it instead.
_SAID = {
    "method": "give --method",
    "model": "give --model",
    "data": "give a picture",
    "target": "give --target",
    "output": "give --output",
    "neuron": "a class is explained",
    "explain": "the picture is explained",
}
_PAGE = ".html"
#: Classes of a prediction that a page lists.
_CLASSES = 5


class _Picture(click.Path):
    """File of a picture; who types a text in its place is told of ``--text``."""

    def fail(self, message: str, *about: Any) -> NoReturn:
        """Refuse what is no file."""
        super().fail(f"{message} Texts are given by --text.", *about)


@click.command()
@click.argument("images", nargs=-1, type=_Picture(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", required=True, help="Name in torchvision, timm:NAME, hf:NAME, or package.module:factory.")
@_weight_options
@click.option("--method", default="epsilon_plus_flat", show_default=True, help="See crp methods.")
@click.option("--target", help="Class, by name or number, or token, by its text or #NUMBER; else the predicted one.")
@click.option("--text", "texts", multiple=True, help="Explain a text, and no picture; may be given again.")
@click.option("--tokenizer", help="Of texts: a folder or name for Hugging Face, or package.module:factory.")
@click.option(
    "--position", help="Of a language model: the token whose next one is explained; -1, the last, by default."
)
@click.option("--against", help="Of a language model: a token in whose place the target is explained.")
@click.option(
    "--scale-without-first", is_flag=True, help="Of texts: the strongest colour is of a token behind the first."
)
@click.option("--output", help="What is explained of what the model returns; segmentation, for example. See below.")
@click.option("--layer", help="Layer of the concepts; of a class activation map; or to be explained itself.")
@click.option(
    "--concept", type=int, multiple=True, help="Channel of --layer to explain; -1 is the last. May be given again."
)
@click.option("--option", "settings", multiple=True, metavar="NAME=VALUE", help="Of the method; may be given again.")
@_picture_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write; of several, a folder.")
@click.option(
    "--page", is_flag=True, help="Write a page (.html) with the concepts of --layer, the last suggested by default."
)
@click.option("--graph", multiple=True, help="Of a page: a layer below --layer, in its graph; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object for each picture, on a line.")
def attribute(
    images: tuple[Path, ...],
    model: str,
    method: str,
    target: str | None,
    texts: tuple[str, ...],
    tokenizer: str | None,
    position: str | None,
    against: str | None,
    output: str | None,
    layer: str | None,
    concept: tuple[int, ...],
    settings: tuple[str, ...],
    out: Path,
    page: bool,
    graph: tuple[str, ...],
    as_json: bool,
    **loading: Any,
) -> None:
    """Explain pictures or texts. Of each picture, a file shows input, heatmap, overlay, colours and prediction.

    crp attribute cat.jpg dog.jpg --model timm:resnet18 --out explained/

    crp attribute cat.jpg --model timm:resnet18 --page --out why.html

    crp attribute --text 'The capital of France is' --target ' Paris' --model hf:gpt2 --method attn_lrp --out why.html

    crp attribute street.jpg --model torchvision:fcn_resnet50 --output segmentation --target car --out car.png

    --output takes the scores of classes from what a model returns: segmentation (:where=all, :key=NAME) or detection
    (:box=0, :score=log-odds), as in crp.outputs; entry:key=NAME, of a dict; or package.module:function.
    """
    from crp.attributors.explaining import find_method
    from crp.commands.texts import Asking, explain_texts
    from crp.visualization.models import find_class

    page, rescaled = page or out.suffix.lower() == _PAGE, loading.pop("scale_without_first")
    _check_options(images, texts, page, out)
    if texts:
        names = tokenizer or model.partition("hf:")[2], position, target, against, layer, concept
        asking = Asking(*names, rescaled)
        _check_writable(out.parent, out)
        loaded = _load(model, output, **loading)
        given = _method_options(settings, () if layer is None else ("layer", "condition", "mask_map"), False)
        for line in explain_texts(texts, loaded, method, asking, given, out, as_json):
            click.echo(line)
        return
    places = _places(images, out, page)
    chosen = find_method(method)
    shown = PageConcepts(layer, concept, graph) if page else None
    through: dict[str, Any] = {"condition": {layer: list(concept)}} if concept and not page else {}
    if layer is not None and (chosen.family == "cam" or not (concept or page)):
        through["layer"] = layer
    given = _method_options(settings, through, page and chosen.family != "cam") | through
    loaded = _load_named(model, output, layer, graph, loading)
    given |= {} if loaded.output is None else {"output": loaded.output}
    index = None if target is None else find_class(target, loaded.classes, "--target")
    where = f" through channels {list(concept)} of {layer}" if concept else f" of {layer}" if layer else ""
    caption = chosen.name if page else f"{chosen.name}{where}"
    unread = []
    for image, place in zip(images, places, strict=True):
        try:
            pair = loaded.read(image)
        except LoadingError as error:
            unread.append(str(error))
            continue
        said, facts = _explain(image, pair, place, loaded, chosen.name, index, given, caption, shown)
        click.echo(json.dumps(facts) if as_json else f"{image}: {_plain(said)}\nwrote {place}")
    if loaded.normalized is None and not as_json and len(unread) < len(images):
        click.echo("pictures were not normalised, in 0..1 (--mean and --std do it, where the training did)")
    if unread:
        raise CommandError(f"{len(unread)} of {counted(len(images), 'picture')} left out: {'; '.join(unread)}")


def _load_named(
    model: str, output: str | None, layer: str | None, graph: Sequence[str], loading: dict[str, Any]
) -> Loaded:
    """Model in which the layers that are named must be; random weights are told."""
    from crp.engine.taps import check_layers

    loaded = _load(model, output, **loading)
    check_layers(loaded.model, [] if layer is None else [layer], "--layer")
    check_layers(loaded.model, graph, "--graph")
    if _has_random_weights(model, loading["weights"], loading["checkpoint"]):
        click.echo(f"{model} has random weights, which say nothing; give --weights or --checkpoint", err=True)
    return loaded


def _check_options(images: Sequence[Path], texts: Sequence[str], page: bool, out: Path) -> None:
    """Refuse options of texts with pictures, those of pictures with texts, and those without what they are about."""
    context = click.get_current_context()
    typed = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if bool(images) == bool(texts) or (images and typed & {"tokenizer", "position", "against", "scale_without_first"}):
        raise CommandError(
            "give pictures, or --text, of which --tokenizer, --position, --against and --scale-without-first are"
        )
    if texts and (wrong := [f"--{name}" for name in ("size", "mean", "std", "graph") if name in typed]):
        raise CommandError(f"{' and '.join(wrong)}: for pictures alone, and --text is given")
    if texts and page and out.suffix.lower() != _PAGE:
        raise CommandError(f"--out {out} must end in .html for a page of texts")
    if context.params["concept"] and context.params["layer"] is None:
        raise CommandError("--concept needs the --layer that it is in")
    if context.params["graph"] and not page:
        raise CommandError("--graph is for --page, which draws it")


def _method_options(settings: Sequence[str], meant: Collection[str], page: bool) -> dict[str, Any]:
    """Options of the method by --option, in which a list is a tuple; what --layer and --concept mean is said once."""
    found = _read_settings(settings, "--option", "NAME=VALUE, such as steps=50")
    for name in found:
        if name in _SAID:
            raise CommandError(f"--option {name} is no option of a method; {_SAID[name]}")
        if name in meant:
            raise CommandError(f"--option {name} and --layer, or --concept, say both what is explained; give one")
        if page and name in ("layer", "condition", "mask_map"):
            raise CommandError(f"--option {name}: a page shows the concepts of --layer; give that, and --concept")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _places(images: Sequence[Path], out: Path, page: bool) -> list[Path]:
    """Where the explanation of each picture is written: over none of the pictures, and where files can be written."""
    places = _named_places(images, out, page)
    for place in places:
        if any(place.resolve() == image.resolve() for image in images):
            raise CommandError(f"{place} is explained, and would be overwritten; give --out another name or folder")
    for folder in {place.parent for place in places}:
        _check_writable(folder, out)
    return places


def _named_places(images: Sequence[Path], out: Path, page: bool) -> list[Path]:
    suffixes, suffix = ((_PAGE,), _PAGE) if page else (FIGURES, ".png")
    if len(images) == 1 and out.suffix.lower() in suffixes:
        return [out]
    if len(images) == 1 and not out.is_dir():
        ends = ".html for a page" if page else ".png, .jpg, .pdf or .svg, or .html for a page"
        raise CommandError(f"--out {out} must end in {ends}")
    if out.suffix.lower() in suffixes:
        raise CommandError(f"--out {out} is one file, and {len(images)} pictures are explained; name a folder")
    names = [image.stem for image in images]
    if len({name.casefold() for name in names}) < len(names):  # (a and A are one file on some disks)
        names = [f"{name}-{number}" for number, name in enumerate(names)]
    return [out / f"{name}{suffix}" for name in names]


def _explain(
    image: Path,
    read: tuple[Tensor, Tensor],
    place: Path,
    loaded: Loaded,
    method: str,
    target: int | None,
    given: dict[str, Any],
    caption: str,
    on_page: PageConcepts | None,
) -> tuple[str, dict[str, Any]]:
    """Explain one picture, given as it is shown and as the model takes it, and tell what the model says of it."""
    from crp.attributors.explaining import explain, find_method
    from crp.commands.panel import draw
    from crp.visualization.report.explained import ExplainedPicture, write_explained

    shown, data = read
    scores = loaded.scores(data)[0]
    aim = int(scores.argmax()) if target is None else target
    given, windows = _completed(method, given, loaded, data)
    caption += windows
    heatmap = explain(method, loaded.model, data, aim, **given)
    found = FoundConcepts()
    if on_page is not None:
        found = concepts_of_picture(on_page, method, loaded, data, aim % len(scores), given)
    if heatmap.dim() != 4:
        raise CommandError(
            f"layer {given.get('layer')!r} has no positions to draw; its relevance is {tuple(heatmap.shape)}"
        )
    said, of, classes, chances = _prediction(loaded, scores, aim % len(scores))
    # A map of positions is the same for every channel; relevance, and shares of a window, add up.
    is_map = find_method(method).family in ("cam", "perturbation") and not given.get("per_feature")
    flat = heatmap[0, 0] if is_map and (heatmap == heatmap[:, :1]).all() else heatmap[0].sum(0)
    if on_page is None:
        draw(shown, flat, f"{said}{of}".replace("predicted ", "predicted: ", 1), caption, place)
    else:
        sentence = f"{said}{of}".replace("predicted ", "Predicted ", 1)
        names = classes["explained"]["name"], chances, sentence, caption, type(loaded.model).__name__
        write_explained(ExplainedPicture(image.name, shown, flat, *names, *found), place)
    facts: dict[str, Any] = {"image": str(image), "method": method, **classes, "out": str(place)}
    if on_page is not None:
        parts = [{"concept": int(one.label), "share": one.share} for one in found.concepts]
        facts |= {"layer": found.layer, "concepts": parts, "graph": found.as_data()}
    return f"{said}{of}", facts


def _prediction(
    loaded: Loaded, scores: Tensor, index: int
) -> tuple[str, str, dict[str, dict[str, Any]], list[tuple[str, float]]]:
    """Predicted and explained class in words, both as data, and the most probable ones."""
    values, what, words = _values_of(scores, loaded.exclusive)
    first = int(values.argmax())

    def in_words(i: int) -> str:
        return f"{loaded.class_name(i)} ({words(float(values[i]))})"

    of = "" if index == first else f"; explained: {in_words(index)}"
    classes = {
        name: {"class": i, "name": loaded.class_name(i), what: float(values[i])}
        for name, i in (("predicted", first), ("explained", index))
    }
    best = [*values.argsort(descending=True, stable=True)[:_CLASSES].tolist(), index] if what == "probability" else []
    chances = [(loaded.class_name(i), float(values[i])) for i in dict.fromkeys(best)]
    return f"predicted {in_words(first)}", of, classes, chances


def _completed(method: str, given: dict[str, Any], loaded: Loaded, data: Tensor) -> tuple[dict[str, Any], str]:
    """Options of a method with those that the command chooses, and what is said of them."""
    from crp.attributors.explaining import find_method
    from crp.attributors.flow import through_concepts
    from crp.visualization.mining.axes import concepts_of_channels

    if find_method(method).options.get("layer") is ... and "layer" not in given:
        raise CommandError(f"method {method!r} needs layer={_suggestion(loaded, data)}")
    if "condition" in given and "mask_map" not in given:  # (of the first picture, for all of them)
        condition = given["condition"]
        given |= through_concepts(concepts_of_channels(loaded.model, data, condition), condition)
    if method != "occlusion" or {"window_shape", "step"} & given.keys():
        return given, ""
    window, step = _windows(*data.shape[-2:])
    return given | {"window_shape": window, "step": step}, f", windows of {window[0]} x {window[1]} pixels"


def _windows(*sides: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of occlusion's windows, and their distance: about an eighth of a side, half of it apart.

    A window for each feature, the method's own default, takes minutes at the usual sizes. Windows end at the edge.
    """
    found = []
    for side in sides:
        lengths = ((length, step) for length in range(max(1, side // 8), side + 1) for step in range(length, 0, -1))
        fits = (pair for pair in lengths if 2 * pair[1] >= pair[0] and (side - pair[0]) % pair[1] == 0)
        found.append(min(fits, key=lambda pair: (pair[0] > max(1, side // 4), abs(pair[1] - pair[0] / 2), pair[0])))
    window, step = zip(*found, strict=True)
    return window, step


def _suggestion(loaded: Loaded, data: Tensor) -> str:
    """Layer that a class activation map is usually made of, as the end of a message."""
    from crp.visualization.mining.selection import list_layers

    suggested = [one.name for one in list_layers(loaded.model, data) if one.suggested]
    return f", such as --layer {suggested[-1]}" if suggested else ""


def _check_writable(folder: Path, out: Path) -> None:
    """Make the folder of what goes to ``--out``, and see whether files can be written there."""
    from crp.visualization.table.files import make_folder

    try:
        make_folder(folder)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"--out {out} cannot be written: {error.strerror or error}") from error


def _options(options: dict[str, Any]) -> str:
    """Options as one line, those that must be given first."""
    words = [f"{name} (required)" for name, default in options.items() if default is ...]
    for name, default in options.items():
        if default is not ...:
            word = getattr(default, "__qualname__", None)
            words.append(f"{name}={word or (default if isinstance(default, str) else repr(default))}")
    return ", ".join(words)
