"""Texts on the command line: concepts of layers that hold tokens, and ``crp attribute --text``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crp.commands.errors import FIGURES, CommandError
from crp.commands.values import _plain, _values_of

if TYPE_CHECKING:
    from torch import Tensor

    from crp.concepts import Concept
    from crp.image.texts import TextHeatmap
    from crp.visualization.mining.texts import Texts
    from crp.visualization.models import Loaded


class Asking(NamedTuple):
    """What is asked about texts, as it is typed."""

    tokenizer: str
    position: str | None
    target: str | None
    against: str | None
    layer: str | None
    concepts: tuple[int, ...]
    scale_without_first: bool = False


def concepts_of_texts(loaded: Loaded, wanted: Sequence[str]) -> dict[str, Concept]:
    """Concepts of layers of shape (samples, tokens, features), by the words of ``--layers`` (`_read_word`).

    ``"h.*.mlp.act"`` has a concept for each feature, ``"h.*.attn.c_proj.input:heads=12"`` one for each head.
    """
    from crp.commands.concepts import _read_word
    from crp.commands.loading import _find_layers
    from crp.concepts import AxisConcept

    found: dict[str, Concept] = {}
    for word in wanted:
        pattern, concept = _read_word(word, any_axis=False)
        for name in _find_layers(loaded, [pattern]):
            found[name] = AxisConcept(-1) if concept is None else concept
    return found


def explain_texts(
    texts: Sequence[str],
    loaded: Loaded,
    method: str,
    asking: Asking,
    given: dict[str, Any],
    out: Path,
    as_json: bool,
) -> Iterator[str]:
    """Explain texts, and write them with the relevance of their tokens: as a page (.html), or as a figure.

    Yields
    ------
    str
        What to tell of each text.
    """
    from crp.attributors.explaining import find_method
    from crp.commands.panel import _write_figure
    from crp.image.texts import plot_texts, text_page
    from crp.visualization.mining.texts import Texts
    from crp.visualization.sources import load_tokenizer
    from crp.visualization.table.files import write_atomic

    suffix = out.suffix.lower()
    if suffix not in (".html", *FIGURES):
        raise CommandError(f"--out {out} must end in .html, .png, .jpg, .pdf or .svg")
    if not asking.tokenizer:
        raise CommandError("--text needs the model's --tokenizer: a folder or name, or package.module:factory")
    loaded.check_main_input()
    chosen = find_method(method)
    through = _set_layer(loaded, asking, given, chosen.family)
    dataset = Texts(list(texts), load_tokenizer(asking.tokenizer))
    found = [_explain(dataset, number, loaded, chosen.name, asking, given) for number in range(len(texts))]
    through += ", in colours of the tokens behind the first" if asking.scale_without_first else ""
    captions = [f"{facts['said']} ({chosen.name}{through})" for _, facts in found]
    shown = [text.scaled_without() if asking.scale_without_first else text for text, _ in found]
    if suffix == ".html":
        page = text_page(list(zip(captions, shown, strict=True)), "Texts explained")
        write_atomic(out, page.encode())
    else:
        _write_figure(plot_texts(shown, captions), out, dpi=150)
    for text, (_, facts) in zip(texts, found, strict=True):
        if as_json:
            facts["said"] = _plain(facts["said"])
            yield json.dumps({"text": text, "method": chosen.name, **facts, "out": str(out)})
        else:
            yield f"{_plain(text)}: {_plain(facts['said'])}"
    if not as_json:
        yield f"wrote {out}"


def _set_layer(loaded: Loaded, asking: Asking, given: dict[str, Any], family: str) -> str:
    """Options of a method that say which layer and concepts are meant; and their words."""
    from crp.attributors.flow import through_concepts

    if asking.layer is None:
        return ""
    concepts = concepts_of_texts(loaded, [asking.layer])
    if len(concepts) != 1:
        raise CommandError(f"--layer {asking.layer} names {len(concepts)} layers; name one")
    (name,) = concepts
    if not asking.concepts and ":" in asking.layer:
        raise CommandError(f"--layer {asking.layer} names concepts, of which none is explained; give --concept, too")
    if asking.concepts:
        given |= through_concepts(concepts, {name: list(asking.concepts)})
    if not asking.concepts or family == "cam":
        given["layer"] = name
    return f", through {list(asking.concepts)} of {asking.layer}" if asking.concepts else f", of {asking.layer}"


def _explain(
    texts: Texts, number: int, loaded: Loaded, method: str, asking: Asking, given: dict[str, Any]
) -> tuple[TextHeatmap, dict[str, Any]]:
    """A text with the relevance of its tokens, and what the model says of it."""
    import torch

    from crp.attributors.explaining import explain
    from crp.image.texts import TextHeatmap
    from crp.visualization.mining.text_batches import Asked
    from crp.visualization.models import select_scores

    asked = Asked.of(texts[number][0][None], texts)
    with torch.no_grad():
        output = select_scores(asked.run(loaded.model), loaded.output)
    words = texts.words(number)
    n = len(words.words)
    place = None if output.dim() == 2 else _place(asking.position or "-1", n)
    if place is None and (asking.against is not None or asking.position is not None):
        raise CommandError("--position and --against are for language models; this one gives a score for each class")
    scores = output[0] if place is None else output[0, place]
    target, named, facts = _aim(scores, place, texts, loaded, asking)
    heatmap: Tensor = explain(method, loaded.model, asked.data, target, output=loaded.output, **given)
    if heatmap.dim() > 2:  # (a layer that is explained itself has features)
        heatmap = heatmap.flatten(2).sum(2)
    if heatmap.shape != (1, n):
        raise CommandError(f"layer {asking.layer!r} has no tokens to draw; its relevance is {tuple(heatmap.shape)}")
    shown = TextHeatmap(words.words, heatmap[0].double().numpy(), words.special, place)
    tokens = [[word, float(value)] for word, value in zip(words.words, heatmap[0].tolist(), strict=True)]
    return shown, {"said": named, **facts, "tokens": tokens}


def _aim(
    scores: Tensor, place: int | None, texts: Texts, loaded: Loaded, asking: Asking
) -> tuple[Any, str, dict[str, Any]]:
    """Target, what is said of it, and the same as data."""
    from crp.engine.targets import Position
    from crp.visualization.models import find_class

    first = int(scores.argmax())
    values, what, words = _values_of(scores, loaded.exclusive)

    def name(index: int) -> str:
        return loaded.class_name(index) if place is None else repr(texts.word(index))

    loaded.check_names(len(scores))
    if place is None:
        chosen = first if asking.target is None else find_class(asking.target, loaded.classes, "--target")
        if not -len(scores) <= chosen < len(scores):
            raise CommandError(f"--target {asking.target}: the model has the classes 0 to {len(scores) - 1}")
        chosen %= len(scores)
    else:
        chosen = first if asking.target is None else _token(asking.target, texts, len(scores), "target")
    said = f"predicted {name(first)} ({words(float(values[first]))})"
    said += "" if chosen == first else f"; explained: {name(chosen)} ({words(float(values[chosen]))})"
    facts: dict[str, Any] = {
        word: {
            "token" if place is not None else "class": index,
            "name": name(index),
            what: float(values[index]),
        }
        for word, index in (("predicted", first), ("explained", chosen))
    }
    if place is None:
        return chosen, said, facts
    facts["position"] = place
    if asking.against is None:
        return Position(place, chosen), said, facts
    other = _token(asking.against, texts, len(scores), "against")
    return Position(place, chosen, against=other), f"{said}, against {name(other)}", facts | {"against": other}


def _place(word: str, n: int) -> int:
    from crp.visualization.sources import read_position

    place = read_position(word)
    if not isinstance(place, int) or not -n <= place < n:
        raise CommandError(f"--position {word} must be a token of the text, which has {n}, such as -1")
    return place % n


def _token(word: str, texts: Texts, n: int, option: str) -> int:
    """Id of a token: by its number, or the only one that the tokenizer makes of a text."""
    if re.fullmatch(r"#\d{1,9}", word):
        if int(word[1:]) >= n:
            raise CommandError(f"--{option} {word}: the model has the tokens #0 to #{n - 1}")
        return int(word[1:])
    try:
        made = texts.tokenizer(word, add_special_tokens=False)
    except TypeError:
        made = texts.tokenizer(word)
    special = set(getattr(texts.tokenizer, "all_special_ids", ()))
    ids = [int(token) for token in (made["input_ids"] if hasattr(made, "keys") else made) if token not in special]
    if len(ids) != 1:
        parts = ", ".join(f"#{token} {texts.word(token)!r}" for token in ids[:8])
        raise CommandError(
            f"--{option} {word!r} is {len(ids)} tokens ({parts}); name one, maybe with a space before it"
        )
    return ids[0]
