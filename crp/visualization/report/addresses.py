"""Where pages and files of a report are: names that are safe on every disk, whatever layers and classes are called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

#: Folder of the heatmaps.
HEATMAPS = "maps"
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")
#: Names that Windows keeps for devices, also before a dot; and those of an atlas: folders of heatmaps, parts of pages.
_TAKEN = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)|(classes|samples|texts|.*-part\d+)$", re.IGNORECASE)
#: Longest name of a folder; hostile names may have any length.
_LONGEST = 60


def slug(name: str) -> str:
    """Name of a file or folder for any text; texts that are not safe themselves get a hash, so that none coincide.

    >>> slug("layer4.2.relu")
    'layer4.2.relu'
    """
    safe = _UNSAFE.sub("-", name).strip(".-")[:_LONGEST]
    if _TAKEN.match(safe):
        safe = f"x-{safe}"
    if safe == name and safe.lower() == name and safe:
        return safe
    return f"{safe or 'x'}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


class Addresses:
    """Addresses of pages and files, relative to the folder."""

    def __init__(self, layers: Iterable[str]) -> None:
        self._layers = {layer: slug(layer) for layer in layers}

    def layer(self, layer: str, part: int = 0) -> str:
        """Page of a layer; a wide one has several parts."""
        return f"layer/{self._layers[layer]}{f'-part{part + 1}' if part else ''}.html"

    def concept(self, layer: str, concept: int) -> str:
        """Page of a concept."""
        return f"concept/{self._layers[layer]}/{concept}.html"

    def concept_maps(self, layer: str, concept: int) -> str:
        """Heatmaps of a concept's references, side by side."""
        return f"{HEATMAPS}/{self._layers[layer]}/{concept}.png"

    def kept(self, kind: str, layer: str, of_class: int | None = None, part: int = 0) -> str:
        """Page of a result that is kept beside the table; a long one has several parts."""
        name = self._layers[layer] + ("" if of_class is None else f"/{of_class}")
        return f"{kind}/{name}{f'-part{part + 1}' if part else ''}.html"

    @staticmethod
    def label(target: int) -> str:
        """Page of a class."""
        return f"class/{target}.html"

    @staticmethod
    def label_maps(target: int) -> str:
        """Mean heatmap of a class."""
        return f"{HEATMAPS}/classes/{target}.png"

    @staticmethod
    def sample(sample: int, target: int | None = None) -> str:
        """Page of a sample; that of a class, where it is explained for several."""
        return f"sample/{sample}{'' if target is None else f'.{target}'}.html"

    @staticmethod
    def sample_maps(sample: int, target: int) -> str:
        """Heatmaps of a sample: the whole one, then those of its concepts."""
        return f"{HEATMAPS}/samples/{sample}.{target}.png"

    @staticmethod
    def text_maps(sample: int) -> str:
        """Heatmaps of a text."""
        return f"{HEATMAPS}/texts/{sample}.json"

    @staticmethod
    def picture(content: bytes, suffix: str) -> str:
        """Picture, named after its content, so that none is stored twice."""
        return f"pictures/{hashlib.sha256(content).hexdigest()[:20]}.{suffix}"


def is_one_file(path: Path) -> bool:
    """Whether a report that is written to a path is one file, and no folder."""
    return path.suffix.lower() in (".html", ".htm")


def relative(address: str, page: str) -> str:
    """Address of a file as a page links to it; both are addresses within the folder."""
    return "../" * page.count("/") + address
