"""What a report shows, and what can be said in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from crp.checks import check_number
from crp.errors import InputError, InputTypeError
from crp.flags import check_flags
from crp.image.colours import as_picture
from crp.image.forms import draw_heatmap
from crp.image.pixels import to_png_bytes

#: (class, layer, concept): a concept and the class for which it is looked at.
Place = tuple[int, str, int]


class Tile(NamedTuple):
    """A sample beside its heatmap: the content of both as PNG files, what is written below, and in the tip."""

    sample: bytes
    heatmap: bytes
    caption: str
    tip: str


class Finding(NamedTuple):
    """Something to be said at the top of the report.

    Attributes
    ----------
    title : str
    text : sequence of str
        Paragraphs.
    figures : sequence of (str, str)
        Numbers to be shown large, each with what it is.
    tiles : sequence of (str, sequence of Tile)
        Groups of pictures with their headings; see `make_tile`.
    concept : (int, str, int), optional
        Class, layer and concept that it is about; it links to the concept's page.
    """

    title: str
    text: Sequence[str] = ()
    figures: Sequence[tuple[str, str]] = ()
    tiles: Sequence[tuple[str, Sequence[Tile]]] = ()
    concept: Place | None = None


class ReportKeywords(TypedDict, total=False):
    """Options of a report; `ReportOptions` says what they mean."""

    class_names: Sequence[str] | Mapping[int, str] | None
    concept_names: Mapping[tuple[str, int], str]
    classes: Sequence[int] | None
    layers: Sequence[str] | None
    n_concepts: int
    n_references: int
    n_active: int | None
    n_negative: int | None
    n_mean: int
    n_sample_concepts: int
    n_maximized: int
    steps: int
    seed: int
    findings: Sequence[Finding]
    title: str
    lead: str
    picture_size: int
    map_size: int
    batch_size: int
    verbose: bool
    part: tuple[int, int] | None


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    Attributes
    ----------
    class_names : sequence of str, or mapping of class to str, optional
        A sequence has the name of every output; a mapping names at least those that were mined. By default, those of
        the table's recipe, or numbers.
    concept_names : mapping of (layer, concept) to str
        What concepts are called, beside their layer and number.
    classes : sequence of int, optional
        Classes that have a page; all by default.
    layers : sequence of str, optional
        Layers to show; all that were mined by default.
    n_concepts : int
        How many concepts of each layer the page of a class shows with pictures, at most.
    n_references, n_active : int
        How many samples in which a concept is most relevant, and most active, are shown; of the latter as many as of
        the former by default.
    n_negative : int, optional
        How many samples in which a concept's relevance is most negative are shown beside them, where it is negative at
        all; half as many as ``n_references`` by default.
    n_mean : int
        How many pictures of a class its mean heatmap is taken of, at most; 0 for none.
    n_sample_concepts : int
        How many concepts of each layer the page of a sample shows, those of the highest layer with their heatmaps.
    n_maximized : int
        For how many concepts of each layer, those with the largest shares of relevance in an average row, a picture is
        made up in which they are as active as can be, where none is kept that was made in the same way. Not of texts.
    steps, seed : int
        Of the making up of such a picture.
    findings : sequence of Finding
        What is said at the top.
    title, lead : str
        Headline, and a paragraph below it.
    picture_size, map_size : int
        Number of pixels on the longer side of a sample's picture, and of a heatmap, at most.
    batch_size : int
        Samples per attribution.
    verbose : bool
        Show the progress.
    part : (int, int), optional
        Of ``(i, n)``, only draw part i of n of what is missing, counted from 0, and write no page. Several processes
        draw into one folder, at the same time if need be; a report without it then finds everything drawn.
    """

    class_names: Sequence[str] | Mapping[int, str] | None = None
    concept_names: Mapping[tuple[str, int], str] = field(default_factory=dict)
    classes: Sequence[int] | None = None
    layers: Sequence[str] | None = None
    n_concepts: int = 8
    n_references: int = 8
    n_active: int | None = None
    n_negative: int | None = None
    n_mean: int = 16
    n_sample_concepts: int = 4
    n_maximized: int = 0
    steps: int = 500
    seed: int = 0
    findings: Sequence[Finding] = ()
    title: str = "What the model looks at"
    lead: str = ""
    picture_size: int = 224
    map_size: int = 64
    batch_size: int = 32
    verbose: bool = True
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_flags(verbose=self.verbose)
        for name in ("n_concepts", "n_references", "picture_size", "map_size", "batch_size", "steps"):
            check_number(name, getattr(self, name), 1, whole=True)
        for name in ("n_active", "n_negative", "n_mean", "n_sample_concepts", "n_maximized", "seed"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, whole=True)
        for name in ("layers", "classes", "findings"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str) or not isinstance(value, Collection)):
                raise InputTypeError(f"{name} must be a list, not {value!r}")
        if wrong := [one for one in self.findings if not isinstance(one, Finding)]:
            raise InputTypeError(f"findings must be of Finding, not {wrong[0]!r}")
        if not isinstance(self.concept_names, Mapping) or not all(map(_is_place, self.concept_names)):
            raise InputTypeError(f"concept_names must map (layer, concept) to a name, not {self.concept_names!r:.80}")
        part: Any = self.part
        is_pair = isinstance(part, tuple | list) and len(part) == 2 and all(type(n) is int for n in part)
        if part is not None and not (is_pair and 0 <= part[0] < part[1]):
            raise InputError(f"part must be (i, n) with i from 0 to n - 1, not {part!r}")

    @property
    def counts(self) -> dict[str, int]:
        """Number of references of a concept, by what they are ranked."""
        return {
            "relevance": self.n_references,
            "activation": self.n_references if self.n_active is None else self.n_active,
            "negative": (self.n_references + 1) // 2 if self.n_negative is None else self.n_negative,
        }


def _is_place(key: object) -> bool:
    """Whether it is a layer and a concept."""
    return isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str)


def make_tile(sample: Tensor, heatmap: Tensor, caption: str, tip: str = "", *, size: int = 96) -> Tile:
    """Sample beside its heatmap, for example for a `Finding`.

    Parameters
    ----------
    sample : Tensor of shape (channels, height, width)
    heatmap : Tensor of shape (height, width)
    caption, tip : str
        What is written below the pictures, and what is shown when the pointer is on them.
    size : int
        Number of pixels on a picture's longer side, at most.

    Raises
    ------
    ValueError
        If the sample is no image, the heatmap has another size, or the size of pictures is no positive number.
    """
    check_number("size", size, 1, whole=True)
    check_image(sample, heatmap)
    content = []
    for values in (as_picture(sample), np.asarray(draw_heatmap(heatmap), np.float64) / 255):
        side = max(values.shape[:2])
        data = torch.from_numpy(values).permute(2, 0, 1)[None]
        if side > size:
            to = [max(1, round(length * size / side)) for length in values.shape[:2]]
            data = torch.nn.functional.interpolate(data, to, mode="bilinear", antialias=True).clamp(0, 1)
        content.append(to_png_bytes((data[0] * 255).round().to(torch.uint8)))
    return Tile(content[0], content[1], caption, tip)


def check_image(sample: Tensor, heatmap: Tensor) -> None:
    """Raise a `ValueError` unless a sample is an image whose heatmap has its size."""
    if sample.dim() != 3 or heatmap.shape != sample.shape[1:]:
        raise InputError(
            "a report shows images of shape (channels, height, width) with heatmaps of shape (height, width), got "
            f"{tuple(sample.shape)} and {tuple(heatmap.shape)}; resize images in the dataset, not in preprocess_fn"
        )
